"""The oldest torch that ghost_ops runs on. The build reads this file, where torch may be absent."""

from __future__ import annotations

import re

LEAST = (2, 10)  # the LibTorch Stable ABI that the libraries use
REQUIREMENT = f"torch>={LEAST[0]}.{LEAST[1]}"


def is_too_old(version: str) -> bool:
    """Whether a version such as ``"2.9.1+cpu"`` is below :data:`LEAST`."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LEAST


def check() -> None:
    """Raise ImportError if the torch of this Python is too old."""
    import torch

    if is_too_old(torch.__version__):
        raise ImportError(
            f"ghost_ops needs torch >= {LEAST[0]}.{LEAST[1]}, and this Python has torch "
            f"{torch.__version__}: pip install --upgrade '{REQUIREMENT}'"
        )
