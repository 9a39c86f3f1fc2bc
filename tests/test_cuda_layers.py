"""The CUDA kernels between the Ghost modules of a network, on the block emulator and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import emulator
import pytest
import torch
import torch.nn.functional as F
from cuda_cases import World, check_extras, poisoned_memory
from cuda_layer_cases import (
    check_depthwise,
    check_gate,
    check_pooled,
    check_stem,
    depthwise_operands,
)
from helpers import ACTIVATIONS, DTYPES, Case, covering, with_layout
from torch import Tensor

from ghost_ops import ops


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "cuda":
        yield World(torch.ops.ghost_ops, "cuda")
        return
    emulator.or_skip(emulator.ops)
    yield World(torch.ops.ghost_emu, "cpu")


@pytest.fixture(params=["sm_90", "tiny sm_86"])
def device(request: pytest.FixtureRequest, world: World) -> Iterator[str]:
    """The GPU that the emulator stands for, or the real one."""
    if world.device == "cuda":
        if request.param != "sm_90":
            pytest.skip("the device is a real GPU")
        yield "cuda"
        return
    with emulator.ops().as_device(emulator.DEVICES[request.param]):
        yield request.param


def ids(row: dict[str, Any]) -> str:
    return "-".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in row.values())


DEPTHWISE = covering(
    {
        # Odd sizes and channels, one pixel, one channel, less than a strip, C not a multiple of 8.
        "shape": [
            (2, 8, 9, 7),
            (1, 20, 14, 14),
            (3, 33, 5, 6),
            (1, 1, 6, 5),
            (2, 12, 1, 1),
            (5, 40, 3, 13),
            (1, 272, 4, 9),
        ],
        "k": [1, 3, 5, 7],
        "stride": [1, 2],
        "act": list(ACTIVATIONS),
        "layout": ["nchw", "nhwc"],
        "dtype": list(DTYPES),
    }
)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("row", DEPTHWISE, ids=ids)
def test_depthwise_conv(world: World, device: str, row: dict[str, Any], sums: bool) -> None:
    check_depthwise(world, row, sums)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nan_stays_where_it_is(world: World, layout: str) -> None:
    x = torch.zeros(2, 8, 9, 9, dtype=torch.float16)
    x[1, 2, 4, 4], x[0, 1, 0, 0] = torch.nan, torch.inf
    for stride in (1, 2):
        weight, shift = torch.ones(8, 1, 3, 3), torch.zeros(8)
        got = world.call("depthwise_conv", with_layout(x, layout), weight, shift, 3, stride, 1, 0.0)
        want = F.relu(F.conv2d(x.float(), weight, shift, stride, 1, 1, 8))
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())


STEMS = covering(
    {
        "shape": [(2, 3, 33, 40), (1, 3, 8, 8), (3, 1, 5, 3), (2, 4, 7, 5), (1, 2, 64, 3)],
        "out_channels": [2, 8, 12, 16, 20, 72],
        "stride": [1, 2],
        "act": list(ACTIVATIONS),
        "layouts": [("nchw", "nchw"), ("nhwc", "nhwc"), ("nchw", "nhwc"), ("nhwc", "nchw")],
        "dtype": list(DTYPES),
    }
)


@pytest.mark.parametrize("row", STEMS, ids=ids)
def test_conv_stem(world: World, device: str, row: dict[str, Any]) -> None:
    check_stem(world, row)


GATES = covering(
    {
        "shape": [
            (2, 5, 3, 7),
            (5, 72, 6, 6),
            (1, 140, 7, 7),
            (7, 1032, 2, 1),
            (3, 16, 1, 1),
            (300, 8, 2, 2),
        ],
        "reduced": [1, 4, 37],
        "act": ["relu", "silu", "leaky_relu"],
        "gate": [ops.HARD_SIGMOID, ops.SIGMOID],
        "sums": [False, True],
        "layout": ["nchw", "nhwc"],
        "dtype": list(DTYPES),
    }
)


@pytest.mark.parametrize("row", GATES, ids=ids)
def test_squeeze_excite_gate(world: World, device: str, row: dict[str, Any]) -> None:
    check_gate(world, row)


GATED = covering(
    {
        # Images that share a tile, bands, many channels (w1 in a ring), odd channels, one pixel.
        "shape": [
            (6, 24, 7, 7, 20),
            (2, 40, 30, 34, 24),
            (1, 7300, 3, 3, 20),
            (3, 13, 9, 6, 21),
            (5, 100, 1, 1, 36),
            (9, 272, 7, 7, 160),
            (70, 33, 3, 2, 130),
        ],
        "dtype": list(DTYPES),
        "layout": ["nchw", "nhwc"],
        "residual": [False, True],
        "use_tf32": [False, True],
    }
)


@pytest.mark.parametrize("row", GATED, ids=ids)
def test_gate_of_the_input(world: World, device: str, row: dict[str, Any]) -> None:
    n, c, h, w, oup = row["shape"]
    if c > 1000 and row["dtype"].itemsize > 4 and device == "tiny sm_86":
        pytest.skip("float64 weights of so many channels do not fit")
    case = Case(n, c, h, w, oup, layout=row["layout"], dtype=row["dtype"], act1="relu", act2="none")
    flags = {"residual": row["residual"], "use_tf32": row["use_tf32"]}
    check_extras(world, case, **flags, in_gate=True, gate=(3, 2) if n == 3 else None)


def test_every_schedule(world: World) -> None:
    """The bits do not depend on the order of the warps and the copies."""
    if world.device == "cuda":
        pytest.skip("a GPU has one schedule")
    row = {"shape": (2, 40, 9, 11), "dtype": torch.float16, "k": 5, "layout": "nhwc"}
    x, weight, shift = depthwise_operands(row)
    p = (torch.randn(12, 40).half(), torch.randn(12), torch.randn(12, 40).half(), torch.randn(40))
    found = []
    for bits in emulator.SCHEDULES.values():
        with emulator.ops().scheduled(bits, seed=3), poisoned_memory():
            out, sums = world.ops.depthwise_conv_sums(x, weight, shift, 5, 2, 1, 0.0)
            gate = world.ops.squeeze_excite_gate(out, sums, *p, 1, 0.0, 0)
            other = world.ops.squeeze_excite_gate(out, None, *p, 1, 0.0, 0)
        found.append((out, sums, gate, other))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_views_into_other_tensors(world: World, dtype: torch.dtype, layout: str) -> None:
    """Operands that begin one element past the alignment of the kernels' vectors."""
    gen = torch.Generator().manual_seed(4)

    def off_by_one(*shape: int, to: torch.dtype = torch.float32) -> Tensor:
        whole = torch.randn(math.prod(shape) + 1, generator=gen).to(to)
        return whole[1:].view(shape)

    def both(name: str, *arguments: Any) -> None:
        copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        for got, want in zip(world_tuple(name, arguments), world_tuple(name, copies), strict=True):
            torch.testing.assert_close(got, want)  # narrower vectors add in another order

    def world_tuple(name: str, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        found = world.call(name, *arguments)
        return found if isinstance(found, tuple) else (found,)

    shape = (2, 6, 5, 16) if layout == "nhwc" else (2, 16, 6, 5)
    x = off_by_one(*shape, to=dtype)
    x = x.permute(0, 3, 1, 2) if layout == "nhwc" else x
    both("depthwise_conv_sums", x, off_by_one(16, 1, 3, 3), off_by_one(16), 3, 1, 1, 0.0)
    taps = off_by_one(3, 3, 1, 16).permute(3, 2, 0, 1)
    both("depthwise_conv_sums", x, taps, off_by_one(16), 3, 2, 1, 0.0)
    gate = (off_by_one(8, 16, to=dtype), off_by_one(8), off_by_one(8, 16, to=dtype), off_by_one(16))
    both("squeeze_excite_gate", x, None, *gate, 1, 0.0, 0)
    both("squeeze_excite_gate", x, off_by_one(2, 3, 16), *gate, 1, 0.0, 0)
    image = off_by_one(2, 3, 7, 9, to=dtype)
    stem = off_by_one(3, 3, 3, 16).permute(3, 2, 0, 1)
    both("conv_stem", image, stem, off_by_one(16), 2, 1, 0.0, layout == "nhwc")
    both("conv_stem", image, off_by_one(16, 3, 3, 3), off_by_one(16), 2, 1, 0.0, layout == "nhwc")


def test_empty(world: World) -> None:
    x = torch.empty(0, 3, 4, 4)
    out, sums = world.call(
        "depthwise_conv_sums", x, torch.ones(3, 1, 3, 3), torch.ones(3), 3, 2, 1, 0.0
    )
    assert out.shape == (0, 3, 2, 2)
    p = (torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), torch.ones(3))
    assert world.call("squeeze_excite_gate", x, sums, *p, 1, 0.0, 0).shape == (0, 3)


POOLED = covering(
    {
        # Images that share a tile, a map as large as a tile, odd channels, one pixel.
        "shape": [
            (6, 24, 7, 7, 40),
            (2, 13, 9, 5, 21),
            (3, 7300, 1, 1, 20),
            (1, 8, 16, 32, 12),
            (9, 160, 7, 7, 960),
        ],
        "act": ["relu", "silu"],
        "dtype": list(DTYPES),
        "layout": ["nchw", "nhwc"],
        "use_tf32": [False, True],
    }
)


@pytest.mark.parametrize("row", POOLED, ids=ids)
def test_pooling(world: World, device: str, row: dict[str, Any]) -> None:
    n, c, h, w, m = row["shape"]
    if c > 1000 and row["dtype"].itemsize > 4 and device == "tiny sm_86":
        pytest.skip("float64 weights of so many channels do not fit")
    case = Case(n, c, h, w, m, layout=row["layout"], dtype=row["dtype"], act1=row["act"], ratio=1)
    check_pooled(world, case, row["use_tf32"])


def test_too_many_pixels_to_pool(world: World) -> None:
    none = (None,) * 4
    packed = world.pack(torch.ones(8, 4, 1, 1), *none, 1e-5, torch.ones(0, 1, 1, 1), *none, 1e-5)
    message = f"x may have {ops.MOST_POOLED} pixels, got 513"
    with pytest.raises(RuntimeError, match=message):
        world.call("ghost_apply_pooled", torch.ones(1, 4, 27, 19), packed, 8, 1, 0.0)


@pytest.mark.parametrize(
    ("in_gate", "stride", "message"),
    [
        (torch.ones(2, 5), 1, r"in_gate must be \[2, 4\] of the dtype of x"),
        (torch.ones(2, 4).half(), 1, "in_gate must be"),
        (torch.ones(2, 4, 1, 1), 1, "in_gate must be"),
        (torch.ones(2, 4), 2, "in_gate needs a primary convolution of stride 1"),
    ],
)
def test_bad_gate_of_the_input(world: World, in_gate: Tensor, stride: int, message: str) -> None:
    x, none = torch.ones(2, 4, 3, 3), (None,) * 4
    packed = world.pack(torch.ones(3, 4, 1, 1), *none, 1e-5, torch.ones(3, 1, 3, 3), *none, 1e-5)
    numbers = (3, 6, 2, 3, stride, 1, 0.0, 1, 0.0, True)
    with pytest.raises(RuntimeError, match=message):
        world.call("ghost_apply_gated", x, in_gate, packed, None, None, *numbers)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("depthwise_conv", {4: 3}, "stride must be 1 or 2, got 3"),
        ("depthwise_conv", {3: 4}, "dw_size must be 1, 3, 5 or 7, got 4"),
        ("depthwise_conv", {1: torch.ones(4, 1, 3, 3)}, r"weight must be \[3, 1, 3, 3\]"),
        ("depthwise_conv", {1: torch.ones(3, 1, 3, 3).half()}, "in the compute dtype of x"),
        ("depthwise_conv", {2: torch.ones(2)}, "shift must have 3 elements, got 2"),
        ("depthwise_conv", {0: torch.ones(1, 3, 4, 8)[..., ::2]}, "x must be dense"),
        ("conv_stem", {0: torch.ones(1, 5, 4, 4), 1: torch.ones(8, 5, 3, 3)}, "up to 4 input chan"),
        ("conv_stem", {1: torch.ones(7, 3, 3, 3)}, "even number of .* got 3 and 7"),
        ("conv_stem", {1: torch.ones(8, 3, 5, 5)}, r"weight must be \[O, 3, 3, 3\]"),
        ("conv_stem", {3: 4}, "stride must be 1 or 2, got 4"),
        ("conv_stem", {2: torch.ones(7)}, "shift must have 8 elements, got 7"),
        ("squeeze_excite_gate", {2: torch.ones(2, 4)}, "w_reduce must have 6 elements, got 8"),
        ("squeeze_excite_gate", {5: torch.ones(4)}, "b_expand must have 3 elements, got 4"),
        ("squeeze_excite_gate", {2: torch.ones(2, 3).half()}, "w_reduce must be contiguous and"),
        ("squeeze_excite_gate", {8: 2}, "gate must be 0 .hard sigmoid. or 1"),
        ("squeeze_excite_gate", {1: torch.ones(1, 2, 4)}, "sums must be a contiguous"),
    ],
)
def test_bad_input(world: World, name: str, change: dict[int, Any], message: str) -> None:
    x = torch.ones(1, 3, 4, 4)
    p = (torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), torch.ones(3))
    arguments: list[Any] = {
        "depthwise_conv": [x, torch.ones(3, 1, 3, 3), torch.ones(3), 3, 2, 1, 0.0],
        "squeeze_excite_gate": [x, None, *p, 1, 0.0, 0],
        "conv_stem": [x, torch.ones(8, 3, 3, 3), torch.ones(8), 2, 1, 0.0, False],
    }[name]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        world.call(name, *arguments)
