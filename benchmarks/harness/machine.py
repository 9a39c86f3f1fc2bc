"""The machine and this process: allocator, threads, packages, instruction sets, metadata."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent

# Environment variables that hold a library to fewer instructions than the processor has: ours,
# ATen and torch.compile, oneDNN (PyTorch's and OpenVINO's, by either name), MKL.
ISA_VARIABLES = tuple(
    "GHOST_OPS_CPU_ISA ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA "
    "MKL_ENABLE_INSTRUCTIONS".split()
)
# Any of these, set, makes a run that is not an ordinary one.
GHOST_OPS = "CPU_MACHINE BACKEND CUDA_PDL CUDA_PIPELINE CUDA_PLAN".split()
FORCING = (*ISA_VARIABLES, *(f"GHOST_OPS_{name}" for name in GHOST_OPS))

# Before anything is pinned: set_threads may be called again with more threads.
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
CORE_COUNT = len(_CORES) or os.cpu_count() or 1  # that this process may use

# One arena that only grows: no mmap per call and no trimming, hence no page faults after warm-up.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# Freed memory goes back to the system at once: the high-water mark is that of live memory.
LEAN_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}


class MissingExtra(RuntimeError):
    """An optional package is not installed; the message says which pip extra brings it."""


def require(module: str, purpose: str, *, extra: str = "bench") -> Any:
    """Import ``module`` or raise :class:`MissingExtra` naming the pip extra that provides it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f"{package!r} is needed for {purpose} and cannot be imported ({error}); "
            f'install it with: pip install "ghost_ops[{extra}]"'
        ) from error


def use_malloc(settings: Mapping[str, str], words: Sequence[str]) -> str:
    """Restart ``python -m benchmarks`` with ``words`` under another allocator (glibc only).

    Large tensors allocated per call are otherwise mapped, page-faulted and unmapped each time,
    which costs every provider about the same time and hides the difference between them. Returns
    how this process allocates, in words.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "default allocator (not glibc: nothing to tune)"
    if all(os.environ.get(name) == value for name, value in settings.items()):
        return "glibc malloc tuned: " + " ".join(f"{k}={v}" for k, v in settings.items())
    sys.stdout.flush()
    command = [sys.executable, "-m", "benchmarks", *words]
    os.execve(sys.executable, command, {**os.environ, **settings})


def set_threads(threads: int, *, pin: bool = True) -> list[int]:
    """Use ``threads`` intra-op threads, pinned to as many cores where possible; returns the
    cores."""
    if threads < 1 or (_CORES and threads > len(_CORES)):
        raise ValueError(f"threads: expected 1 to {len(_CORES) or 'the core count'}, got {threads}")
    torch.set_num_threads(threads)
    if not pin or not _CORES:
        return []
    cores = _CORES[-threads:]
    os.sched_setaffinity(0, cores)
    return cores


@contextlib.contextmanager
def unpinned() -> Iterator[None]:
    """All cores for a while: compilers and their worker processes need not share one."""
    pinned = os.sched_getaffinity(0) if _CORES else []
    try:
        if _CORES:
            os.sched_setaffinity(0, _CORES)
        yield
    finally:
        if _CORES:
            os.sched_setaffinity(0, pinned)


def processor_name() -> str:
    """The CPU's model name, with family and model numbers where /proc/cpuinfo has them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def forced(names: Sequence[str] = FORCING) -> dict[str, str]:
    """Those of the variables ``names`` that are set to something."""
    found = {name: os.environ.get(name, "").strip() for name in names}
    return {name: value for name, value in found.items() if value not in ("", "auto")}


def not_held(held: Mapping[str, str]) -> str:
    """The variables that hold the peers to an instruction set, where only ours is held to one."""
    if "GHOST_OPS_CPU_ISA" not in held:
        return ""
    old = "ONEDNN_MAX_CPU_ISA" if "DNNL_MAX_CPU_ISA" in held else "DNNL_MAX_CPU_ISA"
    return ", ".join(name for name in ISA_VARIABLES if name not in held and name != old)


def command_line(words: Sequence[str]) -> str:
    """A command as a shell takes it, with the variables of ``FORCING`` that are set."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in forced().items()), shlex.join(words)])


def instructions(meta: Mapping[str, Any]) -> str:
    """The instruction sets of a results file's run in words, and the variables that forced them."""
    ours = meta.get("ghost_ops", {}).get("isa", "none")
    words = f"ghost_ops {ours}, ATen {meta.get('cpu_capability', 'unknown')}"
    variables = " ".join(f"{name}={value}" for name, value in meta.get("forced", {}).items())
    return f"{words}; forced: {variables}" if variables else words


def start(
    command: Sequence[Any], log: Path, cwd: Path, environment: Mapping[str, str], **options: Any
) -> subprocess.Popen[Any]:
    """Start a program with its output in a file; ``options`` as Popen takes them."""
    words, options = [str(word) for word in command], {"cwd": cwd, "env": environment, **options}
    with log.open("w") as file:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        return subprocess.Popen(words, **streams, **options)


def git_commit() -> str:
    """The commit, with ``-dirty`` if the tree was changed; ``unknown`` outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.stdout.strip() or "unknown"


def library_info() -> dict[str, Any]:
    """Version and build of ghost_ops as this process uses it."""
    try:
        import ghost_ops

        info: dict[str, Any] = {"version": ghost_ops.__version__}
        from ghost_ops import _C
    except ImportError as error:
        return {"missing": str(error)}
    native = {str(k): str(v) for k, v in _C.build_info().items()}
    return {**info, "native": native, "isa": _C.isa()}


def metadata(
    words: Sequence[str], *, cores: Sequence[int], allocation: str, clock: str = "wall"
) -> dict[str, Any]:
    """What a reader needs to judge the numbers.

    ``words`` is the command line after ``python -m benchmarks``, ``cores`` those that the threads
    are pinned to, ``allocation`` how the process allocates.
    """
    return {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(["python", "-m", "benchmarks", *words]),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "forced": forced(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ghost_ops": library_info(),
        "commit": git_commit(),
        "threads": torch.get_num_threads(),
        "pinned_to": list(cores),
        "allocation": allocation,
        "clock": clock,
    }


def print_header(meta: Mapping[str, Any]) -> None:
    """Print the metadata that decides how to read the tables below it."""
    print(f"{meta['cpu']}, {meta['cores']} cores; load average {meta['load_average']}")
    library = meta["ghost_ops"].get("version", "missing")
    print(f"torch {meta['torch']}, commit {meta['commit']}, ghost_ops {library}")
    print(f"Instruction sets: {instructions(meta)}")
    if free := not_held(meta["forced"]):
        print(f"The peers and the peak are not held to it: set {free} as well")
    print(f"{meta['threads']} thread(s) on cores {meta['pinned_to'] or 'of any number'}")
    print(f"Clock: {meta['clock']}. Allocation: {meta['allocation']}")


def prepare_output(path: Path) -> Path:
    """Create the folder of ``path``; OSError naming path and reason if it cannot be written."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise type(error)(f"cannot write results to {path}: {error}") from error
    return path


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document`` atomically, so that an interrupted run never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=True) + "\n")
    temporary.replace(path)
