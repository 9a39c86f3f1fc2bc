"""The GPU report without a GPU: command line, resuming, tables, and all of it over a fake
torch.cuda (fake_gpu.py), which computes on the CPU.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import fake_gpu
import pytest
import torch
from gpu_cases import (
    META,
    PATIENT,
    ROOT,
    SANITIZER,
    SMALL,
    SYNTHETIC,
    alive,
    new_report,
    synthetic_row,
)

from benchmarks import (
    gpu_programs,
    gpu_report,
    gpu_session,
    gpu_tables,
    gpu_timing,
    shapes,
)
from benchmarks.gpu_programs import OutOfTime
from benchmarks.gpu_session import Part, Report

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.usefixtures("scratch")


# ---- the command line


def test_parts_are_named_once_and_cover_the_grid() -> None:
    names = [part.name for group in gpu_report.all_parts() for part in group]
    assert len(set(names)) == len(names)
    for dtype in ("float16", "bfloat16", "float32"):
        for batch in (1, 32, 256):
            for kind in ("eval", "train", "triton-eval", "triton-train"):
                assert f"{kind}-{dtype}-{batch}" in names
        for kind in ("graph", "triton-graph"):
            assert f"{kind}-{dtype}-1" in names
    for needed in ("build", "primitives", "tests", "memcheck", "racecheck", "warm", "copy"):
        assert names.index(needed) < names.index("eval-float16-256")
    for mode in ("eval", "train"):
        assert f"compile-{mode}-float16-256" in names
        assert f"max-autotune-{mode}-float16-256" in names
    assert {"memory-float16-256", "triton-tests"} <= set(names)
    assert names[0] == "build"


def test_nothing_is_timed_beside_anything_else() -> None:
    measuring = {"copy", *gpu_report.measurements()}
    for group in gpu_report.all_parts():
        if measuring & {part.name for part in group}:
            assert len(group) == 1


def test_every_candidate_and_mode_is_known() -> None:
    for name, what in gpu_report.measurements().items():
        assert set(what.candidates) <= set(gpu_timing.NAMED), name
        json.dumps(what.job(shapes.ALL[0]))


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
        (["--minutes", "nan"], "--minutes"),
        (["--shapes", "nonsense"], "matches no shape"),
        (["--out", "a.md"], "expected a .json file"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_report.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--list"]) == 0
    names = [part.name for group in gpu_report.all_parts() for part in group]
    assert capsys.readouterr().out.split() == names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_without_a_gpu(
    cuda: str | None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    out = tmp_path / "report.json"
    assert gpu_report.main(["--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "there is no GPU to report on: torch" in err
    assert ("a build without CUDA" if cuda is None else "finds no CUDA device") in err
    assert not out.exists()


def test_file_names() -> None:
    assert gpu_session.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_gpu_tests_are_found() -> None:
    files = gpu_programs.gpu_test_files(triton=False)
    assert "tests/test_cuda_gpu.py" in files
    assert "tests/test_cuda_prims.py" not in files
    triton = gpu_programs.gpu_test_files(triton=True)
    names = ("forward", "launches", "ops", "training")
    assert {f"tests/test_triton_{name}.py" for name in names} <= set(triton)
    assert not set(files) & set(triton)
    assert all((ROOT / file).exists() for file in files + triton)


# ---- parts and resuming


def test_finished_parts_are_not_run_again(tmp_path: pathlib.Path) -> None:
    ran: list[str] = []

    def work(name: str, always: bool = False) -> list[Part]:
        return [Part(name, lambda report: ran.append(name) or f"did {name}", always)]

    path = tmp_path / "r.json"
    build = work("build", always=True)  # a second machine has the rows, but not the library
    assert new_report(path).run([build, work("one")], again=False) == 0
    assert new_report(path).run([build, work("one"), work("two")], again=False) == 0
    assert ran == ["build", "one", "build", "two"]
    assert new_report(path).run([work("one")], again=True) == 0
    assert ran[4:] == ["one"]
    parts = json.loads(path.read_text())["parts"]
    assert [parts[n]["summary"] for n in ("one", "two")] == ["did one", "did two"]
    assert "did two" in path.with_suffix(".md").read_text()


def test_failure_and_lack_of_time_are_told_apart(tmp_path: pathlib.Path) -> None:
    def fail(report: Report) -> str:
        raise RuntimeError("first line\nthe reason")

    def slow(report: Report) -> str:
        report.add([SYNTHETIC[0]])
        raise OutOfTime

    path = tmp_path / "r.json"
    assert new_report(path).run([[Part("a", fail)], [Part("b", slow)]], again=False) == 1
    document = json.loads(path.read_text())
    assert document["parts"]["a"]["status"] == "failed"
    assert document["parts"]["a"]["summary"] == "the reason"
    assert "in fail" in document["parts"]["a"]["log"]
    assert document["parts"]["b"]["status"] == "out of time"
    assert document["rows"] == [SYNTHETIC[0]]
    ran: list[str] = []
    parts = [[Part(n, lambda report, n=n: ran.append(n) or "done")] for n in "ab"]
    assert new_report(path).run(parts, again=False) == 0
    assert ran == ["b", "a"]  # what failed before comes last
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_parts_of_a_group_run_side_by_side(tmp_path: pathlib.Path) -> None:
    together = threading.Barrier(3)

    def wait(report: Report) -> str:
        together.wait(timeout=30)
        return "waited"

    def fail(report: Report) -> str:
        raise RuntimeError("no")

    report = new_report(tmp_path / "r.json")
    parts = [Part("a", wait), Part("b", wait), Part("c", wait), Part("d", fail)]
    assert report.run([parts], again=False) == 1
    states = report.document["parts"]
    assert [states[n]["status"] for n in "abcd"] == ["done", "done", "done", "failed"]


def test_no_part_starts_after_the_time(tmp_path: pathlib.Path) -> None:
    report = new_report(tmp_path / "r.json", minutes=0.0)
    assert report.run([[Part("a", lambda report: pytest.fail("ran"))]], again=False) == 0
    assert report.document["parts"]["a"]["status"] == "out of time"


@pytest.mark.parametrize("key", gpu_session.SAME)
def test_reports_of_something_else_are_kept_aside(tmp_path: pathlib.Path, key: str) -> None:
    path = tmp_path / "r.json"
    report = new_report(path)
    skipped = synthetic_row("a", "native_nchw", None, note="skipped: not built")
    report.add([SYNTHETIC[0], skipped])
    assert new_report(path).rows == [SYNTHETIC[0]]  # the library may have been built since
    before = path.read_text()
    assert new_report(path, fresh=True).rows == []
    assert new_report(path, meta={**META, key: "other"}).rows == []
    assert [p.read_text() for p in tmp_path.glob("r-*.json")] == [before]


@pytest.mark.parametrize("text", ["{ half a fi", "[]", "{}", '{"meta": 3}'])
def test_a_damaged_file_is_no_report(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    assert new_report(path).rows == []


def test_broken_tables_lose_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    report = new_report(path)
    report.add(SYNTHETIC)
    monkeypatch.setattr(gpu_tables, "render", lambda document: 1 / 0)
    assert report.run([[Part("a", lambda report: "done")]], again=False) == 0
    assert json.loads(path.read_text())["rows"] == SYNTHETIC
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_rows_are_put_into_words_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device waits for the file after each shape; a run has thousands of rows."""
    report = new_report(tmp_path / "r.json")
    report.add([dict(SYNTHETIC[0], error=i / 7) for i in range(100)])
    encoded: list[Any] = []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda o, **how: encoded.append(o) or dumps(o, **how))
    report.add([SYNTHETIC[1]])
    assert len(encoded) == 2  # the head and the new one
    report.drop(lambda row: row is not SYNTHETIC[1])
    report.add([SYNTHETIC[2]])
    assert json.loads(report.path.read_text())["rows"] == SYNTHETIC[1:3]


# ---- tables


def test_summary_of_synthetic_rows() -> None:
    part = gpu_tables.grouped(SYNTHETIC)["eval", "float16", 256, "ghostnet"]
    summary = gpu_tables.summarize(part)
    assert summary["shapes"] == 2
    assert summary["over_eager"]["native_cl"] == pytest.approx((4 * 1) ** 0.5)
    assert summary["called_over_eager"]["native_cl"] == pytest.approx((4 * 1) ** 0.5)
    assert summary["over_compile"]["native_cl"] == pytest.approx((2 / 3) ** 0.5)
    assert summary["share_of_copy"]["native_cl"] == pytest.approx((1 / 9) ** 0.5)
    assert summary["slower"] == {"native_cl": ["b"]}


def test_rendered_tables_of_synthetic_rows() -> None:
    parts = {"build": {"status": "done", "summary": "made up", "seconds": 1.0}}
    text = gpu_tables.render({"meta": META, "parts": parts, "rows": SYNTHETIC})
    assert "Not a measurement: a test's fixture" in text
    assert "| build | done | 1 | made up |" in text
    assert "| a | 8.0 | 4.0 | 1.0 | 2.0 |  | 4.00 | 2.00 | 100% |" in text
    assert "| b | 9.0 |  | 9.0 | 3.0 |  | 1.00 | 0.33 | 11% |" in text
    assert (
        "- native_cl: 2.00x the faster eager layout (calls from Python 2.00x), 0.82x "
        "torch.compile, 33% of a device copy as large, 17% of the largest; slower than PyTorch at "
        "its best: b" in text
    )
    assert "- of 1 rows the device time holds some of the host's" in text
    assert "| a | 8.0 | 9.0 | 1.0 | 3.0 |" in text  # memory, MiB
    assert (
        "- native_cl keeps 12% of what eager_cl keeps for backward (mean over 1 shapes), 12%"
        in (text)
    )
    assert "- eval float16 triton_cl: skipped: not there (1 rows)" in text
    for line in text.splitlines():  # every line of a table has the columns of its heading
        if line.startswith("| shape"):
            columns = line.count("|")
        elif line.startswith(("| a", "| b ")) and "made up" not in line:
            assert line.count("|") == columns


def test_tables_of_failures_alone() -> None:
    rows = [synthetic_row("a", name, None, note="failed: x") for name in ("eager_cl", "native_cl")]
    rows += [dict(row, mode="memory") for row in rows]
    text = gpu_tables.render({"meta": META, "parts": {}, "rows": rows})
    assert "- eval float16 native_cl: failed: x (1 rows)" in text


# ---- all of it


CHECKOUT = {
    "pyproject.toml": "[project]\nlicense = 'of a form that an old setuptools refuses'\n",
    "setup.py": """
import os
print("here:", sorted(os.listdir()), sorted(os.listdir("ghost_ops"))[-1])
print({k: v for k, v in os.environ.items() if k.startswith("GHOST_OPS_") or k == "CUDA_HOME"})
""",
    "ghost_ops/__init__.py": "",
    "ghost_ops/backends/__init__.py": "",
    "ghost_ops/backends/cuda.py": """
def load(): return True
def reason(): return "loaded it"
""",
    "tests/conftest.py": "def pytest_configure(config):\n"
    "    config.addinivalue_line('markers', 'gpu')\n",
    "tests/test_cuda_prims.py": "import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n",
    "tests/test_cuda_gpu.py": "import pytest\n@pytest.mark.gpu\ndef test_it(): assert 0, 'oh'\n",
    "tests/test_triton.py": "import pytest\n@pytest.fixture\ndef triton_device(): pass\n"
    "@pytest.mark.gpu\ndef test_it(triton_device): pass\n",
    "tests/cuda_driver.py": "",
}


@pytest.fixture
def checkout(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A small checkout, and a toolkit of programs that only print."""
    root, toolkit = tmp_path / "checkout", tmp_path / "cuda" / "bin"
    for name, text in CHECKOUT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    toolkit.mkdir(parents=True)
    sanitizer = SANITIZER.format(summary="ERROR SUMMARY: 0 errors", wrong=0, code=0)
    nvcc = "#!/bin/sh\necho release 13.0, V13.0.88\n"
    for name, text in (("nvcc", nvcc), ("compute-sanitizer", sanitizer)):
        (toolkit / name).write_text(text)
        (toolkit / name).chmod(0o755)
    monkeypatch.setattr(gpu_programs, "ROOT", root)
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    return root


SHORT = ("eval-float32-1", "train-float32-1", "graph-float32-1")


def test_the_whole_command(
    checkout: pathlib.Path,
    fake_workers: None,
    native: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twice, as on two bare machines, the file of the first carried to the second."""
    out = tmp_path / "out" / "gpu.json"
    known = {
        name: what
        for name, what in gpu_report.measurements().items()
        if name in (*SHORT, "memory-float32-256", "compile-eval-float16-256")
    }
    small = {name: what.__class__(**{**vars(what), "batch": 1}) for name, what in known.items()}
    monkeypatch.setattr(gpu_report, "measurements", lambda: small)
    monkeypatch.setattr(shapes, "select", lambda patterns: (SMALL,))
    monkeypatch.setattr(gpu_report, "STARTED", time.monotonic())
    monkeypatch.setattr(gpu_programs, "processes", lambda: 2)
    # Of this checkout's sources, which somebody may be editing.
    assert len(gpu_report.sources_digest()) == 16
    monkeypatch.setattr(gpu_report, "sources_digest", lambda: "abc")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = ["--out", str(out), "--commit", "abc123", "--minutes", "8"]
    assert gpu_report.main(arguments) == 1  # one of the tests fails
    document = json.loads(out.read_text())
    parts = document["parts"]
    states = {name: part["status"] for name, part in parts.items()}
    assert states.pop("tests") == "failed"
    assert set(states.values()) == {"done"}, parts
    assert next(iter(parts)) == "build" and "built for 9.0" in parts["build"]["summary"]
    assert parts["primitives"]["summary"].startswith("1 passed")
    assert parts["tests"]["summary"].startswith("tests: exit 1: 1 failed, 1 passed in")
    assert "assert 0" in parts["tests"]["log"]
    assert parts["memcheck"]["summary"] == "29 cases, 0 errors"
    assert parts["triton-tests"]["summary"].startswith("1 passed")
    for key in ("gpu", "torch", "nvcc", "commit", "cuda", "date", "python", "tf32_convolutions"):
        assert document["meta"][key] is not None
    assert document["meta"]["nvcc"] == "V13.0.88"
    assert document["meta"]["commit"] == "abc123"
    rows = document["rows"]
    assert [r["note"] for r in rows if "note" in r] == []
    assert {r["mode"] for r in rows} == {
        "eval", "train", "graph", "memory", "eval beside compile"
    }  # fmt: skip
    log = out.with_suffix(".log").read_text()
    assert "here: ['ghost_ops'] backends" in log
    for text in ("'GHOST_OPS_BUILD_CPU': '0'", "'GHOST_OPS_CUDA_ARCHS': '9.0'", "-p xdist -n"):
        assert text in log
    table = out.with_suffix(".md").read_text()
    for text in (
        "## eval beside compile, float16, batch 1, ghostnet",
        "x eager",
        "native_cl keeps",
    ):
        assert text in table
    capsys.readouterr()
    assert gpu_report.main(arguments) == 1
    said = capsys.readouterr().out
    assert "build: done, built" in said and "copy: done before" in said
    assert "train-float32-1: done before" in said and "tests: failed" in said
    again = json.loads(out.read_text())
    assert again["rows"] == rows
    monkeypatch.setenv("FAKE_GPU_LOSE", "eager_nchw")
    assert gpu_report.main([*arguments, "--part", "eval-float32-1"]) == 0
    assert "copy" not in capsys.readouterr().out
    new = [r for r in json.loads(out.read_text())["rows"] if r not in rows]  # what is named alone
    assert {(r["mode"], r["dtype"]) for r in new} == {("eval", "float32")}
    assert [r["provider"] for r in new if r["median_s"]] == ["eager_cl", "native_nchw", "native_cl"]
    assert new[0]["note"].startswith("failed: RuntimeError: CUDA error: an illegal memory access")


def test_a_broken_build(checkout: pathlib.Path, on_fake_gpu: None, tmp_path: pathlib.Path) -> None:
    report = new_report(tmp_path / "r.json")
    (checkout / "ghost_ops/backends/cuda.py").write_text(
        "def load(): return False\ndef reason(): return 'of another CUDA'\n"
    )
    with pytest.raises(RuntimeError, match="built, but: of another CUDA"):
        gpu_programs.build(report)
    (checkout / "ghost_ops/backends/cuda.py").write_text("raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="exit 1"):
        gpu_programs.build(report)
    (checkout / "tests/test_cuda_prims.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_it(): pytest.skip('no g++')\n"
    )
    with pytest.raises(RuntimeError, match="no test ran: 1 skipped"):
        gpu_programs.primitives(report)


ENDLESS = """
import pathlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import fake_gpu
from benchmarks import gpu_programs, gpu_report, gpu_session
fake_gpu.install()
gpu_programs.SCRATCH = pathlib.Path({scratch!r})
def run(report):
    return gpu_programs.run_program(report, "slow", [sys.executable, "-c", {patient!r}], 60)
parts = [gpu_session.Part(n, run) for n in {names}]
gpu_report.all_parts = lambda: [parts]
raise SystemExit(gpu_report.main(["--out", {out!r}]))
"""


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_time_limit_from_outside_leaves_the_results_and_no_process(
    tmp_path: pathlib.Path, scratch: pathlib.Path, names: str
) -> None:
    out = tmp_path / "r.json"
    code = ENDLESS.format(
        root=str(ROOT), tests=str(ROOT / "tests"), patient=PATIENT, names=list(names),
        out=str(out), scratch=str(scratch),
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    slow = scratch / "slow.out"
    for _ in range(600):
        if process.poll() is not None or (slow.exists() and "child" in slow.read_text()):
            break
        time.sleep(0.05)
    child = int(slow.read_text().split()[1])
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not alive(child)
    assert json.loads(out.read_text())["meta"]["gpu"] == fake_gpu.NAME
    assert "GPU report" in out.with_suffix(".md").read_text()
