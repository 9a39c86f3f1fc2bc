"""Optional packages, imported where they are needed and named when they are missing."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(RuntimeError):
    """An optional package is not installed; the message says which pip extra brings it."""


def require(module: str, purpose: str, *, extra: str = "bench") -> Any:
    """Import ``module`` or raise :class:`MissingExtra` naming the pip extra that provides it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f"{package!r} is needed for {purpose} and cannot be imported ({error}); "
            f'install it with: pip install "ghost_ops[{extra}]"'
        ) from error
