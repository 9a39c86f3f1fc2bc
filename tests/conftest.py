"""Backends as a fixture, seeds, and two threads at most."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

# PyTorch's compiler keeps code by processor, not by the instruction set that it is told to take. It
# would find code for wider vectors, which gives wrong numbers.
if "ATEN_CPU_CAPABILITY" in os.environ:
    folder = f"inductor-{os.environ['ATEN_CPU_CAPABILITY']}"
    build = pathlib.Path(__file__).resolve().parent.parent / "build"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(build / folder))

# Triton decides when it is imported whether its kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@functools.cache
def native_module() -> Any | None:
    """``ghost_ops._C`` or None where it is not built."""
    try:
        return importlib.import_module("ghost_ops._C")
    except ImportError:
        return None


def native_isas() -> list[str]:
    """What this processor has, widest first; from GHOST_OPS_CPU_ISA on, where that is set."""
    native = native_module()
    available = list(native.available_isas()) if native else []
    forced = os.environ.get("GHOST_OPS_CPU_ISA", "auto")
    return available[available.index(forced) :] if forced in available else available


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-mkldnn", action="store_true", help="run PyTorch without oneDNN")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-mkldnn"):
        torch.backends.mkldnn.set_flags(False)


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    """``eager``, ``native`` (the instruction set chosen at run time) or ``native-<isa>``."""
    import ghost_ops

    name, _, isa = backend.partition("-")
    native = native_module()
    if name == "native" and native is None:
        pytest.skip("the native library is not built")
    with ghost_ops.use_backend(name):
        if not isa:
            yield
            return
        before = native.isa()
        native.set_isa(isa)
        try:
            yield
        finally:
            native.set_isa(before)


@contextlib.contextmanager
def machine(l2_bytes: int) -> Iterator[None]:
    """The native kernels with the plans of a machine whose L2 has this size."""
    from ghost_ops import environment as _env

    native = native_module()
    assert native is not None
    native.force_machine(l1_bytes=32 << 10, l2_bytes=l2_bytes)
    try:
        yield
    finally:
        native.force_machine(**_env.cpu_machine())


EVERY_ISA = ["eager", *(f"native-{isa}" for isa in native_isas())]
if len(EVERY_ISA) == 1:
    EVERY_ISA.append("native")


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=EVERY_ISA)
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend and instruction set this machine can run."""
    with running(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[str]:
    """For promises that only the native kernels make; skips where they are not built."""
    with running("native"):
        yield "native"


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the Triton backend, on the device that it gives."""
    from triton_cases import running_triton

    with running_triton(request.param) as device:
        yield device


@pytest.fixture(autouse=True)
def steady() -> Iterator[None]:
    """One seed and one thread unless the test says otherwise; both put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once in a process has not been said by another test."""
    monkeypatch.setattr("ghost_ops.announce._said", set())
