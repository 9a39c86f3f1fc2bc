"""The CUDA kernels, run by the block emulator, compute what the reference computes.

The sources are those that nvcc compiles; launchers, plan and argument checks are those of a GPU.
Shapes are small, because one core runs all lanes in turn. Each case runs under one of the schedules
in turn, some cases under all of them.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import emulator
import pytest
import torch
from conftest import native_module
from cuda_cases import (
    World,
    assert_same,
    check_eval,
    check_extras,
    check_train,
    misaligned,
    operands,
)
from cuda_driver import SMALL, nan_output, spawn
from cuda_grids import EVAL, EXTRAS, FROZEN, MIXED, TRAIN, identity
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, Case, make_input

from ghost_ops import planner

SCHEDULES = list(emulator.SCHEDULES.values())
DEVICES = list(emulator.DEVICES.values())


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.or_skip(emulator.ops)


@pytest.fixture
def world(library: emulator.Library) -> Iterator[World]:
    yield World(torch.ops.ghost_emu, "cpu")
    library.configure()


@contextlib.contextmanager
def taking_turns(library: emulator.Library, turn: int) -> Iterator[None]:
    """Another schedule and another GPU to plan for each turn."""
    device, schedule = DEVICES[turn % len(DEVICES)], SCHEDULES[turn % len(SCHEDULES)]
    with library.as_device(device), library.scheduled(schedule, seed=turn):
        yield


@pytest.mark.parametrize("rank", ["2", "3"])
def test_other_plans_compute_the_same(library: emulator.Library, rank: str) -> None:
    """With GHOST_OPS_CUDA_PLAN, which a process reads once."""
    cases = ["eval nhwc", "eval bands", "eval deep", "eval tf32", "train nhwc", "train nchw"]
    driver = str(pathlib.Path(__file__).with_name("cuda_driver.py"))
    arguments = (driver, "--library", str(library.path), "--cases", *cases)
    done = spawn(*arguments, GHOST_OPS_CUDA_PLAN=rank)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("turn", "row"), list(enumerate(EVAL)), ids=map(identity, EVAL))
def test_eval(world: World, library: emulator.Library, turn: int, row: dict[str, Any]) -> None:
    with taking_turns(library, turn):
        check_eval(world, **row)


@pytest.mark.parametrize(("turn", "row"), list(enumerate(TRAIN)), ids=map(identity, TRAIN))
def test_train(world: World, library: emulator.Library, turn: int, row: dict[str, Any]) -> None:
    with taking_turns(library, turn):
        check_train(world, **row)


@pytest.mark.parametrize(("turn", "row"), list(enumerate(FROZEN)), ids=map(identity, FROZEN))
def test_frozen_batch_norms(
    world: World, library: emulator.Library, turn: int, row: dict[str, Any]
) -> None:
    row = {**row, "keep_u": False}
    with taking_turns(library, turn):
        check_train(world, batch_stats=False, **row)


@pytest.mark.parametrize(("turn", "row"), list(enumerate(MIXED)), ids=map(identity, MIXED))
def test_mixed_norms_and_slopes(
    world: World, library: emulator.Library, turn: int, row: dict[str, Any]
) -> None:
    with taking_turns(library, turn):
        check_train(world, **row)


@pytest.mark.parametrize(("turn", "row"), list(enumerate(EXTRAS)), ids=map(identity, EXTRAS))
def test_gate_and_slopes_per_channel(
    world: World, library: emulator.Library, turn: int, row: dict[str, Any]
) -> None:
    with taking_turns(library, turn):
        check_extras(world, **row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_primary", [True, False])
def test_misaligned_views(world: World, layout: str, dtype: torch.dtype, has_primary: bool) -> None:
    """A view of x may start at any element: no vector is loaded across its alignment."""
    case = Case(2, 24, 9, 11, 48, layout=layout, dtype=dtype, act1="silu", act2="silu")
    x = misaligned(operands(case, has_primary).x)
    assert x.data_ptr() % 16
    check_eval(world, case, x=x, has_primary=has_primary)
    check_train(world, case, has_primary=has_primary, shift=1)


@pytest.mark.parametrize(
    ("change", "scope"),
    [
        ({}, "kLean"),
        ({"act1": "none", "act2": "none"}, "kLean"),
        ({"d": 5}, "kDirect"),
        ({"act1": "silu"}, "kDirect"),
        ({"act2": "relu6"}, "kDirect"),
        ({"ratio": 3}, "kDirect"),
        ({"oup": 41}, "kDirect"),
        ({"c": 12}, "kAny"),
        ({"layout": "nchw"}, "kAny"),
        ({"dtype": torch.float32}, "kAny"),
    ],
    ids=str,
)
def test_scope(world: World, library: emulator.Library, change: dict[str, Any], scope: str) -> None:
    """The launched instance is the one whose compile-time conditions the problem meets."""
    case = Case(2, 24, 9, 11, 40, layout="nhwc", dtype=torch.bfloat16, act1="relu", act2="relu")
    check_eval(world, case.replace(**change))
    assert f"Scope::{scope}" in library.last_kernel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gate_takes_the_nearest_pixel(world: World, layout: str) -> None:
    """Bit for bit the pixel that F.interpolate takes, at every size."""
    module = Case(1, 1, 23, 29, 1, ratio=1, layout=layout)
    o = operands(module)
    bn1 = [torch.tensor([v]) for v in (0.0, 1.0, 0.0, 1.0)]  # y = 1 everywhere
    packed = world.pack(o.w1, *bn1, 0.0, o.p.w2.detach(), None, None, None, None, 0.0)
    for size in [(h, w) for h in (1, 2, 5, 10, 23, 24, 46, 47) for w in (1, 3, 7, 14, 29, 30, 58)]:
        gate = torch.arange(float(size[0] * size[1])).view(1, 1, *size)
        got = world.call("ghost_apply", o.x, packed, None, gate, *o.shape, 0, 0.0, 0, 0.0, True)
        assert torch.equal(got, torch.nn.functional.interpolate(gate, (23, 29), mode="nearest"))


# One block makes dx and dw1: intrinsic channels and channels of x around the accumulators of each
# instance, several slices, several tiles a block, tiles that end inside a unit.
HALF = {"layout": "nhwc", "dtype": torch.float16, "act1": "silu", "act2": "silu"}
SHARED_DU = [
    (Case(3, 8, 11, 13, 9, **HALF), "tiny sm_86", True),  # 32 x 32
    (Case(9, 16, 14, 14, 24, **HALF), "tiny sm_86", True),
    (Case(5, 40, 14, 13, 78, **HALF), "tiny sm_86", True),  # 64 x 64
    (Case(5, 72, 14, 13, 36, **HALF), "tiny sm_86", True),  # 32 x 128
    (Case(5, 128, 9, 13, 24, **HALF), "tiny sm_86", False),
    (Case(3, 40, 9, 9, 205, **HALF), "tiny sm_86", True),  # 128 x 64
    (Case(2, 104, 9, 7, 250, **HALF), "sm_80", True),  # 128 x 128
    (Case(3, 200, 7, 9, 74, **HALF), "sm_80", False),  # 64 x 256
    (Case(2, 56, 5, 9, 470, **HALF), "sm_80", True),  # 256 x 64
    (Case(2, 72, 5, 9, 350, **HALF), "sm_90", False),  # in slices
    (Case(3, 520, 5, 7, 70, **HALF), "sm_90", False),
    (Case(3, 40, 9, 9, 60, ratio=3, d=5, **HALF).replace(dtype=torch.bfloat16), "sm_90", True),
    (Case(2, 24, 8, 8, 30, ratio=1, **HALF), "sm_90", True),
]


def backward_plan(case: Case, device: str, stride: int = 1) -> planner.CudaBackward:
    """The plan on a GPU with the shared memory of an emulated one."""
    settings = {"ratio": case.ratio, "dw_size": case.d, "stride": stride, "dtype": case.dtype}
    settings |= {"channels_last": case.layout == "nhwc", "device": device.removeprefix("tiny ")}
    shape = (case.n, case.c, case.h, case.w)
    plan = planner.explain(shape, case.oup, training=True, **settings)
    assert isinstance(plan, planner.CudaPlan) and plan.backward is not None
    return plan.backward


@pytest.mark.skipif(native_module() is None, reason="the native library is not built")
@pytest.mark.parametrize("keep_u", [False, True], ids=["u", "kept u"])
@pytest.mark.parametrize(("turn", "row"), list(enumerate(SHARED_DU)), ids=str)
def test_both_products_in_a_block(
    world: World,
    library: emulator.Library,
    turn: int,
    row: tuple[Case, str, bool],
    keep_u: bool,
) -> None:
    case, device, makes_u = row
    plan = backward_plan(case, device)
    assert plan.du_workers > 0 and plan.makes_u == makes_u
    with library.as_device(emulator.DEVICES[device]):
        with library.scheduled(SCHEDULES[turn % len(SCHEDULES)], seed=turn):
            first = check_train(world, case, keep_u=keep_u)
            if keep_u:  # frozen statistics have no u to keep
                return
            check_train(world, case, batch_stats=False)
        for name in ("greedy-eager", "random"):
            with library.scheduled(emulator.SCHEDULES[name], seed=turn, threads=2):
                assert_same(first, check_train(world, case), f"under schedule {name}")


@pytest.mark.parametrize("shift", [1, 4])
def test_backward_of_x_at_any_address(world: World, shift: int) -> None:
    """If x begins inside a vector, separate blocks compute dx and dw1."""
    check_train(world, Case(2, 16, 9, 8, 20, **HALF), shift=shift)


# The coefficients of all channels, or the parameters of all ghosts, do not fit into shared memory
# with the rest of a block, which loads them tile by tile.
SHORT_OF_MEMORY = [
    ("58 KiB", True, Case(2, 12, 3, 3, 800, dtype=torch.float16, layout="nhwc", act1="silu")),
    ("72 KiB", True, Case(2, 12, 5, 4, 790, act1="silu", act2="silu", stride=2)),
    ("40 KiB", False, Case(2, 1, 3, 3, 800, dtype=torch.bfloat16, layout="nhwc", act2="silu")),
    ("58 KiB", True, Case(3, 5, 9, 9, 150, ratio=30, d=7, act1="silu", act2="silu")),
    ("58 KiB", True, Case(4, 3, 5, 5, 50, ratio=17, d=7, dtype=torch.float64, act2="gelu")),
]


@pytest.mark.parametrize(
    ("batch_stats", "prelu"),
    [(True, False), (False, False), (True, True), (False, True)],
    ids=["training", "frozen", "training, slopes", "frozen, slopes"],
)
@pytest.mark.parametrize(("device", "has_primary", "case"), SHORT_OF_MEMORY, ids=str)
def test_backward_short_of_shared_memory(
    world: World,
    library: emulator.Library,
    device: str,
    has_primary: bool,
    case: Case,
    batch_stats: bool,
    prelu: bool,
) -> None:
    with library.as_device(emulator.SMALL_BLOCKS[device]):
        how = {"has_primary": has_primary, "batch_stats": batch_stats, "in_three": prelu}
        check_train(world, case, prelu=(prelu, prelu), **how)


# A training case is a dozen eval cases long: the schedules that find the most.
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        (name, schedule)
        for name in SMALL
        for schedule in emulator.SCHEDULES
        if name.startswith("eval") or schedule in ("reversed", "greedy-eager", "random")
    ],
)
def test_every_schedule(world: World, library: emulator.Library, name: str, schedule: str) -> None:
    with library.scheduled(emulator.SCHEDULES[schedule], seed=1):
        SMALL[name](world)


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 24, 9, 11, 44, layout="nhwc", dtype=torch.float16, act1="silu", act2="silu"),
        Case(3, 20, 14, 14, 26, dtype=torch.float32, d=5, act1="silu", act2="gelu"),
        Case(9, 5, 7, 7, 6, dtype=torch.float64, ratio=3, act1="silu", act2="none"),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_order_of_blocks(
    world: World, library: emulator.Library, case: Case
) -> None:
    first = check_train(world, case)
    for name in ("reversed", "greedy-eager", "random"):
        with library.scheduled(emulator.SCHEDULES[name], seed=5, threads=1 + (name == "random")):
            assert_same(first, check_train(world, case), f"under schedule {name}")


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_alignment_of_x(world: World, dtype: torch.dtype, layout: str, shift: int) -> None:
    """x that begins anywhere gives the bits of x at an aligned address."""
    case = Case(2, 16, 9, 8, 20, layout=layout, dtype=dtype, act1="silu")
    want = check_eval(world, case)
    x = make_input(case)
    moved = torch.empty(x.numel() + shift, dtype=dtype)[shift:].as_strided(x.size(), x.stride())
    got = check_eval(world, case, x=moved.copy_(x))
    torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(dtype).eps * 8)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_goes_through_every_activation(world: World, act: str) -> None:
    case = Case(2, 8, 6, 7, 12, act1=act, act2=act, dtype=torch.float16, layout="nhwc")
    x = make_input(case)
    x[1, 3, 4, 5] = float("nan")
    out = nan_output(world, case, x)
    want = torch.zeros_like(out, dtype=torch.bool)
    want[1, : case.m, 4, 5] = True
    want[1, case.m :, 3:6, 4:7] = True
    assert torch.equal(out.isnan(), want)


# The largest GhostNet shapes would take minutes here; these have its proportions.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "inp", "oup", "relu"),
    [
        (28, 16, 16, True),
        (28, 16, 48, True),
        (14, 80, 184, True),
        (14, 184, 80, False),
        (7, 160, 240, True),
        (7, 240, 160, False),
    ],
)
def test_ghostnet_proportions(
    world: World, size: int, inp: int, oup: int, relu: bool, layout: str
) -> None:
    act = "relu" if relu else "none"
    case = Case(1, inp, size, size, oup, act1=act, act2=act, layout=layout, dtype=torch.float16)
    check_eval(world, case)
