"""Loader of the native CUDA library ``ghost_ops/_cuda.so``, for the native backend."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import build_record, environment

LEAST_CAPABILITY = (8, 0)  # cp.async, bfloat16 and TF32 on tensor cores
PATH = Path(__file__).resolve().parent.parent / "_cuda.so"

_state: tuple[bool, str] | None = None


def load() -> bool:
    """Load the library, which registers its kernels. Returns whether it is loaded."""
    global _state
    if _state is None:
        _state = _try_load()
    return _state[0]


def reason() -> str:
    """Why the CUDA library is loaded or is not."""
    load()
    assert _state is not None
    return _state[1]


def _gpu_without_kernels() -> str | None:
    """Why the kernels cannot run on a GPU of this machine; None if they can or there is none."""
    if not torch.cuda.is_available():
        return None
    built = set(_built_for(PATH))
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        have, need = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        gpu = f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {have}"
        if capability < LEAST_CAPABILITY:
            return f"{gpu}, the CUDA kernels need {need} or newer"
        if built and not any(_runs_on(capability, *code) for code in built):
            names = ", ".join(
                f"{major}.{minor}{'+PTX' if is_ptx else ''}"
                for major, minor, is_ptx in sorted(built)
            )
            return (
                f"{gpu}, {PATH.name} was built for {names}; install ghost_ops again with "
                f"{environment.CUDA_ARCHS.name}={have}"
            )
    return None


def _versions() -> tuple[int, int]:
    """CUDA of the runtime in the loaded library, CUDA that the driver supports; 13000 is 13.0."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    library = ctypes.CDLL(str(PATH))
    library.ghost_ops_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


def _old_driver() -> str | None:
    """Why the driver cannot run the library's CUDA runtime; None if it can.

    The runtime is linked into the library and can be newer than torch's. A driver runs all runtimes
    up to its own major version.
    """
    runtime, driver = _versions()
    if driver // 1000 >= runtime // 1000:
        return None
    have, need = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
    return (
        f"{PATH.name} was built with CUDA {need}, the driver of this machine supports CUDA {have}; "
        "install a newer NVIDIA driver, or install ghost_ops again from source with the nvcc of "
        f"CUDA {have}"
    )


def _runs_on(capability: tuple[int, int], major: int, minor: int, is_ptx: bool) -> bool:
    """Whether code for (major, minor) runs on a GPU.

    Machine code runs on GPUs of the same major version with an equal or higher minor version; PTX
    runs on GPUs of an equal or higher version.
    """
    if is_ptx:
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


FATBIN_MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2


def _built_for(path: Path) -> Iterator[tuple[int, int, bool]]:
    """(major, minor, is PTX) of each piece of GPU code in a library that this function finds.

    nvcc writes a "fat binary" for each source: a header (magic, version, its size, size of the
    entries) and entries (kind, version, size of the entry's header, size of its code, ..., and at
    byte 28 the architecture).
    """
    if path.stat().st_size == 0:
        return  # an empty file cannot be mapped
    magic = struct.pack("<I", FATBIN_MAGIC)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(magic)
        while 0 <= start <= len(data) - 16:
            header, size = struct.unpack_from("<6xHQ", data, start)
            at, end = start + header, min(start + header + size, len(data))
            while at + 32 <= end:
                kind, entry, code = struct.unpack_from("<H2xIQ", data, at)
                (arch,) = struct.unpack_from("<I", data, at + 28)
                if kind not in (PTX, MACHINE_CODE) or entry < 32:
                    break  # not a fat binary, or an unknown format
                yield arch // 10, arch % 10, kind == PTX
                at += entry + code
            start = data.find(magic, start + 4)


def _try_load() -> tuple[bool, str]:
    # With a torch built without CUDA, the loader's error would only list missing libraries.
    if torch.version.cuda is None:
        return False, (
            f"torch {torch.__version__} is a build without CUDA; install a CUDA build of PyTorch"
        )
    if not PATH.exists():
        return False, f"the native CUDA library was not built: {build_record.why_missing('cuda')}"
    if (wrong_gpu := _gpu_without_kernels()) is not None:
        return False, wrong_gpu
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:  # a missing symbol
        return False, f"{PATH.name} {loading_failure(error)}, with the nvcc of that CUDA"
    if torch.cuda.is_available() and (old_driver := _old_driver()) is not None:
        return False, old_driver
    loaded = f"loaded {PATH.name} into torch {torch.__version__} with CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        loaded += "; torch finds no GPU here (nvidia-smi tells whether there is a driver)"
    return True, loaded


def loading_failure(error: Exception) -> str:
    """Why a compiled library does not load, as the rest of a sentence, with the remedy."""
    text = str(error.__cause__ or error)
    # The loader's text: "/lib/libc.so.6: version `GLIBC_2.38' not found (required by ...)".
    if found := re.search(r"version `(GLIBC|GLIBCXX)_([\d.]+)' not found", text):
        library, version = found.groups()
        why = f"was built for a newer system: it needs {library.lower()} {version}"
        if library == "GLIBC":
            why += f", and this system has {os.confstr('CS_GNU_LIBC_VERSION')}"
    else:
        cuda = f" with CUDA {torch.version.cuda}" if torch.version.cuda else ""
        why = f"does not load into torch {torch.__version__}{cuda} ({text})"
    return f"{why}; `pip install .` in the checkout of ghost_ops builds it for this machine"
