"""When the Triton backend runs: chosen on a GPU without native kernels, or forced; else refused."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator

import pytest
import torch
from processes import RUN, python

import ghost_ops
from ghost_ops import backends, ops
from ghost_ops.autograd.checks import ops_named
from ghost_ops.backends import native, triton

INSTALLED = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
COMPILES = {"TRITON_INTERPRET": "0"}


def on_gpu(ok: bool, reason: str):  # type: ignore[no-untyped-def]
    """A ``can_run`` that knows CUDA devices in float32 and below, or none."""

    def can_run(device_type: str, dtype: torch.dtype) -> tuple[bool, str]:
        return ok and device_type == "cuda" and dtype != torch.float64, f"{reason} {dtype}"

    return can_run


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing chosen or announced yet."""
    monkeypatch.setattr(backends, "_cache", {})
    monkeypatch.setattr("ghost_ops.announce._said", set())
    with ghost_ops.use_backend("auto"):
        yield monkeypatch


@pytest.mark.parametrize(
    ("has_native", "has_triton", "chosen"),
    [(True, True, "native"), (False, True, "triton"), (True, False, "native")],
)
def test_order_on_a_gpu(
    fresh: pytest.MonkeyPatch, has_native: bool, has_triton: bool, chosen: str
) -> None:
    fresh.setattr(native, "can_run", on_gpu(has_native, "N"))
    fresh.setattr(triton, "can_run", on_gpu(has_triton, "T"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert backends.select("cuda", torch.float16) == chosen
    said = [str(warning.message) for warning in caught]
    assert len(said) == (chosen == "triton"), "a fallback is announced once"
    assert all("runs its Triton kernels" in text and "N torch.float16" in text for text in said)
    row = next(row for row in backends.status() if (row.device, row.dtype) == ("cuda", "float16"))
    assert row.backend == chosen
    assert row.reason.startswith("N" if chosen == "native" else "T")


def test_eager_where_neither_runs_says_why_of_both(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(native, "can_run", on_gpu(False, "no nvcc"))
    fresh.setattr(triton, "can_run", on_gpu(False, "no Triton"))
    with pytest.warns(UserWarning, match=r"no nvcc.*no Triton"):
        assert backends.select("cuda", torch.float32) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("cuda", torch.float32) == "eager"


def test_float64_is_eager_and_announced(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(native, "can_run", on_gpu(False, "no nvcc"))
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="no Triton kernels for torch.float64"):
        assert backends.select("cuda", torch.float64) == "eager"


def test_never_the_automatic_choice_on_a_cpu(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(native, "can_run", on_gpu(False, "no compiler"))
    fresh.setattr(triton, "can_run", lambda *_: (True, "interpreter"))
    with pytest.warns(UserWarning, match="no compiler"):
        assert backends.select("cpu", torch.float32) == "eager"


def test_its_operators() -> None:
    assert ops_named("triton") is ops.triton
    for name in ops.NAMES:
        assert getattr(ops.triton, name) is getattr(torch.ops.ghost_ops_triton, name).default


@INSTALLED
def test_forced_by_environment_in_the_interpreter() -> None:
    result = python(RUN, GHOST_OPS_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.stdout.strip() == "triton", result.stderr


@INSTALLED
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_forced_where_it_cannot_run() -> None:
    for code, environment in (
        (RUN, {"GHOST_OPS_BACKEND": "triton"}),
        ("import ghost_ops; ghost_ops.use_backend('triton')", {}),
    ):
        result = python(code, **environment, **COMPILES)
        assert result.returncode != 0
        assert "RuntimeError" in result.stderr
        assert "backend 'triton'" in result.stderr
        assert "no GPU" in result.stderr or "Triton compiles for GPUs" in result.stderr


def test_forced_without_triton() -> None:
    hide = "import sys; sys.modules['triton'] = None; import importlib.util as u; f = u.find_spec;"
    hide += "u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a);"
    result = python(hide + "import ghost_ops; ghost_ops.use_backend('triton')", **COMPILES)
    assert result.returncode != 0
    assert "RuntimeError" in result.stderr
    assert "ghost_ops[triton]" in result.stderr


@INSTALLED
def test_forced_in_a_dtype_that_it_has_not() -> None:
    if not triton.interpreting():
        pytest.skip("no interpreter")
    with ghost_ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*float64"):
        backends.select("cpu", torch.float64)


@INSTALLED
def test_forced_with_a_depthwise_kernel_that_it_has_not() -> None:
    if not triton.interpreting():
        pytest.skip("no interpreter")
    module = ghost_ops.FusedGhostModule(3, 4, dw_size=9).eval()
    with ghost_ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*dw_size=9"):
        module(torch.randn(1, 3, 9, 9))


@INSTALLED
def test_can_run_says_why_not() -> None:
    for device, dtype, word in (
        ("cpu", torch.int8, "int8"),
        ("cuda", torch.float64, "float64"),
        ("xla", torch.float32, "xla"),
    ):
        ok, reason = triton.can_run(device, dtype)
        assert not ok
        assert word in reason


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("triton")
    monkeypatch.setattr(module, "__version__", "3.5.1")
    ok, reason = triton._try_load()
    assert not ok
    assert "3.5.1" in reason
    assert "3.6" in reason


@INSTALLED
def test_report() -> None:
    start = "import runpy, sys; sys.argv[1:] = ['--all']; "
    result = python(f"{start}runpy.run_module('ghost_ops', run_name='__main__')", **COMPILES)
    assert result.returncode == 0, result.stderr
    assert "Triton 3." in result.stdout
    assert "GHOST_OPS_TRITON_AUTOTUNE" in result.stdout


def test_wrong_autotune_variable() -> None:
    result = python("import ghost_ops", GHOST_OPS_TRITON_AUTOTUNE="yes")
    assert result.returncode != 0
    assert "GHOST_OPS_TRITON_AUTOTUNE" in result.stderr
