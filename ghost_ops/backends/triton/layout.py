"""The packed parameters of the Triton backend: one float32 tensor, as the schema requires.

Parts, each padded to a multiple of 16 bytes: scale1 [m], shift1 [m], scale2 [g], shift2 [g] and
w2 [g, d, d] in float32, and the bits of w1 [m, C] in its own dtype, for tensor cores. Batch norm is
not folded into w1, because a second rounding to half precision would lose digits. The slopes of
PReLUs, [m] and [g], come last and are not padded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """The parts of a packed tensor, as views of it; None: no primary convolution, no PReLU."""

    scale1: Tensor
    shift1: Tensor
    scale2: Tensor
    shift2: Tensor
    w2: Tensor
    w1: Tensor | None
    prelu1: Tensor | None
    prelu2: Tensor | None


def offsets(
    channels: int, m: int, g: int, d: int, itemsize: int, has_primary: bool
) -> tuple[int, ...]:
    """Beginnings of the six parts, and the end of the last, in float32 elements."""
    w1 = -(-m * channels * itemsize // 4) if has_primary else 0
    found = [0]
    for size in (m, m, g, g, g * d * d, w1):
        found.append(found[-1] + -(-size // 4) * 4)
    return tuple(found)


def packed_numel(
    channels: int, m: int, g: int, d: int, dtype: torch.dtype, has_primary: bool
) -> int:
    """Number of elements of a packed tensor, without slopes."""
    return offsets(channels, m, g, d, dtype.itemsize, has_primary)[-1]


def split(
    packed: Tensor,
    channels: int,
    m: int,
    g: int,
    d: int,
    dtype: torch.dtype,
    has_primary: bool,
    has_prelu: tuple[bool, bool] = (False, False),
) -> Parts:
    """The parts of ``packed``.

    Raises:
        RuntimeError: packed is not of the size that these numbers give.
    """
    at = offsets(channels, m, g, d, dtype.itemsize, has_primary)
    slopes = [size if has else 0 for size, has in zip((m, g), has_prelu, strict=True)]
    numel = at[-1] + sum(slopes)
    if packed.numel() != numel or packed.dtype is not torch.float32:
        raise RuntimeError(
            f"packed has {packed.numel()} elements of {packed.dtype}; {channels} input channels, "
            f"{m} intrinsic and {g} ghost maps with a {d}x{d} kernel in {dtype} need {numel} of "
            "torch.float32"
        )
    pieces = [packed[at[i] : at[i + 1]] for i in range(6)]
    w1 = pieces[5].view(dtype) if has_primary else None
    both = packed[at[-1] :].split(slopes)
    prelu1, prelu2 = (t if has else None for t, has in zip(both, has_prelu, strict=True))
    return Parts(*pieces[:5], w1, prelu1, prelu2)
