"""Several operators in a row as one operator of the CPU, ``ghost_ops::run_program``.

At batch 1 the interpreter, the dispatcher and the guards between two layers take a good part of the
time, because each layer evicts their code from the caches. ``csrc/torch/cpu_program.cpp`` describes
the instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import direct
from ..model_ops import native_run_program

_GHOST, _DEPTHWISE, _EXCITE = range(3)
_NONE = -1
# Where an instruction's tensors are among its numbers; values stand before them.
_TENSORS = {_GHOST: (2, 3), _DEPTHWISE: (1, 4), _EXCITE: (1, 2)}


class Program:
    """Instructions in the order in which they run; values are numbered, 0 is the input."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._code: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._code)

    def _tensor(self, t: Tensor) -> int:
        self._tensors.append(t)
        return len(self._tensors) - 1

    def _add(self, *numbers: int, release: tuple[int, ...] = ()) -> int:
        self._code.append([*numbers, *(*release, _NONE, _NONE)[:2]])
        return len(self._code)

    def ghost(
        self, x: int, packed: Tensor, arguments: tuple, residual: int | None, *, is_conv: bool,
        release: tuple[int, ...] = (),
    ) -> int:  # fmt: skip
        """``ghost_apply``, or ``ghost_conv_apply``, with the arguments after x and a residual."""
        conv = (0, 0, False)
        if is_conv:
            conv, arguments = arguments[:3], (*arguments[3:], True)
        *sizes, act1, slope1, act2, slope2, has_primary = arguments
        return self._add(
            _GHOST, x, _NONE if residual is None else residual, self._tensor(packed),
            _bits(slope1), _bits(slope2), *map(int, conv), *sizes, act1, act2, int(has_primary),
            release=release,
        )  # fmt: skip

    def depthwise(
        self, x: int, weight: Tensor, taps_first: Tensor, shift: Tensor, arguments: tuple,
        *, release: tuple[int, ...] = (),
    ) -> int:  # fmt: skip
        """``depthwise_conv`` with stride, act and slope."""
        stride, act, slope = arguments
        tensors = map(self._tensor, (weight, taps_first, shift))
        k = weight.size(-1)
        return self._add(_DEPTHWISE, x, *tensors, k, stride, act, _bits(slope), release=release)

    def excite(self, x: int, tensors: tuple[Tensor, ...], arguments: tuple) -> int:
        """``squeeze_excite_`` with act, slope and gate: x itself, changed."""
        act, slope, gate = arguments
        first, *_ = [self._tensor(t) for t in tensors]
        return self._add(_EXCITE, x, first, act, _bits(slope), gate, release=(x,))

    def append(self, other: Program, x: int) -> int:
        """The number of another program's output, for the value x of its input."""
        values, tensors = len(self._code), len(self._tensors)

        def value(number: int) -> int:
            return x if number == 0 else number if number == _NONE else number + values

        for code, *numbers in other._code:
            first, last = _TENSORS[code]
            self._code.append([
                code,
                *map(value, numbers[:first]),
                *(n + tensors for n in numbers[first:last]),
                *numbers[last:-2],
                *map(value, numbers[-2:]),
            ])  # fmt: skip
        self._tensors += other._tensors
        return len(self._code)

    def packed(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """The operator, and its arguments after x."""
        code = torch.tensor([n for numbers in self._code for n in numbers], dtype=torch.int64)
        return direct(native_run_program), (self._tensors, code)


def _bits(value: float) -> int:
    """The bits of a double as an integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]
