"""The machine and the process as the operating system shows them. No torch."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# Variables of other libraries that change what runs, or its speed.
OTHER_VARIABLES = re.compile(
    r"(OMP|GOMP|KMP|MKL|MALLOC|ATEN|ONEDNN|DNNL|TRITON|TORCH|PYTORCH|CUDA|NVIDIA)_\w+"
    r"|LD_PRELOAD|GLIBC_TUNABLES"
)
_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def variables() -> dict[str, str]:
    """The variables of ``OTHER_VARIABLES`` that are set."""
    return {name: os.environ[name] for name in sorted(os.environ) if is_relevant(name)}


def is_relevant(name: str) -> bool:
    """Whether a variable of another library changes what runs, or its speed."""
    return OTHER_VARIABLES.fullmatch(name) is not None and bool(os.environ[name])


def processor() -> str:
    """The model name of the CPU, with family and model numbers where /proc/cpuinfo has them."""
    if sys.platform == "darwin":
        return run("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def affinity() -> list[int]:
    """The logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores(processors: list[int]) -> int | None:
    """The number of cores that these logical processors belong to; None if it is not known."""
    cores = set()
    for number in processors:
        path = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(path.read_text().strip())
        except OSError:
            return None
    return len(cores)


def cgroup_limit() -> float | None:
    """The processors that the control group of this process allows; None if it sets no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: the limits of all parents hold as well
            root = Path("/sys/fs/cgroup")
            folder = root / path.lstrip("/")
            for parent in (folder, *folder.parents):
                if parent.is_relative_to(root):
                    limits.append(_quota(parent / "cpu.max"))
        elif "cpu" in controllers.split(","):
            # In a container the own group is mounted at the root.
            for mount in (f"/sys/fs/cgroup/{controllers}{path}", "/sys/fs/cgroup/cpu"):
                quota, period = (Path(mount) / f"cpu.cfs_{x}_us" for x in ("quota", "period"))
                limits.append(_quota(quota, period))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(*files: Path) -> float | None:
    """Quota / period, from one file with both or from two."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()[:2]
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def usable_cores(processors: list[int], limit: float | None) -> int:
    """The number of threads beyond which threads share a core."""
    cores = physical_cores(processors) or len(processors)
    return cores if limit is None else max(1, min(cores, math.floor(limit)))


def allocator() -> dict[str, str | None]:
    """The allocator of large tensors on the CPU: its name, its library and its settings."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        maps = ""
    pattern = rf"(/\S*/lib({'|'.join(_ALLOCATORS)})\S*\.so\S*)"
    if loaded := re.search(pattern, maps):
        return {"name": loaded[2], "library": loaded[1], "settings": ""}
    settings = {name: os.environ[name] for name in sorted(os.environ) if _tunes_malloc(name)}
    text = " ".join(f"{name}={value}" for name, value in settings.items())
    library, version = platform.libc_ver()
    name = f"{library} {version}".strip() or platform.system()
    return {"name": name, "library": None, "settings": text}


def _tunes_malloc(name: str) -> bool:
    if name == "GLIBC_TUNABLES":
        return "glibc.malloc" in os.environ[name]
    return name.startswith("MALLOC_") and bool(os.environ[name])


def driver() -> dict[str, Any]:
    """What ``nvidia-smi`` says, which works without torch: version, GPUs, and why there is none."""
    if (program := shutil.which("nvidia-smi")) is None:
        return {"version": None, "gpus": [], "reason": "no NVIDIA driver (nvidia-smi is not found)"}
    query = "--query-gpu=driver_version,name,compute_cap"
    try:
        text = run(program, query, "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError) as error:
        return {"version": None, "gpus": [], "reason": f"{program} fails: {first_line(error)}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    gpus = [f"{name}, compute capability {capability}" for _, name, capability in rows]
    reason = f"driver {rows[0][0]}" if rows else f"{program} lists no GPU"
    return {"version": rows[0][0] if rows else None, "gpus": gpus, "reason": reason}


def nvcc() -> dict[str, str | None]:
    """The nvcc that a build takes: its path, the version of its toolkit, and why there is none."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    found = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    path = next(filter(os.path.exists, found), None) or shutil.which("nvcc")
    if path is None:
        return {"path": None, "version": None, "reason": "nvcc is not found (set CUDA_HOME)"}
    try:
        text = run(path, "--version")
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{path} does not run: {first_line(error)}"
        return {"path": path, "version": None, "reason": reason}
    version = re.search(r"release ([\d.]+)(?:, V([\d.]+))?", text)
    if version is None:
        return {"path": path, "version": None, "reason": f"{path} does not tell its version"}
    number = version[2] or version[1]
    return {"path": path, "version": number, "reason": f"{number}, {path}"}


def run(*command: str) -> str:
    """The output of a program. Raises OSError or subprocess.SubprocessError if it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
        check=True,
    )
    return done.stdout.decode(errors="replace").strip()


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message that has text; its type if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
