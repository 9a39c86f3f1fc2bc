"""The loader of the CUDA library reports why the library does not load, and the remedy."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghost_ops.backends import cuda, native


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader before its first load, in a torch with CUDA and without a GPU."""
    monkeypatch.setattr(cuda, "_state", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "_versions", lambda: (13000, 13000))


def with_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")


def junk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts a file that is no library in the place of the library."""
    path = folder / "_cuda.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "PATH", path)


def fat_binary(*code: tuple[int, int]) -> bytes:
    """(kind, architecture) as nvcc writes them; kind 1 is PTX, 2 machine code."""
    entries = b""
    for kind, arch in code:
        payload = bytes(24)
        head = struct.pack("<HHIQ", kind, 0x101, 64, len(payload))
        entries += head + struct.pack("<12xI", arch) + bytes(64 - 32) + payload
    return struct.pack("<IHHQ", cuda.FATBIN_MAGIC, 1, 16, len(entries)) + entries


def library(monkeypatch: pytest.MonkeyPatch, folder: Path, *binaries: bytes) -> None:
    """Puts a file with GPU code in the place of the library."""
    path = folder / "_cuda.so"
    path.write_bytes(b"\x7fELF and more " + b" rest ".join(binaries))
    monkeypatch.setattr(cuda, "PATH", path)


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not cuda.load()
    assert "a build without CUDA; install a CUDA build of PyTorch" in cuda.reason()


def test_library_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "PATH", tmp_path / "_cuda.so")
    assert not cuda.load()
    assert "the native CUDA library was not built" in cuda.reason()
    assert "nvcc" in cuda.reason()


@pytest.mark.parametrize("others", [(), ((9, 0),)])
def test_gpu_too_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: tuple[tuple[int, int], ...]
) -> None:
    junk(monkeypatch, tmp_path)
    with_gpus(monkeypatch, *others, (7, 5))
    assert not cuda.load()
    number = len(others)
    assert cuda.reason() == (
        f"cuda:{number} (GPU number {number}) has compute capability 7.5, the CUDA kernels need "
        "8.0 or newer"
    )


@pytest.mark.parametrize(
    ("capability", "code", "names"),
    [
        ((8, 6), [(2, 90)], "9.0"),
        ((9, 0), [(2, 80), (2, 86), (1, 100)], "8.0, 8.6, 10.0+PTX"),
        ((8, 0), [(2, 86)], "8.6"),
        ((12, 0), [(2, 80), (2, 90)], "8.0, 9.0"),
    ],
)
def test_library_of_another_architecture(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: tuple[int, int],
    code: list[tuple[int, int]],
    names: str,
) -> None:
    library(monkeypatch, tmp_path, fat_binary(*code), fat_binary(*code))
    with_gpus(monkeypatch, capability)
    assert not cuda.load()
    have = "{}.{}".format(*capability)
    assert cuda.reason() == (
        f"cuda:0 (GPU number 0) has compute capability {have}, _cuda.so was built for {names}; "
        f"install ghost_ops again with GHOST_OPS_CUDA_ARCHS={have}"
    )


# Machine code of the same generation, of an older minor version, PTX; and unreadable binaries.
FITTING = [
    ((9, 0), fat_binary((2, 80), (2, 90))),
    ((8, 9), fat_binary((2, 80))),
    ((12, 1), fat_binary((2, 80), (1, 90))),
    ((9, 0), fat_binary((7, 90))),
    ((9, 0), fat_binary((2, 90))[:40]),
    ((9, 0), struct.pack("<I", cuda.FATBIN_MAGIC)),
    ((9, 0), b""),
]


@pytest.mark.parametrize(("capability", "binary"), FITTING)
def test_library_that_fits_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], binary: bytes
) -> None:
    library(monkeypatch, tmp_path, binary)
    with_gpus(monkeypatch, capability)
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert cuda.load()
    assert loaded == [str(cuda.PATH)]
    assert cuda.reason() == f"loaded _cuda.so into torch {torch.__version__} with CUDA 13.0"


def test_driver_older_than_the_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The runtime in the library is newer than what a torch for CUDA 12 needs."""
    library(monkeypatch, tmp_path, fat_binary((2, 90)))
    with_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cuda, "_versions", lambda: (13000, 12080))
    assert not cuda.load()
    assert cuda.reason() == (
        "_cuda.so was built with CUDA 13.0, the driver of this machine supports CUDA 12.8; "
        "install a newer NVIDIA driver, or install ghost_ops again from source with the nvcc of "
        "CUDA 12.8"
    )


@pytest.mark.parametrize("driver", [13000, 13020, 14000])
def test_driver_of_the_same_major_version_or_newer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: int
) -> None:
    library(monkeypatch, tmp_path, fat_binary((2, 90)))
    with_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cuda, "_versions", lambda: (13010, driver))
    assert cuda.load()


def test_no_gpu_and_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library of a wheel is loaded all the same; the reason names the missing GPU."""
    library(monkeypatch, tmp_path, fat_binary((2, 90)))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert cuda.load()
    assert "; torch finds no GPU here (nvidia-smi tells" in cuda.reason()


def test_what_nvcc_writes_is_understood() -> None:
    path = Path(cuda.__file__).resolve().parent.parent / "_cuda.so"
    if not path.exists():
        pytest.skip("the CUDA library is not built in this checkout")
    found = set(cuda._built_for(path))
    assert found and all(8 <= major <= 12 for major, _, _ in found)


def test_empty_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library(monkeypatch, tmp_path)
    cuda.PATH.write_bytes(b"")
    with_gpus(monkeypatch, (9, 0))
    assert not cuda.load()
    assert "does not load into torch" in cuda.reason()


@pytest.mark.parametrize("capabilities", [(), ((8, 0),), ((9, 0), (12, 1))])
def test_library_of_another_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capabilities: tuple[tuple[int, int], ...]
) -> None:
    junk(monkeypatch, tmp_path)
    if capabilities:
        with_gpus(monkeypatch, *capabilities)
    assert not cuda.load()
    reason = cuda.reason()
    assert f"does not load into torch {torch.__version__} with CUDA 13.0" in reason
    assert "`pip install .` in the checkout of ghost_ops builds it" in reason


def test_the_reason_is_found_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    junk(monkeypatch, tmp_path)
    first = cuda.reason()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded twice"))
    assert not cuda.load()
    assert cuda.reason() == first


GLIBC = "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.99' not found (required by _C.so)"
GLIBCXX = "/lib/libstdc++.so.6: version `GLIBCXX_3.4.99' not found (required by _C.so)"


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        (GLIBC, f"it needs glibc 2.99, and this system has {os.confstr('CS_GNU_LIBC_VERSION')};"),
        (GLIBCXX, "it needs glibcxx 3.4.99;"),
    ],
)
def test_library_of_a_newer_system(
    text: str, needs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both libraries; torch.ops.load_library gives the loader's text as the cause of its error."""

    def load_library(path: str) -> None:
        raise OSError("Could not load this library") from OSError(text)

    def import_module(name: str) -> None:
        raise ImportError(text)

    junk(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native.importlib, "import_module", import_module)
    for library, name in ((cuda, "_cuda.so"), (native, "ghost_ops._C")):
        assert not library.load()
        assert library.reason().startswith(f"{name} was built for a newer system: {needs} ")


def test_a_real_library_of_a_newer_system(tmp_path: Path) -> None:
    """The loader's own error: a copy of the library, with another name for a version it needs."""
    if not native.load():
        pytest.skip(native.reason())
    path = Path(native.library().__file__)
    data = path.read_bytes()
    needed = sorted(set(re.findall(rb"\0(GLIBC_2\.\d\d)\0", data)))
    if not needed:
        pytest.skip("the library needs no version of glibc that can be renamed")
    newer = data.replace(b"\0" + needed[-1] + b"\0", b"\0GLIBC_2.99\0")
    (tmp_path / path.name).write_bytes(newer)
    code = f"import ctypes, torch; ctypes.CDLL({str(tmp_path / path.name)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    error = ImportError(done.stderr.strip().splitlines()[-1])
    assert "it needs glibc 2.99, and this system has" in cuda.loading_failure(error)
