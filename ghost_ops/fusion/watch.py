"""Tells whether what a module's packed weights were made from has changed since.

Everything about a module can be changed between two calls, so all of it is compared before every
call. The compiled library has the same class in C, ten times faster; ``make`` takes it where it is.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

from torch import Tensor

from ..backends import native

_version = operator.attrgetter("_version")
_address = Tensor.data_ptr
MISSING = object()  # the value of what is not there


class Watch(Protocol):
    """What ``make`` returns."""

    def unchanged(self, own: dict | None = None, /) -> bool:
        """Whether everything watched is as it was at construction.

        own: the dictionary for the items without one.
        """
        ...


class PythonWatch:
    """The contents of dictionaries, some of their items, and the state of tensors.

    Args:
        dicts: dictionaries whose keys must stay equal and whose values the same objects, in the
            same order.
        items: pairs (dictionary, key) whose value must stay the same object, or an equal one of the
            same type. None in the place of the dictionary: that which ``unchanged`` is given.
        absent: pairs (dictionary, key) of keys that must stay absent; None as of items.
        tensors: tensors that must keep their version, which PyTorch raises at in-place changes, and
            their address. Their memory must be kept alive elsewhere, so that nothing else comes to
            that address.
        attributes: pairs (object, name) whose value must stay so as well, or stay missing.
        own: the dictionary of the items without one, as it is now; not kept.

    Raises:
        KeyError: an item is absent, or a key of ``absent`` is there.
    """

    __slots__ = (
        "_absent", "_addresses", "_attributes", "_dicts", "_items", "_tensors", "_versions",
    )  # fmt: skip

    def __init__(
        self,
        dicts: tuple[dict, ...],
        items: tuple[tuple[dict | None, str], ...],
        absent: tuple[tuple[dict | None, str], ...],
        tensors: tuple[Tensor, ...],
        attributes: tuple[tuple[Any, str], ...],
        own: dict | None,
    ) -> None:
        for mapping, key in absent:
            if key in _or_own(mapping, own):
                raise KeyError(key)
        self._dicts = tuple((d, tuple(d), tuple(d.values())) for d in dicts)
        self._items = tuple((d, key, _or_own(d, own)[key]) for d, key in items)
        self._absent = absent
        self._tensors = tensors
        self._versions = tuple(map(_version, tensors))
        self._addresses = tuple(map(_address, tensors))
        self._attributes = tuple((o, name, _attribute(o, name)) for o, name in attributes)

    def unchanged(self, own: dict | None = None, /) -> bool:
        try:
            return self._all_hold(own)
        except Exception:  # what cannot be read or compared any more has changed
            return False

    def _all_hold(self, own: dict | None) -> bool:
        for mapping, key, value in self._items:
            if not same_value(_or_own(mapping, own).get(key, MISSING), value):
                return False
        for mapping, key in self._absent:
            if key in _or_own(mapping, own):
                return False
        for values, keys, expected in self._dicts:
            if tuple(values) != keys or not all(map(operator.is_, values.values(), expected)):
                return False
        for thing, name, value in self._attributes:
            if not same_value(_attribute(thing, name), value):
                return False
        return (
            tuple(map(_version, self._tensors)) == self._versions
            and tuple(map(_address, self._tensors)) == self._addresses
        )


def _attribute(thing: Any, name: str) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"Watch: names of attributes must be strings, got {name!r}")
    try:
        return getattr(thing, name)
    except Exception:
        return MISSING


def _or_own(values: dict | None, own: dict | None) -> dict:
    found = own if values is None else values
    if not isinstance(found, dict):
        raise TypeError(f"Watch: no dictionary for items without one, got {type(own).__name__}")
    return found


def same_value(a: Any, b: Any) -> bool:
    """Whether two values are the same object, or equal ones of one type, in tuples too."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b)


def make(
    dicts: tuple[dict, ...] = (),
    items: tuple[tuple[dict | None, str], ...] = (),
    absent: tuple[tuple[dict | None, str], ...] = (),
    tensors: tuple[Tensor, ...] = (),
    attributes: tuple[tuple[Any, str], ...] = (),
    own: dict | None = None,
) -> Watch:
    """A ``PythonWatch``, or the compiled library's equal of it."""
    kind: Any = native.library().Watch if native.load() else PythonWatch
    return kind(dicts, items, absent, tensors, attributes, own)
