"""``FusedGhostModule`` and ``FusedGhostBottleneck``: modules that are fused from the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import activations, backends
from .activations import ActivationSpec
from .conventions import ghosts_per_map
from .fusion.bottleneck import FusedBottleneck
from .fusion.fused import attach, forget, fused_forward, named, state_of
from .fusion.ghost import FusedGhost
from .reference import (
    GhostBottleneck,
    GhostModule,
    build_children,
    checked_arguments,
    relu_or_none,
)


@named
class FusedGhostModule(FusedGhost, GhostModule):
    """Drop-in for the reference ``GhostModule``: same numbers, in fewer passes over memory.

    With m = ceil(oup / ratio) intrinsic channels and g = m * (ratio - 1) ghost channels::

        y   = act(bn1(conv(x)))                  [N, m, Ho, Wo]
        z   = cheap_act(bn2(depthwise(y)))       [N, g, Ho, Wo]
        out = concat(y, z)[:, :oup]              [N, oup, Ho, Wo]

    Constructor, children (``primary_conv`` and ``cheap_operation``, each convolution, batch norm,
    activation), state_dict keys, initial values for a given seed and batch norm behaviour are those
    of the reference. Children can be changed as in the reference. If the fused ops cannot compute
    the changed module (hooks, another layer type), the reference's forward runs, and a warning says
    why once. Modules with the hooks of weight norm, spectral norm and pruning stay fused.

    The module is fused, in training too, with PReLUs (one slope, or one per channel), with one or
    both batch norms in eval mode, with batch norms without parameters or without running
    statistics, and with frozen parameters, whose gradients are not computed.

    In eval mode without gradients, weights with batch norms folded in are packed once, and packed
    again after a change of a parameter, buffer or setting. PyTorch does not record an in-place
    write to ``parameter.data``: call ``eval()``, ``train()`` or ``reset_cache()`` after it. In a
    compiled graph the module is one operator with the same packed weights and guards.

    Args:
        inp, oup, kernel_size, ratio, dw_size, stride, relu: as in ``reference.GhostModule``.
        activation: a name in ``ghost_ops.activations`` or a module (copied), in place of relu;
            ``"prelu"`` has a slope per channel, as ``nn.PReLU(channels)``.
        cheap_activation: of the cheap branch; None: the same as the primary activation.
        device, dtype: of the parameters and buffers.

    The input is x [N, inp, H, W] in the dtype of the weights (float32, float64, bfloat16 or
    float16; under autocast any floating-point dtype), NCHW or channels_last. The output has the
    layout of the input.

    Raises:
        TypeError, ValueError: as the reference; ValueError for an unknown activation.
        In forward: as ``functional.ghost_module``.

    Source: GhostNet, CVPR 2020, section 3.1.
    """

    _ghost_ops_base = GhostModule
    forward = fused_forward(GhostModule.forward)

    def __init__(
        self,
        inp: int,
        oup: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        relu: bool = True,
        *,
        activation: ActivationSpec | None = None,
        cheap_activation: ActivationSpec | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        numbers = checked_arguments(inp, oup, kernel_size, ratio, dw_size, stride)
        first = relu_or_none(relu) if activation is None else activation
        second = first if cheap_activation is None else cheap_activation
        _, oup, _, ratio, _, _ = numbers
        intrinsic = math.ceil(oup / ratio)
        ghosts = intrinsic * ghosts_per_map(ratio)
        act1 = activations.make_module(first, "activation", intrinsic, device, dtype)
        act2 = activations.make_module(second, "cheap_activation", ghosts, device, dtype)
        build_children(self, *numbers, act1, act2, device, dtype)
        attach(self)

    @classmethod
    def from_reference(cls, module: nn.Module) -> FusedGhostModule:
        """A fused module that shares the children, parameters, buffers and hooks of ``module``.

        Args:
            module: a ``reference.GhostModule``, or any module with its forward and its attributes
                ``oup``, ``primary_conv`` and ``cheap_operation``.

        Raises:
            TypeError: ``module`` lacks one of these attributes.
        """
        for name in ("oup", "primary_conv", "cheap_operation"):
            if not isinstance(module, nn.Module) or not hasattr(module, name):
                raise TypeError(
                    "from_reference takes a Ghost module with oup, primary_conv and "
                    f"cheap_operation, got {type(module).__name__} without {name}"
                )
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        fused.__dict__.update(module.__dict__)
        # A copy, so that a child replaced in one of the two modules stays in the other.
        fused._modules = module._modules.copy()
        forget(fused)
        attach(fused)
        return fused

    def extra_repr(self) -> str:
        return f"oup={self.oup}, backend={self._backend_name()}"

    def _backend_name(self) -> str:
        """The backend of the next call, or why the module runs unfused. Does not warn or raise."""
        state = state_of(self)
        if state.parts is None:
            return f"none, unfused: {state.reason}"
        weight = next(state.parts.first.parameters(), None)  # .weight itself may be computed
        if weight is None:
            return "unknown: its weight is no parameter"
        dtype = str(weight.dtype).removeprefix("torch.")
        rows = backends.status((weight.device.type,))
        return next((row.backend for row in rows if row.dtype == dtype), "none")


@named
class FusedGhostBottleneck(FusedBottleneck, GhostBottleneck):
    """Drop-in for ``reference.GhostBottleneck``: same numbers, with fused Ghost modules.

    With conv_dw only for stride > 1, and gate (squeeze-and-excitation) only with se_ratio::

        out = ghost2(gate(conv_dw(ghost1(x)))) + shortcut(x)

    [N, in_chs, H, W] -> [N, out_chs, Ho, Wo], in the dtype and layout of the input. Constructor,
    children, state_dict keys, initial values for a given seed and numbers are those of the
    reference. In eval mode without gradients the bottleneck runs as few operators with packed
    weights (``fusion.bottleneck``), which are packed again after a change of a parameter, buffer,
    child or hook. PyTorch does not record an in-place write to ``parameter.data``: call ``eval()``,
    ``train()`` or ``reset_cache()`` after it.

    Args:
        in_chs, mid_chs, out_chs, dw_kernel_size, stride, act_layer, se_ratio: as in
            ``reference.GhostBottleneck``.

    Raises:
        TypeError, ValueError: as ``reference.GhostBottleneck``.
        In forward: as ``functional.ghost_module``.

    Source: GhostNet, CVPR 2020, section 3.2.
    """

    _ghost_ops_base = GhostBottleneck
    forward = fused_forward(GhostBottleneck.forward)

    def __init__(
        self,
        in_chs: int,
        mid_chs: int,
        out_chs: int,
        dw_kernel_size: int = 3,
        stride: int = 1,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        se_ratio: float | None = 0.0,
    ) -> None:
        GhostBottleneck.__init__(
            self, in_chs, mid_chs, out_chs, dw_kernel_size, stride, act_layer, se_ratio
        )
        self.ghost1 = FusedGhostModule.from_reference(self.ghost1)
        self.ghost2 = FusedGhostModule.from_reference(self.ghost2)
        attach(self)
