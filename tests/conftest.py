"""Fixtures and options that every test file may use: backends, one thread, one seed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

# PyTorch's compiler caches code by processor, not by ATEN_CPU_CAPABILITY: without a folder for each
# capability it would run cached code for wider vectors, which gives wrong numbers.
if "ATEN_CPU_CAPABILITY" in os.environ:
    folder = f"inductor-{os.environ['ATEN_CPU_CAPABILITY']}"
    build = pathlib.Path(__file__).resolve().parent.parent / "build"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(build / folder))

# Triton reads this when it is imported: kernels are interpreted if there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@functools.cache
def native_module() -> Any | None:
    """``ghost_ops._C``, or None if it is not built."""
    try:
        return importlib.import_module("ghost_ops._C")
    except ImportError:
        return None


def native_isas() -> list[str]:
    """Instruction sets of this processor, widest first, none wider than GHOST_OPS_CPU_ISA."""
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
    """Run with a backend: "eager", "native" or "native-<isa>"; skip if it is not built."""
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
    """Run the native kernels with the plans of a machine whose L2 cache has this size."""
    from ghost_ops import environment

    native = native_module()
    assert native is not None
    native.force_machine(l1_bytes=32 << 10, l2_bytes=l2_bytes)
    try:
        yield
    finally:
        native.force_machine(**environment.cpu_machine())


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
    """Runs the test with the native kernels; skips if they are not built."""
    with running("native"):
        yield "native"


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the Triton backend, on the CPU (interpreter) and on a GPU."""
    from triton_cases import running_triton

    with running_triton(request.param) as device:
        yield device


@pytest.fixture(autouse=True)
def steady() -> Iterator[None]:
    """Every test starts with one seed and one thread; the number of threads is restored."""
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
def fresh_compiler() -> Iterator[None]:
    """Starts and ends without compiled code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets which warnings were given: each is given once in a process."""
    monkeypatch.setattr("ghost_ops.announce._said", set())


@pytest.fixture(params=["4K", "24K"])
def small_caches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Caches so small that images are cut into bands of a few rows, and K into slices."""
    from ghost_ops import environment

    library = native_module()
    assert library is not None
    l1_bytes = {"4K": 4 << 10, "24K": 24 << 10}[request.param]
    library.force_machine(l1_bytes=l1_bytes, l2_bytes=64 << 10)
    yield
    library.force_machine(**environment.cpu_machine())


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[..., list[Any]]]:
    """Runs a function in two processes, started once for a file; see ``processes.Pair``."""
    import processes

    pair: processes.Pair | None = None

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        nonlocal pair
        if pair is None or not pair.is_open:
            pair = processes.Pair()
        return pair.run(function, *arguments)

    yield run
    if pair is not None and pair.is_open:
        pair.close()
