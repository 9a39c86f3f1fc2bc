"""One call of an operator with kept arguments, if everything still is as when they were made.

In Python, the checks before a module in eval mode may run its operator take as long as a small
module's arithmetic. The compiled library has the same class in C; ``make`` takes it where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import native
from .watch import Watch

Guard = tuple[Callable[..., bool], tuple]


class CachedCall(Protocol):
    """What ``make`` returns."""

    def run(self, x: Tensor, own: dict) -> Tensor | None:
        """The operator's result; None where a check failed, and the general path is to be taken.

        own: the ``__dict__`` of the module that is called, for the watch.
        """
        ...


class PythonCachedCall:
    """``operator(x, *arguments)`` where nothing speaks against it.

    Args:
        watch: over what the arguments were made from; of the compiled library for its class.
        guards: pairs (function, arguments); each has to answer False, such as
            ``(torch.is_grad_enabled, ())``.
        tensor_type: the type of x, no subclass.
        dtype, device: of x.
        channels_last: ``torch.channels_last``: x is dense in this memory format or contiguous.
        channels: x is [N, channels, H, W], and not empty.
        operator: called with x and the arguments, at most 31.

    Raises:
        TypeError, ValueError: the compiled class, for arguments of another kind.
    """

    __slots__ = (
        "_arguments",
        "_channels",
        "_channels_last",
        "_device",
        "_dtype",
        "_guards",
        "_operator",
        "_tensor_type",
        "_unchanged",
    )  # fmt: skip

    def __init__(
        self,
        watch: Watch,
        guards: tuple[Guard, ...],
        tensor_type: type[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        channels_last: torch.memory_format,
        channels: int,
        operator: Callable[..., Tensor],
        arguments: tuple,
    ) -> None:
        self._unchanged = watch.unchanged
        self._guards = guards
        self._tensor_type = tensor_type
        self._dtype, self._device = dtype, device
        self._channels_last = channels_last
        self._channels = channels
        self._operator, self._arguments = operator, arguments

    def run(self, x: Tensor, own: dict) -> Tensor | None:
        if (
            type(x) is not self._tensor_type
            or not isinstance(own, dict)
            or x.dtype is not self._dtype
            or x.device != self._device
            or x.dim() != 4
            or x.size(1) != self._channels
            or not x.numel()
            or not (x.is_contiguous() or x.is_contiguous(memory_format=self._channels_last))
            or any(function(*given) for function, given in self._guards)
            or not self._unchanged(own)
        ):
            return None
        return self._operator(x, *self._arguments)


def make(**arguments: Any) -> CachedCall:
    """A ``PythonCachedCall``, or the compiled library's equal of it."""
    kind: Any = native.library().CachedCall if native.load() else PythonCachedCall
    return kind(**arguments)
