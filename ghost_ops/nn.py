"""Modules that are fused from the start: a Ghost module and a Ghost bottleneck."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import activations, backends
from .activations import ActivationSpec
from .fusion.bottleneck import FusedBottleneck
from .fusion.fused import attach, fused_forward
from .fusion.ghost import FusedGhost
from .reference import GhostBottleneck, GhostModule, build_children, checked_arguments


class FusedGhostModule(FusedGhost, GhostModule):
    """Drop-in for the reference ``GhostModule``: same numbers, in fewer passes over memory.

    Formula and shapes: ``ghost_ops.reference``. Constructor, children (``primary_conv`` and
    ``cheap_operation``, each convolution, batch norm, activation), state_dict keys, initial
    values from a given seed and batch norm behaviour are the reference's. It is a reference module
    that ``fuse`` was called with: its children can be changed as those of the reference can, and
    what the fused ops cannot compute (hooks, another layer type) runs as the reference's forward,
    with a warning that says why once. Hooks of weight norm, spectral norm and pruning are known and
    stay fused.

    A PReLU (one slope, or one a channel) is fused, in training too. So are frozen batch norms (one
    or both in eval mode), batch norms without parameters or without running statistics, and frozen
    parameters, whose gradients are not computed.

    In eval mode without gradients the weights with batch norm folded in are kept from call to
    call, and made anew when a parameter, buffer or setting has changed. Writing into
    ``parameter.data`` in place is the one change that PyTorch does not record: call ``eval()``,
    ``train()`` or ``reset_cache()`` after it. In a compiled graph the module is then one operator,
    with the same weights and the same checks.

    Args:
        inp, oup, kernel_size, ratio, dw_size, stride, relu: as ``reference.GhostModule``.
        activation: a name of ``ghost_ops.activations`` or a module (copied), in place of relu;
            ``"prelu"`` has a slope for every channel, as ``nn.PReLU(channels)``.
        cheap_activation: that of the cheap branch; as the primary one if None.
        device, dtype: of the parameters and buffers.

    Input [N, inp, H, W] in the dtype of the weights (under autocast, any floating-point dtype);
    float32, float64, bfloat16 or float16; NCHW or channels_last, and the output has the layout
    of the input.

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
        first = ("relu" if relu else "none") if activation is None else activation
        second = first if cheap_activation is None else cheap_activation
        m = math.ceil(numbers[1] / numbers[3])
        g = m * (numbers[3] - 1)
        act1 = activations.make_module(first, "activation", m, device, dtype)
        act2 = activations.make_module(second, "cheap_activation", g, device, dtype)
        build_children(self, *numbers, act1, act2, device, dtype)
        attach(self)

    @classmethod
    def from_reference(cls, module: nn.Module) -> FusedGhostModule:
        """A fused module over the very children of ``module``: shared parameters, buffers, hooks.

        Args:
            module: a ``reference.GhostModule``, or any module with its attributes ``oup``,
                ``primary_conv`` and ``cheap_operation`` and its forward.

        Raises:
            TypeError: ``module`` lacks one of these.
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
        # Shared until one of the two has a child replaced.
        fused._modules = module._modules.copy()
        fused.__dict__.pop("_ghost_ops", None)
        attach(fused)
        return fused

    def extra_repr(self) -> str:
        return f"oup={self.oup}, backend={self._backend_name()}"

    def _backend_name(self) -> str:
        """What will run, or why nothing fused will; without warning or raising."""
        state = self._ghost_state()
        if state.parts is None:
            return f"none, unfused: {state.reason}"
        weight = next(state.parts.first.parameters(), None)  # not .weight, which may be computed
        if weight is None:
            return "unknown: its weight is no parameter"
        dtype = str(weight.dtype).removeprefix("torch.")
        rows = backends.status((weight.device.type,))
        return next((row.backend for row in rows if row.dtype == dtype), "none")


class FusedGhostBottleneck(FusedBottleneck, GhostBottleneck):
    """Drop-in for ``reference.GhostBottleneck`` with fused Ghost modules.

    Constructor, children, state_dict keys, initial values from a given seed and numbers are the
    reference's. Called in eval mode without gradients it runs as few operators with packed weights
    (``fusion.bottleneck``), made anew when a parameter, buffer, child or hook has changed; an
    in-place write to ``parameter.data`` is noticed after ``eval()``, ``train()`` or
    ``reset_cache()`` only. [N, in_chs, H, W] -> [N, out_chs, Ho, Wo], in the layout of the input.

    Args:
        in_chs, mid_chs, out_chs, dw_kernel_size, stride, act_layer, se_ratio: as
            ``reference.GhostBottleneck``.

    Raises:
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
