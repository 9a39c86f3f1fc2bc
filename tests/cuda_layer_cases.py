"""Checks of the CUDA operators between Ghost modules, for the emulator and a GPU.

As in ``cuda_cases``: a check takes a ``World`` and a row of its grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cuda_cases import (
    SLOPE,
    World,
    as_tensor_cores_see_it,
    norm_arguments,
    operands,
    tf32,
    tolerance_dtype,
)
from helpers import ACT_CODE, Case, Params, activation, assert_close, with_layout
from torch import Tensor

from ghost_ops import activations, ops
from ghost_ops.conventions import compute_dtype

Row = dict[str, Any]


def depthwise_operands(row: Row) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    dtype, k, channels = row["dtype"], row["k"], row["shape"][1]
    x = torch.randn(row["shape"], generator=gen, dtype=torch.float64).to(dtype)
    wide = compute_dtype(dtype)
    weight = torch.randn(channels, 1, k, k, generator=gen, dtype=torch.float64).to(wide)
    shift = torch.randn(channels, generator=gen, dtype=torch.float64).to(wide)
    return with_layout(x, row["layout"]), weight, shift


def taps_first(weight: Tensor) -> Tensor:
    """A weight in the memory order of ``ops.layers.fold`` for a GPU."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def check_depthwise(world: World, row: Row, sums: bool) -> None:
    x, weight, shift = depthwise_operands(row)
    k, stride, channels = row["k"], row["stride"], row["shape"][1]
    settings = (k, stride, activations.CODES[row["act"]], 0.01)
    packed = taps_first(weight)
    u = F.conv2d(x.double(), weight.double(), shift.double(), stride, k // 2, 1, channels)
    want = activation(row["act"], u)
    eager = F.conv2d(x.to(weight.dtype), weight, shift, stride, k // 2, 1, channels)
    eager = activation(row["act"], eager).to(x.dtype)
    if not sums:
        got = world.call("depthwise_conv", x, packed, shift, *settings)
    else:
        got, parts = world.call("depthwise_conv_sums", x, packed, shift, *settings)
        assert parts.shape[::2] == x.shape[:2]
        assert parts.dtype == weight.dtype
        exact = got.double().sum((2, 3))
        torch.testing.assert_close(
            parts.sum(1).double(), exact, rtol=1e-5, atol=1e-5 * float(got.double().abs().sum())
        )
    assert got.dtype == x.dtype
    assert got.stride() == torch.empty_like(with_layout(want, row["layout"])).stride()
    assert_close(got, want, eager, scale=want.abs().max() + u.abs().max())
    # The weight in the order of a module gives the same bits.
    assert torch.equal(got, world.call("depthwise_conv", x, weight, shift, *settings))


def check_stem(world: World, row: Row) -> None:
    gen = torch.Generator().manual_seed(1)
    dtype, (layout, out_layout) = row["dtype"], row["layouts"]
    wide, c, o = compute_dtype(dtype), row["shape"][1], row["out_channels"]
    x = torch.randn(row["shape"], generator=gen, dtype=torch.float64).to(dtype)
    x = with_layout(x, layout)
    weight = torch.randn(o, c, 3, 3, generator=gen, dtype=torch.float64).to(wide)
    shift = torch.randn(o, generator=gen, dtype=torch.float64).to(wide)
    settings = (row["stride"], activations.CODES[row["act"]], 0.01, out_layout == "nhwc")
    got = world.call("conv_stem", x, taps_first(weight), shift, *settings)
    u = F.conv2d(x.double(), weight.double(), shift.double(), row["stride"], 1)
    want = activation(row["act"], u)
    eager = activation(row["act"], F.conv2d(x.to(wide), weight, shift, row["stride"], 1)).to(dtype)
    assert got.dtype == dtype
    assert got.stride() == torch.empty_like(with_layout(want, out_layout)).stride()
    assert_close(got, want, eager, scale=want.abs().max() + u.abs().max())
    assert torch.equal(got, world.call("conv_stem", x, weight, shift, *settings))


def gate_formula(x: Tensor, row: Row, p: tuple[Tensor, ...]) -> Tensor:
    hidden = activation(row["act"], x.mean((2, 3)) @ p[0].t() + p[1])
    s = hidden @ p[2] + p[3]
    return F.relu6(s + 3) / 6 if row["gate"] == ops.HARD_SIGMOID else torch.sigmoid(s)


def check_gate(world: World, row: Row) -> None:
    dtype, (n, c, h, w), r = row["dtype"], row["shape"], row["reduced"]
    wide = compute_dtype(dtype)
    gen = torch.Generator().manual_seed(3)

    def make(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(to)

    x = with_layout(make(n, c, h, w, to=dtype), row["layout"])
    p = make(r, c, to=dtype), make(r, to=wide), make(r, c, to=dtype), make(c, to=wide)
    sums = None
    if row["sums"]:  # in two parts; x must not be read
        half = x.to(wide).flatten(2)
        sums = torch.stack([half[:, :, ::2].sum(2), half[:, :, 1::2].sum(2)], 1).contiguous()
    given = torch.full_like(x, torch.nan) if row["sums"] else x
    settings = (activations.CODES[row["act"]], 0.01, row["gate"])
    got = world.call("squeeze_excite_gate", given, sums, *p, *settings)
    want = gate_formula(x.double(), row, tuple(t.double() for t in p))
    eager = gate_formula(x.to(wide), row, tuple(t.to(wide) for t in p)).to(dtype)
    assert got.dtype == dtype
    assert got.shape == (n, c)
    assert_close(got, want, eager)


def check_pooled(world: World, case: Case, use_tf32: bool = False) -> None:
    """A 1x1 convolution with its batch norm and activation, pooled."""
    o = operands(case)
    none = (None,) * 4

    def formula(p: Params, x: Tensor) -> Tensor:
        u, n = F.conv2d(x, p.w1), p.bn1
        u = F.batch_norm(u, n.mean, n.var, n.gamma, n.beta, False, 0.0, n.eps)
        return activation(case.act1, u).mean((2, 3))

    with torch.no_grad(), tf32(use_tf32):
        want = formula(o.p.to(torch.float64), o.x.double())
        eager = formula(*as_tensor_cores_see_it(o, use_tf32))
        w2 = torch.empty(0, 1, 1, 1, dtype=case.dtype)
        packed = world.pack(o.w1, *norm_arguments(o)[0], 1e-5, w2, *none, 1e-5)
        got = world.call("ghost_apply_pooled", o.x, packed, case.m, ACT_CODE[case.act1], SLOPE)
    assert got.shape == (case.n, case.m)
    assert_close(got, want, eager, dtype=tolerance_dtype(case, use_tf32))
