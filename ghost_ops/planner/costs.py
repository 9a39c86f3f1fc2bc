"""The cost of operators on a GPU: launches, bytes and time.

The cost of an operator of ghost_ops comes from the plan of its kernel
(``csrc/core/cuda_plan.cpp``, ``cuda_plan_layers.cpp``). For every other operator::

    seconds = max(bytes / (0.92 * DRAM bandwidth), FLOPs / (0.5 * peak)) + 2e-6 * launches

where peak is that of the tensor cores; for float64, and for float32 without TF32, it is that of the
plain units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import backends
from ..autograd.checks import is_fused_primary
from ..conventions import DTYPES
from ..fusion.branch import Branch
from ..fusion.ghost_parts import Ghost
from ..ops.ghost import allow_tf32
from .trace import Op, Shape, conv_shape


class Cost(NamedTuple):
    """The cost of one or more operators; bytes are those of DRAM."""

    launches: int
    bytes: int
    seconds: float


class Gpu:
    """A GPU of architecture ``sm`` that computes in ``dtype`` and one memory format."""

    def __init__(self, sm: int, dtype: torch.dtype, channels_last: bool) -> None:
        self.library = backends.native.library()
        self.element = dtype.itemsize
        self.target = {"dtype": DTYPES.index(dtype), "sm": sm}
        self.layout = {**self.target, "channels_last": channels_last}
        arch = self.library.cuda_arch(sm)
        self.bandwidth = arch["dram_gb_s"] * 0.92e9
        # Multiply-adds per clock of one multiprocessor: half of the tensor cores' peak, or half of
        # fma_clock (fma_clock_double for float64) of csrc/core/cuda_costs.inc.
        rate = arch["tensor_flops_clock"] / 2 / (self.element / 2) * 0.5
        if dtype is torch.float64 or (dtype is torch.float32 and not allow_tf32()):
            rate = 32 if dtype is torch.float64 else 64
        self.flops = 2 * rate * arch["multiprocessors"] * arch["clock_ghz"] * 1e9

    def ghost_apply(
        self,
        shape: Shape,
        ghost: Ghost,
        residual: bool = False,
        gated: bool = False,
        gate: tuple[int, int] = (0, 0),
        pooled: bool = False,
    ) -> Cost:
        """The cost of ``ghost_apply``.

        Args:
            shape: N, C, H, W of the module's input. If ``ghost_apply`` does not compute the primary
                convolution, it reads u instead, and the convolution is not part of this cost.
            ghost: the parts of the module.
            residual: a residual is added.
            gated: the kernel multiplies x by a gate [N, C] while it reads x.
            gate: height and width of the gate of the output; (0, 0) without a gate.
            pooled: only the mean over the output's pixels is written.
        """
        conv, cheap, fused = ghost.primary.conv, ghost.cheap, has_primary(ghost)
        found = self.library.cuda_plan(
            *(shape if fused else conv_shape(shape, ghost.primary)),
            intrinsic=conv.out_channels,
            out_channels=ghost.settings.out_channels,
            ratio=1 if cheap is None else cheap.conv.out_channels // conv.out_channels + 1,
            dw_size=ghost.dw_size,
            stride=conv.stride[0] if fused else 1,
            has_primary=fused,
            has_residual=residual,
            has_in_gate=gated,
            gate_height=gate[0],
            gate_width=gate[1],
            pooled=pooled,
            allow_tf32=allow_tf32(),
            **self.layout,
        )
        (one,) = found["passes"]
        # The plan does not count the factors [N, C] of x.
        factors = shape[0] * shape[1] * self.element if gated else 0
        return Cost(1, one["dram_bytes"] + factors, one["seconds"] + factors / self.bandwidth)

    def depthwise(self, shape: Shape, conv: nn.Conv2d, sums: bool = False) -> tuple[Cost, int]:
        """The cost of ``depthwise_conv``, and the number of partial sums of one image.

        With ``sums`` the cost is that of ``depthwise_conv_sums``; without, the number is 0.
        """
        sizes = *shape, conv.kernel_size[0], conv.stride[0]
        found = self.library.cuda_depthwise_plan(*sizes, sums=sums, **self.layout)
        return _of_plan(found), found["splits"] if sums else 0

    def gate(self, n: int, channels: int, reduced: int, pixels: int, splits: int) -> Cost:
        """The cost of ``squeeze_excite_gate`` with ``reduced`` hidden channels.

        Args:
            pixels: pixels of a map.
            splits: partial sums of one image, as ``depthwise`` returns; 0: the kernel reads x.
        """
        return _of_plan(
            self.library.cuda_gate_plan(n, channels, reduced, pixels, splits, **self.target)
        )

    def stem(self, shape: Shape, conv: nn.Conv2d) -> Cost:
        """The cost of ``conv_stem``."""
        sizes = *shape, conv.stride[0], conv.out_channels
        return _of_plan(self.library.cuda_stem_plan(*sizes, **self.layout))

    def conv(self, shape: Shape, branch: Branch, has_bias: bool = False) -> Cost:
        """The cost of a branch's convolution in PyTorch; a second launch adds a bias in place."""
        out, weights = math.prod(conv_shape(shape, branch)), branch.conv.weight.numel()
        channels = branch.conv.out_channels
        moved = math.prod(shape) + out + weights + has_bias * (2 * out + channels)
        return self.other(moved, 2 * out * weights // channels, 1 + has_bias)

    def linear(self, n: int, layer: nn.Conv2d | nn.Linear) -> Cost:
        """The cost of a matrix product of n rows with a layer's weight, plus the bias."""
        outs, ins = layer.weight.shape[:2]
        bias = 0 if layer.bias is None else outs
        return self.other(n * (ins + outs) + outs * ins + bias, 2 * n * outs * ins)

    def other(self, elements: int, flops: int = 0, launches: int = 1) -> Cost:
        """The cost of a PyTorch operator; ``elements``: elements that it reads and writes."""
        return self.eager([Op("", launches, elements * self.element, flops)])

    def eager(self, ops: Sequence[Op]) -> Cost:
        """The cost of PyTorch operators, by the formula of this file's docstring."""
        seconds = sum(
            max(op.bytes / self.bandwidth, op.flops / self.flops) + 2e-6 * op.launches for op in ops
        )
        return Cost(sum(op.launches for op in ops), sum(op.bytes for op in ops), seconds)


def has_primary(ghost: Ghost) -> bool:
    """Whether ``ghost_apply`` computes the primary convolution too."""
    return is_fused_primary(ghost.primary.conv.weight, ghost.settings)


def _of_plan(found: dict[str, Any]) -> Cost:
    """The cost in a plan that the library returned."""
    return Cost(found.get("launches", 1), found["dram_bytes"], found["seconds"])
