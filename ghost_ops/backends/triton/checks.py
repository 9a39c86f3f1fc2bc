"""Checks of the operators' arguments, on which the kernels rely; they raise RuntimeError.

``functional`` checks the same conditions with better messages. The checks of this file prevent that
a direct call of an operator accesses memory outside of its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...activations import NAMES, PRELU
from . import DTYPES
from .plan import Problem

DW_SIZES = (1, 3, 5, 7)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_image(name: str, x: Tensor) -> None:
    """4-D, in a dtype of the kernels, dense in NCHW or channels_last."""
    _require(x.dim() == 4, f"{name} must be 4-D [N, C, H, W], got {x.dim()}-D")
    _require(x.dtype in DTYPES, f"{name} must be one of {DTYPES}, got {x.dtype}")
    _require(
        x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last),
        f"{name} must be dense, contiguous or channels_last; its strides are {x.stride()}",
    )


def check_problem(x: Tensor, p: Problem, prelu: bool) -> None:
    """The numbers of a problem on x; ``prelu``: whether PReLUs are allowed."""
    _require(p.dw_size in DW_SIZES, f"dw_size must be 1, 3, 5 or 7, got {p.dw_size}")
    _require(p.stride >= 1, f"stride must be positive, got {p.stride}")
    _require(p.ratio >= 1, f"ratio must be positive, got {p.ratio}")
    _require(
        p.m <= p.out_channels <= p.m * p.ratio,
        f"out_channels must lie in [{p.m}, {p.m * p.ratio}], got {p.out_channels}",
    )
    _require(
        p.has_primary or (p.c == p.m and p.stride == 1),
        f"without a primary convolution x must have {p.m} channels and stride be 1",
    )
    last = PRELU if prelu else len(NAMES) - 1
    for name, code in (("act1", p.act1), ("act2", p.act2)):
        _require(0 <= code <= last, f"{name} must be a code from 0 to {last}, got {code}")


def check_primary(w1: Tensor | None, x: Tensor, m: int, channels: int) -> None:
    """w1 [m, channels, 1, 1], if there is one."""
    if w1 is not None:
        shape = (m, channels, 1, 1)
        _require(w1.shape == shape, f"w1 must be {list(shape)}, got {list(w1.shape)}")
        _check_tensor("w1", w1, x, (x.dtype,))


def check_cheap(w2: Tensor, x: Tensor, m: int) -> tuple[int, int]:
    """(g, d) of w2 [g, 1, d, d]."""
    _require(
        w2.dim() == 4 and w2.size(1) == 1 and w2.size(2) == w2.size(3) and m > 0,
        f"w2 must be [g, 1, d, d], got {list(w2.shape)}",
    )
    g = w2.size(0)
    _require(g % m == 0, f"w2 must have a multiple of {m} channels, got {g}")
    _check_tensor("w2", w2, x, (x.dtype,))
    return g, w2.size(-1)


def check_vectors(x: Tensor, size: int, **vectors: Tensor | None) -> None:
    """Vectors [size] in the dtype of x or float32."""
    for name, t in vectors.items():
        if t is not None:
            _require(t.shape == (size,), f"{name} must be [{size}], got {list(t.shape)}")
            _check_tensor(name, t, x, (x.dtype, torch.float32))


def check_pairs(**vectors: Tensor | None) -> None:
    """All are given, or none."""
    given = [t is not None for t in vectors.values()]
    _require(all(given) or not any(given), f"{' and '.join(vectors)} must be given together")


def check_slopes(x: Tensor, act: int, size: int, **slopes: Tensor | None) -> None:
    """Slopes [size], which are given exactly for a PReLU."""
    check_vectors(x, size, **slopes)
    for name, t in slopes.items():
        expected = (act == PRELU) == (t is not None)
        _require(expected, f"{name} must be given for a PReLU, and only for one")


def check_means(x: Tensor, size: int, batch_stats: bool, **means: Tensor | None) -> None:
    """Means [2, size] in float32, only for a norm with the batch's statistics."""
    for name, t in means.items():
        if t is not None:
            _require(batch_stats, f"{name} are of a norm with statistics of the batch")
            _require(t.shape == (2, size), f"{name} must be [2, {size}], got {list(t.shape)}")
            _check_tensor(name, t, x, (torch.float32,))


def check_gate(gate: Tensor, out: Tensor) -> None:
    """[N, out_channels, Hg, Wg] in the dtype of out."""
    fits = gate.dim() == 4 and gate.shape[:2] == out.shape[:2] and min(gate.shape[2:]) >= 1
    _require(
        fits and gate.dtype is out.dtype,
        f"gate must be {out.dtype} of shape [{out.size(0)}, {out.size(1)}, height, width], got "
        f"{gate.dtype} of shape {list(gate.shape)}",
    )
    _require(gate.device == out.device, f"gate is on {gate.device}, but x is on {out.device}")


def check_same_shape(name: str, t: Tensor, like: Tensor) -> None:
    """Shape, dtype and device of ``like``."""
    _require(
        t.shape == like.shape and t.dtype is like.dtype,
        f"{name} must be {like.dtype} of shape {list(like.shape)}, got {t.dtype} of shape "
        f"{list(t.shape)}",
    )
    _require(t.device == like.device, f"{name} is on {t.device}, but x is on {like.device}")


def _check_tensor(name: str, t: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _require(t.dtype in dtypes, f"{name} must be one of {dtypes}, got {t.dtype}")
    _require(t.device == x.device, f"{name} is on {t.device}, but x is on {x.device}")
    _require(t.is_contiguous(), f"{name} must be contiguous; its strides are {t.stride()}")
