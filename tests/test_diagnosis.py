"""Promise: ``python -m ghost_ops`` never fails, and tells the truth."""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import native_isas, native_module
from torch import Tensor, nn

import ghost_ops
from ghost_ops import backends, environment
from ghost_ops.diagnosis import collect, selftest, text

ROOT = Path(ghost_ops.__file__).resolve().parents[1]
NEEDS_NATIVE = pytest.mark.skipif(native_module() is None, reason="the native library is not built")
WRONG = {v.name: "foo" for v in environment.VARIABLES if v.choices or v is environment.CPU_MACHINE}
FREE = ("build", "other_variables")  # their keys depend on the machine
LACKING = [isa for isa in ("avx512_amx", "avx512", "avx2") if isa not in native_isas()]


def run(
    arguments: str, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The report in a clean environment, by a shell; ``folder`` comes first on Python's path."""
    ours = ("GHOST_OPS_", "TRITON_INTERPRET", "OMP_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    path = os.pathsep.join([*([str(folder)] if folder else []), str(ROOT)])
    return subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -m ghost_ops {arguments}"],
        env={**clean, "PYTHONPATH": path, **variables},
        cwd=folder or "/", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    return folder


def collected(**variables: str) -> dict[str, Any]:
    """The report of this process, which is checked."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        info = collect.collect()
    check(info)
    return info


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    """The report where nothing is set."""
    info = collected()
    assert collect.exit_status(info) == 0, info["problems"]
    return info


def squeezed(content: str) -> str:
    return "".join(content.split())


def check(info: dict[str, Any]) -> None:
    """The text says all of the data, in 100 columns."""
    everything = text.report(info, everything=True)
    for content in (everything, text.report(info)):
        assert max(map(len, content.splitlines())) <= 100
    found = squeezed(everything)
    missing = [leaf for leaf in leaves(info) if squeezed(text.printable(leaf)) not in found]
    assert not missing


def leaves(value: Any) -> list[Any]:
    """The texts and numbers of the data. Seconds are rounded in the text."""
    if isinstance(value, dict):
        return [leaf for k, entry in value.items() if k != "seconds" for leaf in leaves(entry)]
    if isinstance(value, (list, tuple)):
        return [leaf for entry in value for leaf in leaves(entry)]
    return [] if value is None or isinstance(value, bool) else [value]


# --- processes --------------------------------------------------------------------------------

NOISE = "print('noise on the standard output'); import os; os.write(1, b'more noise\\n')\n"
OLD_TORCH = "__version__ = '2.9.1'\n" + NOISE
NO_TORCH = "raise ModuleNotFoundError('no torch')"
# An import hook that fails for one module, as the loader of a library does.
FAIL = """
import importlib.abc, importlib.machinery, sys
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "{name}":
            return importlib.machinery.ModuleSpec(name, self, origin=__file__)
    def exec_module(self, module):
        raise {error}
sys.meta_path.insert(0, Broken())
"""

# name: (environment variables, files put on the path, arguments, exit status, what is said)
SITUATIONS: dict[str, tuple[dict[str, str], dict[str, str], str, int, list[str]]] = {
    "unknown variable, broken library": (
        {"GHOST_OPS_BACKED": "eager", "GHOST_OPS_BACKEND": "native"},
        {"sitecustomize": FAIL.format(name="ghost_ops._C", error="ImportError('symbol x')")},
        "--selftest", 1,
        ["did you mean GHOST_OPS_BACKEND?", "symbol x", "GHOST_OPS_BACKEND=native cannot run here",
         "ok eager cpu, inference", "skipped native cpu"],
    ),
    "no torch": (
        {}, {"torch": NO_TORCH}, "--selftest", 1,
        ["torch does not import: ModuleNotFoundError: no torch", "skipped every backend",
         "https://pytorch.org"],
    ),
    "old torch": (
        {}, {"torch": OLD_TORCH}, "", 1, ["needs torch >= 2.10, and this Python has torch 2.9.1"],
    ),
    "incomplete package": (
        {}, {"sitecustomize": FAIL.format(name="ghost_ops.conventions", error="OSError('gone')")},
        "", 1, ["ghost_ops does not import: OSError: gone"],
    ),
    "broken Triton": ({}, {"triton": NOISE + "raise SystemExit('oh')"}, "", 0, ["SystemExit: oh"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str, usual: dict[str, Any], tmp_path: Path) -> None:
    variables, files, arguments, status, says = SITUATIONS[name]
    folder = write(tmp_path, **files)
    done = run(f"--json {arguments}", folder, **variables)
    assert "Traceback" not in done.stderr, done.stderr
    info = json.loads(done.stdout)
    check(info)
    for key, value in usual.items():
        assert isinstance(info[key], type(value)) or value is None
        assert key in FREE or not isinstance(value, dict) or info[key].keys() == value.keys()
    assert done.returncode == status, info["problems"]
    assert bool(info["problems"]) == bool(status)
    assert all(entry["mend"] for entry in info["problems"])
    content = squeezed(text.report(info, everything=True))
    assert not [part for part in says if squeezed(part) not in content]


def test_every_value_wrong_in_an_ascii_terminal() -> None:
    done = run("--all", PYTHONIOENCODING="ascii", OMP_X="\x1b[31mé" + 300 * "x", **WRONG)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1
    assert done.stdout.isascii()
    assert r"\x1b[31m\xe9xx" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 103  # an escaped letter is longer
    for name in WRONG:
        assert squeezed(f"{name}='foo'") in squeezed(done.stdout)


@pytest.mark.skipif(not (native_isas() and LACKING), reason="the processor has all of them")
def test_instruction_set_that_the_processor_lacks() -> None:
    info = json.loads(run("--json", GHOST_OPS_CPU_ISA=LACKING[0]).stdout)
    assert f"GHOST_OPS_CPU_ISA='{LACKING[0]}': not available" in info["problems"][0]["what"]
    assert collect.exit_status(info) == 1
    assert info["instruction_sets"]["available"] == native_module().available_isas()


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "> /dev/full", "| true"])
def test_output_that_cannot_be_written(redirection: str, tmp_path: Path) -> None:
    folder = write(tmp_path, torch=NO_TORCH)
    command = f"--all {redirection}; echo status $? > status"
    done = run(command, folder, OMP_X=100_000 * "x")
    assert not {"Traceback", "Exception"} & set(done.stderr.split())
    assert ("cannot be written" in done.stderr) == ("full" in redirection)
    status = "0" if "|" in redirection else "1"
    assert (tmp_path / "status").read_text() == f"status {status}\n"


@pytest.mark.parametrize(
    ("command", "arguments", "runs"),
    [
        ("python -m ghost_ops --json", "-m --json", True),
        ("python -mghost_ops", "-m", True),
        ("python -X dev -Bm ghost_ops", "-m", True),
        ("python -m app", "-m", False),
        ("python -m ghost_ops.app", "-m", False),
        ("python x.py -m ghost_ops", "x.py -m ghost_ops", False),
        ("python -m ghost_ops", "ghost_ops/__main__.py", False),
    ],
)
def test_the_start_of_the_report_is_recognised(
    command: str, arguments: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only there a wrong value does not raise at import."""
    monkeypatch.setattr(sys, "orig_argv", command.split())
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert environment.runs_report() == runs


# --- facts ------------------------------------------------------------------------------------


def test_facts_of_this_process(usual: dict[str, Any]) -> None:
    assert usual["versions"]["ghost_ops"] == ghost_ops.__version__
    assert usual["versions"]["torch"] == torch.__version__
    assert usual["package"]["path"] == str(ROOT / "ghost_ops")
    for name, backend in (("cpu", backends.native), ("cuda", backends.cuda)):
        assert usual["libraries"][name]["loaded"] == backend.load()
        assert usual["libraries"][name]["reason"] == backend.reason()
    isas = usual["instruction_sets"]
    assert isas["torch"] == torch.backends.cpu.get_cpu_capability()
    if (native := native_module()) is not None:
        assert usual["libraries"]["cpu"]["path"] == native.__file__
        assert (isas["available"], isas["chosen"]) == (native.available_isas(), native.isa())
        assert "unknown: " not in str(usual)
    gpu = torch.cuda.is_available()
    assert usual["gpu"]["available"] == gpu
    devices = ("cpu", "cuda") if gpu else ("cpu",)
    assert usual["backends"] == [row._asdict() for row in backends.status(devices)]


@pytest.mark.parametrize("works", [True, False], ids=["works", "broken"])
def test_driver_and_nvcc(works: bool, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, says in (("nvidia-smi", "580.1, NVIDIA X, 9.0"), ("nvcc", "release 13.0, V13")):
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/bin/sh\necho '{says}'\nexit {0 if works else 3}\n")
        stub.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    info = collected(PATH=path, CUDA_HOME=str(tmp_path))
    assert collect.exit_status(info) == 0
    if works:
        assert info["gpu"]["driver"] == "580.1, NVIDIA X, 9.0"
        assert info["nvcc"] == f"13.0, {tmp_path}/bin/nvcc"
    else:
        assert (info["gpu"]["driver"] + info["nvcc"]).count("exit status 3") == 2


def test_cuda_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA driver initialization failed\nand more")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("device_count", "init", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, fail)
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
        gpu = collected()["gpu"]
        assert "RuntimeError: CUDA driver initialization failed" in str(gpu)


def test_text_of_a_gpu(usual: dict[str, Any]) -> None:
    row = {"device": "cuda", "backend": "triton", "reason": "Triton 9"}
    info = copy.deepcopy(usual)
    info["gpu"] |= {"available": True, "reason": None, "devices": ["NVIDIA X, 9.0", "NVIDIA Y"]}
    info["backends"] += [{**row, "dtype": dtype} for dtype in ("float32", "bfloat16")]
    check(info)
    assert "  devices  NVIDIA X, 9.0, NVIDIA Y\n" in text.report(info)
    assert "  cuda       float32, bfloat16: triton: Triton 9\n" in text.report(info)


def test_hints(usual: dict[str, Any]) -> None:
    for torch_threads, usable, hint in ((2, 1, True), (2, 2, False), (1, 4, False)):
        threads = {**usual["threads"], "torch": torch_threads, "usable": usable}
        said = str(collect._hints({**usual, "threads": threads}))
        assert (f"OMP_NUM_THREADS={usable}," in said) == hint
    tuned = collected(MALLOC_TOP_PAD_="67108864")
    assert "MALLOC_TOP_PAD_=67108864" in tuned["allocator"]
    assert "glibc's allocator" not in str(tuned["hints"])


# --- the self-test ----------------------------------------------------------------------------

ENGINE = selftest.Engine("native" if native_isas() else "eager", "cpu", *native_isas()[:1])


def failing() -> set[str]:
    return {line["what"] for line in selftest.checks(ENGINE) if line["status"] == "FAILED"}


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, bool], Tensor]) -> None:
    """Change the output of each fused module: ``change(out, training)``."""
    fused = selftest.fused

    def changed(plain: nn.Module, device: str) -> nn.Module:
        module = fused(plain, device)
        module.register_forward_hook(lambda module, _, out: change(out, module.training))
        return module

    monkeypatch.setattr(selftest, "fused", changed)


def scale_gradient(out: Tensor) -> Tensor:
    out.register_hook(lambda grad: grad * 1.05)
    return out


def test_selftest_of_every_backend(usual: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():  # Triton's interpreter is slow
        monkeypatch.setattr(backends.triton, "can_run", lambda *_: (False, "not here"))
    native = native_module()
    before = (native and native.isa(), backends.requested(), torch.get_num_threads())
    state = torch.random.get_rng_state()
    lines = selftest.run()
    assert before == (native and native.isa(), backends.requested(), torch.get_num_threads())
    assert torch.equal(state, torch.random.get_rng_state())
    assert {line["status"] for line in lines} <= {"ok", "skipped"}, lines
    ran = {line["engine"] for line in lines if line["status"] == "ok"}
    assert ran >= {"eager cpu", *(f"native cpu {isa}" for isa in native_isas())}
    info = {**usual, "selftest": lines}
    check(info)
    assert collect.exit_status(info) == 0
    lines[0]["status"] = "FAILED"
    assert collect.exit_status(info) == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda out, training: out, set()),
        (lambda out, training: out * 1.02, {"inference", "training"}),
        (lambda out, training: out if training else out.roll(1, -1), {"inference"}),
        (lambda out, training: out * float("nan") if training else out, {"training"}),
        (lambda out, training: scale_gradient(out) if training else out, {"training"}),
        (lambda out, training: out.double(), {"inference", "training"}),
        (lambda out, training: out.contiguous(), {"inference", "training"}),
        (lambda out, training: out[:, :, :1], {"inference", "training"}),
    ],
    ids="none scale shift nan gradient dtype layout shape".split(),
)
def test_selftest_finds_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, change: Any, found: set[str]
) -> None:
    plant(monkeypatch, change)
    assert failing() - {"same bits"} == found


@NEEDS_NATIVE
def test_selftest_finds_other_bits_and_a_module_that_runs_unfused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        plant(patch, lambda out, training: out * (1 + next(calls) * 2**-22))
        assert failing() == {"same bits"}
    monkeypatch.setattr(selftest, "fused", lambda plain, device: copy.deepcopy(plain))
    assert failing() >= {"inference", "training"}
