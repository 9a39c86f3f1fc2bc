"""The facts of the report as data for JSON. A fact that cannot be found is "unknown: reason"."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import build_record, checkout, environment, torch_version
from .._version import __version__

ROOT = __package__.partition(".")[0]
PACKAGE = Path(__file__).resolve().parent.parent
RESET = "correct it or unset it; the report goes on without it"
INSTALL_TORCH = (
    f"install {torch_version.REQUIREMENT}: https://pytorch.org/get-started/locally has the command"
)
INSTALL_AGAIN = "install ghost_ops again"
BROKEN = (Exception, SystemExit)  # a broken installation raises errors of any type
# Variables of other libraries that change what runs, or its speed.
OTHER_VARIABLES = re.compile(
    r"(OMP|GOMP|KMP|MKL|MALLOC|ATEN|ONEDNN|DNNL|TRITON|TORCH|PYTORCH|CUDA|NVIDIA)_\w+"
    r"|LD_PRELOAD|GLIBC_TUNABLES"
)


class Missing:
    """Stands for a module that does not import: the use of an attribute raises the error."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def problem(what: object, mend: str) -> dict[str, str]:
    return {"what": str(what), "mend": mend}


def described(error: BaseException) -> str:
    """Type and first line of an error."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def known(find: Callable[[], Any]) -> Any:
    """The fact that ``find`` returns; "unknown: reason" if it raises."""
    try:
        return find()
    except BROKEN as error:
        return f"unknown: {described(error)}"


def collect(selftest: bool = False) -> dict[str, Any]:
    """The content of the report, as data for JSON; the keys are always the same.

    Wrong values of variables are reported and then removed from ``os.environ``.

    Args:
        selftest: run the self-test too.
    """
    problems: list[dict[str, str]] = []
    variables = {
        variable.name: {"value": os.environ.get(variable.name, ""), **dataclasses.asdict(variable)}
        for variable in environment.VARIABLES
    }
    others = {k: v for k, v in sorted(os.environ.items()) if v and OTHER_VARIABLES.fullmatch(k)}
    for name, error in environment.wrong_values().items():
        problems.append(problem(error, RESET))
        del os.environ[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        torch, backends = _modules(problems)
        known(lambda: _load_native(backends, problems))
        gpu = _gpu(torch)
        devices = ("cpu", "cuda") if gpu["available"] is True else ("cpu",)
        info = {
            "versions": {
                "ghost_ops": __version__,
                "torch": known(lambda: str(torch.__version__)),
                "python": platform.python_version(),
                "platform": known(platform.platform),
            },
            "package": {"path": str(PACKAGE), "note": known(lambda: checkout.note(ROOT))},
            "libraries": {name: _library(name, backends) for name in ("cpu", "cuda", "triton")},
            "build": _build(backends),
            "processor": known(processor),
            "threads": {
                "torch": known(lambda: torch.get_num_threads()),
                "usable": known(lambda: len(os.sched_getaffinity(0))),
                "logical": os.cpu_count(),
            },
            "instruction_sets": {
                "chosen": known(lambda: backends.native.library().isa()),
                "available": known(lambda: list(backends.native.library().available_isas())),
                "torch": known(lambda: torch.backends.cpu.get_cpu_capability()),
            },
            "allocator": known(allocator),
            "gpu": gpu,
            "nvcc": known(nvcc),
            "requested_backend": known(lambda: backends.requested()),
            "backends": [row for device in devices for row in _rows(backends, device)],
            "environment": variables,
            "other_variables": others,
            "selftest": _selftest(backends) if selftest else None,
        }
    if not isinstance(backends, Missing):
        _judge(problems, info)
    texts = dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught)
    return {"problems": problems, "hints": _hints(info), "warnings": list(texts), **info}


def exit_status(info: dict[str, Any]) -> int:
    """1 if there is a problem, or a failed check of the self-test; else 0."""
    failed = any(check["status"] == "FAILED" for check in info["selftest"] or ())
    return int(bool(info["problems"]) or failed)


def _modules(problems: list[dict[str, str]]) -> tuple[Any, Any]:
    """torch and ``ghost_ops.backends``, or what stands for them."""
    torch: Any = None
    try:
        torch = importlib.import_module("torch")
        torch_version.check()
    except BROKEN as error:
        what = error if torch else f"torch does not import: {described(error)}"
        problems.append(problem(what, INSTALL_TORCH))
        return torch or Missing(error), Missing(error)
    try:
        return torch, importlib.import_module(f"{ROOT}.backends")
    except BROKEN as error:
        problems.append(problem(f"{ROOT} does not import: {described(error)}", INSTALL_AGAIN))
        return torch, Missing(error)


def _load_native(backends: Any, problems: list[dict[str, str]]) -> None:
    """Load the CPU library, without the requested instruction set if the processor lacks it."""
    try:
        backends.native.load()
    except RuntimeError as error:
        if environment.CPU_ISA.name not in str(error):
            raise
        problems.append(problem(error, RESET))
        del os.environ[environment.CPU_ISA.name]
        backends.native.load()


def _library(name: str, backends: Any) -> dict[str, Any]:
    """The file of a library of kernels, and why it is loaded or is not."""

    def path() -> str | None:
        if name == "cuda":
            file = PACKAGE / "_cuda.so"
            return str(file) if file.exists() else None
        spec = importlib.util.find_spec("triton" if name == "triton" else f"{ROOT}._C")
        return spec.origin if spec else None

    try:
        backend = getattr(backends, "native" if name == "cpu" else name)
        loaded, reason = backend.load(), backend.reason()
    except BROKEN as error:
        loaded, reason = False, described(error)
    return {"path": known(path), "loaded": loaded, "reason": reason}


def _build(backends: Any) -> dict[str, str]:
    """What the CPU library and the record of the build say of the build."""
    found = known(lambda: dict(backends.native.library().build_info()))
    found = {**(found if isinstance(found, dict) else {}), **build_record.read()}
    return {str(key): str(value) for key, value in found.items()}


def processor() -> str:
    """The model name of the CPU, with family and model numbers where /proc/cpuinfo has them."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)", text, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found.get('model')})"
    return name


def allocator() -> str:
    """The allocator of large tensors on the CPU: its library, or its name and settings."""
    maps = Path("/proc/self/maps")
    text = maps.read_text(errors="replace") if maps.exists() else ""
    if loaded := re.search(r"/\S*/lib(?:tcmalloc|jemalloc|mimalloc)\S*", text):
        return loaded[0]
    settings = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if (name.startswith("MALLOC_") and value) or "glibc.malloc" in value
    ]
    name = " ".join(platform.libc_ver()).strip() or platform.system()
    return f"{name}, {' '.join(settings) or 'default settings'}"


# --- GPUs and backends ------------------------------------------------------------------------


def _gpu(torch: Any) -> dict[str, Any]:
    def devices() -> list[str]:
        found = []
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            gpu = torch.cuda.get_device_properties(index)
            size = f"{gpu.total_memory / 2**30:.1f} GiB"
            found.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {size}")
        return found

    def reason() -> str | None:
        """Why torch sees no GPU; None if it sees one."""
        if torch.cuda.is_available():
            return None
        if torch.version.cuda is None and torch.version.hip is None:
            return (
                f"torch {torch.__version__} is a build without CUDA; for an NVIDIA GPU, install a "
                "CUDA build of PyTorch"
            )
        if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            return f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs, if there are any"
        torch.cuda.init()
        return "torch finds none"

    return {
        "available": known(lambda: bool(torch.cuda.is_available())),
        "devices": known(devices),
        "reason": known(reason),
        "driver": known(driver),
        "torch_cuda": known(lambda: torch.version.cuda or torch.version.hip),
        "cudnn": known(lambda: torch.backends.cudnn.version()),
    }


def driver() -> str:
    """Driver, name and compute capability of each GPU, of ``nvidia-smi``: works without torch."""
    if (program := shutil.which("nvidia-smi")) is None:
        return "none (nvidia-smi is not found)"
    return run(program, "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader")


def nvcc() -> str:
    """Version and path of the nvcc that a build takes, or why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = Path(home or "/usr/local/cuda", "bin", "nvcc")
    path = str(usual) if home or usual.exists() else shutil.which("nvcc")
    if path is None:
        return "none (not on PATH, not in /usr/local/cuda): install CUDA's toolkit, set CUDA_HOME"
    version = re.search(r"release ([\d.]+)", run(path, "--version"))
    return f"{version[1] if version else 'of unknown version'}, {path}"


def run(*command: str) -> str:
    """The output of a program. Raises OSError or subprocess.SubprocessError if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=True
    )
    return done.stdout.decode(errors="replace").strip()


def _rows(backends: Any, device: str) -> list[dict[str, str]]:
    """The backend for each dtype of a device, with the reason."""
    try:
        return [row._asdict() for row in backends.status((device,))]
    except BROKEN as error:
        reason = described(error)
        return [{"device": device, "dtype": "all", "backend": "unknown", "reason": reason}]


def _selftest(backends: Any) -> list[dict[str, Any]]:
    try:
        backends.status(())  # raises if torch or ghost_ops does not import
        return importlib.import_module(f"{__package__}.selftest").run()
    except BROKEN as error:
        check = {"engine": "every backend", "what": "all checks", "status": "skipped"}
        return [{**check, "detail": described(error), "seconds": 0.0}]


# --- what follows from the facts --------------------------------------------------------------


def _judge(problems: list[dict[str, str]], info: dict[str, Any]) -> None:
    """Add a problem for a request that cannot be met, and each library that does not load."""
    requested, rows = info["requested_backend"], info["backends"]
    if all(row["backend"] == "none" for row in rows):
        what = f"{environment.BACKEND.name}={requested} cannot run here: {rows[0]['reason']}"
        mend = f"do what the reason says, or set {environment.BACKEND.name}=auto"
        problems.append(problem(what, mend))
    for name, library in info["libraries"].items():
        is_wanted = name == "cpu" or (name == "cuda" and info["gpu"]["available"] is True)
        if is_wanted and library["path"] and not library["loaded"]:
            what = f"{library['path']} is not loaded: {library['reason']}"
            problems.append(problem(what, INSTALL_AGAIN))


def _hints(info: dict[str, Any]) -> list[str]:
    """What is allowed and costs speed or is easily overlooked, each with the mend."""
    hints = [info["package"]["note"]] if info["package"]["note"] else []
    threads, usable = info["threads"]["torch"], info["threads"]["usable"]
    if isinstance(threads, int) and isinstance(usable, int) and threads > usable:
        hints.append(
            f"torch runs {threads} threads; processors that this process may use: {usable}. Set "
            f"OMP_NUM_THREADS={usable}, or call torch.set_num_threads({usable})."
        )
    if re.fullmatch("glibc.*default settings", info["allocator"]):
        hints.append(
            "glibc's allocator with its default settings maps large outputs anew at each call, "
            "which costs page faults at large batches: set MALLOC_MMAP_THRESHOLD_=1073741824 "
            "MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864, or preload tcmalloc "
            "(LD_PRELOAD); docs/settings.md has the measured gain."
        )
    return hints
