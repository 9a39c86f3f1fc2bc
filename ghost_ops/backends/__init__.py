"""The choice of the backend that runs, by device and dtype.

A backend is a module with a ``name`` and a ``can_run(device_type, dtype) -> (ok, reason)``:

``native``  fused kernels of the compiled libraries
``triton``  fused kernels for GPUs that Triton compiles at run time
``eager``   plain PyTorch operators

The request is a name, or ``"auto"`` for the first backend of this list that can run (except Triton
on a CPU, where it is only an interpreter). The environment variable GHOST_OPS_BACKEND sets the
request, and :func:`use_backend` changes it. If an explicitly requested backend cannot run,
``select`` raises; ``"auto"`` falls back to Triton or eager and warns once.
"""

from __future__ import annotations

import threading
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

from .. import environment
from ..announce import warn_once
from ..conventions import DTYPES
from . import cuda, eager, native, triton
from .triton import tuning as _tuning  # noqa: F401  (a wrong GHOST_OPS_TRITON_AUTOTUNE raises)

BACKENDS: dict[str, ModuleType] = {module.name: module for module in (native, triton, eager)}

_requested: str = environment.BACKEND.get()
for _variable in (
    environment.CPU_ISA,
    environment.CUDA_PDL,
    environment.CUDA_PIPELINE,
    environment.CUDA_PLAN,
):
    _variable.get()  # a wrong value is an error at import, not at the first call
_lock = threading.RLock()
_cache: dict[tuple[str, str, torch.dtype], str] = {}


def requested() -> str:
    """The request in force: ``"auto"`` or the name of a backend."""
    return _requested


def select(device_type: str, dtype: torch.dtype) -> str:
    """Name of the backend that computes on ``device_type`` (such as ``"cpu"``) in ``dtype``.

    Costs a dictionary lookup after the first call.

    Raises:
        RuntimeError: the backend was requested explicitly and cannot run; the message says why.
    """
    return _select(_requested, device_type, dtype)


def _select(request: str, device_type: str, dtype: torch.dtype) -> str:
    found = _cache.get((request, device_type, dtype))
    return found if found is not None else _choose(request, device_type, dtype)


# For torch.compile the result is a constant of the graph, guarded by `_requested` only. This line
# has the effect of torch.compiler.assume_constant_result, without an import of the compiler.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(request: str, device_type: str, dtype: torch.dtype) -> str:
    with _lock:
        if request == "auto":
            chosen, reason = _automatic(device_type, dtype)
            if chosen == eager.name:
                _announce(device_type, reason)
            elif chosen == triton.name:
                _announce_triton(device_type, native.can_run(device_type, dtype)[1])
        else:
            ok, reason = BACKENDS[request].can_run(device_type, dtype)
            if not ok:
                raise RuntimeError(
                    f"backend {request!r} was requested and cannot run on device type "
                    f"{device_type!r} in {dtype}: {reason}"
                )
            chosen = request
        _cache[request, device_type, dtype] = chosen
        return chosen


def _automatic(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend for ``"auto"`` and a reason: for eager, why no fused backend can run."""
    fused = (native, triton) if device_type == "cuda" else (native,)
    why_not = []
    for backend in fused:
        ok, reason = backend.can_run(device_type, dtype)
        if ok:
            return backend.name, reason
        why_not.append(reason)
    return eager.name, "; ".join(why_not)


def _announce(device_type: str, reason: str) -> None:
    if device_type == "meta":  # computes nothing
        return
    warn_once(
        f"ghost_ops runs plain PyTorch operators on device type {device_type!r}, slower and with "
        f"more memory than its fused kernels: {reason}. `python -m ghost_ops` shows more; "
        "ghost_ops.use_backend('eager') chooses this on purpose and without a warning."
    )


def _announce_triton(device_type: str, reason: str) -> None:
    warn_once(
        f"ghost_ops runs its Triton kernels on device type {device_type!r}, not those of its "
        f"compiled library: {reason}. ghost_ops.use_backend('triton') chooses this on purpose and "
        "without a warning."
    )


class use_backend:
    """Request a backend: a plain call until the next request, a ``with`` statement for its block.

    The request holds for the whole process, because autograd runs backward passes in other threads.

    Args:
        name: ``"auto"``, ``"native"``, ``"triton"`` or ``"eager"``.

    Raises:
        ValueError: ``name`` is another string.
        RuntimeError: ``name`` is ``"native"`` and no native library can be loaded, or ``"triton"``
            and Triton can run on no device of this machine.
    """

    def __init__(self, name: str) -> None:
        global _requested
        if name not in environment.BACKEND.choices:
            allowed = ", ".join(repr(choice) for choice in environment.BACKEND.choices)
            raise ValueError(f"use_backend: name must be one of {allowed}, got {name!r}")
        if name == native.name and not (native.load() or cuda.load()):
            raise RuntimeError(f"backend 'native' cannot run: {native.reason()}")
        if name == triton.name and (reason := triton.nowhere()):
            raise RuntimeError(f"backend 'triton' cannot run: {reason}")
        with _lock:
            self._previous = _requested
            _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _requested
        with _lock:
            _requested = self._previous


class Row(NamedTuple):
    """One line of :func:`status`: the backend for a device and dtype, and the reason."""

    device: str
    dtype: str
    backend: str
    reason: str


def status(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Row]:
    """The backend that the present request selects for every device and dtype, with the reason.

    Does not warn or raise: if the requested backend cannot run, the row has ``backend="none"``.

    Args:
        devices: device types.

    Returns:
        One row for each device and dtype.
    """
    return [_row(device, dtype) for device in devices for dtype in DTYPES]


def _row(device: str, dtype: torch.dtype) -> Row:
    dtype_name = str(dtype).removeprefix("torch.")
    if _requested == "auto":
        return Row(device, dtype_name, *_automatic(device, dtype))
    ok, reason = BACKENDS[_requested].can_run(device, dtype)
    if _requested == eager.name:
        reason = "requested"
    return Row(device, dtype_name, _requested if ok else "none", reason)
