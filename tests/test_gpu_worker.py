"""The process that measures for the GPU report: what it answers, and what its end costs."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import pytest
from gpu_cases import (
    COPY,
    SMALL,
    eval_part,
    failing,
    new_report,
    workers,
)

from benchmarks import (
    gpu_report,
    gpu_session,
    gpu_worker,
    shapes,
)
from benchmarks.gpu_programs import OutOfTime

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.usefixtures("scratch")


# ---- the process that measures


def job(**more: Any) -> dict[str, Any]:
    what = gpu_report.Measurement("eval beside it", "time", "eval", "float32", 1, ("eager_cl",))
    return what.job(SMALL, copy=COPY, **more)


def test_serving(on_fake_gpu: None, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    lines = [
        json.dumps({"kind": "copy"}), json.dumps(job()), json.dumps(job(kind="memory")),
        json.dumps(job(candidates=["no such"])), json.dumps(job(kind="warm")),
    ]  # fmt: skip
    assert gpu_worker.serve(lines, said.append) == 0
    kinds = [next(iter(message)) for message in said]
    assert kinds == ["ready", "copy", "at", "at", "rows", "at", "rows", "failed", "at", "rows"]
    assert [row["mode"] for row in said[4]["rows"]] == ["eval beside it"]
    assert said[4]["rows"][0]["median_s"] > 0 and said[6]["rows"][0]["peak"] > 0
    assert "KeyError: 'no such'" in said[7]["failed"]
    failing(monkeypatch, "native_cl", lose=True)
    said.clear()
    assert gpu_worker.serve([json.dumps(job(candidates=["native_cl"]))], said.append) == 1
    assert said[-1] == {"lost": "RuntimeError: no kernel image"}


def test_a_part_goes_on_where_it_stopped(tmp_path: pathlib.Path, stub_workers: None) -> None:
    path = tmp_path / "r.json"
    chosen = [shapes.Shape(8, 12, size) for size in (3, 5, 7)]
    report = new_report(path, chosen=chosen)
    report.document["copy"] = COPY
    ask = report.ask

    def twice(*given: Any) -> Any:
        if len(report.rows) == 2:
            raise OutOfTime
        return ask(*given)

    report.ask = twice  # type: ignore[method-assign]
    report.run([[eval_part("eager_cl")]], again=False)
    assert json.loads(path.read_text())["parts"]["p"]["status"] == "out of time"
    first = [row["shape"] for row in report.rows]
    again = new_report(path, chosen=chosen)
    again.run([[eval_part("eager_cl")]], again=False)
    assert [row["shape"] for row in again.rows] == [shape.name for shape in chosen]
    assert again.rows[:2] == report.rows and len(first) == 2
    assert json.loads(path.read_text())["parts"]["p"]["summary"] == "3 rows"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("crash", "the process ended: SIGSEGV"),
        ("hang", "no answer in 2 s"),
        ("lose", "RuntimeError: an illegal memory access"),
    ],
)
def test_what_brings_the_process_down_costs_one_candidate(
    tmp_path: pathlib.Path,
    stub_workers: None,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    reason: str,
) -> None:
    monkeypatch.setenv("STUB_FAULT", f"{fault}:eager_nchw")
    monkeypatch.setattr(gpu_report, "SILENCE", 2.0)
    report = new_report(tmp_path / "r.json", chosen=[SMALL])
    report.document["copy"] = COPY
    assert report.run([[eval_part("eager_nchw", "eager_cl")]], again=False) == 0
    assert [row.get("note") for row in report.rows] == [f"failed: {reason}", None]
    assert report.losses == 1 and not report.children
    assert "what libraries print" in report.log_path.read_text()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("fail:SHAPE", "RuntimeError: out of memory"), ("kill:timing", "the process ended: SIGKILL")],
)
def test_a_shape_that_cannot_be_measured_costs_itself_alone(
    tmp_path: pathlib.Path,
    stub_workers: None,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    reason: str,
) -> None:
    monkeypatch.setenv("STUB_FAULT", fault)
    report = new_report(tmp_path / "r.json", chosen=shapes.QUICK[:2])
    assert report.run([[eval_part("eager_nchw", "eager_cl")]], again=False) == 0
    assert report.document["copy"]["bytes"] == [1]  # measured as it was not there
    assert [row["note"].partition(";")[0] for row in report.rows] == [f"failed: {reason}"] * 4
    assert report.document["parts"]["p"]["summary"] == "4 rows, 4 failed"


def test_a_part_is_done_when_every_shape_of_this_run_is(
    tmp_path: pathlib.Path, stub_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of few shapes, or one before the library was built, leaves the rest to the next."""
    what = gpu_report.Measurement("eval", "time", "eval", "float32", 1, ("eager_cl", "native_cl"))
    monkeypatch.setattr(gpu_report, "measurements", lambda: {"p": what})
    (part,) = next(g for g in gpu_report.all_parts() if g[0].name == "p")
    path, two = tmp_path / "r.json", shapes.QUICK[:2]
    first = new_report(path, chosen=two[:1])
    assert first.run([[part]], again=False) == 0
    second = new_report(path, chosen=two)
    assert second.run([[part]], again=False) == 0
    assert [row["shape"] for row in second.rows] == [s.name for s in two for _ in range(2)]
    second.rows[1]["note"] = "skipped: not built"
    second._lines.clear()
    second.save()
    third = new_report(path, chosen=two)
    assert len(third.rows) == 3
    third.run([[part]], again=False)
    assert len(third.rows) == 4 and not any("note" in row for row in third.rows)
    fourth = new_report(path, chosen=two, minutes=0.0)  # complete: it needs no time
    fourth.run([[part]], again=False)
    assert fourth.document["parts"]["p"]["status"] == "done"


def test_who_brings_down_one_process_after_another_is_avoided(
    tmp_path: pathlib.Path, stub_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAULT", "crash:eager_nchw")
    chosen = [shapes.Shape(8, 12, size) for size in (3, 4, 5, 6, 7)]
    report = new_report(tmp_path / "r.json", chosen=chosen)
    report.document["copy"] = COPY
    report.run([[eval_part("eager_nchw", "eager_cl")]], again=False)
    notes = [row["note"] for row in report.rows if "note" in row]
    assert notes[:3] == ["failed: the process ended: SIGSEGV"] * 3
    assert notes[3:] == ["failed: ended 3 processes at other shapes"] * 2
    assert report.losses == 3


def test_a_process_that_does_not_start(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(monkeypatch, "-c", "raise SystemExit(5)")
    report = new_report(tmp_path / "r.json")
    report.document["copy"] = COPY
    assert report.run([[eval_part("eager_cl")]], again=False) == 1
    assert "the process ended: exit status 5; see r.log" in report.document["parts"]["p"]["summary"]
    with pytest.raises(RuntimeError, match="processes that measure have ended"):
        report.ask({"kind": "copy", "avoid": {}}, 60)


def test_a_job_that_outlasts_the_time(
    tmp_path: pathlib.Path, stub_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAULT", "hang:eager_cl")
    report = new_report(tmp_path / "r.json", chosen=[SMALL])
    report.document["copy"] = COPY
    report.deadline = time.monotonic() + gpu_session.MARGIN + 1.0
    assert report.run([[eval_part("eager_cl")]], again=False) == 0
    assert report.document["parts"]["p"]["status"] == "out of time"
    assert report.rows == []


def test_a_worker_that_ended_unnoticed(tmp_path: pathlib.Path, stub_workers: None) -> None:
    report = new_report(tmp_path / "r.json", chosen=[SMALL])
    first = report.ask({"kind": "copy", "avoid": {}}, 60)
    assert report._worker is not None
    report._worker.process.kill()
    report._worker.process.wait()
    with pytest.raises(RuntimeError, match="the process"):
        report.ask({"kind": "copy", "avoid": {}}, 60)
    assert report.ask({"kind": "copy", "avoid": {}}, 60).keys() == first.keys()
    report.stop()


def test_compiling_ahead(
    tmp_path: pathlib.Path, stub_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = gpu_report.Measurement("eval", "time", "eval", "float32", 1, ("triton_cl", "eager_cl"))
    monkeypatch.setattr(gpu_report, "measurements", lambda: {"p": what})
    monkeypatch.setenv("STUB_FAULT", "crash:eager_cl")
    report = new_report(tmp_path / "r.json", chosen=[SMALL])
    assert gpu_report.warm(report) == "0 of 1 compiled ahead by 1 processes"
    monkeypatch.delenv("STUB_FAULT")
    assert gpu_report.warm(report) == "1 of 1 compiled ahead by 1 processes"
    assert not report.children
    report.shapes = []
    assert gpu_report.warm(report) == "0 of 0 compiled ahead by 0 processes"
    monkeypatch.setattr(gpu_report, "WARM_SECONDS", 0.0)
    report.shapes = [SMALL]
    assert gpu_report.warm(report) == "0 of 1 compiled ahead by 1 processes"
