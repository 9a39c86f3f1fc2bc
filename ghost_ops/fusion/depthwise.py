"""Depthwise convolutions with batch norm and activation, outside of Ghost modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..autograd import layers
from ..autograd.tail import Norm
from ..conventions import memory_format
from ..sync import NORMS, group_of
from .branch import Branch, BranchForm
from .guards import Refusal
from .program import Program


def bind_depthwise(form: BranchForm, module: nn.Module) -> Branch:
    """The branch in a module. Raises ``Refusal`` if ``depthwise_conv`` cannot compute it."""
    branch, name = form.bind(module), ".".join(form.conv)
    conv = branch.conv
    if branch.prelu is not None:
        raise Refusal(f"{name} has a PReLU, which only Ghost modules compute")
    k, s = conv.kernel_size[0], conv.stride[0]
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise Refusal(f"{name} is not depthwise, one filter a channel")
    if not ops.has_depthwise(k, s) or conv.kernel_size != (k, k) or conv.stride != (s, s):
        raise Refusal(f"{name} has kernel {conv.kernel_size} and stride {conv.stride}")
    if branch.padding != (k // 2, k // 2) or conv.dilation != (1, 1):
        raise Refusal(f"{name} does not pad with {k // 2} zeros, half its kernel")
    return branch


def run_depthwise(branch: Branch, x: Tensor) -> Tensor:
    """The output of a depthwise branch; differentiable."""
    conv, bn = branch.conv, branch.bn
    plain = bn is None or (
        any(type(bn).forward is norm.forward for norm in NORMS)
        and group_of(bn) is None
        and (bn.running_mean is None) == (bn.running_var is None)
    )
    if not plain or conv.bias is not None or not layers.has_kernels(x):
        return branch.then(conv(x))
    weight = conv.weight  # read once: it may be computed at every access
    norm = Norm(None, None, None, None) if bn is None else Norm(*branch.norm(weight))
    eps, batch = 0.0 if bn is None else bn.eps, branch.uses_batch_stats()
    settings = layers.DepthwiseSettings(conv.stride[0], eps, batch, branch.act, branch.slope)
    out = layers.depthwise(x, weight, norm, settings, branch.running_update())
    return branch.then(conv._conv_forward(x, weight, None)) if out is None else out


class PackedDepthwise:
    """A depthwise branch in inference, with its batch norm folded in.

    Attributes:
        weight: [C, 1, k, k], contiguous.
        taps_first: the values of weight, with memory [k, k, C], for kernels in channels_last.
        shift: [C].
        arguments: stride, act and slope.
    """

    def __init__(self, branch: Branch) -> None:
        conv, bn = branch.conv, branch.bn
        norm: tuple[Any, ...] = (None, None, None, None, 0.0)
        if bn is not None:
            norm = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        self.weight, self.shift = ops.fold(conv.weight, conv.bias, *norm)
        self.taps_first = self.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        self.arguments = (conv.stride[0], branch.act, branch.slope)

    def __call__(self, x: Tensor) -> Tensor:
        nchw = memory_format(x) == torch.contiguous_format
        weight = self.weight if nchw else self.taps_first
        return ops.depthwise_conv(x, weight, self.shift, *self.arguments)

    def add_to(self, program: Program, x: int) -> int:
        """Add the branch to a program, for the value number x. Returns the number of the output."""
        return program.depthwise(x, self.weight, self.taps_first, self.shift, self.arguments)

    def with_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As ``depthwise_conv_sums``: the output, and its sums over pixels [N, parts, C]."""
        return ops.depthwise_conv_sums(x, self.weight, self.shift, *self.arguments)
