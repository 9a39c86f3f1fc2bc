"""``CachedCall``: an operator and its packed arguments, run only if every guard holds.

In Python the check of a module's guards takes as long as the arithmetic of a small module.
Therefore the compiled library has the same class in C (``csrc/python/cached_call.cpp``);
``make_cached_call`` makes an instance of it if the library is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from .watch import Watch

# A function and its arguments; the guard holds if the function returns False.
Guard = tuple[Callable[..., bool], tuple]


class CachedCall:
    """``operator(x, *arguments)``, if x fits and every guard holds.

    Args:
        watch: over the objects that the arguments were packed from. The compiled class takes the
            compiled ``Watch`` only.
        guards: modes of PyTorch that must be off, such as ``(torch.is_grad_enabled, ())``.
        tensor_type: the exact type of x; subclasses do not fit.
        dtype, device: of x.
        channels_last: ``torch.channels_last``; x must be dense in this memory format or contiguous.
        channels: C; x is [N, C, H, W] and not empty.
        operator: called with x and the arguments.
        arguments: at most 31.

    Raises:
        TypeError, ValueError: by the compiled class, for arguments of another type.
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
    )

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
        """The operator's result; None (a cache miss) if x does not fit or a guard fails.

        Args:
            x: [N, C, H, W].
            own: the ``__dict__`` of the called module, for the watch.
        """
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


def make_cached_call(**arguments: Any) -> CachedCall:
    """A ``CachedCall``, of the compiled class if the native library is loaded."""
    kind: type[CachedCall] = native.library().CachedCall if native.load() else CachedCall
    return kind(**arguments)
