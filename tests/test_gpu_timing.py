"""What the GPU report measures, over a fake torch.cuda (fake_gpu.py) that computes on the CPU."""

from __future__ import annotations

import json
import time
from typing import Any

import fake_gpu
import pytest
import torch
from gpu_cases import (
    COPY,
    SMALL,
    failing,
)

from benchmarks import (
    gpu_clock,
    gpu_timing,
    shapes,
)

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.usefixtures("scratch")


# ---- the clock


def test_rotation_goes_round_and_keeps_results_until_the_next_turn() -> None:
    made: list[str] = []
    rotation = gpu_clock.Rotation([lambda n=n: made.append(n) or n for n in "abc"])
    assert [rotation() for _ in range(4)] == ["a", "b", "c", "a"]
    assert rotation.results == ["a", "b", "c"]


@pytest.mark.parametrize(("nbytes", "count"), [(1, 32), (1 << 14, 4), (3 << 13, 3), (1 << 30, 1)])
def test_sets_exceed_the_cache(on_fake_gpu: None, nbytes: int, count: int) -> None:
    assert gpu_clock.set_count(nbytes) == count


def test_times(on_fake_gpu: None) -> None:
    calls = {"short": lambda: time.sleep(1e-3), "long": lambda: time.sleep(3e-2)}
    timed = gpu_clock.time_calls(calls, rounds=3, each=2)
    for name, seconds in (("short", 1e-3), ("long", 3e-2)):
        found = timed[name]
        assert found.device.p20 <= found.device.median <= found.device.p80
        assert found.device.median >= seconds / 2 <= found.call
        assert found.queued_ahead
        assert found.device.rounds == 3
    assert timed["short"].device.median < timed["long"].device.median
    assert timed["short"].call < timed["long"].call
    assert fake_gpu.Device.slept


def test_a_host_that_does_not_keep_up_is_told(on_fake_gpu: None) -> None:
    fake_gpu.Device.behind = True
    timed = gpu_clock.time_calls({"call": lambda: None}, rounds=2)
    assert not timed["call"].queued_ahead
    longest = max(fake_gpu.Device.slept) / gpu_clock.CYCLES_PER_SECOND
    assert longest <= 2.1 * gpu_clock.LONGEST_WAIT  # it does not wait for ever


@pytest.mark.parametrize(
    ("nbytes", "rate"), [(1, 1e9), (1 << 10, 1e9), (1 << 15, 2e9), (1 << 20, 3e9), (1 << 30, 3e9)]
)
def test_copy_rate(nbytes: int, rate: float) -> None:
    assert gpu_clock.copy_rate(COPY, nbytes) == pytest.approx(rate)


def test_the_copy(on_fake_gpu: None) -> None:
    known = gpu_clock.measure_copy()
    assert known["bytes"] == list(gpu_clock.COPY_SIZES)
    assert all(rate > 0 for rate in [*known["bytes_per_s"], known["float16_flops"]])
    json.dumps(known)


# ---- measuring


OPTIONS = gpu_timing.Options(copy=COPY)
ALL = (*gpu_timing.CANDIDATES, gpu_timing.COMPILE)


@pytest.mark.parametrize("mode", ["eval", "train", "graph"])
def test_rows_of_a_shape(on_fake_gpu: None, native: str, mode: str) -> None:
    rows = gpu_timing.time_shape(mode, SMALL, 2, torch.float32, gpu_timing.CANDIDATES, OPTIONS)
    assert [row["provider"] for row in rows] == [c.name for c in gpu_timing.CANDIDATES]
    for row in rows:
        assert row["median_s"] > 0, row
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["call_s"] > 0
        assert row["error"] <= row["allowed"]
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        assert row["share_of_copy"] > 0 and row["share_of_largest_copy"] > 0
    x, out = 2 * 8 * 49 * 4, 2 * 12 * 49 * 4
    assert rows[0]["bytes"] == (3 * x + 2 * out if mode == "train" else x + out)
    if mode == "graph":
        assert fake_gpu.Device.replays > 0


def test_graphs_hold_as_many_calls_as_are_counted(on_fake_gpu: None) -> None:
    made: list[int] = []
    replay = gpu_timing.in_graph(lambda: made.append(1))
    assert len(made) == 3 + gpu_timing.GRAPH_CALLS
    assert len(replay()) == gpu_timing.GRAPH_CALLS


def test_triton_alone_is_held_against_eager(on_fake_gpu: None, native: str) -> None:
    (row,) = gpu_timing.time_shape("eval", SMALL, 1, torch.float32, ALL[2:3], OPTIONS)
    assert row["median_s"] > 0 and row["eager_error"] >= 0


def test_torch_compile_gets_folded_batch_norms_in_eval_and_the_mode_asked_for(
    on_fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        torch, "compile", lambda module, **how: seen.append((module, how)) or module
    )
    for mode, compile_mode in (("eval", "default"), ("train", "max-autotune-no-cudagraphs")):
        options = gpu_timing.Options(copy=COPY, compile_mode=compile_mode)
        candidates = (gpu_timing.EAGER_CL, gpu_timing.COMPILE)
        rows = gpu_timing.time_shape(mode, SMALL, 1, torch.float32, candidates, options)
        assert rows[1]["median_s"] > 0 and rows[1]["compile_mode"] == compile_mode
    folded, training = (module for module, _ in seen)
    assert isinstance(folded.primary_conv[1], torch.nn.Identity) and not folded.training
    assert isinstance(training.primary_conv[1], torch.nn.BatchNorm2d) and training.training
    assert [how["mode"] for _, how in seen] == [None, "max-autotune-no-cudagraphs"]


def test_wrong_results_are_not_timed(
    on_fake_gpu: None, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu_timing.Problem.run

    def wrong(self: Any, candidate: Any, *rest: Any) -> Any:
        call = run(self, candidate, *rest)
        return (lambda: (call()[0] + 1,)) if candidate.ours else call

    monkeypatch.setattr(gpu_timing.Problem, "run", wrong)
    rows = gpu_timing.time_shape("eval", SMALL, 1, torch.float32, gpu_timing.CANDIDATES, OPTIONS)
    assert [row["median_s"] is None for row in rows] == [False, False, True, True]
    assert rows[2]["note"].startswith("wrong result: error")


@pytest.mark.parametrize("measure", [gpu_timing.time_shape, gpu_timing.memory_shape])
def test_a_failure_is_a_finding_and_a_lost_device_is_not_used_on(
    on_fake_gpu: None, native: str, monkeypatch: pytest.MonkeyPatch, measure: Any
) -> None:
    failing(monkeypatch, "native_nchw")
    what = ("train", SMALL, 1, torch.float32, gpu_timing.CANDIDATES)
    rows = measure(*what, OPTIONS)
    assert [row["note"] for row in rows if "note" in row] == [
        "failed: RuntimeError: no kernel image"
    ]
    failing(monkeypatch, "native_nchw", lose=True)
    with pytest.raises(gpu_timing.DeviceLost, match="no kernel image"):
        measure(*what, OPTIONS)
    fake_gpu.Device.lost = False
    rows = measure(*what, gpu_timing.Options(copy=COPY, avoid={"native_nchw": "it crashed"}))
    assert [row["note"] for row in rows if "note" in row] == ["failed: it crashed"]


def test_a_failure_while_timing(
    on_fake_gpu: None, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timing, "time_calls", lambda *a, **k: 1 / 0)
    rows = gpu_timing.time_shape("eval", SMALL, 1, torch.float32, ALL[:2], OPTIONS)
    assert [row["note"] for row in rows] == ["failed: ZeroDivisionError: division by zero"] * 2


def test_backends_that_cannot_run_are_skipped(
    on_fake_gpu: None, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghost_ops.backends import native as backend

    monkeypatch.setattr(backend, "can_run", lambda device, dtype: (False, "not built"))
    rows = gpu_timing.time_shape("eval", SMALL, 1, torch.float32, ALL[:3], OPTIONS)
    assert [row.get("note") for row in rows] == [None, None, "skipped: not built"]


def test_the_native_rows_run_the_native_backend(on_fake_gpu: None, native: str) -> None:
    from ghost_ops import backends

    problem = gpu_timing.Problem(SMALL, 1, torch.float32, "eval")
    seen: list[str] = []
    gpu_timing.as_backend(gpu_timing.NATIVE_CL, lambda: seen.append(backends.requested()))()
    gpu_timing.as_backend(gpu_timing.EAGER_CL, lambda: seen.append("as it was"))()
    assert seen == ["native", "as it was"]
    out = problem.run(gpu_timing.NATIVE_CL)()[0]
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_every_set_is_memory_of_its_own(on_fake_gpu: None) -> None:
    problem = gpu_timing.Problem(SMALL, 1, torch.float32, "train")
    assert problem.sets > 1
    for which in ("x", "grad_out"):
        for layout in ("nchw", "channels_last"):
            found = problem.copies(which, layout)
            assert len({t.data_ptr() for t in found}) == problem.sets
            assert all(torch.equal(t, getattr(problem, which)) for t in found)
            assert all(t.requires_grad is (which == "x") for t in found)


def test_memory_rows(on_fake_gpu: None, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = iter([100, 1000] * 8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    rows = gpu_timing.memory_shape("train", SMALL, 1, torch.float32, ALL[:3], OPTIONS)
    out_bytes = 12 * 49 * 4
    assert [(row["kept"], row["peak"]) for row in rows] == [(900 - out_bytes, 4900)] * 3
    assert rows[0]["x_bytes"] == 8 * 49 * 4


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiling_ahead_runs_every_candidate_once(
    on_fake_gpu: None, native: str, mode: str
) -> None:
    told: list[str] = []
    options = gpu_timing.Options(tell=told.append)
    assert gpu_timing.warm_shape(mode, SMALL, 1, torch.float32, ALL[:4], options) == []
    assert told == [c.name for c in ALL[:4]]


def test_compiling_triton_kernels_ahead(on_fake_gpu: None) -> None:
    """In the interpreter, where there is no GPU."""
    missing = gpu_timing.backend_missing(gpu_timing.TRITON, torch.float16)
    if missing:
        pytest.skip(missing)
    told: list[str] = []
    options = gpu_timing.Options(tell=told.append)
    tiny = shapes.Shape(4, 6, 4)
    gpu_timing.warm_shape("train", tiny, 1, torch.float16, [gpu_timing.TRITON], options)
    assert told == ["triton_cl"]
