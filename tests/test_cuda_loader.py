"""The loader of the CUDA library says why it does not load, and what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ghost_ops.backends import cuda


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that has tried nothing yet, in a torch with CUDA and without a GPU."""
    monkeypatch.setattr(cuda, "_state", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")


def junk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A file where the library should be that no loader takes."""
    path = folder / "_cuda.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "PATH", path)


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not cuda.load()
    assert "a build without CUDA; install a CUDA build of PyTorch" in cuda.reason()


def test_library_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "PATH", tmp_path / "_cuda.so")
    assert not cuda.load()
    assert "was not built; put nvcc on the PATH" in cuda.reason()


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
    assert "install ghost_ops again with the nvcc of that CUDA" in reason


def test_the_reason_is_found_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    junk(monkeypatch, tmp_path)
    first = cuda.reason()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded twice"))
    assert not cuda.load()
    assert cuda.reason() == first
