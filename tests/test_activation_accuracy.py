"""Promise: the smooth activations of the CPU kernels are accurate over all float32 values."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from conftest import EVERY_ISA, running
from helpers import ACT_CODE
from torch import Tensor

from ghost_ops import activations, ops

# The largest error allowed, in ulps of the input. For |x| > 1 the terms of the formulas are as
# large as x; for |x| < 1 the result is smaller.
ULPS = {"silu": 1.7, "hardswish": 1.7, "gelu": 1.8, "gelu_tanh": 1.8}
STRIDE = 8191  # one of so many of all 2^32 floats is tested: half a million

SMOOTH = pytest.mark.parametrize("act", ULPS)


@pytest.fixture(params=[isa for isa in EVERY_ISA if isa != "eager"])
def native_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param):
        yield request.param


@functools.cache
def floats() -> Tensor:
    x = torch.arange(-(2**31), 2**31, STRIDE).to(torch.int32).view(torch.float32)
    return x[x.isfinite()]


def ulp(x: Tensor) -> Tensor:
    x = x.abs()
    return torch.nextafter(x, torch.tensor(math.inf)).double() - x.double()


def kernel(x: Tensor, act: str) -> Tensor:
    """act(x) by the native kernels: a depthwise convolution with the weight 1."""
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1)
    return ops.depthwise_conv(x.view(1, 1, 1, -1), one, zero, 1, ACT_CODE[act]).view(-1)


def pytorch(x: Tensor, act: str) -> Tensor:
    return activations.apply(x, ACT_CODE[act], 0.0)


@functools.cache
def wanted(act: str) -> tuple[Tensor, float]:
    """act(x) in float64, and PyTorch's largest error in float32, in ulps of the input."""
    x = floats()
    want = pytorch(x.double(), act)
    return want, worst(pytorch(x, act), want)


def worst(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want).abs() / ulp(floats())
    # Hardswish of a huge x is Inf in PyTorch too: x * 6 / 6.
    return error[got.isfinite()].max().item()


@SMOOTH
def test_every_float(native_isa: str, act: str) -> None:
    want, own = wanted(act)
    got = kernel(floats(), act)
    assert (got.isfinite() | ~pytorch(floats(), act).isfinite()).all()
    error = worst(got, want)
    assert error <= min(ULPS[act], 2 * own + 1)


def test_silu_keeps_its_digits(native_isa: str) -> None:
    """Errors in ulps of the result, down to where PyTorch's result is zero, too."""
    x = torch.linspace(-88.7, 20, 200_001)
    got, want = kernel(x, "silu").double(), pytorch(x.double(), "silu")
    assert ((got - want).abs() / ulp(want.float())).max() <= 4


def test_sigmoid(native_isa: str) -> None:
    """The sigmoid of a gate whose logits are its biases."""
    x = torch.cat((torch.linspace(-87, 87, 60_001), torch.tensor([-3e38, -90.0, 90.0, 3e38])))
    n, none = len(x), torch.zeros(1, len(x))
    got = torch.ones(1, n, 1, 1)
    ops.squeeze_excite_(got, none, torch.zeros(1), none, x, activations.RELU, 0.0, ops.SIGMOID)
    got, want = got.view(-1).double(), torch.sigmoid(x.double())
    normal = x.abs() < 86.9
    assert ((got - want).abs() / ulp(want.float()))[normal].max() <= 4
    assert (got - want).abs()[~normal].max() <= 3e-38


@SMOOTH
def test_special_values(native_isa: str, act: str) -> None:
    tiny = [2.0**-149, 3 * 2.0**-149, 2.0**-127, 2.0**-126]
    x = torch.tensor([0.0, *tiny, 256.0, 2.0**14, 2.0**100])
    x = torch.cat((x, -x, torch.tensor([math.inf, -math.inf, math.nan])))
    got, want = kernel(x, act), pytorch(x.double(), act)
    small = x.abs() < 1
    assert (got.double() - want)[small].abs().max() <= 2.0**-149
    assert torch.equal(got[~small].nan_to_num(7.0), want[~small].float().nan_to_num(7.0))
