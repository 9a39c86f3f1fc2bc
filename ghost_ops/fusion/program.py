"""``Program``: a sequence of operators as one operator of the CPU, ``ghost_ops::run_program``.

At batch 1 a large part of the time is spent in the interpreter, the dispatcher and the guards
between two layers, because each layer evicts their code from the caches.
``csrc/torch/cpu_eval.cpp`` describes the instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd.checks import direct
from ..ops.conv import native_run_program

_GHOST, _DEPTHWISE, _EXCITE, _SUM, _CONCAT, _MEAN, _NHWC, _ROWS = range(8)
_NONE = -1


class _Instruction(NamedTuple):
    code: int
    values: tuple[int, ...]
    numbers: tuple[int, ...]


class Program:
    """Instructions in the order in which they run.

    Values are numbered: 0 is the input, k the result of instruction k. A value is released after
    the last instruction that takes it. The methods for instructions return the result's number.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._code: list[_Instruction] = []

    def __len__(self) -> int:
        return len(self._code)

    def _tensor(self, t: Tensor) -> int:
        self._tensors.append(t)
        return len(self._tensors) - 1

    def _add(self, code: int, values: tuple[int, ...], *numbers: int) -> int:
        self._code.append(_Instruction(code, values, numbers))
        return len(self._code)

    def ghost(
        self, x: int, packed: Tensor, arguments: tuple, residual: int | None, *, is_conv: bool
    ) -> int:
        """``ghost_apply`` or ``ghost_conv_apply``; ``arguments`` are those after the residual."""
        conv = (0, 0, False)
        if is_conv:
            conv, arguments = arguments[:3], (*arguments[3:], True)
        *sizes, act1, slope1, act2, slope2, has_primary = arguments
        values = (x, _NONE if residual is None else residual)
        slopes = _bits(slope1), _bits(slope2)
        numbers = (*slopes, *map(int, conv), *sizes, act1, act2, int(has_primary))
        return self._add(_GHOST, values, self._tensor(packed), *numbers)

    def depthwise(
        self, x: int, weight: Tensor, taps_first: Tensor, shift: Tensor, arguments: tuple
    ) -> int:
        """``depthwise_conv``; ``arguments`` are stride, act and slope."""
        stride, act, slope = arguments
        tensors = map(self._tensor, (weight, taps_first, shift))
        return self._add(_DEPTHWISE, (x,), *tensors, weight.size(-1), stride, act, _bits(slope))

    def excite(self, x: int, tensors: tuple[Tensor, ...], arguments: tuple) -> int:
        """``squeeze_excite_``, which overwrites x; ``arguments`` are act, slope and gate code."""
        act, slope, gate = arguments
        first, *_ = [self._tensor(t) for t in tensors]
        return self._add(_EXCITE, (x,), first, act, _bits(slope), gate)

    def sum(self, x: int, other: int | None, act: tuple[int, float], *, in_place: bool) -> int:
        """act(x + other), or act(x); x and other have one shape."""
        values = (x, _NONE if other is None else other)
        return self._add(_SUM, values, act[0], _bits(act[1]), int(in_place))

    def concat(self, values: tuple[int, ...]) -> int:
        """The concatenation along channels; all other sizes are equal."""
        return self._add(_CONCAT, values)

    def mean(self, x: int) -> int:
        """The means over pixels: [1, C, 1, N] in channels_last for x [N, C, H, W]."""
        return self._add(_MEAN, (x,))

    def channels_last(self, x: int) -> int:
        """x in channels_last; a copy if x has another layout."""
        return self._add(_NHWC, (x,))

    def rows(self, x: int, dims: int) -> int:
        """The result x of ``mean`` as [N, C] or [N, C, 1, 1]; ``dims`` is 2 or 4."""
        return self._add(_ROWS, (x,), dims)

    def packed(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """The operator, and its arguments after x."""
        last = {v: at for at, step in enumerate(self._code) for v in step.values if v != _NONE}
        numbers: list[int] = []
        for at, (code, values, rest) in enumerate(self._code):
            released = [v for v in dict.fromkeys(values) if last.get(v) == at]
            body = [len(released), *released, *values, *rest]
            numbers += [code, len(body), *body]
        return direct(native_run_program), (self._tensors, torch.tensor(numbers))


def _bits(value: float) -> int:
    """The bits of a double as an integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]
