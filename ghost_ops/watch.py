"""Has anything changed that a module's packed weights, or what is known of it, were made from?

Everything about a module can be changed between two calls, so it is looked at before every call.
The compiled library has the same class in C, ten times faster; ``make`` takes that where it is.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

from torch import Tensor

from .backends import native

_version = operator.attrgetter("_version")
_address = Tensor.data_ptr


class Watch(Protocol):
    """What ``make`` returns."""

    def unchanged(self) -> bool:
        """Whether everything watched is as it was at construction."""
        ...


class PythonWatch:
    """The contents of dictionaries, some of their items, and the state of tensors.

    Args:
        dicts: dictionaries whose values must stay the same objects, in the same order.
        items: pairs (dictionary, key) whose value must stay the same object, or an equal one.
        absent: pairs (dictionary, key) of keys that must stay absent.
        tensors: tensors that must keep their version, which PyTorch raises at in-place changes, and
            their address. Their memory must be kept alive elsewhere, so that nothing else comes to
            that address.

    Raises:
        KeyError: an item is absent, or a key of ``absent`` is there.
    """

    __slots__ = ("_absent", "_addresses", "_dicts", "_items", "_tensors", "_versions")

    def __init__(
        self,
        dicts: tuple[dict, ...],
        items: tuple[tuple[dict, str], ...],
        absent: tuple[tuple[dict, str], ...],
        tensors: tuple[Tensor, ...],
    ) -> None:
        for mapping, key in absent:
            if key in mapping:
                raise KeyError(key)
        self._dicts = tuple((mapping, tuple(mapping.values())) for mapping in dicts)
        self._items = tuple((mapping, key, mapping[key]) for mapping, key in items)
        self._absent = absent
        self._tensors = tensors
        self._versions = tuple(map(_version, tensors))
        self._addresses = tuple(map(_address, tensors))

    def unchanged(self) -> bool:
        for mapping, values in self._dicts:
            if len(mapping) != len(values) or not all(map(operator.is_, mapping.values(), values)):
                return False
        for mapping, key, value in self._items:
            if key not in mapping or mapping[key] != value:
                return False
        for mapping, key in self._absent:
            if key in mapping:
                return False
        return (
            tuple(map(_version, self._tensors)) == self._versions
            and tuple(map(_address, self._tensors)) == self._addresses
        )


def make(
    dicts: tuple[dict, ...] = (),
    items: tuple[tuple[dict, str], ...] = (),
    absent: tuple[tuple[dict, str], ...] = (),
    tensors: tuple[Tensor, ...] = (),
) -> Watch:
    """A ``PythonWatch``, or the compiled library's equal of it."""
    kind: Any = native.library().Watch if native.load() else PythonWatch
    return kind(dicts, items, absent, tensors)
