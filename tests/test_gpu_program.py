"""``benchmarks/gpu.py``: its runner on made-up steps, its steps on a GPU that is not there."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_steps import clock, fit, sheet, steps
from benchmarks.harness import shapes, subjects

ROOT = Path(__file__).resolve().parent.parent
Rows = list[dict[str, Any]]


# ---------------------------------------------------------------- the runner


class Program(gpu.Step):
    """A step that runs Python code given as its purpose; OUT is the folder."""

    def command(self, arguments: argparse.Namespace) -> list[str]:
        return [sys.executable, "-c", f"OUT = {str(arguments.out)!r}\n{self.purpose}"]


WRITE = 'open(OUT + \'/rows.jsonl\', \'a\').write(\'{"step": "x", "case": "%s"}\\n\')'


def run_programs(tmp_path: Path, *programs: tuple[str, str, float], budget: float = 60) -> Rows:
    """The rows that steps (name, code, seconds) leave; the runner says that one of them failed."""
    arguments = SimpleNamespace(out=tmp_path, budget=budget, run="now")
    chosen = [Program(name, code, seconds, False) for name, code, seconds in programs]
    assert gpu.StepRunner(arguments).run_steps(chosen) == 1  # type: ignore[arg-type]
    return sheet.read_rows(tmp_path / "rows.jsonl")


def test_a_crash_or_a_time_limit_loses_one_step(tmp_path: Path) -> None:
    crash = f"{WRITE % 'early'}\nimport os; os.kill(os.getpid(), 11)"
    hang = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    started = time.monotonic()
    told = ("c", "raise SystemExit('told so')", 10)
    programs = (("a", crash, 10), ("b", hang, 0.4), told, ("d", WRITE % "late", 10))
    rows = run_programs(tmp_path, *programs)
    assert time.monotonic() - started < 30
    assert [row["case"] for row in rows if "case" in row] == ["early", "late"]
    notes = {row["step"]: row.get("note", "") for row in rows if "seconds" in row}
    assert notes["a"].startswith("failed: ended with -11") and "time limit" in notes["b"]
    assert notes["c"].endswith("told so") and notes["d"] == ""
    text = sheet.render(rows)
    assert "NOT MEASURED b: failed: time limit of 1 s" in text and "d" not in text.split()


def test_the_budget_drops_the_last_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_programs(
        tmp_path, ("a", "raise SystemExit(1)", 20), ("b", "", 30), ("c", "", 20), budget=55
    )
    assert [row["step"] for row in rows] == ["a", "b"]
    assert "c: left out, the budget is 55 s" in capsys.readouterr().out


def test_an_unfinished_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"step": "a"}\n{"step": ')
    assert sheet.read_rows(tmp_path / "rows.jsonl") == [{"step": "a"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "evil"], "--steps: evil: not one of correct, eval"),
        (["--write"], "--write goes with --fit"),
        (["--budget", "0"], "--budget: expected seconds above 0"),
        (["--library", "nowhere.so", "--steps", "eval"], "--library: nowhere.so is not a file"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--out", str(tmp_path), *arguments])
    assert message in str(caught.value) + capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert gpu.main(["--out", str(tmp_path / "file" / "folder"), "--steps"]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    status = steps.main("eval", Path("rows.jsonl"), Path("plans.json"), False, {"run": "r"})
    assert status == gpu.NO_GPU and "is a build without CUDA" in capsys.readouterr().out


# ---------------------------------------------------------------- a GPU that is not there


class Event:
    """A moment of the device's time, which here is the host's."""

    def __init__(self, enable_timing: bool) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.moment - self.moment)

    query = synchronize = lambda self: None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch.cuda over CPU tensors, with small problems; ours runs the native CPU kernels."""
    nothing = SimpleNamespace(wait_stream=lambda other: None, replay=lambda: None)
    properties = SimpleNamespace(name="Fake GPU", L2_cache_size=1 << 12)
    properties.multi_processor_count = 132
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda: (9, 0),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "CUDAGraph": lambda: nothing,
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "memory_allocated": lambda: 1 << 20,
        "max_memory_allocated": lambda: 3 << 20,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for module in (clock, steps):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    two = {"void ghost::ghost_apply_kernel<half>(A)": [2, 9.0], "ghost_apply_kernel<B>": [1, 1.0]}
    monkeypatch.setattr(clock, "kernels", lambda call: two)
    monkeypatch.setattr(clock, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(clock, "ROUNDS", 2)
    monkeypatch.setattr(steps, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(steps, "BATCH", 4)
    small = (shapes.Shape(4, 6, 5), shapes.Shape(4, 10, 5, "none"))
    for name in ("GHOSTNET", "QUICK", "YOLO", "ALL"):
        monkeypatch.setattr(shapes, name, small)
    monkeypatch.setattr(shapes, "select", lambda names: small[:1])
    tiny = SimpleNamespace(plain=lambda size: subjects.ghostnet(0.1).make())
    monkeypatch.setattr(subjects, "NETWORKS", {"ghostnet-1.0": tiny})
    monkeypatch.setattr(steps, "images", lambda b, t: steps.random(b, 3, 32, t, 3))
    return monkeypatch


def run(
    tmp_path: Path, step: str, digest: str = "d", resume: bool = False, machine: str = "Fake GPU"
) -> Rows:
    """A step's new rows."""
    path = tmp_path / "rows.jsonl"
    meta = {"step": "meta", "run": "r", "device": "Fake GPU", "torch": "2", "cuda": "13"}
    if not path.exists():
        sheet.write_row(path, {**meta, "commit": "c"})
    before = len(sheet.read_rows(path))
    plans = {"eval torch.float16 4 4-6@5-relu": 7.0}
    common = {"digest": digest, "run": "r"}
    steps.STEPS[step](sheet.Sheet(path, step, common, plans, resume, (machine, "2")))
    return sheet.read_rows(path)[before:]


@pytest.mark.parametrize("step", ["correct", "eval", "network", "train"])
def test_steps(device: pytest.MonkeyPatch, tmp_path: Path, step: str) -> None:
    rows = run(tmp_path, step)
    counts = {"correct": 12, "eval": 1 + 2 * 3, "network": 8, "train": 2 * (2 + 2 * 2)}
    assert len(rows) == counts[step]
    for row in rows:
        assert "note" not in row and row["digest"] == "d" and row["p20_us"] <= row["us"]
        if row.get("images_per_s"):
            assert row["kernels"] == {"ghost_apply_kernel": [3, 10.0]} and row["launches"] == 3
            assert row["images_per_s"] == pytest.approx(row["batch"] / row["wall_us"] * 1e6, 1e-4)
        elif row["case"] != "copy":
            assert row["error"] <= row["allowed"]
    predicted = [row for row in rows if row.get("predicted_us")]
    assert [row["layout"] for row in predicted] == ["channels_last"] * (step == "eval")
    assert 1 <= len(sheet.render(rows).splitlines()) <= 60


def test_measured_plans_can_be_read(device: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(tmp_path, "plans-1")
    assert [row["plan"]["device"] for row in rows] == ["Fake GPU"] * 2
    file = fit.read(tmp_path / "rows.jsonl")
    assert (file.device, file.rows, file.skipped) == ("Fake GPU", 2, [])
    for one, row in zip(file.plans, rows, strict=True):
        assert (one.shape.name, one.sm) == (row["case"], 90)
        assert list(one.measured.values()) == [row["us"]]
    fewer = SimpleNamespace(name="Half a GPU", L2_cache_size=1 << 12, multi_processor_count=66)
    device.setattr(torch.cuda, "get_device_properties", lambda device: fewer)
    (row,) = run(tmp_path, "plans-2")
    assert "66 multiprocessors" in row["note"]


def test_resuming(device: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of others stay, ours go with the digest of our sources."""
    assert len(run(tmp_path, "eval", "old")) == 7
    assert run(tmp_path, "eval", "old", resume=True) == []
    again = run(tmp_path, "eval", "new", resume=True)
    assert {row["provider"] for row in again} >= {"ours"}
    assert "copy" not in {row["case"] for row in again}
    assert len(run(tmp_path, "eval", "new", resume=True, machine="Another")) == 7


def test_a_candidate_that_fails_or_is_wrong(device: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare = steps.Candidate.prepare

    def faulty(self: steps.Candidate, *given: Any) -> Any:
        call, result = prepare(self, *given)
        if self.family == "ours":
            if result[0].size(1) == 6:
                raise RuntimeError("no kernel image\nis available")
            result = (result[0] + 1, *result[1:])
        return call, result

    device.setattr(steps.Candidate, "prepare", faulty)
    rows = run(tmp_path, "eval")
    notes = {row["case"]: row["note"] for row in rows if "note" in row}
    assert notes["4-6@5-relu"] == "failed: RuntimeError: no kernel image is available"
    assert notes["4-10@5-linear"] == "wrong result"
    assert all("us" in row for row in rows if row.get("provider") == "eager")
    assert sheet.render(rows).count("NOT MEASURED") == 2


def test_a_network_that_is_wrong(device: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def shifted(plain: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.Sequential(plain, torch.nn.Hardtanh(-0.01, 0.01))

    device.setattr(steps, "fused", shifted)
    rows = run(tmp_path, "network")
    assert [row["provider"] for row in rows if row.get("note") == "wrong result"] == ["ours"] * 2


def test_counters_are_read() -> None:
    metrics = [*steps.NCU_METRICS.values(), steps.STALL.format("barrier")]
    header = ["ID", "Kernel Name", *metrics]
    line = ["0", "void ghost::cuda::ghost_apply_kernel<A>(B)", "1,234.5"]
    line += ["50"] * (len(metrics) - 1)
    text = "==PROF== noise\n" + "\n".join(
        ",".join(f'"{word}"' for word in words) for words in (header, [""] * len(header), line)
    )
    (row,) = steps.ncu_rows(text)
    assert (row["kernel"], row["ncu_us"]) == ("ghost_apply_kernel", 1234.5)
    assert row["stalls"]["barrier"] == 50.0
    assert "ncu ghost_apply_kernel" in sheet.render([{"step": "ncu", **row}])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")), ids=str)
def test_committed_results(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    runs = {row["run"] for row in rows if row["step"] == "meta" and row["device"]}
    assert {row["run"] for row in rows} == runs
    assert all("us" in row for row in rows if "bytes" in row and "note" not in row)
    assert len(sheet.render(rows).splitlines()) <= 60
