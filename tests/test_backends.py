"""Promise: a backend can be chosen by call, block or environment; a wrong choice raises.

Also instruction sets and machines set by the environment.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
import warnings

import pytest
import torch
from conftest import native_isas, native_module
from helpers import Case, make_input, make_module, recorded
from processes import RUN, python

import ghost_ops
from ghost_ops import backends, environment

RUN_DOUBLE = RUN + "; m.double()(torch.randn(1, 4, 5, 5).double())"
# Code that hides the native library from an interpreter.
HIDE = "import sys; sys.modules['ghost_ops._C'] = None;"
NEEDS_NATIVE = pytest.mark.skipif(native_module() is None, reason="the native library is not built")


def test_as_a_block() -> None:
    before = backends.requested()
    with ghost_ops.use_backend("eager"):
        assert backends.requested() == "eager"
        assert backends.select("cpu", torch.float32) == "eager"
        with ghost_ops.use_backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "eager"
    assert backends.requested() == before


def test_restored_after_an_exception() -> None:
    before = backends.requested()
    with pytest.raises(KeyError), ghost_ops.use_backend("eager"):
        raise KeyError
    assert backends.requested() == before


def test_as_a_call() -> None:
    before = backends.requested()
    try:
        ghost_ops.use_backend("eager")
        assert backends.select("cpu", torch.float32) == "eager"
    finally:
        ghost_ops.use_backend(before)


def test_reaches_other_threads() -> None:
    seen = []
    with ghost_ops.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == ["eager"]


@pytest.mark.parametrize("name", ["nativ", "", "cuda", None, 3])
def test_unknown_name(name: object) -> None:
    before = backends.requested()
    with pytest.raises((TypeError, ValueError), match=r"auto.*native.*eager"):
        ghost_ops.use_backend(name)
    assert backends.requested() == before


def test_the_backend_that_is_asked_for_runs(backend: str) -> None:
    """The dispatcher sees our operators with ``native`` and convolutions with ``eager``."""
    module, x = make_module(Case()).eval(), make_input(Case())
    with torch.no_grad(), recorded() as names:
        module(x)
    fused = [name for name in names if name.startswith("ghost_ops")]
    convolutions = [name for name in names if "conv" in name]
    if backend == "native":
        assert fused
        assert not convolutions
    else:
        assert convolutions


@NEEDS_NATIVE
def test_native_is_the_automatic_choice() -> None:
    result = python(RUN)
    assert result.stdout.strip() == "native", result.stderr
    assert "Warning" not in result.stderr


def test_chosen_by_environment() -> None:
    result = python(RUN, GHOST_OPS_BACKEND="eager")
    assert result.stdout.strip() == "eager", result.stderr
    assert "Warning" not in result.stderr


def test_mistyped_environment() -> None:
    result = python(RUN, GHOST_OPS_BACKENDS="eager")
    assert result.returncode == 0, result.stderr
    assert "GHOST_OPS_BACKENDS has no effect: ghost_ops reads GHOST_OPS_BACKEND, " in result.stderr


def test_wrong_environment() -> None:
    result = python(RUN, GHOST_OPS_BACKEND="fast")
    assert result.returncode != 0
    assert "ValueError" in result.stderr
    assert "GHOST_OPS_BACKEND" in result.stderr
    assert "'eager'" in result.stderr


def test_fallback_is_announced_once() -> None:
    result = python(HIDE + RUN_DOUBLE)
    assert result.stdout.strip() == "eager", result.stderr
    assert result.stderr.count("UserWarning") == 1
    assert "not built" in result.stderr or "does not load" in result.stderr
    assert "compiler" in result.stderr, "it says how to get the native library"


def test_explicit_request_that_cannot_run() -> None:
    for code, variables in (
        (HIDE + RUN, {"GHOST_OPS_BACKEND": "native"}),
        (HIDE + "import ghost_ops; ghost_ops.use_backend('native')", {}),
    ):
        result = python(code, **variables)
        assert result.returncode != 0
        assert "RuntimeError" in result.stderr
        assert "native" in result.stderr
        assert "compiler" in result.stderr


def test_explicit_request_on_a_device_without_kernels(native: str) -> None:
    with pytest.raises(RuntimeError, match=r"native.*(meta|xla)"):
        backends.select("xla", torch.float32)


def test_status_table() -> None:
    for request in ("auto", "eager"):
        with ghost_ops.use_backend(request), warnings.catch_warnings():
            warnings.simplefilter("error")
            rows = backends.status()
        assert {(row.device, row.dtype) for row in rows} >= {
            ("cpu", t) for t in ("float32", "float64", "bfloat16", "float16")
        }
        for row in rows:
            assert row.backend in ("native", "eager", "none")
            assert row.reason
            if row.device == "cpu" and request == "eager":
                assert row.backend == "eager"


@pytest.mark.parametrize("name", ["native", "eager"])
def test_can_run(name: str) -> None:
    backend = backends.BACKENDS[name]
    assert backend.name == name
    ok, reason = backend.can_run("cpu", torch.int8)
    assert not ok
    assert "int8" in reason
    ok, reason = backend.can_run("cpu", torch.float32)
    assert ok == (name == "eager" or native_module() is not None)
    assert reason


# --- instruction sets -------------------------------------------------------------------------


@NEEDS_NATIVE
def test_instruction_sets() -> None:
    native = native_module()
    available = native.available_isas()
    assert "generic" in available
    assert native.isa() in available
    before = native.isa()
    for isa in available:
        native.set_isa(isa)
        assert native.isa() == isa
    native.set_isa(before)
    with pytest.raises((ValueError, RuntimeError), match="sse9"):
        native.set_isa("sse9")
    assert native.isa() == before


@NEEDS_NATIVE
def test_instruction_set_by_environment() -> None:
    code = RUN + "; import ghost_ops._C as c; print(c.isa())"
    result = python(code, GHOST_OPS_CPU_ISA="generic")
    assert result.stdout.split() == ["native", "generic"], result.stderr


def test_an_instruction_set_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from ghost_ops.backends import native

    library = types.SimpleNamespace(available_isas=lambda: ["avx2", "generic"])
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setitem(sys.modules, "ghost_ops._C", library)
    monkeypatch.setenv("GHOST_OPS_CPU_ISA", "avx512")
    with pytest.raises(RuntimeError, match=r"GHOST_OPS_CPU_ISA='avx512': .* only avx2, generic"):
        native.load()


@NEEDS_NATIVE
def test_machine_by_environment() -> None:
    code = "import ghost_ops; m = ghost_ops.planner.cpu_machine(3); print(m.l2_bytes, m.cores)"
    result = python(code, GHOST_OPS_CPU_MACHINE="l1=32K, l2=512K,cores=7")
    assert result.stdout.split() == ["524288", "7"], result.stderr
    result = python(code, GHOST_OPS_CPU_MACHINE="l2=1M")
    assert result.stdout.split() == ["1048576", "3"], result.stderr


@pytest.mark.parametrize(
    "value", ["l2=0", "cores=0", "l1=1K", "l2=1G", "l3=4M", "l2=512K,l2=1M", "512K", "cores=-1"]
)
def test_a_machine_that_makes_no_sense(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOST_OPS_CPU_MACHINE", value)
    with pytest.raises(ValueError, match=r"GHOST_OPS_CPU_MACHINE=.* expected l1=4K \.\.\. 1M, l2="):
        environment.cpu_machine()


@NEEDS_NATIVE
def test_build_info() -> None:
    info = native_module().build_info()
    assert isinstance(info, dict)
    assert info


# --- the package -----------------------------------------------------------------------------


def test_import_needs_torch_alone() -> None:
    """Optional packages are not imported by ``import ghost_ops``."""
    code = (
        "import sys, torch; before = set(sys.modules); import ghost_ops;"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "ghost_ops" in result.stdout
    for package in (
        "matplotlib",
        "rich",
        "mlxtend",
        "hypothesis",
        "pytest",
        "numpy.random",
        "triton",
    ):
        assert package not in result.stdout.split()


def test_public_names() -> None:
    for name in ("FusedGhostModule", "use_backend", "functional", "reference", "backends"):
        assert hasattr(ghost_ops, name), name
    assert set(getattr(ghost_ops, "__all__", ())) <= set(dir(ghost_ops))
    importlib.import_module("ghost_ops.planner")


def test_auto_is_the_widest(native: str) -> None:
    code = f"{RUN}; from ghost_ops import backends; print(backends.native.library().isa())"
    results = [python(code, GHOST_OPS_CPU_ISA=isa) for isa in ("auto", "")]
    assert [r.returncode for r in results] == [0, 0], results[0].stderr
    assert results[0].stdout == results[1].stdout


@pytest.mark.parametrize("isa", native_isas())
def test_all_kernels_are_of_one_instruction_set(native: str, isa: str) -> None:
    library = backends.native.library()
    before = library.isa()
    library.set_isa(isa)
    try:
        names = {name.split("_")[0] for name in library.tables()}
    finally:
        library.set_isa(before)
    assert names == {isa.split("_")[0]}


def test_a_dtype_without_kernels_falls_back_or_raises() -> None:
    assert not backends.native.can_run("cpu", torch.float8_e5m2)[0]
    with pytest.warns(UserWarning, match="float8_e5m2"), ghost_ops.use_backend("auto"):
        assert backends.select("cpu", torch.float8_e5m2) == "eager"
    if backends.native.load():
        with (
            ghost_ops.use_backend("native"),
            pytest.raises(RuntimeError, match="float8_e5m2"),
        ):
            backends.select("cpu", torch.float8_e5m2)


def test_select_is_a_constant_of_the_compiled_graph() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * (3.0 if backends.select(x.device.type, x.dtype) == "eager" else 2.0)

    x = torch.ones(2)
    with ghost_ops.use_backend("eager"):
        assert scaled(x)[0] == 3.0
    if backends.native.load():
        with ghost_ops.use_backend("native"):
            assert scaled(x)[0] == 2.0
        with ghost_ops.use_backend("eager"):
            assert scaled(x)[0] == 3.0
