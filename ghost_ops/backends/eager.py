"""The eager backend: plain PyTorch operators. Runs wherever PyTorch runs, and fuses nothing."""

from __future__ import annotations

import torch

name = "eager"


def can_run(device_type: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend computes on ``device_type`` in ``dtype``, and why (not)."""
    if not dtype.is_floating_point:
        return False, f"{dtype} is not a floating-point dtype"
    return True, "plain PyTorch operators run on every device"
