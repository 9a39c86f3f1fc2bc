"""The programs that the GPU report runs: found, limited in time, ended, and understood."""

from __future__ import annotations

import pathlib
import sys
import time
from typing import Any

import pytest
import torch
from gpu_cases import (
    PATIENT,
    ROOT,
    SANITIZER,
    alive,
    new_report,
)

from benchmarks import (
    gpu_programs,
    gpu_report,
    gpu_session,
)
from benchmarks.gpu_programs import OutOfTime

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.usefixtures("scratch")


# ---- other programs


def test_programs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = new_report(tmp_path / "r.json")
    monkeypatch.setenv("PYTHONPATH", "/carried")
    monkeypatch.setenv("GHOST_OPS_BACKEND", "eager")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    names = "A PYTHONPATH GHOST_OPS_BACKEND PYTORCH_CUDA_ALLOC_CONF".split()
    code = f"import os; print(*map(os.environ.get, {names}), os.getcwd())"
    out = gpu_programs.run_program(report, "env", [sys.executable, "-c", code], 60, {"A": "b"})
    assert out.split() == ["b", f"{ROOT}:/carried", "None", "None", str(ROOT)]
    assert "======== env:" in report.log_path.read_text()
    report.deadline = time.monotonic()
    with pytest.raises(OutOfTime):
        gpu_programs.run_program(report, "late", [sys.executable, "-c", code], 60)
    report.deadline += 60
    fail = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match=r"(?s)why.*exit 3"):
        gpu_programs.run_program(report, "exit", fail, 60)


@pytest.mark.parametrize("short_of_time", [False, True])
def test_programs_that_take_too_long(tmp_path: pathlib.Path, short_of_time: bool) -> None:
    report = new_report(tmp_path / "r.json")
    limit, started = 1.5, time.monotonic()
    if short_of_time:
        limit, report.deadline = 60, time.monotonic() + gpu_session.MARGIN + 1.5
    error: Any = OutOfTime if short_of_time else RuntimeError
    with pytest.raises(error, match="^$" if short_of_time else r"slow took longer than 2 s"):
        gpu_programs.run_program(report, "slow", [sys.executable, "-c", PATIENT], limit)
    assert time.monotonic() - started < 50
    child = int(report.log_path.read_text().rpartition("child ")[2])
    assert not alive(child)
    assert not report.children


def test_tools_are_found(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, on_path = tmp_path / "home" / "bin", tmp_path / "path"
    for folder in (home, on_path):
        folder.mkdir(parents=True)
        (folder / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(home.parent))
    assert gpu_programs.find_tool("nvcc") == str(home / "nvcc")
    assert str(home) in gpu_programs.environment()["PATH"].split(":")
    monkeypatch.delenv("CUDA_HOME")
    assert gpu_programs.find_tool("nvcc") == str(on_path / "nvcc")
    assert gpu_programs.find_tool("no-such-tool") is None


def test_caches_without_a_writable_checkout(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu_programs, "SCRATCH", tmp_path / "file" / "build")
    folder = gpu_programs.scratch()
    assert folder.is_dir()
    assert gpu_programs.environment()["TRITON_CACHE_DIR"] == str(folder / "triton")


def test_what_is_missing_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = new_report(tmp_path / "r.json")
    monkeypatch.setattr(gpu_programs, "find_tool", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc was not found: put it on the PATH or set CUDA_H"):
        gpu_programs.build(report)
    with pytest.raises(RuntimeError, match="compute-sanitizer was not found"):
        gpu_programs.sanitizer(report, "memcheck")
    monkeypatch.setattr(gpu_programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pytest is not installed"):
        gpu_programs.tests(report)


def test_versions_and_tools_that_are_not_there() -> None:
    assert gpu_report.version_of("no-such-package") == "not found"
    assert torch.__version__.startswith(gpu_report.version_of("torch"))
    assert gpu_report.output_of(["/no/such/nvidia-smi"]).startswith("unknown (")
    assert gpu_report.output_of([sys.executable, "-c", "raise SystemExit(9)"]).startswith("unknown")


def test_results_that_cannot_be_written(
    on_fake_gpu: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert gpu_report.main(["--out", str(tmp_path / "file" / "r.json")]) == 2
    assert "cannot write results to" in (err := capsys.readouterr().err)
    assert "--out names another file" in err


@pytest.mark.parametrize(
    ("summary", "wrong", "code", "message"),
    [
        ("ERROR SUMMARY: 0 errors", 0, 0, None),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0, None),
        ("RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)", 0, 0, "2 hazards"),
        ("ERROR SUMMARY: 3 errors", 0, 9, "exit 9: =+ ERROR SUMMARY: 3"),
        ("ERROR SUMMARY: 0 errors", 1, 1, "exit 1"),
        ("Target application terminated", 0, 0, "no summary"),
    ],
)
def test_sanitizer(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    summary: str,
    wrong: int,
    code: int,
    message: str | None,
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(summary=summary, wrong=wrong, code=code))
    program.chmod(0o755)
    monkeypatch.setattr(gpu_programs, "find_tool", lambda name: str(program))
    report = new_report(tmp_path / "r.json")
    if message is None:
        found = gpu_programs.sanitizer(report, "memcheck")
        assert found == f"29 cases, {summary.partition(': ')[2]}"
        assert "--report-api-errors no" in report.log_path.read_text()
    else:
        with pytest.raises(RuntimeError, match=message):
            gpu_programs.sanitizer(report, "racecheck")
