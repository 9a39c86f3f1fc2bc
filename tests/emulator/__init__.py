"""Builds the CUDA sources for the block emulator, and sets its options.

The libraries are written to build/emulator; only changed sources are compiled again. ``ops`` has
the real kernels, launchers and registrations, as operators ``torch.ops.ghost_emu.*`` on CPU
tensors; ``prims`` has one kernel for each primitive, and kernels with deliberate faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import fnmatch
import functools
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"

# Bits of a schedule, as in emulator.h.
REVERSE_WARPS, REVERSE_LANES, GREEDY, EAGER_COPIES, RANDOM_WARPS = 1, 2, 4, 8, 16
# A race that one order hides shows in another: lazy and eager copies, greedy and fair warps, both
# directions.
SCHEDULES = {
    "plain": 0,
    "reversed": REVERSE_WARPS | REVERSE_LANES,
    "eager": EAGER_COPIES | REVERSE_WARPS,
    "greedy": GREEDY,
    "greedy-eager": GREEDY | EAGER_COPIES | REVERSE_WARPS | REVERSE_LANES,
    "random": RANDOM_WARPS | REVERSE_LANES,
    "random-eager": RANDOM_WARPS | EAGER_COPIES,
}

# Compiling the kernels takes longer than running them, so that they are not optimised much. The
# emulator itself is.
KERNEL_FLAGS, RUNTIME_FLAGS = ["-Og"], ["-O2"]
CXX_FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Wno-unknown-pragmas "
    "-DGHOST_OPS_EMULATOR"
).split()
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1".split()


class Unavailable(Exception):
    """The emulator cannot be built here; the message says why."""


def compiler() -> str:
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if cxx is None:
        raise Unavailable("no C++ compiler for the emulator")
    return cxx


def ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise Unavailable("no ninja to build the emulator with") from None
        return found
    return str(Path(BIN_DIR) / "ninja")


def torch_flags() -> list[str]:
    import torch

    include = Path(torch.__file__).parent / "include"
    return ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include)]


def torch_link_flags() -> list[str]:
    import torch

    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def object_name(source: Path) -> str:
    return f"{'_'.join(source.parts[-3:])}.o"


def build(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    csrc: Path = CSRC,
    objects: Sequence[Path] = (),
) -> Path:
    """Compiles sources into build/emulator/<name>/lib.so; csrc is what they include from.

    ``objects`` are already compiled. They are linked last, so that of an inline function defined in
    several files the definition in ``sources`` is used.

    Raises:
        Unavailable: there is no compiler or no ninja.
        RuntimeError: the compiler refused, with its messages.
    """
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{csrc}", f"-I{HERE}"]

    def quote(words: Sequence[str]) -> str:
        return " ".join(map(shlex.quote, map(str, words))).replace("$", "$$")

    lines = [
        "rule cxx",
        f"  command = {compiler()} -MMD -MF $out.d {quote(CXX_FLAGS)} $more "
        f"{quote([*flags, *include])} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared {quote(flags)} $in -o $out {quote(link)} -pthread",
    ]
    for source in sources:
        more = RUNTIME_FLAGS if source in runtime_sources() else KERNEL_FLAGS
        if "torch" in source.parts[-3:]:
            more = [*more, *torch_flags()]
        lines += [f"build {object_name(source)}: cxx {source}", f"  more = {quote(more)}"]
    linked = " ".join([*map(object_name, sources), *map(str, objects)])
    lines += [f"build lib.so: link {linked}", "default lib.so", ""]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes build once
        text, file = "\n".join(lines), folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(min(2, os.cpu_count() or 1))
        done = subprocess.run(
            [ninja(), "-C", str(folder), "-j", jobs], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"the emulator library {name!r} does not compile:\n{done.stdout}")
    return folder / "lib.so"


def runtime_sources() -> list[Path]:
    names = ("emulator.cpp", "emulated_copies.cpp", "emulated_mma.cpp", "control.cpp")
    return [HERE / name for name in names]


def op_sources(csrc: Path = CSRC) -> list[Path]:
    """The sources of the operators: plan, launchers, kernels, registrations."""
    patterns = ("core/*.cpp", "cuda/*.cpp", "cuda/**/*.cu", "torch/cuda/*.cpp")
    return sorted({path for pattern in patterns for path in csrc.glob(pattern)})


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a GPU that the launchers query. Sizes in bytes."""

    major: int
    minor: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    l2: int


DEVICES = {
    "sm_90": Device(9, 0, 132, 227 << 10, 228 << 10, 50 << 20),
    "sm_80": Device(8, 0, 108, 163 << 10, 164 << 10, 40 << 20),
    # Very small: blocks take several tiles in turn, and tiles are small.
    "tiny sm_86": Device(8, 6, 2, 99 << 10, 100 << 10, 1 << 20),
}
# Less shared memory than any GPU has: blocks run short of it at hundreds of channels, as they do on
# a GPU at thousands.
SMALL_BLOCKS = {
    "40 KiB": Device(8, 6, 2, 40 << 10, 41 << 10, 1 << 20),
    "58 KiB": Device(8, 6, 2, 58 << 10, 59 << 10, 1 << 20),
    "72 KiB": Device(8, 6, 2, 72 << 10, 73 << 10, 1 << 20),
    "tiny sm_90": Device(9, 0, 2, 99 << 10, 200 << 10, 1 << 20),
}


class Library:
    """A loaded emulator library, and its options."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.ghost_emu_launches.restype = ctypes.c_int64
        self.c.ghost_emu_limits_set.restype = ctypes.c_int64

    def configure(self, schedule: int = 0, seed: int = 0, threads: int = 1) -> None:
        self.c.ghost_emu_configure(schedule, seed, threads)

    @contextlib.contextmanager
    def scheduled(self, schedule: int, seed: int = 0, threads: int = 1) -> Iterator[None]:
        """Runs what is inside under a schedule, on a number of OS threads."""
        self.configure(schedule, seed, threads)
        try:
            yield
        finally:
            self.configure()

    def set_device(self, device: Device) -> None:
        """From now on, launchers plan for this GPU."""
        self.c.ghost_emu_set_device(*dataclasses.astuple(device))

    @contextlib.contextmanager
    def as_device(self, device: Device) -> Iterator[None]:
        """Inside, launchers plan for this GPU; afterwards for the default one."""
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(DEVICES["sm_90"])

    def launches(self) -> int:
        """Kernels launched in this process so far."""
        return self.c.ghost_emu_launches()

    def last_kernel(self) -> str:
        """The kernel that was launched last in this process."""
        self.c.ghost_emu_last_kernel.restype = ctypes.c_char_p
        return self.c.ghost_emu_last_kernel().decode()

    def limits_set(self) -> int:
        """How often a kernel's limit of shared memory was set in this process so far."""
        return self.c.ghost_emu_limits_set()

    def call(self, function: str, name: str, data: int, out: int, number: int) -> None:
        """Calls one of the harness functions. Raises RuntimeError with what it reports."""
        run = getattr(self.c, function)
        run.restype = ctypes.c_char_p
        message = run(name.encode(), ctypes.c_void_p(data), ctypes.c_void_p(out), number)
        if message is not None:
            raise RuntimeError(message.decode())

    def primitives(self) -> list[str]:
        self.c.ghost_prim_name.restype = ctypes.c_char_p
        names: list[str] = []
        while (name := self.c.ghost_prim_name(len(names))) is not None:
            names.append(name.decode())
        return names


def sanitizer_environment() -> dict[str, str]:
    """Environment variables with which Python loads a library with the address sanitizer."""
    import pytest

    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler(), f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if "/" not in found:
            pytest.skip(f"the compiler has no {name}")
        libraries.append(found)
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(ROOT)]),
    }


def or_skip(build: Callable[[], T]) -> T:
    """The result of ``build``; skips the test if the emulator cannot be built here."""
    import pytest

    try:
        return build()
    except Unavailable as reason:
        pytest.skip(str(reason))


@functools.cache
def prims() -> Library:
    """The primitives and the faulty kernels."""
    sources = [HERE / "prim_harness.cu", HERE / "faulty_kernels.cu", *runtime_sources()]
    return Library(build("prims", sources))


def build_ops() -> Path:
    return build("ops", [*op_sources(), *runtime_sources()], link=torch_link_flags())


def build_variant(
    name: str, only: Sequence[str], csrc: Path = CSRC, flags: Sequence[str] = ()
) -> Path:
    """The operators with some sources (names or globs, relative to csrc) compiled again, with more
    flags or from a changed copy of csrc. The others are linked from the objects of ``build_ops``.
    """
    base = build_ops().parent
    fresh = [*(path for path in op_sources(csrc) if matches(path.relative_to(csrc), only))]
    assert fresh, f"no source matches {only}"
    if flags:
        fresh += runtime_sources()
    names = {object_name(path) for path in fresh}
    everything = [*op_sources(), *runtime_sources()]
    rest = [base / object_name(p) for p in everything if object_name(p) not in names]
    return build(name, fresh, flags, torch_link_flags(), csrc, rest)


def matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(path.as_posix(), pattern) for pattern in patterns)


def define_schemas() -> None:
    """torch.ops.ghost_emu: the operators of ghost_ops under another name."""
    import torch

    import ghost_ops  # noqa: F401  (defines the operators)
    from ghost_ops.ops.define import SCHEMAS

    global _schemas
    if _schemas is None:
        _schemas = torch.library.Library("ghost_emu", "DEF")
        for schema in SCHEMAS.values():
            _schemas.define(schema)


_schemas = None


def load_ops(path: Path) -> Library:
    """Registers the operators of a built library. One library a process."""
    import torch

    define_schemas()
    torch.ops.load_library(str(path))
    return Library(path)


@functools.cache
def ops() -> Library:
    """The kernels, launchers and registrations, as operators torch.ops.ghost_emu."""
    return load_ops(build_ops())
