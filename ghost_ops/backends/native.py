"""The native backend: fused kernels of the compiled libraries ``ghost_ops._C`` and ``_cuda.so``."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from .. import build_record, environment
from ..conventions import DTYPES
from . import cuda

name = "native"

# Dispatch keys by device type.
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# The operators of the Ghost module. The backend runs on a device only if all have a kernel for it.
OPS = (
    "ghost_pack",
    "ghost_apply",
    "ghost_primary_stats",
    "ghost_cheap_stats",
    "ghost_train_forward",
    "ghost_backward",
    "ghost_update_running_",
)

_library: ModuleType | None = None
_reason: str | None = None  # why the library is not loaded; None before the first try


def load() -> bool:
    """Import ``ghost_ops._C``, which registers the CPU kernels; apply the variables of the CPU.

    Idempotent. A failure is final; :func:`reason` gives the reason.

    Raises:
        ValueError: GHOST_OPS_CPU_ISA or GHOST_OPS_CPU_MACHINE holds a value that is not allowed.
        RuntimeError: this processor or build lacks the instruction set of GHOST_OPS_CPU_ISA.
    """
    global _library, _reason
    if _library is None and _reason is None:
        isa, machine = environment.CPU_ISA.get(), environment.cpu_machine()
        try:
            library = importlib.import_module("ghost_ops._C")
        except ImportError as error:
            _reason = _import_failure(error)
            return False
        if isa != "auto":
            available = list(library.available_isas())
            if isa not in available and isa != environment.EMULATED:
                name, known = environment.CPU_ISA.name, ", ".join(available)
                raise RuntimeError(f"{name}={isa!r}: not available here, only {known}")
            library.set_isa(isa)
        library.force_machine(**machine)
        _library = library
    return _library is not None


def library() -> ModuleType:
    """The module ``ghost_ops._C``. Raises RuntimeError with the reason if it cannot be loaded."""
    if not load():
        raise RuntimeError(f"the native CPU library is not available: {_reason}")
    assert _library is not None
    return _library


def reason() -> str:
    """Why the native CPU library is loaded or is not."""
    if load():
        return f"loaded ghost_ops._C, instruction set {library().isa()}"
    assert _reason is not None
    return _reason


def can_run(device_type: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether fused kernels compute on ``device_type`` in ``dtype``, and why (not)."""
    if dtype not in DTYPES:
        return False, f"no fused kernels for {dtype}, only for {', '.join(map(str, DTYPES))}"
    key = DISPATCH_KEYS.get(device_type)
    if key is None:
        return False, f"there are no fused kernels for device type {device_type!r}"
    module = cuda if device_type == "cuda" else None
    loaded = module.load() if module else load()
    why = module.reason() if module else reason()
    if not loaded:
        return False, why
    missing = missing_kernels(key)
    if missing:
        return False, f"the {device_type} library has no kernels yet for {', '.join(missing)}"
    return True, why


def missing_kernels(dispatch_key: str) -> list[str]:
    """Operators without a kernel under ``dispatch_key``."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [op for op in OPS if not has_kernel(f"ghost_ops::{op}", dispatch_key)]


def _import_failure(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "ghost_ops._C":
        return f"the native CPU library was not built: {build_record.why_missing('cpu')}"
    return f"ghost_ops._C {cuda.loading_failure(error)}"
