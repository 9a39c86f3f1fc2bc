"""The Triton backend: the fused Ghost module on every GPU that Triton supports, without nvcc.

``plan``               launches and tiles for a shape; does not import Triton
``tuning``             the choice of tiles on the device, cached on disk
``layout``             packed parameters
``kernels``            the kernels, one concern a file
``forward, backward``  the operators' implementations: checks, allocation, launches

The first use of this backend imports Triton. If TRITON_INTERPRET=1 is set before, the kernels run
in Triton's interpreter on CPU tensors: slowly, for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re

import torch

name = "triton"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 6)

_state: tuple[bool, str] | None = None


def load() -> bool:
    """Import Triton and the kernels. Returns whether they are loaded; see ``reason``."""
    global _state
    if _state is None:
        _state = _try_load()
    return _state[0]


def reason() -> str:
    """Why the kernels are loaded or are not."""
    load()
    assert _state is not None
    return _state[1]


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return load() and _kernels().INTERPRET.value


def can_run(device_type: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the Triton kernels compute on ``device_type`` in ``dtype``, and why (not)."""
    if dtype not in DTYPES:
        return False, f"no Triton kernels for {dtype}, only for {', '.join(map(str, DTYPES))}"
    if device_type not in ("cuda", "cpu"):
        return False, f"there are no Triton kernels for device type {device_type!r}"
    if not load():
        return False, reason()
    if interpreting():
        if device_type == "cpu":
            return True, f"{reason()}, in its interpreter (TRITON_INTERPRET=1)"
        return (
            False,
            "TRITON_INTERPRET=1 is set: the kernels run in an interpreter, on the CPU alone",
        )
    if device_type == "cpu":
        return False, (
            "Triton compiles for GPUs; set TRITON_INTERPRET=1 before starting Python to run its "
            "interpreter on CPU tensors (slow, for tests)"
        )
    return _can_run_on_gpu()


def nowhere() -> str | None:
    """Why the kernels run on no device of this machine; None if they run on one."""
    found = [can_run(device_type, torch.float32) for device_type in ("cuda", "cpu")]
    return None if any(ok for ok, _ in found) else found[0][1]


def _can_run_on_gpu() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    device = torch.cuda.get_device_name()
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < (8, 0):
        return False, (
            f"Triton needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
        )
    return True, f"{reason()}, on {device}"


def _kernels():  # type: ignore[no-untyped-def]
    return importlib.import_module(f"{__name__}.kernels.common")


def _try_load() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; install ghost_ops[triton] (Linux only)"
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return False, f"Triton {version} is too old, {oldest} is needed"
        _kernels()
    except Exception as error:  # a broken installation raises errors of many types
        where = " under TRITON_INTERPRET=1" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return False, f"Triton does not load{where}: {type(error).__name__}: {error}"
    return True, f"Triton {version}"
