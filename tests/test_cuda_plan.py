"""The tile plan of the CUDA kernels: golden choices, and properties of every plan.

The golden lines are decisions, not measurements. A change of the model changes some of them: look
at each, then write the new ones down (``python tests/test_cuda_plan.py`` prints them).
"""

from __future__ import annotations

import itertools
import math
import subprocess
from typing import Any

import pytest
import torch
from conftest import native_module
from cuda_driver import spawn
from helpers import GHOSTNET, product

from ghost_ops import planner

pytestmark = pytest.mark.skipif(native_module() is None, reason="the native library is not built")

SMEM = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}  # KiB a block
SIZE = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
HALF_NHWC = {"dtype": torch.float16, "channels_last": True}


def lines(plan: planner.CudaPlan) -> tuple[str, ...]:
    """The decisions of a plan, a line a launch."""
    return tuple(
        f"{p.kernel[6:]}: {p.images}x{p.rows}x{p.cols} px, {p.channels}x{p.channel_blocks} of "
        f"{p.instance}, slice {p.slice}{' resident' * p.resident}, {p.blocks} blocks, "
        f"{p.smem_bytes} B"
        for p in plan.passes
    )


GOLDEN: dict[tuple[Any, ...], tuple[str, ...]] = {
    ("sm_90", (256, 16, 112, 112), 16, "float16", "NHWC", ()): (
        "apply: 1x16x112 px, 8x1 of 16, slice 32 resident, 256 blocks, 94592 B",
    ),
    ("sm_90", (1, 16, 112, 112), 16, "float16", "NHWC", ()): (
        "apply: 1x2x28 px, 8x1 of 16, slice 32 resident, 224 blocks, 7168 B",
    ),
    ("sm_90", (256, 16, 112, 112), 48, "float16", "NHWC", ()): (
        "apply: 1x16x56 px, 24x1 of 32, slice 32 resident, 256 blocks, 113792 B",
    ),
    ("sm_90", (1, 16, 112, 112), 48, "float16", "NHWC", ()): (
        "apply: 1x4x14 px, 24x1 of 32, slice 32 resident, 224 blocks, 13568 B",
    ),
    ("sm_90", (256, 24, 56, 56), 72, "float16", "NHWC", ()): (
        "apply: 1x19x28 px, 40x1 of 64, slice 32 resident, 256 blocks, 109824 B",
    ),
    ("sm_90", (1, 24, 56, 56), 72, "float16", "NHWC", ()): (
        "apply: 1x2x14 px, 24x2 of 32, slice 32 resident, 224 blocks, 10240 B",
    ),
    ("sm_90", (256, 40, 28, 28), 240, "float16", "NHWC", ()): (
        "apply: 1x10x28 px, 64x2 of 64, slice 32 resident, 256 blocks, 109696 B",
    ),
    ("sm_90", (1, 40, 28, 28), 240, "float16", "NHWC", ()): (
        "apply: 1x2x14 px, 16x8 of 32, slice 32 resident, 224 blocks, 9728 B",
    ),
    ("sm_90", (256, 80, 14, 14), 480, "float16", "NHWC", ()): (
        "apply: 1x14x14 px, 64x4 of 64, slice 32 resident, 256 blocks, 84480 B",
    ),
    ("sm_90", (1, 80, 14, 14), 480, "float16", "NHWC", ()): (
        "apply: 1x2x7 px, 64x4 of 128, slice 32 resident, 56 blocks, 26112 B",
    ),
    ("sm_90", (256, 672, 14, 14), 112, "float16", "NHWC", ()): (
        "apply: 1x14x14 px, 56x1 of 64, slice 32, 256 blocks, 90368 B",
    ),
    ("sm_90", (1, 672, 14, 14), 112, "float16", "NHWC", ()): (
        "apply: 1x2x7 px, 8x7 of 32, slice 32 resident, 98 blocks, 24704 B",
    ),
    ("sm_90", (256, 160, 7, 7), 960, "float16", "NHWC", ()): (
        "apply: 4x7x7 px, 64x8 of 64, slice 32 resident, 256 blocks, 96128 B",
    ),
    ("sm_90", (1, 160, 7, 7), 960, "float16", "NHWC", ()): (
        "apply: 1x2x7 px, 16x30 of 32, slice 32 resident, 120 blocks, 10240 B",
    ),
    ("sm_90", (256, 960, 7, 7), 160, "float16", "NHWC", ()): (
        "apply: 3x7x7 px, 32x3 of 32, slice 32 resident, 258 blocks, 95360 B",
    ),
    ("sm_90", (1, 960, 7, 7), 160, "float16", "NHWC", ()): (
        "apply: 1x1x7 px, 8x10 of 32, slice 32 resident, 70 blocks, 33408 B",
    ),
    ("sm_80", (256, 40, 28, 28), 120, "float16", "NHWC", ()): (
        "apply: 1x14x28 px, 32x2 of 32, slice 32 resident, 206 blocks, 82944 B",
    ),
    ("sm_86", (256, 40, 28, 28), 120, "float16", "NHWC", ()): (
        "apply: 1x6x14 px, 64x1 of 64, slice 32 resident, 143 blocks, 46592 B",
    ),
    ("sm_100", (256, 40, 28, 28), 120, "float16", "NHWC", ()): (
        "apply: 1x10x28 px, 64x1 of 64, slice 32 resident, 256 blocks, 109696 B",
    ),
    ("sm_90", (256, 40, 28, 28), 120, "float16", "NCHW", ()): (
        "apply: 1x10x28 px, 64x1 of 64, slice 32 resident, 256 blocks, 103168 B",
    ),
    ("sm_90", (256, 160, 7, 7), 960, "float16", "NCHW", ()): (
        "apply: 2x7x7 px, 120x4 of 128, slice 32 resident, 256 blocks, 112256 B",
    ),
    ("sm_90", (256, 40, 28, 28), 120, "float32", "NHWC", ()): (
        "apply: 1x10x14 px, 64x1 of 64, slice 16, 256 blocks, 111232 B",
    ),
    ("sm_90", (2, 40, 28, 28), 120, "float64", "NCHW", ()): (
        "apply: 1x7x7 px, 16x4 of 32, slice 16, 128 blocks, 76288 B",
    ),
    ("sm_90", (256, 72, 28, 28), 40, "bfloat16", "NHWC", (("training", True),)): (
        "primary_stats: 1x28x28 px, 24x1 of 32, slice 32 resident, 256 blocks, 57728 B",
        "cheap_stats: 1x28x28 px, 24x1 of 32, slice 16 resident, 256 blocks, 58240 B",
        "apply: 1x28x28 px, 24x1 of 32, slice 16 resident, 256 blocks, 94976 B",
    ),
    ("sm_90", (32, 960, 7, 7), 160, "float16", "NHWC", (("training", True),)): (
        "primary_stats: 1x4x7 px, 32x3 of 32, slice 32 resident, 192 blocks, 65792 B",
        "cheap_stats: 1x7x7 px, 16x5 of 32, slice 16 resident, 160 blocks, 13568 B",
        "apply: 1x2x7 px, 40x2 of 64, slice 16 resident, 256 blocks, 8320 B",
    ),
    ("sm_90", (32, 64, 80, 80), 128, "float16", "NHWC", (("dw_size", 5),)): (
        "apply: 1x10x21 px, 64x1 of 64, slice 32 resident, 256 blocks, 103808 B",
    ),
    ("sm_90", (8, 32, 20, 20), 160, "float16", "NHWC", (("dw_size", 7), ("ratio", 5))): (
        "apply: 1x2x20 px, 16x2 of 16, slice 32 resident, 160 blocks, 32384 B",
    ),
    ("sm_90", (32, 16, 112, 112), 48, "float16", "NHWC", (("residual", True),)): (
        "apply: 1x14x28 px, 24x1 of 32, slice 32 resident, 256 blocks, 53888 B",
    ),
}


def plan_of(key: tuple[Any, ...]) -> planner.CudaPlan:
    device, shape, oup, dtype, layout, extra = key
    layout_and_dtype = {"channels_last": layout == "NHWC", "dtype": getattr(torch, dtype)}
    return planner.explain(shape, oup, device=device, **layout_and_dtype, **dict(extra))


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden(key: tuple[Any, ...]) -> None:
    assert lines(plan_of(key)) == GOLDEN[key]


PROBLEMS = list(
    product(
        shape=(
            (1, 16, 112, 112),
            (256, 40, 28, 28),
            (3, 7, 7, 7),
            (33, 960, 7, 7),
            (1, 3, 1, 1),
            (2, 5, 300, 17),
            (1, 64, 1, 20000),
            (4, 1, 640, 640),
        ),
        out_channels=(1, 16, 51, 960),
        ratio=(1, 2, 5),
        dw_size=(1, 3, 7),
        stride=(1, 2),
        dtype=(torch.float16, torch.float32, torch.float64),
        channels_last=(False, True),
    )
)


def check(one: planner.CudaPass, problem: dict[str, Any], device: str) -> None:
    n, _, h, w = problem["shape"]
    stride, ratio = problem["stride"], problem["ratio"]
    ho, wo, m = -(-h // stride), -(-w // stride), math.ceil(problem["out_channels"] / ratio)
    ghosts_per_map = 0 if one.kernel == "ghost_primary_stats" else ratio - 1
    assert 1 <= one.images <= n
    assert one.images == 1 or (one.rows, one.cols) == (ho, wo), "only whole images are joined"
    assert 1 <= one.rows <= ho
    assert 1 <= one.cols <= wo
    assert one.tiles == math.ceil(n / one.images) * -(-ho // one.rows) * -(-wo // one.cols)
    assert one.channels % 8 == 0
    assert one.channels <= one.instance
    assert one.channels * one.channel_blocks >= m > one.channels * (one.channel_blocks - 1)
    assert one.ghosts * one.ghost_blocks >= ghosts_per_map
    assert ghosts_per_map == 0 or ghosts_per_map > one.ghosts * (one.ghost_blocks - 1)
    parts = one.channel_blocks * one.ghost_blocks
    assert one.blocks % parts == 0
    assert parts <= one.blocks <= parts * one.tiles, "no block is without a tile"
    assert one.smem_bytes <= SMEM[device] * 1024
    assert one.smem_bytes % 128 == 0
    assert one.slice * SIZE[problem["dtype"]] in (32, 64, 128)
    assert one.halo == (0 if one.kernel == "ghost_primary_stats" else problem["dw_size"] // 2)
    assert one.tensor_cores == (problem["dtype"] is not torch.float64)
    assert one.seconds > 0


@pytest.mark.parametrize("device", SMEM)
def test_every_plan_covers_its_problem(device: str) -> None:
    problems = PROBLEMS[:: 4 if device == "sm_90" else 29]
    for number, problem in enumerate(problems):
        training = number % 3 == 0
        plan = planner.explain(**problem, device=device, training=training)
        assert len(plan.passes) <= 3 if training else len(plan.passes) == 1
        for one in plan.passes:
            check(one, problem, device)


def test_traffic_is_at_least_the_floor() -> None:
    """The model counts at least x once and out once, and repeated reads in l2_bytes."""
    for size, c, oup, _ in GHOSTNET:
        plan = planner.explain((32, c, size, size), oup, device="sm_90", **HALF_NHWC)
        (one,) = plan.passes
        assert one.dram_bytes >= plan.bytes_fused * 0.99
        assert one.l2_bytes >= one.dram_bytes * 0.99
        assert plan.seconds >= plan.bytes_fused / 3350e9


def test_a_batch_of_one_uses_the_whole_gpu() -> None:
    """Channels and rows are split further if there are few images."""
    for size, c, oup, _ in GHOSTNET:
        shape = (c, size, size)
        one = planner.explain((1, *shape), oup, device="sm_90", **HALF_NHWC).passes[0]
        many = planner.explain((256, *shape), oup, device="sm_90", **HALF_NHWC).passes[0]
        assert one.blocks >= 56, shape
        assert one.images * one.rows * one.cols * one.channels < (
            many.images * many.rows * many.cols * many.channels
        ), shape


def test_tf32_follows_torch() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            plan = planner.explain((2, 16, 14, 14), 32, device="sm_80")
            assert plan.passes[0].tensor_cores is allowed
            half = planner.explain((2, 16, 14, 14), 32, device="sm_80", dtype=torch.float16)
            assert half.passes[0].tensor_cores
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_u_is_written_where_that_moves_less() -> None:
    wide = planner.explain((8, 960, 7, 7), 160, device="sm_90", training=True, **HALF_NHWC)
    narrow = planner.explain((8, 16, 56, 56), 48, device="sm_90", training=True, **HALF_NHWC)
    assert wide.writes_u
    assert not narrow.writes_u
    assert [one.kernel for one in narrow.passes] == [
        "ghost_primary_stats",
        "ghost_cheap_stats",
        "ghost_apply",
    ]
    alone = planner.explain((8, 16, 56, 56), 48, ratio=1, device="sm_90", training=True)
    assert [one.kernel for one in alone.passes] == ["ghost_primary_stats", "ghost_apply"]


def test_text_names_every_launch() -> None:
    plan = planner.explain((8, 16, 56, 56), 48, device="sm_80", training=True)
    text = str(plan)
    for one in plan.passes:
        assert one.kernel in text
        assert f"{one.smem_bytes:,} bytes shared" in text
    assert "not measured" in text
    assert text.startswith("sm_80, 3 launches")


def tile_of(one: planner.CudaPass) -> tuple[Any, ...]:
    names = ("instance", "channels", "ghosts", "images", "rows", "cols", "slice", "resident")
    return tuple(getattr(one, name) for name in names)


@pytest.mark.parametrize("training", [False, True])
def test_alternatives_are_different_plans_in_order(training: bool) -> None:
    for size, c, oup, _ in GHOSTNET:
        settings = {"device": "sm_90", "training": training, "alternatives": 4, **HALF_NHWC}
        plan = planner.explain((256, c, size, size), oup, **settings)
        for one in plan.passes:
            assert tile_of(one.alternatives[0]) == tile_of(one)
            assert len({tile_of(other) for other in one.alternatives}) == 4
            times = [other.seconds for other in one.alternatives]
            assert all(a <= b * 1.0011 for a, b in itertools.pairwise(times))
            assert all(other.alternatives == () for other in one.alternatives)
    assert "plan 4" in str(plan)


def test_fewer_alternatives_than_asked_for() -> None:
    plan = planner.explain((1, 8, 1, 1), 16, device="sm_90", alternatives=1000, **HALF_NHWC)
    assert 1 <= len(plan.passes[0].alternatives) < 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "sm_90", "alternatives": -1}, "alternatives must be at least 0, got -1"),
        ({"alternatives": 2}, "alternatives: only plans for a GPU"),
    ],
)
def test_bad_alternatives(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planner.explain((1, 8, 4, 4), 16, **settings)


RANKED = """
import torch
from ghost_ops import planner
plan = planner.explain(
    (256, 40, 28, 28), 240, device="sm_90", dtype=torch.float16, channels_last=True, training=True,
    alternatives=3,
)
print([one.alternatives.index(replace(one, alternatives=())) for one in plan.passes])
print(plan.backward.rows, plan.backward.cols, plan.backward.channels, plan.backward.images)
"""


def ranked(value: str, code: str = RANKED) -> subprocess.CompletedProcess[str]:
    return spawn("-c", "from dataclasses import replace\n" + code, GHOST_OPS_CUDA_PLAN=value)


def test_the_environment_chooses_among_the_best_plans() -> None:
    found = [ranked(value) for value in ("", "1", "2", "3")]
    assert not any(one.returncode for one in found), found[-1].stderr
    passes, grads = zip(*(one.stdout.splitlines() for one in found), strict=True)
    assert passes == ("[0, 0, 0]", "[0, 0, 0]", "[1, 1, 1]", "[2, 2, 2]")
    assert len(set(grads)) == 3 and grads[0] == grads[1]


@pytest.mark.parametrize("value", ["0", "4", "2x", "best"])
def test_a_rank_that_makes_no_sense(value: str) -> None:
    """Both where Python reads the variable and where the launchers do."""
    direct = "import ghost_ops._C as c; c.cuda_plan(1, 8, 4, 4, 8, 16)"
    for code in (RANKED, direct):
        done = ranked(value, code)
        expected = f"environment variable GHOST_OPS_CUDA_PLAN='{value}': expected one of '1', '2'"
        assert done.returncode != 0 and expected in done.stderr


@pytest.mark.parametrize("device", ["sm_70", "gpu", "", "sm_9"])
def test_unknown_device(device: str) -> None:
    with pytest.raises(ValueError, match=r"device must be one of 'cpu', 'cuda', 'sm_80'.*got"):
        planner.explain((1, 8, 4, 4), 16, device=device)


def test_training_is_not_planned_for_the_cpu() -> None:
    with pytest.raises(ValueError, match="training: only the passes on a GPU"):
        planner.explain((1, 8, 4, 4), 16, training=True)


def test_empty_shape() -> None:
    with pytest.raises(ValueError, match="no empty size for a GPU plan"):
        planner.explain((0, 8, 4, 4), 16, device="sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="torch sees none; name an architecture instead: sm_80"):
        planner.explain((1, 8, 4, 4), 16, device="cuda")


if __name__ == "__main__":
    for golden in GOLDEN:
        print(f"    {golden!r}: {lines(plan_of(golden))!r},")
