"""Warnings that are given once for each text in a process."""

from __future__ import annotations

import warnings

import torch

_said: set[str] = set()


def announce(text: str) -> None:
    """Warn with a ``UserWarning``, unless the same was said before or a graph is being compiled."""
    if torch.compiler.is_compiling() or text in _said:
        return
    _said.add(text)
    warnings.warn(f"{text} (Said once.)", UserWarning, stacklevel=3)
