"""Conditions that decide the path of a call: backend, kind of primary convolution, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..announce import warn_once
from ..formula import Norms, Settings, Slopes
from ..ops import eager
from ..ops.ghost import native, triton

LARGEST_DW_SIZE = 7


def ops_named(backend: str) -> Any:
    """The functions ``ghost_*`` of a backend: operators, or for eager the Python functions."""
    if backend == "triton":
        return triton
    return native if backend == "native" else eager


def direct(function: Any) -> Any:
    """The builtin function of an operator overload, which is faster to call; else ``function``."""
    return getattr(function, "_op", function)


def backend_for(x: Tensor, dw_size: int) -> str:
    """The backend that computes on x with a depthwise kernel of this size.

    Raises:
        RuntimeError: a fused backend was requested explicitly and has no such kernel.
    """
    backend = backends.select(x.device.type, x.dtype)
    if backend != "eager" and dw_size > LARGEST_DW_SIZE:
        return _without_kernel(dw_size)
    return backend


def _without_kernel(dw_size: int) -> str:
    reason = f"there is no fused kernel for dw_size={dw_size}, only up to {LARGEST_DW_SIZE}"
    if (requested := backends.requested()) != "auto":
        raise RuntimeError(f"backend {requested!r} was requested and cannot run: {reason}")
    announce_eager(reason)
    return "eager"


def announce_eager(reason: str) -> None:
    """Warn once that PyTorch's operators run, with the reason; not while a graph is compiled."""
    if not torch.compiler.is_compiling():
        warn_once(f"ghost_ops runs plain PyTorch operators, slower: {reason}", stacklevel=3)


def ops_for(x: Tensor, w2: Tensor) -> Any:
    """The functions ``ghost_*`` that compute on x with cheap weight w2."""
    return ops_named(backend_for(x, w2.size(-1)))


def needs_grad(x: Tensor, w1: Tensor | None, w2: Tensor, norms: Norms, slopes: Slopes) -> bool:
    """Whether autograd records this call."""
    if not torch.is_grad_enabled():
        return False
    n = norms
    inputs = (x, w1, w2, n.gamma1, n.beta1, n.gamma2, n.beta2, *slopes)
    return any(t is not None and t.requires_grad for t in inputs)


def is_fused_primary(w1: Tensor, settings: Settings) -> bool:
    """Whether the primary convolution is part of the fused operators."""
    return is_fused_geometry(settings) and w1.size(2) == 1 and w1.size(3) == 1


def is_fused_geometry(settings: Settings) -> bool:
    """``is_fused_primary`` of a convolution that is known to have a 1x1 kernel."""
    s = settings
    return s.groups == 1 and s.padding == (0, 0) and s.stride[0] == s.stride[1]


def keeps_u(x: Tensor, w1: Tensor, settings: Settings) -> bool:
    """Whether training saves u for backward: it has at most a quarter of the elements of x.

    ``keep_primary`` in csrc/core/plan.cpp is the same rule for a 1x1 convolution.
    """
    s, m = settings, w1.size(0)
    n, _, h, w = x.shape
    ho = (h + 2 * s.padding[0] - s.dilation[0] * (w1.size(2) - 1) - 1) // s.stride[0] + 1
    wo = (w + 2 * s.padding[1] - s.dilation[1] * (w1.size(3) - 1) - 1) // s.stride[1] + 1
    return n * m * ho * wo * 4 <= x.numel()
