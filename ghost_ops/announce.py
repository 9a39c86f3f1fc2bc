"""Warnings that are given once for each text in a process."""

from __future__ import annotations

import warnings

import torch

_said: set[str] = set()


def warn_once(text: str, stacklevel: int = 2) -> None:
    """Warn with a ``UserWarning``, unless the same text was given before."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, UserWarning, stacklevel=stacklevel + 1)


def announce(text: str) -> None:
    """``warn_once``, except while a graph is being compiled."""
    if not torch.compiler.is_compiling():
        warn_once(f"{text} (Said once.)", stacklevel=3)
