"""Evaluation mode on the Triton kernels gives the reference's numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACT_CODE,
    ACTIVATIONS,
    LAYOUTS,
    Case,
    Params,
    assert_close,
    covering,
    make_input,
    make_module,
    oracle,
    plain,
    product,
    sound,
)
from module_checks import check_forward
from triton_cases import SMALL_TILE, planned

from ghost_ops import ops
from ghost_ops.activations import PRELU

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every pair of these occurs; a second activation goes with each first one.
COVERING = [
    (
        sound(
            Case(
                h=axes["hw"][0],
                w=axes["hw"][1],
                k=axes["primary"][0],
                stride=axes["primary"][1],
                act1=ACTIVATIONS[axes["act"]],
                act2=ACTIVATIONS[3 * axes["act"] % len(ACTIVATIONS)],
                **{name: axes[name] for name in ("n", "c", "oup", "ratio", "d", "layout", "dtype")},
            )
        ),
        {"tile": axes["tile"], "one_pass": axes["one_pass"]},
    )
    for axes in covering(
        {
            "n": (1, 3),
            "c": (1, 5, 24, 34),
            "hw": ((1, 1), (1, 9), (9, 1), (3, 5), (7, 7), (6, 17)),
            "oup": (1, 7, 16, 33),
            "ratio": (1, 2, 3, 4, 5),
            "d": (1, 3, 5, 7),
            "primary": ((1, 1), (1, 2), (3, 1)),
            "act": range(len(ACTIVATIONS)),
            "layout": LAYOUTS,
            "dtype": DTYPES,
            "tile": (None, SMALL_TILE),
            "one_pass": (False, True),
        }
    )
]


@pytest.mark.parametrize(("case", "how"), COVERING, ids=str)
def test_covering(triton_device: str, case: Case, how: dict) -> None:
    with planned(**how):
        check_forward(case, device=triton_device)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two launches"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_bit_offsets(triton_device: str, layout: str, one_pass: bool) -> None:
    with planned(wide=True, one_pass=one_pass, tile=SMALL_TILE):
        check_forward(Case(ratio=3, stride=2, h=9, w=12, layout=layout), device=triton_device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_float32_batch_norms_around_half_precision(
    triton_device: str,
    ratio: int,
    layout: str,
) -> None:
    case = Case(dtype=torch.bfloat16, bn_dtype=torch.float32, ratio=ratio, layout=layout)
    check_forward(case, device=triton_device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_rounds_at_the_end(
    triton_device: str,
    training: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    """Arithmetic is float32's: y and z are rounded once each, to nearest."""
    case = Case(2, 9, 9, 10, 22, act1="silu", dtype=dtype, layout=layout)
    module, x = make_module(case).train(training).to(triton_device), make_input(case)
    exact = copy.deepcopy(module).float()
    x = x.to(triton_device)
    with torch.no_grad():
        got, want = module(x).float(), exact(x.float())
    ulp = torch.finfo(dtype).eps * want.abs().clamp_min(torch.finfo(dtype).tiny)
    y = slice(0, case.m)
    assert ((got - want).abs() <= 0.51 * ulp + 2e-6)[:, y].double().mean() > 0.999


def apply_with(
    device: str,
    case: Case,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    slope: float = 0.01,
    *,
    gate: torch.Tensor | None = None,
    prelu1: torch.Tensor | None = None,
    prelu2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The module through the raw operators; with slopes, a PReLU is its activation."""
    p = Params.of(make_module(case))
    b1, b2 = p.bn1, p.bn2

    def moved(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        return [None if t is None else t.detach().to(device) for t in tensors]

    first = *moved(p.w1, b1.gamma, b1.beta, b1.mean, b1.var), b1.eps
    second = *moved(p.w2, b2.gamma, b2.beta, b2.mean, b2.var), b2.eps
    packed = ops.triton.ghost_pack(*first, *second, *moved(prelu1, prelu2))
    act1 = ACT_CODE[case.act1] if prelu1 is None else PRELU
    act2 = ACT_CODE[case.act2] if prelu2 is None else PRELU
    x, residual, gate = moved(x, residual, gate)
    numbers = case.m, case.oup, case.ratio, case.d, case.stride, act1, slope, act2, slope, True
    return ops.triton.ghost_apply(x, packed, residual, gate, *numbers).cpu()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_residual_is_added_last(
    triton_device: str,
    ratio: int,
    residual_layout: str,
    layout: str,
) -> None:
    case = Case(2, 5, 6, 7, 9, ratio, act1="hardswish", layout=layout)
    x = make_input(case)
    residual = make_input(case.replace(c=case.oup, layout=residual_layout), extra_seed=2)
    before = residual.clone()
    with torch.no_grad():
        got = apply_with(triton_device, case, x, residual)
        p = Params.of(make_module(case))
        want = oracle(p.to(torch.float64), x.double(), case, False).out + residual.double()
        assert_close(got, want, plain(p, x, case, False) + residual)
    assert torch.equal(residual, before)


GATES = {"pooled": (1, 1), "half": (4, 3), "odd": (2, 5), "same": (7, 5), "larger": (9, 13)}


@pytest.mark.parametrize(("height", "width"), list(GATES.values()), ids=list(GATES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gate_of_any_size(triton_device: str, layout: str, height: int, width: int) -> None:
    """out * nearest(gate) + residual; the gate's memory format need not be that of x."""
    ratio = 1 if height == 4 else 3
    dtype = torch.bfloat16 if height == 2 else torch.float32
    case = Case(2, 3, 7, 5, 7, ratio, layout=layout, dtype=dtype, act2="silu")
    wide = height == 9
    gate = make_input(
        case.replace(c=case.oup, h=height, w=width, layout="nhwc" if height == 7 else layout), 3
    ).abs()
    residual = None if height == 1 else make_input(case.replace(c=case.oup), extra_seed=2)
    p, x = Params.of(make_module(case)), make_input(case)

    def finished(out: torch.Tensor) -> torch.Tensor:
        out = out * F.interpolate(gate.to(out.dtype), (7, 5), mode="nearest")
        return out if residual is None else out + residual.to(out.dtype)

    with torch.no_grad(), planned(wide=wide, tile=SMALL_TILE if wide else None):
        got = apply_with(triton_device, case, x, residual, gate=gate)
        want = finished(oracle(p.to(torch.float64), x.double(), case, False).out)
        assert_close(got, want, finished(plain(p, x, case, False)))


@pytest.mark.parametrize("size", [3, 11, 49, 97])
def test_nearest_as_pytorch_rounds_it(triton_device: str, size: int) -> None:
    """Sizes for which float32 and exact arithmetic disagree about the source pixel."""
    case = Case(1, 1, 1, 128, 1, ratio=1, act1="none")
    gate = torch.arange(float(size)).view(1, 1, 1, size)
    x = make_input(case)
    with torch.no_grad():
        plain_out = apply_with(triton_device, case, x, None)
        got = apply_with(triton_device, case, x, None, gate=gate)
    want = plain_out * F.interpolate(gate, (1, 128), mode="nearest")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two launches"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["both", "first", "second"])
def test_prelu(triton_device: str, which: str, layout: str, one_pass: bool) -> None:
    """A slope for each channel, of either branch."""
    dtype = torch.float16 if which == "both" else torch.float32
    case = Case(2, 5, 4, 6, 13, 3, layout=layout, act1="none", act2="none", dtype=dtype)
    slopes = [torch.randn(count).to(dtype) for count in (case.m, case.g)]
    prelu1 = None if which == "second" else slopes[0]
    prelu2 = None if which == "first" else slopes[1]
    p, x = Params.of(make_module(case)), make_input(case)

    def computed(p: Params, x: torch.Tensor) -> torch.Tensor:
        def norm(t: torch.Tensor, bn: Any, slopes: torch.Tensor | None) -> torch.Tensor:
            t = F.batch_norm(t, bn.mean, bn.var, bn.gamma, bn.beta, False, 0.0, bn.eps)
            return t if slopes is None else F.prelu(t, slopes.to(t.dtype))

        y = norm(F.conv2d(x, p.w1), p.bn1, prelu1)
        z = norm(F.conv2d(y, p.w2, None, 1, 1, 1, case.m), p.bn2, prelu2)
        return torch.cat([y, z], 1)[:, : case.oup]

    with torch.no_grad(), planned(one_pass=one_pass, tile=SMALL_TILE):
        got = apply_with(triton_device, case, x, None, prelu1=prelu1, prelu2=prelu2)
        want = computed(p.to(torch.float64), x.double())
        assert_close(got, want, computed(p, x))


@pytest.mark.parametrize("slope", [0.0, 1.5, -0.3])
def test_leaky_relu_slope(triton_device: str, slope: float) -> None:
    case = Case(act1="leaky_relu", act2="none", ratio=1)
    x, p = make_input(case), Params.of(make_module(case))
    with torch.no_grad():
        got = apply_with(triton_device, case, x, None, slope)
        a = oracle(p, x, case.replace(act1="none"), False).a
    torch.testing.assert_close(got, F.leaky_relu(a, slope), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_none(triton_device: str, dtype: torch.dtype, layout: str) -> None:
    case = Case(n=0, layout=layout, dtype=dtype, stride=2)
    out = make_module(case).eval().to(triton_device)(make_input(case).to(triton_device))
    assert out.shape == (0, 8, 3, 4)
    assert out.dtype == dtype


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_reach_where_pytorch_has_them(
    triton_device: str,
    value: float,
    act: str,
) -> None:
    case = Case(1, 3, 5, 6, 6, act1=act, act2=act)
    module, x = make_module(case).eval(), make_input(case)
    x[0, 1, 2, 3] = value
    if math.isinf(value) and act == "gelu":
        pytest.skip("PyTorch's CPU kernels make NaN of gelu(inf), its formula does not")
    with torch.no_grad():
        want = plain(Params.of(module), x, case, False)
        got = module.to(triton_device)(x.to(triton_device)).cpu()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("axes", list(product(layout=LAYOUTS, one_pass=(True, False))), ids=str)
def test_the_same_bits_every_time(triton_device: str, axes: dict) -> None:
    case = Case(3, 20, 9, 11, 30, 3, act1="silu", layout=axes["layout"])
    x = make_input(case)
    with planned(tile=SMALL_TILE, one_pass=axes["one_pass"]):
        first = apply_with(triton_device, case, x, None)
        assert torch.equal(first, apply_with(triton_device, case, x, None))
