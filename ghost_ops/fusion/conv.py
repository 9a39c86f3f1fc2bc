"""Convolutions between the Ghost modules of a model: act(norm(conv(x))) as one operator.

In eval mode without gradients, on a CPU with native kernels: the norm is folded in, and the
activation is part of the convolution. Everything else is the module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .bottleneck import PackedDepthwise, bind_depthwise
from .branch import (
    Branch,
    BranchForm,
    match_any_branch,
    why_not_together,
)
from .fused import FusedInference
from .ghost import (
    Ghost,
    PackedGhost,
)
from .guards import Refusal
from .read import PARAMETER_HOOKS, Reading


def why_not_on_cpu(first: nn.Conv2d, layers: tuple[nn.Module, ...]) -> str:
    """Why layers cannot be packed for one operator of the CPU; empty if they can."""
    hooks = (hook for layer in layers for hook in layer._forward_pre_hooks.values())
    if any(isinstance(hook, PARAMETER_HOOKS) for hook in hooks):
        return "its weights are computed at every call"
    reason = why_not_together(layers)
    if not reason and first.weight.device.type != "cpu":
        return "only the CPU has kernels for it"
    return reason


class Conv:
    """A convolution, batch norm and activation, bound to its layers."""

    alone = False
    dw_size = 1

    def __init__(self, branch: Branch) -> None:
        self.branch, self.first, self.layers = branch, branch.conv, branch.layers
        self.ghost = Ghost(branch, None, branch.conv.out_channels)  # the same, of ratio 1

    def check(self, x: Tensor) -> None:
        """Nothing: what does not fit goes to the module's own forward."""

    def why_not_packed(self) -> str:
        return why_not_on_cpu(self.first, self.layers) or self.ghost.why_not_packed()

    def run(self, x: Tensor) -> str:
        return ""  # its own forward, without a warning

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        if self.first.groups > 1:
            return PackedDepthwise(self.branch), ()
        packed = PackedGhost(self.ghost, backend)
        return packed.operator, (packed.packed, None, *packed.arguments)

    def description(self) -> str:
        """In words, for the report."""
        conv = self.first
        k, s = conv.kernel_size[0], conv.stride[0]
        text = f"conv {conv.in_channels} -> {conv.out_channels}, {k}x{k}"
        if conv.groups > 1:
            text = f"depthwise {conv.in_channels}, {k}x{k}"
        return text + (f" stride {s}" if s > 1 else "")


class ConvForm(NamedTuple):
    """Where the layers of a convolution are."""

    branch: BranchForm

    def bind(self, module: nn.Module) -> Conv:
        branch = self.branch.bind(module)
        if branch.prelu is not None:
            raise Refusal("it has a PReLU, which only Ghost modules compute")
        if branch.conv.groups > 1:
            return Conv(bind_depthwise(self.branch, module))
        parts = Conv(branch)
        if not parts.ghost.is_conv():
            raise Refusal("there is no kernel for its convolution")
        return parts

    def shape(self, module: nn.Module) -> None:
        return None  # it is no operator of a graph


class FusedConv(FusedInference):
    """A convolution with norm and activation made fused by ``fuse``."""

    _ghost_kind = "conv"
    _ghost_device = "cpu"

    @classmethod
    def _ghost_match(cls, reading: Reading) -> ConvForm:
        branch, x = match_any_branch(reading, reading.out, "it")
        if x.op != "input":
            raise Refusal("its convolution does not take its input")
        return ConvForm(branch)
