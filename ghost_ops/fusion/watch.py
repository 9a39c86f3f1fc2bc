"""``Watch``: detects changes of Python objects and tensors since the watch was made.

Any part of a module can change between two calls. Therefore all sources of the packed weights are
compared before every call. The compiled library has the same class in C, about ten times faster
(``csrc/python/watch.cpp``); ``make_watch`` makes an instance of it if the library is loaded.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from ..backends import native

_version = operator.attrgetter("_version")
_address = Tensor.data_ptr
MISSING = object()  # the value of an absent key or attribute


class Watch:
    """Remembers dictionaries, dictionary items, attributes and tensors, and compares them later.

    The dictionary of an item may be ``None``: the item is then looked up in ``own``, an argument of
    the constructor and of each ``unchanged``. In this way a watch over a module's ``__dict__``
    holds no reference to the module.

    Args:
        dicts: dictionaries that must keep the same keys in the same order, and the same objects as
            values.
        items: pairs (dictionary or None, key); the value must stay the same object, or become an
            equal object of the same type.
        absent: pairs (dictionary or None, key); the key must stay absent.
        tensors: tensors that must keep their address and their version counter, which PyTorch
            increments at each in-place change. The caller must keep their memory alive, so that no
            other tensor gets the same address.
        attributes: pairs (object, name); the value is compared as that of an item, and a missing
            attribute must stay missing.
        own: the dictionary of items whose dictionary is None; the watch does not keep it.

    Raises:
        KeyError: an item is absent, or a key of ``absent`` is present.
    """

    __slots__ = (
        "_absent",
        "_addresses",
        "_attributes",
        "_dicts",
        "_items",
        "_tensors",
        "_versions",
    )

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
        """Whether nothing has changed since construction.

        Args:
            own: the dictionary of items whose dictionary is None.
        """
        try:
            return self._all_hold(own)
        except Exception:  # a value that cannot be read or compared counts as changed
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
    """Whether two values are the same object, or equal and of one type; tuples item by item."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b)


def make_watch(
    dicts: tuple[dict, ...] = (),
    items: tuple[tuple[dict | None, str], ...] = (),
    absent: tuple[tuple[dict | None, str], ...] = (),
    tensors: tuple[Tensor, ...] = (),
    attributes: tuple[tuple[Any, str], ...] = (),
    own: dict | None = None,
) -> Watch:
    """A ``Watch``, of the compiled class if the native library is loaded."""
    kind: type[Watch] = native.library().Watch if native.load() else Watch
    return kind(dicts, items, absent, tensors, attributes, own)
