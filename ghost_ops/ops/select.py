"""Choice between the native operator and its eager implementation for a tensor."""

from __future__ import annotations

from torch import Tensor

from .. import backends


def runs_native(x: Tensor) -> bool:
    """Whether the native backend computes on x."""
    return backends.select(x.device.type, x.dtype) == "native"


def on_gpu(t: Tensor) -> bool:
    """Whether GPU kernels compute on t. They have their own packed layouts and operators."""
    return t.is_cuda
