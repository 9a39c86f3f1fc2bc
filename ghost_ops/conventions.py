"""Dtypes, memory formats, counts and masks shared by the operators, backends and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


class NEEDS:
    """Bits of the mask ``needs`` of ``ghost_backward``: the gradients to compute."""

    DX = 1
    DW1 = 2
    NORM1 = 4  # dgamma1 and dbeta1
    PRELU1 = 8
    DW2 = 16
    NORM2 = 32
    PRELU2 = 64
    ALL = 127


def ghosts_per_map(ratio: int) -> int:
    """The number of ghost maps that are made from one intrinsic map."""
    return ratio - 1


def intrinsic_count(w1: Tensor | None, *per_channel: Tensor | None) -> int:
    """m, from the primary weight or from the first tensor [m] of batch norm 1 that is given."""
    for t in (w1, *per_channel):
        if t is not None:
            return t.size(0)
    raise RuntimeError("ghost_pack: without w1, gamma1, beta1, mean1 or var1 must be given")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results for input x: channels_last if x is channels_last and not NCHW.

    A tensor can be both, for example with one channel. Then, as in PyTorch, the format is
    channels_last only if x has one channel, several pixels and a channel stride of 1.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    one_map = x.size(1) == 1 and x.size(2) * x.size(3) > 1
    if x.is_contiguous() and not (one_map and x.stride(1) == 1):
        return torch.contiguous_format
    return torch.channels_last


def in_format(t: Tensor, fmt: torch.memory_format) -> Tensor:
    """t in a memory format; t itself if it already has that format.

    ``contiguous`` alone is not enough: dynamo of PyTorch 2.11 drops the gradient of a result if the
    last operation returns its own input.
    """
    return t if t.is_contiguous(memory_format=fmt) else t.contiguous(memory_format=fmt)


def dense(x: Tensor) -> Tensor:
    """x if x is dense in NCHW or channels_last; else a dense copy.

    The copy has the format that is nearest to the strides of x. PyTorch's convolutions treat sliced
    and expanded inputs in the same way.
    """
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=_nearest_format(x))


def _nearest_format(x: Tensor) -> torch.memory_format:
    least = 0
    for dim in (1, 3, 2, 0):
        stride = x.stride(dim)
        if x.size(dim) == 0 or stride < least or (dim == 0 and stride == x.stride(1)):
            return torch.contiguous_format
        if dim == 1 and stride == 0:
            return torch.contiguous_format
        least = stride * max(x.size(dim), 1)
    return torch.channels_last


def contiguous(t: Tensor | None) -> Tensor | None:
    """t if t is None or contiguous; else a contiguous copy."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def out_size(size: int, stride: int) -> int:
    """Height or width of the output of a convolution with an odd kernel k and padding k // 2."""
    return (size - 1) // stride + 1


def empty_map(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    """An uninitialised [N, channels, Ho, Wo] in the dtype and memory format of x [N, C, H, W]."""
    n, _, h, w = x.shape
    shape = (n, channels, out_size(h, stride), out_size(w, stride))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
