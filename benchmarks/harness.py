"""Interleaved timing, output checks, allocator and threads, and the metadata of results files.

The rules: a candidate is checked before its time counts; candidates run in interleaved rounds (A B
C, A B C, ...) so that a slow spell of the machine hits all of them; a sample repeats the call until
it is long against the clock's resolution; what is reported is the median with the 20th and 80th
percentile.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.extras import require

SCHEMA_VERSION = 1
RUN_FILE = "run.json"  # of ``python -m benchmarks all``, beside the results
Clock = Callable[[], float]
# CPU time leaves out the slices that other processes take of a shared machine; it means something
# only where this thread does all the work.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}

# Environment variables that hold a library to fewer instructions than the processor has: ours,
# ATen and torch.compile, oneDNN (PyTorch's and OpenVINO's, by either name), MKL.
ISA_VARIABLES = (
    "GHOST_OPS_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip
# Others that make a run one that must not be taken for an ordinary one.
FORCING = (
    *ISA_VARIABLES, "GHOST_OPS_CPU_MACHINE", "GHOST_OPS_BACKEND", "GHOST_OPS_CUDA_PDL",
    "GHOST_OPS_CUDA_PIPELINE", "GHOST_OPS_CUDA_PLAN",
)  # fmt: skip

# Before anything is pinned: set_threads may be called again with more threads.
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

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


@dataclass(frozen=True)
class Timing:
    """Quantiles in seconds of one call, over ``rounds`` samples of ``repeats`` calls each."""

    median: float
    p20: float
    p80: float
    rounds: int
    repeats: int

    @classmethod
    def from_samples(cls, samples: Sequence[float], repeats: int) -> Timing:
        """Quantiles of per-call times in seconds."""
        numpy = require("numpy", "quantiles")
        p20, median, p80 = (float(q) for q in numpy.quantile(samples, (0.2, 0.5, 0.8)))
        return cls(median, p20, p80, len(samples), repeats)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    min_sample: float = 2e-3,
    warmup: float = 5e-3,
    clock: Clock = time.perf_counter,
    synchronize: Callable[[], object] = lambda: None,
    max_repeats: int = 10_000,
) -> dict[str, Timing]:
    """Time every call in interleaved rounds.

    Args:
        calls: name -> function without arguments.
        rounds: samples per call.
        min_sample: the call is repeated inside a sample until the sample lasts about this long, in
            seconds.
        warmup: seconds each call runs before its number of repeats is fixed (two calls at least).
        clock: monotonic clock in seconds.
        synchronize: waits for the device; called before the clock is read.

    Returns:
        name -> quantiles of the time per call.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")

    def sample(call: Callable[[], object], repeats: int) -> float:
        synchronize()
        start = clock()
        for _ in range(repeats):
            call()
        synchronize()
        return (clock() - start) / repeats

    repeats: dict[str, int] = {}
    for name, call in calls.items():
        sample(call, 1)
        start, count = clock(), 0
        while True:
            call()
            count += 1
            if clock() - start >= warmup or count >= max_repeats:
                break
        synchronize()
        per_call = max((clock() - start) / count, 1e-9)
        repeats[name] = min(max(1, round(min_sample / per_call)), max_repeats)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(sample(call, repeats[name]))
    return {name: Timing.from_samples(samples[name], repeats[name]) for name in calls}


@dataclass(frozen=True)
class Check:
    """Relative errors against float64: the candidate's, eager PyTorch's, and what is allowed."""

    error: float
    eager_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the candidate may be timed (NaN is never ok)."""
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        """Error over allowed error; infinite for NaN."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.allowed if self.error < math.inf and self.allowed else math.inf


def relative_error(candidate: torch.Tensor, exact: torch.Tensor, *, norm: str) -> float:
    """Error of ``candidate`` relative to the size of ``exact``, both measured in one norm.

    Args:
        candidate, exact: tensors of one shape; compared in float64.
        norm: ``"max"`` (largest element) or ``"l2"``.

    Returns:
        The relative error: NaN if either holds a NaN, infinite if the shapes differ.
    """
    if candidate.shape != exact.shape:
        return math.inf
    order = {"max": math.inf, "l2": 2}[norm]
    size = torch.linalg.vector_norm(exact.double(), order).item() if exact.numel() else 0.0
    if not exact.numel():
        return 0.0
    error = torch.linalg.vector_norm(candidate.double() - exact.double(), order).item()
    return error / size if size else (0.0 if error == 0.0 else math.inf)


def timed_fields(timing: Timing, check: Check, nbytes: int) -> dict[str, Any]:
    """What a row gets once it is checked and timed: quantiles, bytes/s, errors."""
    return {
        "median_s": timing.median,
        "p20_s": timing.p20,
        "p80_s": timing.p80,
        "rounds": timing.rounds,
        "repeats": timing.repeats,
        "gbytes_per_s": nbytes / timing.median / 1e9,
        "error": check.error,
        "eager_error": check.eager_error,
        "allowed": check.allowed,
    }


def check_errors(
    candidate: Sequence[float], eager: Sequence[float], floors: Sequence[float]
) -> Check:
    """Check ``candidate <= 2 * eager + floor`` for the relative error of each tensor.

    Returns:
        The check of the tensor that comes closest to its limit or passes it furthest.
    """
    checks = [
        Check(error, base, 2.0 * base + floor)
        for error, base, floor in zip(candidate, eager, floors, strict=True)
    ]
    return max(checks, key=lambda check: check.used if check.ok else math.inf)


def saved_bytes(call: Callable[[], torch.Tensor], module: torch.nn.Module) -> dict[str, int]:
    """Bytes that autograd keeps for the backward of one forward, parameters and buffers aside.

    Every distinct storage counts once, at its full size (a saved view keeps all of its storage
    alive).

    Returns:
        ``maps``: storages of feature maps; ``stats``: one-dimensional tensors (per-channel
            statistics); ``total``: both.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    seen: dict[int, tuple[bool, int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            # The tensor is held too, so that no storage is freed and its address reused while we
            # count.
            seen[storage.data_ptr()] = (tensor.dim() > 1, storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    del out
    maps = sum(nbytes for is_map, nbytes, _ in seen.values() if is_map)
    stats = sum(nbytes for is_map, nbytes, _ in seen.values() if not is_map)
    return {"maps": maps, "stats": stats, "total": maps + stats}


def use_tuned_malloc(
    module: str, arguments: Sequence[str], settings: Mapping[str, str] = TUNED_MALLOC
) -> str:
    """Re-execute ``python -m module`` with an allocator that, by default, keeps memory.

    Large tensors allocated per call are otherwise mapped, page-faulted and unmapped each time,
    which costs every provider about the same time and hides the difference between them. Without
    glibc nothing is changed.

    Returns:
        How this process allocates, in words.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "default allocator (not glibc: nothing to tune)"
    if all(os.environ.get(name) == value for name, value in settings.items()):
        return "glibc malloc tuned: " + " ".join(f"{k}={v}" for k, v in settings.items())
    sys.stdout.flush()
    environment = {**os.environ, **settings}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


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
    if not _CORES:
        yield
        return
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)


def core_count() -> int:
    """Cores that this process may use."""
    return len(_CORES) or os.cpu_count() or 1


def processor_name() -> str:
    """The CPU's model name, with family and model numbers where the name alone says little."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        return platform.processor() or platform.machine()
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
    """A command as a shell takes it, with the variables of ``FORCING`` that are in force."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in forced().items()), shlex.join(words)])


def instructions(meta: Mapping[str, Any]) -> str:
    """The instruction sets of a results file's run in words, and the variables that forced them."""
    ours = meta.get("ghost_ops", {}).get("isa", "none")
    words = f"ghost_ops {ours}, ATen {meta.get('cpu_capability', 'unknown')}"
    variables = " ".join(f"{name}={value}" for name, value in meta.get("forced", {}).items())
    return f"{words}; forced: {variables}" if variables else words


def git_commit() -> str:
    """The commit, with ``-dirty`` if the tree was changed; ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.stdout.strip() or "unknown"


def library_info() -> dict[str, Any]:
    """Version and build of ghost_ops as this process uses it."""
    info: dict[str, Any] = {}
    try:
        import ghost_ops
    except ImportError as error:
        return {"missing": str(error)}
    info["version"] = getattr(ghost_ops, "__version__", "unknown")
    try:
        from ghost_ops import _C
    except ImportError as error:
        info["native"] = f"not loaded: {error}"
    else:
        info["native"] = {str(k): str(v) for k, v in _C.build_info().items()}
        info["isa"] = _C.isa()
    return info


def metadata(
    *, threads: int, cores: Sequence[int], allocation: str, clock: str = "wall"
) -> dict[str, Any]:
    """What a reader needs to judge the numbers: machine, versions, commit, threads, date,
    command."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "schema": SCHEMA_VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line([Path(sys.executable).name, "-m", _main_module(), *sys.argv[1:]]),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "forced": forced(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ghost_ops": library_info(),
        "commit": git_commit(),
        "threads": threads,
        "pinned_to": list(cores),
        "allocation": allocation,
        "clock": clock,
    }


def _main_module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec is not None else "benchmarks"


def print_header(console: Any, meta: Mapping[str, Any]) -> None:
    """Print the metadata that decides how to read the tables below it."""
    library = meta["ghost_ops"]
    native = library.get("isa") or library.get("native") or library.get("missing")
    console.print(
        f"[bold]{meta['cpu']}[/], {meta['cores']} cores; load average {meta['load_average']}"
    )
    console.print(
        f"torch {meta['torch']}, Python {meta['python']}, commit {meta['commit']}, "
        f"ghost_ops {library.get('version', 'missing')} (native: {native})"
    )
    console.print(f"Instruction sets: {instructions(meta)}")
    if free := not_held(meta["forced"]):
        console.print(f"[yellow]The peers and the peak are not held to it: set {free} as well[/]")
    pinned = f"pinned to cores {meta['pinned_to']}" if meta["pinned_to"] else "not pinned"
    clock = {"wall": "wall clock", "cpu": "CPU time of the thread"}[meta["clock"]]
    console.print(f"{meta['threads']} thread(s), {pinned}; {clock}")
    console.print(f"Allocation: {meta['allocation']}")


def prepare_output(path: Path) -> Path:
    """Create the folder of ``path`` and make sure that the file can be written.

    Raises:
        OSError: naming the path and the reason.
    """
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
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
