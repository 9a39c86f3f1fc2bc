"""Promise: ``python -m ghost_ops`` never fails, and tells the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import native_isas, native_module
from torch import nn

import ghost_ops
from ghost_ops import FusedGhostModule, backends, environment
from ghost_ops.diagnosis import collect, machine, selftest, text

ROOT = Path(ghost_ops.__file__).resolve().parents[1]
NEEDS_NATIVE = pytest.mark.skipif(native_module() is None, reason="the native library is not built")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on this GPU")
ALL_ISAS = ("avx512_amx", "avx512", "avx2", "generic")
WRONG = {v.name: "foo" for v in environment.VARIABLES if v.choices or v is environment.CPU_MACHINE}


def start(*arguments: str, folder: Path | None = None, **variables: str) -> dict[str, Any]:
    """The arguments of ``subprocess`` that run the report in a clean environment.

    Args:
        folder: put before the package on the path.
    """
    ours = ("GHOST_OPS_", "TRITON_INTERPRET", "OMP_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    path = os.pathsep.join([*([str(folder)] if folder else []), str(ROOT)])
    return {
        "args": [sys.executable, "-m", "ghost_ops", *arguments],
        "env": {**clean, "PYTHONPATH": path, **variables},
        "cwd": folder or "/",
    }


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        **start(*arguments, **options), capture_output=True, text=True, timeout=300, check=False
    )


def data(*arguments: str, **options: Any) -> tuple[dict[str, Any], int]:
    """The report as JSON, and the exit status."""
    done = run("--json", *arguments, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout), done.returncode


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    """The report where nothing is set."""
    info, status = data()
    assert status == 0, info["problems"]
    return info


@pytest.mark.parametrize(
    ("command", "arguments", "runs"),
    [
        ("python -m ghost_ops --json", "-m --json", True),
        ("python -mghost_ops", "-m", True),
        ("python -X dev -Bm ghost_ops", "-m", True),
        ("python -m app", "-m", False),
        ("python -m app ghost_ops", "-m ghost_ops", False),
        ("python -m ghost_ops.app", "-m", False),
        ("python x.py -m ghost_ops", "x.py -m ghost_ops", False),
        ("python -m ghost_ops", "ghost_ops/__main__.py", False),
        ("python", "", False),
    ],
)
def test_the_start_of_the_report_is_recognised(
    command: str, arguments: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only there a wrong value does not raise at import."""
    monkeypatch.setattr(sys, "orig_argv", command.split())
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert environment.runs_report() == runs


def test_a_wrong_value_raises_in_a_program_that_runs_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import ghost_ops\nprint('imported')\n")
    options = start(folder=tmp_path, GHOST_OPS_BACKEND="cuda")
    options["args"][2] = "app"
    done = subprocess.run(**options, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ValueError: environment variable GHOST_OPS_BACKEND='cuda'" in done.stderr


# --- situations -------------------------------------------------------------------------------

HIDE = "import sys; sys.modules['ghost_ops._C'] = None\n"
# An import hook that fails for one module, as the loader of a library does.
FAIL = """
import importlib.abc, importlib.machinery, sys
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            return importlib.machinery.ModuleSpec(name, self, origin=__file__)
    def exec_module(self, module):
        raise {error}
sys.meta_path.insert(0, Broken())
"""
BROKEN_CUDA = """
import torch
def fail(*_):
    raise RuntimeError("CUDA driver initialization failed\\nand more")
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
for name in ("device_count", "init", "get_device_properties", "get_device_capability",
             "get_device_name", "current_device"):
    setattr(torch.cuda, name, fail)
"""
OTHER_COPY = {
    "more/ghost_ops/__init__.py": "",
    "more/ghost_ops/_version.py": '__version__ = "0.0.7"',
}
NO_TEMPORARY = """
import tempfile
def TemporaryFile():
    raise FileNotFoundError("no usable temporary directory")
tempfile.TemporaryFile = TemporaryFile
"""
NOISE = "print('noise on the standard output'); import os; os.write(1, b'more noise\\n')\n"


def broken(name: str, error: str) -> dict[str, str]:
    return {"sitecustomize.py": FAIL.format(name=name, error=error)}


# name: (environment variables, files put on the path, exit status, what the report says)
SITUATIONS: dict[str, tuple[dict[str, str], dict[str, str], int, str]] = {
    "backend cuda": ({"GHOST_OPS_BACKEND": "cuda"}, {}, 1, "expected one of 'auto', 'native'"),
    "every value wrong": (WRONG, {}, 1, "GHOST_OPS_CPU_MACHINE='foo': 'foo' is not allowed"),
    "unknown variable": ({"GHOST_OPS_BACKED": "eager"}, {}, 1, "did you mean GHOST_OPS_BACKEND?"),
    "library does not load": (
        {}, broken("ghost_ops._C", "ImportError('undefined symbol: x')"), 1, "undefined symbol: x"
    ),
    "library is not built": ({}, {"sitecustomize.py": HIDE}, 0, "the native CPU library was not"),
    "backend native is not there": (
        {"GHOST_OPS_BACKEND": "native"}, {"sitecustomize.py": HIDE}, 1,
        "GHOST_OPS_BACKEND=native cannot run here",
    ),
    "broken Triton": (
        {}, {"triton/__init__.py": NOISE + "raise SystemExit('no triton')"}, 0, "no triton"
    ),
    "no NumPy": ({}, broken("numpy", "ModuleNotFoundError('no numpy')"), 0, "no numpy"),
    "old torch": (
        {}, {"sitecustomize.py": "import torch; torch.__version__ = '2.9.1'"}, 1,
        "ghost_ops needs torch >= 2.10, and this Python has torch 2.9.1",
    ),
    "no torch": (
        {}, broken("torch", "ModuleNotFoundError('no torch')"), 1, "torch does not import"
    ),
    "incomplete package": (
        {}, broken("ghost_ops.conventions", "ImportError('no file')"), 1,
        "ghost_ops.backends does not import: ImportError: no file",
    ),
    "CUDA does not start": (
        {}, {"sitecustomize.py": BROKEN_CUDA}, 1, "RuntimeError: CUDA driver initialization failed"
    ),
    "no temporary folder": ({}, {"sitecustomize.py": NO_TEMPORARY}, 0, "oneDNN v"),
    "cache that is a file": (
        {"GHOST_OPS_CACHE_DIR": "sitecustomize.py/x"}, {"sitecustomize.py": ""}, 1,
        "GHOST_OPS_CACHE_DIR='sitecustomize.py/x' is not a folder that can be written",
    ),
    "tuned allocator": ({"MALLOC_TOP_PAD_": "67108864"}, {}, 0, "MALLOC_TOP_PAD_=67108864"),
    "another copy": (
        {}, OTHER_COPY, 0, "more/ghost_ops (0.0.7)"
    ),
    "a long value with an escape": ({"OMP_X": "\x1b[31m" + 300 * "x" + "é"}, {}, 0, r"\x1b[31mxx"),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str, usual: dict[str, Any], tmp_path: Path) -> None:
    variables, files, status, says = SITUATIONS[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    if name == "another copy":
        variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "more")])}
    info, got = data(folder=tmp_path, **variables)
    check(info, usual)
    assert got == status, info["problems"]
    assert bool(info["problems"]) == bool(status)
    assert squeezed(says) in squeezed(text.report(info, everything=True))
    for variable in set(variables) & set(WRONG):
        assert info["environment"][variable]["value"] == variables[variable]
        told = [entry for entry in info["problems"] if variable in entry["what"]]
        assert len(told) == 1 and told[0]["mend"]


def squeezed(content: str) -> str:
    return "".join(content.split())


def check(info: dict[str, Any], usual: dict[str, Any]) -> None:
    """The form of the data is always the same, and the text says all of it in 100 columns."""
    assert shape(info) == shape(usual)
    everything = text.report(info, everything=True)
    for content in (everything, text.report(info)):
        assert max(map(len, content.splitlines())) <= 100
    found = squeezed(everything)
    numbers = {"bytes", "seconds"}  # rounded in the text
    missing = [
        f"{key}: {leaf}"
        for key, leaf in leaves(info)
        if key not in numbers and squeezed(text.printable(leaf)) not in found
    ]
    assert not missing


def shape(value: Any, key: str = "") -> Any:
    """The keys of the data, without those that depend on the machine."""
    if isinstance(value, dict) and key not in ("build", "environment", "other_variables", "others"):
        return {name: shape(entry, name) for name, entry in value.items()}
    if key == "backends":
        assert value, "no row of backends"
        return shape(value[0])
    return None


def leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """The texts and numbers of the data."""
    if isinstance(value, dict):
        return [leaf for name, entry in value.items() for leaf in leaves(entry, name)]
    if isinstance(value, list):
        return [leaf for entry in value for leaf in leaves(entry, key)]
    return [] if value is None or isinstance(value, bool) else [(key, value)]


@NO_GPU
def test_triton_without_a_gpu(usual: dict[str, Any]) -> None:
    info, status = data(GHOST_OPS_BACKEND="triton")
    check(info, usual)
    assert status == 1
    assert info["requested_backend"] == "triton"
    assert {row["backend"] for row in info["backends"]} == {"none"}


@NEEDS_NATIVE
def test_instruction_set_that_the_processor_lacks(usual: dict[str, Any]) -> None:
    lacking = [isa for isa in ALL_ISAS if isa not in native_module().available_isas()]
    if not lacking:
        pytest.skip("the processor has every instruction set")
    info, status = data(GHOST_OPS_CPU_ISA=lacking[0])
    check(info, usual)
    assert status == 1
    assert f"GHOST_OPS_CPU_ISA='{lacking[0]}': not available" in info["problems"][0]["what"]
    assert info["instruction_sets"] == usual["instruction_sets"]
    assert info["libraries"]["cpu"]["loaded"]


def stub(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("works", [True, False], ids=["works", "broken"])
def test_driver_and_nvcc(works: bool, usual: dict[str, Any], tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    end = "exit 0" if works else "exit 3"
    stub(programs / "nvidia-smi", f"echo '580.1, NVIDIA X, 9.0'; {end}")
    stub(programs / "nvcc", f"echo 'Cuda compilation tools, release 13.0, V13.0.88'; {end}")
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    info, status = data(PATH=path, CUDA_HOME=str(tmp_path))
    check(info, usual)
    assert status == 0
    assert info["gpu"]["driver"]["version"] == ("580.1" if works else None)
    assert info["nvcc"]["path"] == str(programs / "nvcc")
    assert info["nvcc"]["version"] == ("13.0.88" if works else None)
    if works and torch.version.cuda is None:
        assert "install a CUDA build of PyTorch for NVIDIA X" in info["gpu"]["reason"]
    if not works:
        assert "non-zero exit status 3" in info["nvcc"]["reason"]


# --- the standard output ----------------------------------------------------------------------


def test_text_of_the_command(usual: dict[str, Any]) -> None:
    """In an encoding that lacks letters."""
    done = run(PYTHONIOENCODING="ascii", OMP_X="é")
    assert done.returncode == 0, done.stderr
    assert r"\xe9" in done.stdout
    for line in text.report(usual).splitlines():
        if "none" not in line:
            assert line in done.stdout.splitlines()


def test_help_has_the_exit_status() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "Exit status: 1 if" in done.stdout


def test_reader_that_stops() -> None:
    command = start("--all", OMP_X=1_000_000 // 10 * "x")
    with subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b"ghost_ops")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=300) == 0


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "> /dev/full"])
def test_output_that_cannot_be_written(redirection: str) -> None:
    command = start()
    shell = f"exec {sys.executable} -m ghost_ops {redirection}"
    done = subprocess.run(
        **{**command, "args": ["sh", "-c", shell]}, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == int("full" in redirection)
    assert "Traceback" not in done.stderr
    assert ("cannot be written" in done.stderr) == ("full" in redirection)


# --- the truth --------------------------------------------------------------------------------


def test_facts_of_this_process(usual: dict[str, Any]) -> None:
    assert usual["versions"]["ghost_ops"] == ghost_ops.__version__
    assert usual["versions"]["torch"] == torch.__version__
    assert usual["package"]["path"] == str(Path(ghost_ops.__file__).resolve().parent)
    libraries = usual["libraries"]
    assert libraries["cpu"]["loaded"] == backends.native.load()
    assert libraries["cuda"]["loaded"] == backends.cuda.load()
    assert libraries["cuda"]["reason"] == backends.cuda.reason()
    isas = usual["instruction_sets"]
    assert isas["torch"] == torch.backends.cpu.get_cpu_capability()
    if native_module() is not None:
        assert libraries["cpu"]["path"] == native_module().__file__
        assert libraries["cpu"]["bytes"] == Path(native_module().__file__).stat().st_size
        assert isas["available"] == native_module().available_isas()
    with ghost_ops.use_backend("auto"):
        chosen = [row._asdict() for row in backends.status(("cpu",))]
    rows = [row for row in usual["backends"] if row["device"] == "cpu"]
    assert [(r["dtype"], r["backend"]) for r in rows] == [
        (r["dtype"], r["backend"]) for r in chosen
    ]
    assert usual["gpu"]["available"] == torch.cuda.is_available()
    assert ("cuda" in {row["device"] for row in usual["backends"]}) == torch.cuda.is_available()
    assert usual["threads"]["affinity"] == len(machine.affinity())


@NEEDS_NATIVE
def test_requests_that_can_be_met() -> None:
    isa = native_module().available_isas()[-1]
    info, status = data(GHOST_OPS_BACKEND="eager", GHOST_OPS_CPU_ISA=isa)
    assert status == 0
    assert info["instruction_sets"]["chosen"] == isa
    assert info["instruction_sets"]["why"] == f"GHOST_OPS_CPU_ISA={isa}"
    assert {row["backend"] for row in info["backends"]} == {"eager"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_quota(files: dict[str, str], limit: float | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert machine._quota(*(tmp_path / name for name in files or ["cpu.max"])) == limit
    cores = machine.physical_cores(machine.affinity()) or len(machine.affinity())
    expected = cores if limit is None else max(1, min(cores, int(limit)))
    assert machine.usable_cores(machine.affinity(), limit) == expected


def test_text_of_a_gpu(usual: dict[str, Any]) -> None:
    device = {"name": "NVIDIA X", "capability": "9.0", "memory_gib": 139.8}
    row = {"device": "cuda", "backend": "triton", "reason": "Triton 9", "others": {"native": "old"}}
    dtypes = ("float32", "bfloat16")
    info = {
        **usual,
        "gpu": {
            **usual["gpu"],
            "available": True,
            "devices": [device, device],
            "torch_cuda": "13.0",
        },
        "backends": usual["backends"] + [{**row, "dtype": dtype} for dtype in dtypes],
    }
    check({**info, "gpu": {**info["gpu"], "reason": None}}, usual)
    content = text.report(info)
    assert "  cuda:1   NVIDIA X, compute capability 9.0, 139.8 GiB\n" in content
    assert "  cuda  float32, bfloat16: triton: Triton 9\n" in content
    assert "        float32, bfloat16: not native: old\n" in content
    assert "no GPU" not in content


# --- the self-test ----------------------------------------------------------------------------


def test_selftest(usual: dict[str, Any]) -> None:
    info, status = data("--selftest")
    checks = info["selftest"]
    check({**info, "selftest": None}, usual)
    assert status == 0, checks
    assert {c["status"] for c in checks} <= {"ok", "skipped"}
    assert all(c["detail"] for c in checks)
    ran = {c["engine"] for c in checks if c["status"] == "ok"}
    isas = native_module().available_isas() if native_module() else []
    assert ran >= {"eager cpu", *(f"native cpu {isa}" for isa in isas)}
    content = text.report(info)
    assert max(map(len, content.splitlines())) <= 100
    for entry in checks:
        assert squeezed(f"{entry['status']}{entry['engine']},{entry['what']}:") in squeezed(content)


ENGINE = (
    selftest.Engine("native", "cpu", native_isas()[0])
    if native_isas()
    else selftest.Engine("eager", "cpu")
)


def statuses(engine: selftest.Engine = ENGINE) -> dict[str, str]:
    return {found.what: found.status for found in selftest.checks(engine)}


def plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the output of the fused module: ``change(out, training)``."""
    forward = FusedGhostModule.forward

    def changed(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return change(forward(self, x), self.training)

    monkeypatch.setattr(FusedGhostModule, "forward", changed)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.05


def test_selftest_without_a_fault() -> None:
    found = statuses()
    assert set(found.values()) == {"ok"}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda out, training: out * 1.02, {"inference", "training"}),
        (lambda out, training: out if training else out.roll(1, -1), {"inference"}),
        (lambda out, training: out * float("nan") if training else out, {"training"}),
        (lambda out, training: ScaledGradient.apply(out) if training else out, {"training"}),
        (lambda out, training: out.double(), {"inference", "training"}),
        (lambda out, training: out.contiguous(), {"inference", "training"}),
    ],
    ids=["scale", "shift", "nan", "gradient", "dtype", "layout"],
)
def test_selftest_finds_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, change: Any, failing: set[str]
) -> None:
    plant(monkeypatch, change)
    found = statuses()
    assert {what for what, status in found.items() if status == "FAILED"} >= failing


@NEEDS_NATIVE
def test_selftest_finds_other_bits_in_a_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def change(out: torch.Tensor, training: bool) -> torch.Tensor:
        calls.append(out)
        return out if len(calls) <= 2 else out * (1 + 2**-22)

    plant(monkeypatch, change)
    with ENGINE.running(), pytest.raises(AssertionError, match="in the first run"):
        selftest.same_bits(ENGINE, 2)


@NEEDS_NATIVE
def test_selftest_finds_a_module_that_runs_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "fused", lambda plain: plain)
    found = [found for found in selftest.checks(ENGINE) if found.what != "same bits"]
    assert [c.status for c in found] == ["FAILED", "FAILED"]
    assert all("no operator of the backend ran" in c.detail for c in found)


OVERRIDE = """
import sys, torch, ghost_ops
from ghost_ops.diagnosis import command
from ghost_ops.ops import eager
library = torch.library.Library("ghost_ops", "IMPL")
wrong = lambda *arguments: 1.02 * ghost_ops.ops.eager.ghost_train_forward(*arguments)[0]
def wrong(*arguments):
    out, *rest = eager.ghost_train_forward(*arguments)
    return (1.02 * out, *rest)
library.impl("ghost_train_forward", wrong, "CPU", allow_override=True)
sys.exit(command.main(["--selftest", "--json"]))
"""


@NEEDS_NATIVE
def test_exit_status_of_a_kernel_with_a_fault() -> None:
    command = start()
    done = subprocess.run(
        **{**command, "args": [sys.executable, "-c", OVERRIDE]},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert not found["problems"]
    failed = {c["engine"] for c in found["selftest"] if c["status"] == "FAILED"}
    assert failed == {f"native cpu {isa}" for isa in native_module().available_isas()}


def test_selftest_restores_what_it_changes() -> None:
    native = native_module()
    before = (native and native.isa(), backends.requested(), torch.get_num_threads())
    state = torch.random.get_rng_state()
    statuses()
    assert before == (native and native.isa(), backends.requested(), torch.get_num_threads())
    assert torch.equal(state, torch.random.get_rng_state())


def test_hint_on_a_library_of_another_copy(usual: dict[str, Any]) -> None:
    libraries = usual["libraries"]
    for folder, is_told in ((collect.PACKAGE, False), (ROOT / "elsewhere", True)):
        moved = {**libraries["cpu"], "path": str(folder / "_C.so")}
        info = {**usual, "libraries": {**libraries, "cpu": moved}}
        told = [hint for hint in collect._hints(info) if "another copy of ghost_ops than" in hint]
        assert bool(told) == is_told


def test_hint_on_threads(usual: dict[str, Any]) -> None:
    usable = usual["threads"]["usable"]
    for threads, is_told in ((usable, False), (usable + 1, True)):
        info = {**usual, "threads": {**usual["threads"], "torch": threads}}
        told = [hint for hint in collect._hints(info) if f"OMP_NUM_THREADS={usable}," in hint]
        assert bool(told) == is_told
