"""Promise: the invariants of the CPU's tile plans, and their model of bytes and FLOPs."""

from __future__ import annotations

import csv
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import native_module
from helpers import (
    GHOSTNET,
    L2_BYTES,
    LAYOUTS,
    VECTORS,
    Case,
    make_module,
    product,
    with_layout,
)

import ghost_ops
from ghost_ops import environment, planner
from ghost_ops.autograd.checks import keeps_u
from ghost_ops.formula import Settings
from ghost_ops.planner import CpuMachine

pytestmark = pytest.mark.skipif(native_module() is None, reason="the native library is not built")

SIZE = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
# Every instruction set with every L2, and one to 64 cores. The plans do not depend on the machine
# that runs the tests.
MACHINES = [
    CpuMachine(*vectors, l1_bytes, l2_bytes, cores)
    for i, vectors in enumerate(VECTORS.values())
    for j, l2_bytes in enumerate(L2_BYTES)
    for l1_bytes, cores in [(((32 << 10), (48 << 10))[j // 2], (1, 2, 64)[(i + j) % 3])]
]
XEON = CpuMachine(16, 32, 48 << 10, 2 << 20)
PROBLEMS = [
    {**problem, "machine": MACHINES[i % len(MACHINES)]}
    for i, problem in enumerate(
        product(
            shape=(
                (1, 16, 112, 112),
                (16, 40, 28, 28),
                (3, 7, 7, 7),
                (33, 960, 7, 7),
                (1, 3, 1, 1),
                (2, 5, 300, 17),
                (1, 64, 1, 2000),
                (4, 1, 640, 640),
            ),
            out_channels=(1, 16, 51, 960),
            ratio=(1, 2, 5),
            dw_size=(1, 3, 7),
            stride=(1, 2),
            dtype=(torch.float32, torch.bfloat16),
            channels_last=(False, True),
        )
    )
]


def sizes(problem: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Images, pixels, rows, intrinsic and ghost maps of the output."""
    n, _, h, w = problem["shape"]
    ho, wo = -(-h // problem["stride"]), -(-w // problem["stride"])
    m = math.ceil(problem["out_channels"] / problem["ratio"])
    return n, ho * wo, ho, m, m * (problem["ratio"] - 1)


def test_every_plan_covers_its_problem() -> None:
    for problem in PROBLEMS:
        plan = planner.explain(**problem)
        n, _, rows, m, _ = sizes(problem)
        assert 1 <= plan.images <= n, problem
        assert 1 <= plan.band_rows <= rows, problem
        assert 1 <= plan.group <= m, problem
        assert plan.images == 1 or plan.band_rows == rows, "only whole images are joined"
        assert 1 <= plan.row_splits <= rows, problem
        assert 1 <= plan.channel_splits <= m, problem
        tiles = math.ceil(n / plan.images)
        assert plan.items == tiles * plan.row_splits * plan.channel_splits, problem
        assert 1 <= plan.vecs <= 8, problem


def test_scratch_stays_small() -> None:
    """A tile is meant to fit in L2; no thread has more than a few megabytes of scratch."""
    for problem in PROBLEMS:
        plan = planner.explain(**problem)
        channels, width = problem["shape"][1], problem["shape"][3]
        _, _, _, m, g = sizes(problem)
        row = 8 * width * (channels + m + g)  # one row, the smallest tile
        assert plan.scratch_bytes <= (8 << 20) + 16 * (problem["dw_size"] + 3) * row, problem


def test_bytes_and_flops() -> None:
    for problem in PROBLEMS:
        plan = planner.explain(**problem)
        n, pixels, _, m, g = sizes(problem)
        channels, oup = problem["shape"][1], problem["out_channels"]
        size, d2 = SIZE[problem["dtype"]], problem["dw_size"] ** 2
        parameters = channels * m + g * d2 + 2 * (m + g)
        x = math.prod(problem["shape"])
        assert plan.bytes_fused == size * (x + n * oup * pixels + parameters), problem
        assert plan.flops == 2 * n * pixels * (channels * m + g * d2), problem
        assert plan.bytes_eager > plan.bytes_fused, problem
        assert plan.keep_primary == (4 * n * m * pixels <= x), problem


def test_autograd_and_plan_keep_u_alike() -> None:
    """``keeps_u`` decides for autograd, ``keep_primary`` for plans."""
    channels, intrinsic, heights, strides = (16, 17, 63, 64, 65), (4, 16), (7, 8), (1, 2)
    for c, m, height, stride in itertools.product(channels, intrinsic, heights, strides):
        x = torch.empty(2, c, height, 9, device="meta")
        w1 = torch.empty(m, c, 1, 1, device="meta")
        settings = Settings(2 * m, (stride, stride), (0, 0), (1, 1), 1, 1e-5, 1e-5, 1, 0.0, 1, 0.0)
        plan = planner.explain(x.shape, 2 * m, stride=stride)
        assert plan.keep_primary == keeps_u(x, w1, settings), (c, m, height, stride)


def test_one_thread_does_not_split() -> None:
    for problem in PROBLEMS:
        if problem["machine"].cores == 1:
            plan = planner.explain(**problem)
            assert (plan.row_splits, plan.channel_splits) == (1, 1), problem


def test_threads_have_work_where_there_is_some() -> None:
    for size, inp, oup, _ in GHOSTNET:
        for machine in MACHINES:
            if machine.cores > 1:
                plan = planner.explain((1, inp, size, size), oup, machine=machine)
                assert plan.items >= 2, (size, inp, oup, machine)


def test_stores_past_the_caches() -> None:
    """Only for large outputs that are written once, in whole vectors of their dtype; with
    channels along the lanes, only if more is written than read."""
    large: dict[str, Any] = {"shape": (16, 16, 112, 112), "out_channels": 96, "machine": XEON}
    assert planner.explain(**large).stream
    assert not planner.explain((1, 16, 28, 28), 16, machine=XEON).stream
    assert not planner.explain(**large, residual=True).stream
    assert planner.explain(**large, channels_last=True).stream
    narrow: dict[str, Any] = {**large, "shape": (16, 96, 112, 112)}
    assert not planner.explain(**narrow, channels_last=True).stream
    assert not planner.explain(**large, dtype=torch.bfloat16).stream


def test_traffic_of_ghostnet() -> None:
    """Over the GhostNet shapes eager PyTorch moves about 4.5 times as many bytes as one pass."""
    plans = [
        planner.explain((1, inp, size, size), oup, activation="relu" if relu else "none")
        for size, inp, oup, relu in GHOSTNET
    ]
    ratio = sum(p.bytes_eager for p in plans) / sum(p.bytes_fused for p in plans)
    assert 3.5 < ratio < 5.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_plan_of_a_module(ratio: int, layout: str) -> None:
    module = make_module(Case(5, 5, oup=9, ratio=ratio, d=5, stride=2))
    options: dict[str, Any] = {"threads": 2, "channels_last": layout == "nhwc"}
    got = planner.explain_module(module, (4, 5, 31, 30), **options)
    want = planner.explain((4, 5, 31, 30), 9, ratio=ratio, dw_size=5, stride=2, **options)
    assert got == want


def test_plan_of_a_module_with_another_primary_convolution() -> None:
    with pytest.raises(ValueError, match="1x1"):
        planner.explain_module(make_module(Case(k=3)), (4, 5, 31, 30))


def test_readable() -> None:
    text = str(planner.explain((16, 40, 28, 28), 240))
    for word in ("tile", "parallel", "scratch", "bytes", "FLOPs", "training"):
        assert word in text
    assert f"{2 * 16 * 28 * 28 * (40 * 120 + 120 * 9):,}" in text


def test_channels_along_the_lanes() -> None:
    """In channels_last; in NCHW if pixels would leave lanes idle and the module narrows."""
    for shape, oup, nchw in (
        ((1, 960, 7, 7), 160, True),
        ((1, 160, 7, 7), 960, False),
        ((16, 480, 14, 14), 112, False),
    ):
        assert (planner.explain(shape, oup, machine=XEON).along_lanes == "channels") is nchw
        last = planner.explain(shape, oup, machine=XEON, channels_last=True)
        assert last.along_lanes == "channels"
        assert last.in_place
        assert not last.pack
        residual = planner.explain(shape, oup, machine=XEON, channels_last=True, residual=True)
        assert not residual.in_place


def test_products_on_tiles() -> None:
    """For an even number of bfloat16 channels along the lanes, on a machine with AMX."""
    tiles = replace(XEON, amx=True)
    given: dict[str, Any] = {"dtype": torch.bfloat16, "channels_last": True}
    plan = planner.explain((1, 960, 7, 7), 160, machine=tiles, **given)
    assert plan.amx
    assert not plan.pack
    assert "AMX" in str(plan)
    for shape, change in (
        ((1, 960, 7, 7), {"machine": XEON}),
        ((1, 35, 7, 7), {}),
        ((1, 960, 7, 7), {"dtype": torch.float32}),
        ((1, 960, 7, 7), {"dtype": torch.float16}),
    ):
        other = planner.explain(shape, 160, **({"machine": tiles} | given | change))
        assert not other.amx, (shape, change)


def test_sums_do_not_depend_on_the_cores() -> None:
    """Threads split the channels; no sum is split between threads."""
    for problem in PROBLEMS:
        plans = [
            planner.explain(**{**problem, "machine": replace(problem["machine"], cores=c)})
            for c in (1, 2, 64)
        ]
        assert len({plan.depth for plan in plans}) == 1, problem


GOLDEN = pathlib.Path(__file__).with_name("golden_plans.csv")
DECISIONS = (
    "along_lanes",
    "depth",
    "in_place",
    "pack",
    "images",
    "band_rows",
    "row_splits",
    "channel_splits",
    "group",
    "vecs",
    "fetch",
    "fetch_results",
    "stream",
    "items",
)


def golden_rows() -> Iterator[dict[str, str]]:
    """The decisions for GhostNet's shapes, on every described machine with two cores.

    In float32; on machines with AMX in bfloat16.
    """
    machines = [
        (isa, CpuMachine(*vectors, 32 << 10, l2_bytes, cores=2))
        for isa, vectors in VECTORS.items()
        for l2_bytes in L2_BYTES
    ]
    machines.append(("amx", replace(XEON, cores=2, amx=True)))
    for isa, machine in machines:
        for size, inp, oup, _ in sorted(set(GHOSTNET)):
            for batch, layout in ((b, layout) for b in (1, 16) for layout in LAYOUTS):
                plan = planner.explain(
                    (batch, inp, size, size),
                    oup,
                    machine=machine,
                    dtype=torch.bfloat16 if machine.amx else torch.float32,
                    channels_last=layout == "nhwc",
                )
                row = {
                    "isa": isa,
                    "l2_kib": machine.l2_bytes >> 10,
                    "shape": f"{inp}->{oup}@{size}",
                    "batch": batch,
                    "layout": layout,
                }
                row |= {name: getattr(plan, name) for name in DECISIONS}
                yield {key: str(value) for key, value in row.items()}


def test_golden_plans() -> None:
    """A changed plan fails here; `python tests/test_planner.py` writes a new file."""
    with GOLDEN.open(newline="") as file:
        assert list(csv.DictReader(file)) == list(golden_rows())


def test_this_machine() -> None:
    machine = planner.cpu_machine(threads=3)
    assert machine.cores == (environment.cpu_machine()["cores"] or 3)
    assert planner.explain((16, 40, 28, 28), 240, threads=3).machine == machine


@pytest.mark.parametrize(
    "change",
    [{"lanes": 3}, {"registers": 0}, {"l1_bytes": 0}, {"l2_bytes": 0}, {"cores": 0}],
    ids=str,
)
def test_no_such_machine(change: dict[str, int]) -> None:
    values = {"lanes": 8, "registers": 16, "l1_bytes": 32 << 10, "l2_bytes": 1 << 20} | change
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        CpuMachine(**values)


@pytest.mark.parametrize("other", [{"threads": 2}, {"device": "sm_90"}], ids=str)
def test_a_machine_and_something_against_it(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="machine"):
        planner.explain((1, 2, 3, 4), 6, machine=XEON, **other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (1, 2, 3)}, "shape"),
        ({"shape": (1, 2, 3, -4)}, "shape"),
        ({"out_channels": 0}, "out_channels"),
        ({"ratio": 0}, "ratio"),
        ({"stride": 0}, "stride"),
        ({"dw_size": 4}, "dw_size"),
        ({"dtype": torch.int8}, "dtype"),
        ({"activation": "tanh"}, "activation"),
        ({"threads": 0}, "threads"),
        ({"device": "gpu"}, "device"),
        ({"device": "sm_90", "alternatives": -1}, "alternatives"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"shape": (1, 2, 3, 4), "out_channels": 6}
    with pytest.raises(ValueError, match=f"{message} must be .*got"):
        planner.explain(**(given | change))


@pytest.mark.parametrize(
    "change",
    [
        *({"shape": value} for value in (None, 4, "1234", (1, 2, 3, 4.5), (1, 2, 3, "4"))),
        *({"out_channels": value} for value in ("6", 6.0, None, True)),
        *({name: "2"} for name in ("ratio", "stride", "dw_size", "threads", "machine")),
        {"ratio": 2.0},
        {"activation": 3},
        {"device": "sm_90", "alternatives": "1"},
    ],
    ids=str,
)
def test_arguments_of_wrong_type(change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"shape": (1, 2, 3, 4), "out_channels": 6}
    with pytest.raises(TypeError, match=f"{list(change)[-1]} must be .*got"):
        planner.explain(**(given | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: planner.explain_saved("net", (1, 3, 8, 8)), "model must be .*got str"),
        (lambda: planner.explain_saved(make_module(Case()), 8), "input_shape must be .*got 8"),
        (lambda: planner.explain_module(None, (1, 3, 8, 8)), "module must be .*got NoneType"),
        (lambda: planner.cpu_machine("2"), "threads must be .*got str"),
        (lambda: CpuMachine(8, 16, 32 << 10, 1 << 20, 1.5), "cores must be .*got float"),
    ],
    ids=["saved", "shape", "module", "threads", "machine"],
)
def test_other_functions_with_wrong_types(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_empty_batch() -> None:
    plan = planner.explain((0, 5, 6, 7), 8)
    assert plan.items == 0
    assert plan.flops == 0


if __name__ == "__main__":
    with GOLDEN.open("w", newline="") as out:
        rows = list(golden_rows())
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_training_keeps(native: str, layout: str) -> None:
    """The rows add up to the bytes that autograd saves, and name the tensors computed again."""
    model, shape = ghost_ops.models.ghostnet(0.5, 10, dropout=0.0), (2, 3, 64, 64)
    plan = planner.explain_saved(model, shape, channels_last=layout == "nhwc")
    seen: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.dim() == 4 and t.size(0) == 2:
            seen[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    x = with_layout(torch.zeros(shape), layout)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model.train()(x)
    assert out.requires_grad
    assert plan.bytes_kept == sum(seen.values())
    rows = {row.part: row for row in plan.rows}
    assert rows["depthwise, norm"].times == 9
    assert rows["squeeze-excite"].times == 7
    assert rows["convolution, norm, activation"].times == 7  # stem, five shortcuts, the last one
    # u of one depthwise convolution, by hand: 16 channels from 32 x 32 to 16 x 16, 3 x 3 taps.
    values = 2 * 16 * 16 * 16
    assert rows["depthwise, norm"].flops > 2 * 9 * values
    assert 0.8 * plan.bytes_kept < plan.bytes_dropped
    assert "computes again" in str(plan)
    ghost_ops.unfuse(model)
    plain = planner.explain_saved(model, shape)
    assert plain.bytes_dropped == plain.flops == 0
    assert plan.bytes_kept < 0.5 * plain.bytes_kept
