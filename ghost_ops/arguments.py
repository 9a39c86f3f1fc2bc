"""Checks of arguments. Each error names the argument, what came and what is allowed."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor, nn


def integer(name: str, value: Any, least: int = 1) -> int:
    """The value as an int.

    Raises:
        TypeError: the value is a bool or no integer.
        ValueError: the value is less than ``least``.
    """
    wrong = f"{name} must be an int, got {type(value).__name__}: {value!r}"
    if isinstance(value, bool):
        raise TypeError(wrong)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(wrong) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def number(name: str, value: Any) -> float:
    """The value as a float. Raises TypeError if it is a bool or no real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    return float(value)


def image_shape(name: str, value: Any, least: int = 1) -> tuple[int, int, int, int]:
    """The value as four ints N, C, H, W.

    Raises:
        TypeError: the value is no sequence of ints.
        ValueError: there are not four sizes, or one is less than ``least``, 0 or 1.
    """
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(f"{name} must be four ints [N, C, H, W], got {value!r}") from None
    if len(sizes) != 4 or min(sizes) < least:
        allowed = "four positive sizes [N, C, H, W]" if least else "four sizes, none negative"
        raise ValueError(f"{name} must be {allowed}, got {sizes}")
    n, c, h, w = sizes
    return n, c, h, w


def module(name: str, value: Any) -> None:
    """Raises TypeError if the value is no ``nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")


def dense(name: str, value: Tensor) -> None:
    """Raises RuntimeError if a tensor is sparse, nested or of another layout than strided."""
    if value.is_nested:
        raise RuntimeError(f"{name} must be a dense tensor, got a nested tensor")
    if value.layout is not torch.strided:
        raise RuntimeError(
            f"{name} must be a dense tensor (torch.strided), got layout {value.layout}; "
            "to_dense() makes it one"
        )
