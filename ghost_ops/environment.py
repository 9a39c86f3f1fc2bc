"""Every environment variable of ghost_ops, with its meaning, default and allowed values.

This file imports nothing but the standard library, because the build (setup.py) reads it too.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable. An empty ``choices`` means free text."""

    name: str
    default: str
    choices: tuple[str, ...]
    read_at: str  # "build", "import" or "first use"
    meaning: str

    def get(self) -> str:
        """The value in force. Raises ValueError if it is not allowed."""
        value = os.environ.get(self.name, "").strip() or self.default
        if self.choices and value not in self.choices:
            allowed = ", ".join(repr(choice) for choice in self.choices)
            raise ValueError(
                f"environment variable {self.name}={value!r}: expected one of {allowed}"
            )
        return value


BACKEND = Variable(
    "GHOST_OPS_BACKEND",
    "auto",
    ("auto", "native", "triton", "eager"),
    "import",
    "The backend: native (compiled kernels), triton (on GPUs), eager (plain PyTorch); auto: the "
    "first of them that can.",
)
EMULATED = "generic_amx"  # for tests: AMX in software
CPU_ISA = Variable(
    "GHOST_OPS_CPU_ISA",
    "auto",
    ("auto", "avx512_amx", "avx512", "avx2", "generic", EMULATED),
    "import",
    "Instruction set of the native CPU kernels; auto takes the widest that the processor has. "
    f"{EMULATED} is for tests: AMX in software.",
)
CPU_MACHINE = Variable(
    "GHOST_OPS_CPU_MACHINE",
    "",
    (),
    "import",
    "Plans of the native CPU kernels for other caches or another number of cores than this "
    "machine's, as in l1=32K,l2=512K,cores=2; what is not named stays the machine's.",
)
BUILD_CPU = Variable(
    "GHOST_OPS_BUILD_CPU",
    "auto",
    ("auto", "0", "1"),
    "build",
    "Native CPU library: 1 must be built, 0 is left out, auto needs a C++ compiler to be present.",
)
BUILD_CUDA = Variable(
    "GHOST_OPS_BUILD_CUDA",
    "auto",
    ("auto", "0", "1"),
    "build",
    "Native CUDA library: 1 must be built, 0 is left out, auto needs nvcc to be present.",
)
CUDA_ARCHS = Variable(
    "GHOST_OPS_CUDA_ARCHS",
    "8.0 9.0+PTX",
    (),
    "build",
    "GPU architectures to compile for, separated by spaces; +PTX adds code for later ones.",
)
CUDA_PIPELINE = Variable(
    "GHOST_OPS_CUDA_PIPELINE",
    "0",
    ("0", "1"),
    "first use",
    "1: evaluation and the last pass of training take the kernel that moves whole tiles in bulk "
    "copies, from sm_90 on and where the shape allows it.",
)
CUDA_PDL = Variable(
    "GHOST_OPS_CUDA_PDL",
    "0",
    ("0", "1"),
    "first use",
    "1: on GPUs of compute capability 9.0, a kernel of the forward starts before the previous one "
    "has ended, and waits for it (programmatic dependent launch).",
)

CUDA_PLAN = Variable(
    "GHOST_OPS_CUDA_PLAN",
    "1",
    ("1", "2", "3"),
    "first use",
    "Tiles of the native CUDA kernels: the plan with the least predicted time, or the second or "
    "third.",
)
TRITON_AUTOTUNE = Variable(
    "GHOST_OPS_TRITON_AUTOTUNE",
    "0",
    ("0", "1"),
    "import",
    "1: each Triton kernel times several tiles on its first call for a shape, and keeps the best.",
)
CACHE_DIR = Variable(
    "GHOST_OPS_CACHE_DIR",
    "",
    (),
    "first use",
    "Folder of what autotuning found; by default ghost_ops in $XDG_CACHE_HOME or ~/.cache.",
)

_MACHINE_RANGES = {"l1": (4 << 10, 1 << 20), "l2": (64 << 10, 256 << 20), "cores": (1, 4096)}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def cpu_machine() -> dict[str, int]:
    """GHOST_OPS_CPU_MACHINE as ``l1_bytes``, ``l2_bytes`` and ``cores``; 0 where absent.

    Raises:
        ValueError: a part has another form, is out of its range, or occurs twice.
    """
    text = CPU_MACHINE.get()
    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(l1|l2|cores)=(\d+)([KM]?)", part.strip())
        low, high = _MACHINE_RANGES[match[1]] if match else (0, 0)
        size = int(match[2]) * _UNITS[match[3]] if match else -1
        if match is None or match[1] in found or not low <= size <= high:
            raise ValueError(
                f"environment variable {CPU_MACHINE.name}={text!r}: {part.strip()!r} is not "
                "allowed; expected l1=4K ... 1M, l2=64K ... 256M and cores=1 ... 4096, each at "
                "most once, separated by commas"
            )
        found[match[1]] = size
    l1, l2, cores = (found.get(name, 0) for name in _MACHINE_RANGES)
    return {"l1_bytes": l1, "l2_bytes": l2, "cores": cores}


VARIABLES: tuple[Variable, ...] = (
    BACKEND,
    CPU_ISA,
    CPU_MACHINE,
    CUDA_PDL,
    CUDA_PIPELINE,
    CUDA_PLAN,
    TRITON_AUTOTUNE,
    CACHE_DIR,
    BUILD_CPU,
    BUILD_CUDA,
    CUDA_ARCHS,
)


def wrong_values() -> dict[str, str]:
    """The variables that are set to a value that is not allowed, each with its error message.

    A variable named GHOST_OPS_... that does not exist counts as well.
    """
    found = {}
    for variable in VARIABLES:
        try:
            cpu_machine() if variable is CPU_MACHINE else variable.get()
        except ValueError as error:
            found[variable.name] = str(error)
    known = [variable.name for variable in VARIABLES]
    for name in sorted(os.environ):
        if name.startswith("GHOST_OPS_") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f", only {', '.join(known)}"
            found[name] = f"environment variable {name}: ghost_ops has no such variable{hint}"
    return found


def runs_report() -> bool:
    """Whether Python is starting ``python -m ghost_ops``, which reports what keeps the package from
    importing. Then ``ghost_ops/__init__.py`` imports nothing.
    """
    arguments = getattr(sys, "argv", [])  # an embedded interpreter may have none
    command = sys.orig_argv[: len(sys.orig_argv) - len(arguments) + 1]
    # Python sets argv[0] to "-m" until it has found the module.
    return arguments[:1] == ["-m"] and bool(re.fullmatch(r"(-\w*m)?ghost_ops", command[-1]))
