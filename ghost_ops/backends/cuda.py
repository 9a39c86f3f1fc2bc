"""Loader of the native CUDA library ``ghost_ops/_cuda.so``; the native backend asks it."""

from __future__ import annotations

from pathlib import Path

import torch

LEAST_CAPABILITY = (8, 0)  # cp.async, bfloat16 and TF32 on tensor cores
PATH = Path(__file__).resolve().parent.parent / "_cuda.so"

_state: tuple[bool, str] | None = None


def load() -> bool:
    """Load the library, which registers its kernels. Idempotent; ``reason()`` tells why not."""
    global _state
    if _state is None:
        _state = _try_load()
    return _state[0]


def reason() -> str:
    """Why the CUDA library is loaded or is not."""
    load()
    assert _state is not None
    return _state[1]


def _too_old_gpu() -> str | None:
    """Why the kernels cannot run on a GPU of this machine; None if they can or there is none."""
    if not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < LEAST_CAPABILITY:
            have, need = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
            gpu = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
            return f"{gpu} has compute capability {have}, the CUDA kernels need {need} or newer"
    return None


def _try_load() -> tuple[bool, str]:
    # Without a CUDA torch the library finds neither libtorch_cuda nor libcudart: say so instead.
    if torch.version.cuda is None:
        return False, (
            f"torch {torch.__version__} is a build without CUDA; install a CUDA build of PyTorch"
        )
    if not PATH.exists():
        return False, (
            "the native CUDA library was not built; put nvcc on the PATH (or set CUDA_HOME) and "
            "install ghost_ops again with pip's --no-build-isolation"
        )
    if (too_old := _too_old_gpu()) is not None:
        return False, too_old
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:  # wrong CUDA major version, missing symbol
        return False, (
            f"{PATH.name} does not load into torch {torch.__version__} with CUDA "
            f"{torch.version.cuda}: {error}; install ghost_ops again with the nvcc of that CUDA"
        )
    return True, f"loaded {PATH.name} into torch {torch.__version__} with CUDA {torch.version.cuda}"
