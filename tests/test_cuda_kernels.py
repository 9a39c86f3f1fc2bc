"""The CUDA kernels, run by the block emulator, compute what the reference computes.

The sources are those that nvcc compiles, the operators those that torch sees on a GPU: launchers,
plan and argument checks included. Shapes are small, because 32 lanes take turns here; each case
runs under one of the schedules in turn, some under all of them.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import emulator
import pytest
import torch
from conftest import native_module
from cuda_cases import (
    Training,
    World,
    backward,
    check_empty,
    check_eval,
    check_extras,
    check_far_statistics,
    check_statistics,
    check_train,
    make_slopes,
    misaligned,
    moments,
    norm_arguments,
    operands,
    train_forward,
)
from cuda_driver import SMALL, nan_output
from helpers import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    Case,
    check_update_running,
    covering,
    make_input,
    same_bits,
)
from torch import Tensor

from ghost_ops import planner
from ghost_ops.conventions import NEEDS

SCHEDULES = list(emulator.SCHEDULES.values())
DEVICES = list(emulator.DEVICES.values())


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    try:
        return emulator.ops()
    except emulator.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def world(library: emulator.Library) -> Iterator[World]:
    yield World(torch.ops.ghost_emu, "cpu")
    library.configure()


@contextlib.contextmanager
def taking_turns(library: emulator.Library, turn: int) -> Iterator[None]:
    """Another schedule and another GPU to plan for each turn."""
    library.set_device(DEVICES[turn % len(DEVICES)])
    try:
        with library.scheduled(SCHEDULES[turn % len(SCHEDULES)], seed=turn):
            yield
    finally:
        library.set_device(DEVICES[0])


@pytest.mark.parametrize("rank", ["2", "3"])
def test_other_plans_compute_the_same(library: emulator.Library, rank: str) -> None:
    """With GHOST_OPS_CUDA_PLAN, which a process reads once."""
    cases = ["eval nhwc", "eval bands", "eval deep", "eval tf32", "train nhwc", "train nchw"]
    driver = str(pathlib.Path(__file__).with_name("cuda_driver.py"))
    done = subprocess.run(
        [sys.executable, driver, "--library", str(library.path), "--cases", *cases],
        env={**os.environ, "GHOST_OPS_CUDA_PLAN": rank}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def identity(row: dict[str, Any]) -> str:
    flags = [name for name, value in row.items() if value is True and name != "case"]
    others = [str(row[name]) for name in ("grad_style",) if name in row]
    return "-".join([str(row["case"]), *others, *flags])


def grid(axes: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pair of values of two axes occurs; the fields of a Case are put together."""
    fields = set(Case.__dataclass_fields__)
    rows = []
    for row in covering(axes):
        row["h"], row["w"] = row.pop("hw")
        case = Case(**{k: v for k, v in row.items() if k in fields})
        rows.append({"case": case, **{k: v for k, v in row.items() if k not in fields}})
    return rows


# Sizes around the tiles: one pixel, less than a strip, whole small images, several bands; channels
# around the blocks of 8, 16, 32 and 64, odd ones, one.
AXES: dict[str, Any] = {
    "n": (1, 2, 5),
    "c": (1, 3, 8, 17, 40, 72),
    "hw": ((1, 1), (1, 9), (9, 2), (3, 5), (7, 7), (8, 16), (14, 14), (5, 33), (21, 12)),
    "oup": (1, 2, 7, 16, 24, 35, 70),
    "ratio": (1, 2, 3, 5),
    "d": (1, 3, 5, 7),
    "stride": (1, 2),
    "act1": ACTIVATIONS,
    "act2": ACTIVATIONS,
    "layout": LAYOUTS,
    "dtype": DTYPES,
    "has_primary": (True, True, False),
}
EVAL = grid({**AXES, "residual": (False, True), "use_tf32": (False, True)})
# Batch statistics of one value have no variance to speak of.
TRAIN_AXES = {
    **AXES,
    "n": (2, 3, 6),
    "hw": ((2, 2), (1, 9), (9, 2), (3, 5), (7, 7), (8, 16), (14, 14), (5, 33)),
    "keep_u": (False, True),
    "grad_style": ("dense", "expanded", "other layout", "sliced"),
}
TRAIN = grid(TRAIN_AXES)
FROZEN = grid(TRAIN_AXES)[::4]


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


# Norms of either kind, PReLUs, and the calls that several processes make.
MIXED = grid(
    {
        "n": (2, 5),
        "c": (3, 8, 40),
        "hw": ((1, 9), (7, 7), (9, 14), (5, 33)),
        "oup": (7, 16, 35),
        "ratio": (1, 2, 3),
        "d": (1, 3, 5),
        "stride": (1, 2),
        "act1": ("silu",),
        "act2": ("gelu",),
        "layout": LAYOUTS,
        "dtype": DTYPES,
        "has_primary": (True, True, False),
        "keep_u": (False, True),
        "batch_stats": ((True, True), (True, False), (False, True), (False, False)),
        "prelu": ((False, False), (True, False), (False, True), (True, True)),
        "in_three": (False, True),
    }
)


@pytest.mark.parametrize(("turn", "row"), list(enumerate(MIXED)), ids=map(identity, MIXED))
def test_mixed_norms_and_slopes(
    world: World, library: emulator.Library, turn: int, row: dict[str, Any]
) -> None:
    with taking_turns(library, turn):
        check_train(world, **row)


# Sizes of the gate that divide the output's, that do not, that are larger, and one number a map.
EXTRAS = grid(
    {
        "n": (1, 2, 5),
        "c": (1, 8, 17, 40),
        "hw": ((1, 1), (3, 5), (7, 7), (9, 14), (5, 33), (28, 12)),
        "oup": (1, 7, 16, 35, 70),
        "ratio": (1, 2, 3),
        "d": (1, 3, 5),
        "stride": (1, 2),
        "act1": ("none", "relu"),
        "act2": ("none", "silu"),
        "layout": LAYOUTS,
        "dtype": DTYPES,
        "has_primary": (True, True, False),
        "residual": (False, True),
        "prelu": ((False, False), (True, False), (False, True), (True, True)),
        "gate": (None, (1, 1), (2, 3), (7, 7), (4, 11), (31, 40)),
        "gate_layout": (None, "nchw", "nhwc"),
        "use_tf32": (False, True),
    }
)


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
    """What an instance fixes at compile time holds for the problem that it is given."""
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


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (torch.ones(2, 12, 3), "gate must be"),
        (torch.ones(2, 11, 3, 3), "gate must be"),
        (torch.ones(1, 12, 3, 3), "gate must be"),
        (torch.ones(2, 12, 0, 3), "at least 1"),
        (torch.ones(2, 12, 3, 3, dtype=torch.float64), "of the dtype of x"),
    ],
    ids=["3-D", "channels", "batch", "empty", "dtype"],
)
def test_gate_of_the_wrong_kind(world: World, gate: Tensor, message: str) -> None:
    o = operands(Case(2, 8, 6, 6, 12))
    bn1, bn2 = norm_arguments(o)
    packed = world.pack(o.w1, *bn1, 1e-5, o.p.w2.detach(), *bn2, 1e-5)
    with pytest.raises(RuntimeError, match=message):
        world.call("ghost_apply", o.x, packed, None, gate, *o.shape, *o.acts, True)


def test_slopes_per_channel_belong_to_the_packed_parameters(world: World) -> None:
    o = operands(Case(2, 8, 6, 6, 12))
    bn1, bn2 = norm_arguments(o)
    arguments = (o.w1, *bn1, 1e-5, o.p.w2.detach(), *bn2, 1e-5)
    packed = world.pack(*arguments)
    with pytest.raises(RuntimeError, match="packed does not belong to this module"):
        world.call("ghost_apply", o.x, packed, None, None, *o.shape, 8, 0.0, 0, 0.0, True)
    with pytest.raises(RuntimeError, match="prelu1 must have 6 elements, got 1"):
        world.pack(*arguments, torch.ones(1), None)
    for slopes, code in ((None, 8), (torch.ones(6), 1)):
        forward = (o.x, o.w1, *bn1, 1e-5, slopes, o.p.w2.detach(), *bn2, 1e-5, None, 12, 1)
        with pytest.raises(
            RuntimeError, match="prelu1 must be given for a PReLU, and only for one"
        ):
            world.call("ghost_train_forward", *forward, code, 0.0, 0, 0.0, False)


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
    plan = planner.explain(
        (case.n, case.c, case.h, case.w), case.oup, ratio=case.ratio, dw_size=case.d, stride=stride,
        dtype=case.dtype, channels_last=case.layout == "nhwc", device=device.removeprefix("tiny "),
        training=True,
    )  # fmt: skip
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
    library.set_device(emulator.DEVICES[device])
    try:
        with library.scheduled(SCHEDULES[turn % len(SCHEDULES)], seed=turn):
            first = check_train(world, case, keep_u=keep_u)
            if keep_u:  # frozen statistics have no u to keep
                return
            check_train(world, case, batch_stats=False)
        for name in ("greedy-eager", "random"):
            with library.scheduled(emulator.SCHEDULES[name], seed=turn, threads=2):
                assert_same(first, check_train(world, case), f"under schedule {name}")
    finally:
        library.set_device(DEVICES[0])


@pytest.mark.parametrize("shift", [1, 4])
def test_backward_of_x_at_any_address(world: World, shift: int) -> None:
    """x that begins inside a vector has other blocks for dx than for dw1."""
    check_train(world, Case(2, 16, 9, 8, 20, **HALF), shift=shift)


# The coefficients of all channels, or the parameters of all ghosts, do not fit beside the rest of a
# block: it loads them tile by tile.
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
    library.set_device(emulator.SMALL_BLOCKS[device])
    slopes = (prelu, prelu)
    try:
        check_train(
            world, case, has_primary=has_primary, batch_stats=batch_stats, prelu=slopes,
            in_three=prelu,
        )  # fmt: skip
    finally:
        library.set_device(DEVICES[0])


EMPTY = [
    *(Case(0, 4, 5, 5, 6, ratio=r, layout=layout) for r in (1, 2) for layout in LAYOUTS),
    Case(0, 40, 7, 6, 24, stride=2, layout="nhwc", dtype=torch.float16),
]
MANY_IMAGES = [
    Case(70_000, 16, 2, 2, 24, layout="nhwc", dtype=torch.float16, act1="silu", act2="silu"),
    Case(70_000, 7, 2, 2, 10, layout="nchw", dtype=torch.float32, act1="silu", act2="silu"),
]


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


STATISTICS = [
    Case(2, 16, 9, 17, 11, ratio=3, d=5, act1="silu", layout="nhwc"),
    Case(3, 4, 5, 15, 13, stride=2, act1="hardswish"),
    Case(2, 8, 9, 18, 12, dtype=torch.bfloat16, act1="silu"),
    Case(2, 40, 9, 18, 12, dtype=torch.float16, layout="nhwc"),
    Case(2, 5, 6, 7, 8, dtype=torch.float64),
]


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_statistics(world: World, case: Case, has_primary: bool) -> None:
    check_statistics(world, case, has_primary)


FAR = [(0.0, 1.0), (1e4, 1.0), (1e4, 1e-2), (100.0, 1.0)]  # means and deviations


@pytest.mark.parametrize("kind", ["normal", "outliers", "drift"])
@pytest.mark.parametrize(("mean", "deviation"), FAR, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_statistics_far_from_zero(
    world: World,
    library: emulator.Library,
    dtype: torch.dtype,
    layout: str,
    mean: float,
    deviation: float,
    kind: str,
) -> None:
    library.set_device(DEVICES[-1])  # several tiles a block
    try:
        check_far_statistics(world, mean, deviation, kind, dtype, layout)
    finally:
        library.set_device(DEVICES[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 3, 5), (2, 8, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_what_is_not_finite(
    world: World, layout: str, at: tuple[int, int, int], value: float
) -> None:
    """A channel's NaN or infinity reaches its mean and variance, and no other's."""
    x = torch.randn(3, 8, 9, 9, generator=torch.Generator().manual_seed(0)).half()
    x[at[0], 2, at[1], at[2]] = value
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    found = moments(world, x.contiguous(memory_format=fmt))
    want = torch.arange(8) != 2
    for name in ("u given", "cheap"):  # w1 would multiply it by 0
        mean, var = found[name]
        assert torch.equal(mean.isfinite(), want), name
        assert torch.equal(~var.isnan(), want), name


# --- determinism ------------------------------------------------------------------------------


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    for name in a:
        assert same_bits(a[name], b[name]), f"{name} differs {what}"


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


# --- shape of the calls -----------------------------------------------------------------------


def launches(library: emulator.Library, call: Any) -> int:
    before = library.launches()
    call()
    return library.launches() - before


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", [*STATISTICS, STATISTICS[3].replace(c=200)], ids=str)
def test_launch_counts(
    world: World, library: emulator.Library, case: Case, has_primary: bool
) -> None:
    """Eval is one launch, a training forward at most four, a backward at most four."""
    o = operands(case, has_primary)
    bn1, bn2 = norm_arguments(o)
    w2 = o.p.w2.detach()
    packed = world.pack(o.w1, *bn1, 1e-5, w2, *bn2, 1e-5)
    assert launches(library, lambda: world.pack(o.w1, *bn1, 1e-5, w2, *bn2, 1e-5)) == 1
    arguments = (o.x, packed, None, None, *o.shape, *o.acts, has_primary)
    assert launches(library, lambda: world.call("ghost_apply", *arguments)) == 1
    how = Training()
    assert launches(library, lambda: train_forward(world, o, how, False)) <= 4
    out, mean1, var1, mean2, var2, _ = train_forward(world, o, how, False)
    moments = [mean1, var1, mean2, var2]
    ones = torch.ones_like(out)
    assert launches(library, lambda: backward(world, o, how, ones, None, moments)) <= 4
    mean, var, count = bn1[2].float().clone(), bn1[3].float().clone(), torch.tensor(3)
    one = (mean, var, count, mean1.float(), var1.float(), 0.1)
    running = (*one, *(None, None, None), *one[3:], 9)
    assert launches(library, lambda: world.call("ghost_update_running_", *running)) == 1


NEEDED = {  # launches: sums, grads, the products, the last one
    "all": (NEEDS.ALL, 4),
    "all but dx": (NEEDS.ALL & ~NEEDS.DX, 4),
    "dx": (NEEDS.DX, 3),
    "dw1": (NEEDS.DW1, 4),
    "norm 2": (NEEDS.NORM2, 2),
    "slopes 2": (NEEDS.PRELU2, 2),
    "dw2": (NEEDS.DW2, 3),
    "norm 1": (NEEDS.NORM1, 3),
    "slopes 1": (NEEDS.PRELU1, 3),
    "dw2, dx": (NEEDS.DW2 | NEEDS.DX, 4),
    "all but dw2": (NEEDS.ALL & ~NEEDS.DW2, 4),
    "none": (0, 0),
}
PARTLY = [
    Case(2, 8, 7, 7, 12, dtype=torch.float16, layout="nhwc", act1="silu"),
    Case(2, 12, 9, 5, 21, ratio=3, d=5, stride=2),
]


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("case", PARTLY, ids=str)
def test_gradients_that_are_not_wanted(
    world: World, library: emulator.Library, case: Case, name: str
) -> None:
    """They are empty and cost no launch; the others have the bits that they have with all."""
    o = operands(case)
    how = Training(slopes=make_slopes(o.case, (True, True)))
    out, *moments, _ = train_forward(world, o, how, False)
    arguments = (world, o, how, torch.ones_like(out), None, moments)
    want = backward(*arguments)
    needs, count = NEEDED[name]
    assert launches(library, lambda: backward(*arguments, needs)) == count
    for key, t in backward(*arguments, needs).items():
        assert same_bits(t, want[key]), key


def test_launches_that_constants_replace(world: World, library: emulator.Library) -> None:
    """Statistics that are given are not computed, nor are sums whose means are given."""
    case = Case(2, 8, 7, 7, 16, dtype=torch.float16, layout="nhwc")
    o = operands(case)
    counts = {(True, True): 3, (True, False): 2, (False, True): 2, (False, False): 1}
    for batch, count in counts.items():
        how = Training(batch)
        assert launches(library, lambda how=how: train_forward(world, o, how, False)) == count
    how = Training()
    out, *moments, u = train_forward(world, o, how, True)
    means = (torch.zeros(2, 8), torch.zeros(2, 8))
    arguments = (world, o, how, torch.ones_like(out), u, moments)
    # u is pixel-major: nothing is left for the first launch.
    assert launches(library, lambda: backward(*arguments, NEEDS.DX, means)) == 2
    assert launches(library, lambda: backward(*arguments, NEEDS.DX | NEEDS.NORM2, means)) == 4
    frozen = (world, o, Training((True, False)), *arguments[3:])
    assert launches(library, lambda: backward(*frozen, NEEDS.DX)) == 2


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_batch(world: World, case: Case, has_primary: bool) -> None:
    check_empty(world, case, has_primary)


@pytest.mark.parametrize("case", MANY_IMAGES, ids=str)
def test_more_images_than_a_grid_has_rows(world: World, case: Case) -> None:
    """A grid has at most 65,535 blocks along y and z."""
    small = case.replace(c=3, h=1, w=1, oup=4)
    check_eval(world, small)
    check_train(world, small)


@pytest.mark.slow
def test_more_channel_blocks_than_a_grid_has_rows(world: World, library: emulator.Library) -> None:
    """65,537 blocks of channels in backward: blocks of 8, for want of shared memory."""
    m = 65_537 * 8
    x = torch.randn(2, m, 1, 1).half().as_strided((2, m, 1, 1), (m, 1, m, m))
    w2, none = torch.zeros(0, 1, 1, 1, dtype=x.dtype), torch.zeros(0)
    library.set_device(emulator.Device(9, 0, 2, 5504, 5504 + 1024, 50 << 20))
    try:
        grads = world.call(
            "ghost_backward", torch.ones_like(x), x, None, None, None, None, torch.zeros(m),
            torch.ones(m), 0.0, None, None, w2, None, None, none, none, 0.0, None, None, 1, 0, 0.0,
            0, 0.0, False, False, NEEDS.NORM1,
        )  # fmt: skip
    finally:
        library.set_device(DEVICES[0])
    assert torch.equal(grads[2], x.float().sum((0, 2, 3)))
    assert torch.equal(grads[3], torch.full((m,), 2.0))


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


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (emulator.Device(7, 5, 40, 64 << 10, 64 << 10, 4 << 20), "this device has 7.5"),
        (emulator.Device(8, 0, 108, 2 << 10, 164 << 10, 40 << 20), "shared memory"),
    ],
    ids=["too old", "too little shared memory"],
)
def test_devices_that_cannot_run_it(
    world: World, library: emulator.Library, device: emulator.Device, message: str
) -> None:
    library.set_device(device)
    try:
        with pytest.raises(RuntimeError, match=message):
            check_eval(world, Case(2, 40, 14, 14, 80, dtype=torch.float16, layout="nhwc"))
    finally:
        library.set_device(DEVICES[0])


@pytest.mark.parametrize("count", [0, 1, 2, 84])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_running(world: World, dtype: torch.dtype, count: int) -> None:
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    check_update_running(torch.ops.ghost_emu.ghost_update_running_, dtype, stat, count)


@pytest.mark.parametrize("missing", ["statistics1", "statistics2", "batches1", "batches2"])
def test_update_running_of_some(world: World, missing: str) -> None:
    update = torch.ops.ghost_emu.ghost_update_running_
    check_update_running(update, torch.float32, torch.float32, 84, missing=missing)


# The largest GhostNet shapes would take minutes here; these have its proportions.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "inp", "oup", "relu"),
    [(28, 16, 16, True), (28, 16, 48, True), (14, 80, 184, True), (14, 184, 80, False),
     (7, 160, 240, True), (7, 240, 160, False)],
)  # fmt: skip
def test_ghostnet_proportions(
    world: World, size: int, inp: int, oup: int, relu: bool, layout: str
) -> None:
    act = "relu" if relu else "none"
    case = Case(1, inp, size, size, oup, act1=act, act2=act, layout=layout, dtype=torch.float16)
    check_eval(world, case)
