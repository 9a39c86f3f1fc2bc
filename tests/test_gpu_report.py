"""The GPU report without a GPU: command line, resuming, tables, and the measuring code on a CPU.

Every number in the tables here is made up by this file, and says so.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_report, gpu_tables, gpu_timing, shapes  # noqa: E402
from benchmarks.gpu_report import OutOfTime, Part, Report  # noqa: E402

META = {"gpu": "No GPU at all", "torch": "0", "sources": "abc", "synthetic": "a test's fixture"}


def synthetic_row(shape: str, provider: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    """A row as time_shape makes them, with a time that nobody measured."""
    row = {
        "question": "gpu", "mode": "eval", "shape": shape, "group": "ghostnet", "count": 1,
        "dtype": "float16", "layout": "nchw", "batch": 256, "provider": provider, "bytes": 1000,
        "median_s": seconds,
    }  # fmt: skip
    if seconds is not None:
        row["share_of_copy"] = 1e-6 / seconds
    return {**row, **more}


SYNTHETIC = [
    synthetic_row("a", "eager_nchw", 8e-6),
    synthetic_row("a", "eager_cl", 4e-6),
    synthetic_row("a", "native_cl", 1e-6),
    synthetic_row("a", "compile_cl", 2e-6),
    synthetic_row("b", "eager_nchw", 9e-6),
    synthetic_row("b", "native_cl", 9e-6),
    synthetic_row("b", "compile_cl", 3e-6),
    synthetic_row("b", "triton_cl", None, note="skipped: not there"),
    synthetic_row("a", "native_cl", None, mode="memory", kept=2**20, peak=3 * 2**20),
]


def new_report(path: pathlib.Path, minutes: float = 1.0, **more: Any) -> Report:
    chosen = more.pop("chosen", shapes.QUICK[:3])
    return Report(path, more.pop("meta", META), minutes, chosen, **more)


# ---- the command line


def test_parts_are_named_once_and_cover_the_grid() -> None:
    names = [part.name for part in gpu_report.all_parts()]
    assert len(set(names)) == len(names)
    for dtype in ("float16", "bfloat16", "float32"):
        for batch in (1, 32, 256):
            assert {f"eval-{dtype}-{batch}", f"train-{dtype}-{batch}"} <= set(names)
        assert f"graph-{dtype}-1" in names
    for needed in ("build", "primitives", "tests", "memcheck", "racecheck", "copy"):
        assert names.index(needed) < names.index("eval-float16-256")
    assert "compile-eval-float16-256" in names
    assert "memory-float16-256" in names


def test_arguments() -> None:
    arguments = gpu_report.parse_arguments(["--part", "build", "copy", "--shapes", "quick"])
    assert arguments.part == ["build", "copy"]
    assert arguments.shapes == shapes.QUICK
    assert gpu_report.parse_arguments([]).shapes == shapes.ALL
    assert gpu_report.parse_arguments([]).minutes < 9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--part", "nonsense"], "unknown nonsense; known: build"),
        (["--minutes", "0.1"], "--minutes"),
        (["--shapes", "nonsense"], "matches no shape"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_report.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [part.name for part in gpu_report.all_parts()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    out = tmp_path / "report.json"
    assert gpu_report.main(["--out", str(out)]) == 2
    assert "there is no GPU to report on: torch" in capsys.readouterr().err
    assert not out.exists()


def test_file_names() -> None:
    assert gpu_report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_gpu_tests_are_found() -> None:
    files = gpu_report.gpu_test_files()
    assert "tests/test_cuda_gpu.py" in files
    assert "tests/test_cuda_prims.py" not in files
    assert all((ROOT / file).exists() for file in files)


# ---- parts and resuming


def test_finished_parts_are_not_run_again(tmp_path: pathlib.Path) -> None:
    ran: list[str] = []

    def work(name: str) -> Part:
        return Part(name, lambda report: ran.append(name) or f"did {name}")

    path = tmp_path / "r.json"
    assert new_report(path).run([work("one")], again=False) == 0
    assert new_report(path).run([work("one"), work("two")], again=False) == 0
    assert ran == ["one", "two"]
    assert new_report(path).run([work("one")], again=True) == 0
    assert ran == ["one", "two", "one"]
    parts = json.loads(path.read_text())["parts"]
    assert [parts[n]["summary"] for n in ("one", "two")] == ["did one", "did two"]
    assert "did two" in path.with_suffix(".md").read_text()


def test_failure_and_lack_of_time_are_told_apart(tmp_path: pathlib.Path) -> None:
    def fail(report: Report) -> str:
        raise RuntimeError("first line\nthe reason")

    def slow(report: Report) -> str:
        report.rows.append(SYNTHETIC[0])
        raise OutOfTime

    path = tmp_path / "r.json"
    assert new_report(path).run([Part("a", fail), Part("b", slow)], again=False) == 1
    document = json.loads(path.read_text())
    assert document["parts"]["a"]["status"] == "failed"
    assert document["parts"]["a"]["summary"] == "the reason"
    assert "in fail" in document["parts"]["a"]["log"]
    assert document["parts"]["b"]["status"] == "out of time"
    assert document["rows"] == [SYNTHETIC[0]]
    assert new_report(path).run([Part("b", lambda report: "done")], again=False) == 0
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_no_part_starts_after_the_time(tmp_path: pathlib.Path) -> None:
    report = new_report(tmp_path / "r.json", minutes=0.0)
    assert report.run([Part("a", lambda report: pytest.fail("ran"))], again=False) == 0
    assert report.document["parts"]["a"]["status"] == "out of time"


@pytest.mark.parametrize("key", ["gpu", "torch", "sources"])
def test_reports_of_something_else_are_not_taken_over(tmp_path: pathlib.Path, key: str) -> None:
    path = tmp_path / "r.json"
    report = new_report(path)
    report.rows.append(SYNTHETIC[0])
    report.save()
    assert new_report(path).rows == [SYNTHETIC[0]]
    assert new_report(path, meta={**META, key: "other"}).rows == []
    assert new_report(path, fresh=True).rows == []
    path.write_text("{ half a fi")
    assert new_report(path).rows == []


def test_a_part_goes_on_where_it_stopped(tmp_path: pathlib.Path) -> None:
    path, measured = tmp_path / "r.json", []

    def measure(shape: shapes.Shape) -> list[dict[str, Any]]:
        if len(measured) == 2:
            raise OutOfTime
        measured.append(shape.name)
        return [synthetic_row(shape.name, "native_cl", 1e-6)]

    def part(report: Report) -> str:
        return gpu_report.each_shape(report, "eval", "float16", 256, measure)

    new_report(path).run([Part("p", part)], again=False)
    assert json.loads(path.read_text())["parts"]["p"]["status"] == "out of time"
    first = list(measured)
    measured.clear()
    new_report(path).run([Part("p", part)], again=False)
    assert first + measured == [shape.name for shape in shapes.QUICK[:3]]
    assert json.loads(path.read_text())["parts"]["p"]["summary"] == "3 rows"


def test_programs(tmp_path: pathlib.Path) -> None:
    report = new_report(tmp_path / "r.json")
    code = "import os; print(os.environ['A'], os.getcwd())"
    out = gpu_report.run_program(report, [sys.executable, "-c", code], 60, {"A": "b"})
    assert out.split() == ["b", str(ROOT)]
    with pytest.raises(RuntimeError, match="exit 3"):
        gpu_report.run_program(report, [sys.executable, "-c", "raise SystemExit(3)"], 60, None)
    wait = [sys.executable, "-c", "import time; time.sleep(30)"]
    with pytest.raises(RuntimeError, match="longer than 0 s"):
        gpu_report.run_program(report, wait, 0.2, None)
    report.deadline = gpu_report.time.monotonic() + gpu_report.MARGIN + 0.2
    with pytest.raises(OutOfTime):
        gpu_report.run_program(report, wait, 60, None)


# ---- tables


def test_summary_of_synthetic_rows() -> None:
    part = gpu_tables.grouped(SYNTHETIC)["eval", "float16", 256, "ghostnet"]
    summary = gpu_tables.summarize(part)
    assert summary["shapes"] == 2
    assert summary["over_eager"]["native_cl"] == pytest.approx((4 * 1) ** 0.5)
    assert summary["over_compile"]["native_cl"] == pytest.approx((2 / 3) ** 0.5)
    assert summary["share_of_copy"]["native_cl"] == pytest.approx((1 / 9) ** 0.5)
    assert summary["slower"] == ["b"]


def test_rendered_tables_of_synthetic_rows() -> None:
    parts = {"build": {"status": "done", "summary": "made up", "seconds": 1.0}}
    text = gpu_tables.render({"meta": META, "parts": parts, "rows": SYNTHETIC})
    assert "Not a measurement: a test's fixture" in text
    assert "| build | done | 1 | made up |" in text
    assert "| a | 8.0 | 4.0 | 1.0 | 2.0 |  | 4.00 | 2.00 | 100% |" in text
    assert "| b | 9.0 |  | 9.0 | 3.0 |  | 1.00 | 0.33 | 11% |" in text
    assert "- native_cl: 2.00x the faster eager layout, 0.82x torch.compile; 33%" in text
    assert "slower than PyTorch at its best: b" in text
    assert "| a | 1.0 | 3.0 |" in text  # memory, MiB
    assert "- eval float16 triton_cl: skipped: not there (1 rows)" in text
    for line in text.splitlines():  # every line of a table has the columns of its heading
        if line.startswith("| shape"):
            columns = line.count("|")
        elif line.startswith(("| a", "| b ")) and "made up" not in line:
            assert line.count("|") == columns


# ---- measuring, on the CPU in place of a GPU


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "COPY_SIZES", (1 << 16, 1 << 20))
    monkeypatch.setattr(gpu_timing, "GEMM_SIZE", 64)


SMALL = shapes.Shape(8, 12, 7)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_rows_of_a_shape(
    on_cpu: None, native: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghost_ops import backends

    without = {name: b for name, b in backends.BACKENDS.items() if name != "triton"}
    monkeypatch.setattr(backends, "BACKENDS", without)
    roofline = gpu_timing.measure_roofline()
    assert roofline.gemm_peak > 0
    rows = gpu_timing.time_shape(
        mode, SMALL, 2, torch.float32, gpu_timing.CANDIDATES, roofline, rounds=2
    )
    assert [row["provider"] for row in rows] == [c.name for c in gpu_timing.CANDIDATES]
    found = {row["provider"]: row for row in rows}
    for name in ("eager_nchw", "eager_cl", "native_nchw", "native_cl"):
        row = found[name]
        assert row["median_s"] > 0, row
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["error"] <= row["allowed"]
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        assert row["share_of_copy"] > 0
    assert found["triton_cl"]["note"] == "skipped: ghost_ops has no backend 'triton'"
    assert found["triton_cl"]["median_s"] is None


def test_wrong_results_are_not_timed(
    on_cpu: None, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu_timing.Problem.run

    def wrong(self: Any, candidate: Any, *rest: Any) -> Any:
        call = run(self, candidate, *rest)
        return (lambda: (call()[0] + 1,)) if candidate.ours else call

    monkeypatch.setattr(gpu_timing.Problem, "run", wrong)
    rows = gpu_timing.time_shape(
        "eval", SMALL, 1, torch.float32, gpu_timing.CANDIDATES[:4],
        gpu_timing.measure_roofline(), rounds=1,
    )  # fmt: skip
    assert [row["median_s"] is None for row in rows] == [False, False, True, True]
    assert rows[2]["note"].startswith("wrong result: error")


def test_the_native_rows_run_the_native_backend(on_cpu: None, native: str) -> None:
    from ghost_ops import backends

    problem = gpu_timing.Problem(SMALL, 1, torch.float32)
    seen = []
    native_cl = gpu_timing.CANDIDATES[3]
    gpu_timing.as_backend(native_cl, lambda: seen.append(backends.requested()))()
    gpu_timing.as_backend(gpu_timing.EAGER_CL, lambda: seen.append("as it was"))()
    assert seen == ["native", "as it was"]
    out = problem.run(native_cl, "eval", "default")()[0]
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_memory_rows(on_cpu: None, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = iter([100, 1000] * 8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    rows = gpu_timing.memory_shape(SMALL, 1, torch.float32, gpu_timing.CANDIDATES[:3])
    out_bytes = 12 * 49 * 4
    assert [(row["kept"], row["peak"]) for row in rows] == [(900 - out_bytes, 4900)] * 3
    assert rows[0]["x_bytes"] == 8 * 49 * 4
