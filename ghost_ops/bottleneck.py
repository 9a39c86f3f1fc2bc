"""Ghost bottlenecks: ghost, optional strided depthwise convolution and gate, ghost, shortcut.

In eval mode without gradients a bottleneck runs as few operators: batch norms are folded, weights
packed once, the shortcut added in the epilogue of the second Ghost module::

    y   = ghost1(x)                                  one op
    y   = bn_dw(conv_dw(y))      if stride > 1       one op, ``ghost_ops::depthwise_conv``
    y   = y * gate(y)            if squeeze-excite   one op, ``ghost_ops::squeeze_excite_``
    out = ghost2(y) + shortcut                       one op

where a shortcut that is no identity is one more depthwise op and one 1x1 convolution (a Ghost
module of ratio 1). In training it is the composition of its children, but for the depthwise
convolutions and the gate, whose forward and backward are ours too (``layers``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import activations, convert_probe, model_ops
from .autograd import backend_for, dense
from .bottleneck_parts import Gate, Parts, layout_of, read_bottleneck
from .convert_forward import PackedGhost, PackedWhole, Values, Watch, _rebuild
from .convert_layouts import Branch, Layout, Refusal, settings_of
from .nn import FusedGhostModule
from .reference import GhostBottleneck, SqueezeExcite

__all__ = ["FusedGhostBottleneck", "SqueezeExcite"]


class _NoGhosts(NamedTuple):
    """Stands for the cheap convolution of a module without ghost maps."""

    weight: Tensor
    bias: None = None


def packed_conv(branch: Branch, backend: str) -> PackedGhost:
    """A 1x1 convolution with its batch norm folded in: a Ghost module of ratio 1."""
    none = Branch(_NoGhosts(branch.conv.weight.new_empty(0, 1, 1, 1)), None, None, ())  # type: ignore[arg-type]
    layout = Layout(("", ""), branch, none, None)
    return PackedGhost(branch, none, settings_of(layout, branch.conv.out_channels), backend)


class _PackedDepthwise:
    """A depthwise convolution with its batch norm folded in."""

    __slots__ = ("arguments", "shift", "weight")

    def __init__(self, branch: Branch) -> None:
        conv, bn = branch.conv, branch.bn
        norm = (None, None, None, None, 0.0)
        if bn is not None:
            norm = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        self.weight, self.shift = model_ops.fold(conv.weight, conv.bias, *norm)
        act = activations.of_module(branch.act) if branch.act is not None else None
        act = act or (activations.NONE, activations.DEFAULT_SLOPE)
        self.arguments = (conv.stride[0], *act)

    def __call__(self, x: Tensor) -> Tensor:
        return model_ops.depthwise_conv(x, self.weight, self.shift, *self.arguments)


class _PackedGate:
    """The tensors of a squeeze-and-excitation in the compute dtype."""

    __slots__ = ("arguments", "tensors")

    def __init__(self, gate: Gate) -> None:
        self.tensors = model_ops.pack_gate(
            gate.reduce.weight, gate.reduce.bias, gate.expand.weight, gate.expand.bias
        )
        self.arguments = (gate.act, gate.slope, gate.code)

    def __call__(self, x: Tensor) -> None:
        """x *= gate(x), in place."""
        model_ops.squeeze_excite_(x, *self.tensors, *self.arguments)


class PackedBottleneck(PackedWhole):
    """A bottleneck in inference: folded, packed, and the values that it was made from."""

    def __init__(self, module: nn.Module, parts: Parts, backend: str) -> None:
        modules = parts.modules()
        layout1, out1 = layout_of(parts.ghost1)
        layout2, out2 = layout_of(parts.ghost2)
        super().__init__(module, modules, layout1.primary.conv)
        self.short_conv = layout1.gate
        with torch.no_grad():
            self.ghost1 = PackedGhost(
                layout1.primary, layout1.cheap, settings_of(layout1, out1), backend
            )
            self.ghost2 = PackedGhost(
                layout2.primary, layout2.cheap, settings_of(layout2, out2), backend
            )
            self.dw = _PackedDepthwise(parts.dw) if parts.dw is not None else None
            self.gate = _PackedGate(parts.gate) if parts.gate is not None else None
            self.shortcut: tuple[_PackedDepthwise, PackedGhost] | None = None
            if parts.shortcut is not None:
                dw, conv = parts.shortcut
                self.shortcut = _PackedDepthwise(dw), packed_conv(conv, backend)

    def __call__(self, x: Tensor) -> Tensor:
        """The bottleneck's output for an x that fits."""
        x = dense(x)
        gate = self.short_conv
        y = self.ghost1(x, None, None if gate is None else convert_probe.small_gate(x, gate))
        if self.dw is not None:
            y = self.dw(y)
        if self.gate is not None:
            self.gate(y)
        if self.shortcut is not None:
            dw, conv = self.shortcut
            x = conv(dw(x))
        return self.ghost2(y, x)


class BottleneckState:
    """What a fused bottleneck keeps: its parts and its packed form, and when they hold."""

    def __init__(self) -> None:
        self.packed: PackedBottleneck | None = None
        self.parts: Parts | None = None
        self.watch: Watch | None = None  # over what parts, or their absence, were read from

    def __getstate__(self) -> dict[str, Any]:
        return {"packed": None, "parts": None, "watch": None}

    def run(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The output, by the packed form or by its parts; None where its own forward has to run."""
        if torch.jit.is_tracing():
            return None
        if not torch.is_grad_enabled():
            out = self.infer(module, x)
            if out is not None:
                return out
        parts = self._read(module)
        return None if parts is None else parts.run(x)

    def _read(self, module: nn.Module) -> Parts | None:
        if self.watch is None or not self.watch.same():
            try:
                self.parts = read_bottleneck(module)
            except Refusal:
                self.parts = None
            inside = module.modules() if self.parts is None else self.parts.modules()
            self.watch = Watch((module, *(m for m in inside if m is not module)), module)
        return self.parts

    def infer(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The output by the packed form; None where there is none."""
        packed = self.packed
        if packed is None or not packed.is_current():
            packed = self.packed = self._pack(module, x)
        if packed is None or not packed.fits(x):
            return None
        return packed(x)

    def _pack(self, module: nn.Module, x: Tensor) -> PackedBottleneck | None:
        parts = self._read(module)
        if parts is None:
            return None
        modules = parts.modules()
        norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
        if any(bn.training or bn.running_mean is None for bn in norms):
            return None
        try:
            layouts = [layout_of(ghost)[0] for ghost in (parts.ghost1, parts.ghost2)]
        except Refusal:
            return None
        dw_size = max(layout.cheap.conv.kernel_size[0] for layout in layouts)
        if not Values.watchable(modules) or backend_for(x, dw_size) != "native":
            return None
        return PackedBottleneck(module, parts, "native")


class ConvertedBottleneck(nn.Module):
    """The forward of a bottleneck made fused by ``fuse``, before its own class in the lookup."""

    _ghost_ops_base: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chs, H, W] -> [N, out_chs, Ho, Wo]."""
        if not torch.compiler.is_compiling():
            out = self.__dict__["_ghost_ops"].run(self, x)
            if out is not None:
                return out
        return super().forward(x)

    def extra_repr(self) -> str:
        parts = (super().extra_repr(), "fused by ghost_ops")
        return ", ".join(part for part in parts if part)

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; forgets the packed weights."""
        self.__dict__["_ghost_ops"] = BottleneckState()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__["_ghost_ops"] = BottleneckState()
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (ConvertedBottleneck, self._ghost_ops_base), self.__getstate__()


class FusedGhostBottleneck(GhostBottleneck):
    """Drop-in for ``reference.GhostBottleneck`` with fused Ghost modules.

    Constructor, children, state_dict keys, initial values from a given seed and numbers are the
    reference's. Called in eval mode without gradients it runs as few operators with packed weights
    (this file's docstring), made anew when a parameter, buffer, child or hook has changed; an
    in-place write to ``parameter.data`` is noticed after ``eval()`` or ``train()`` only.
    [N, in_chs, H, W] -> [N, out_chs, Ho, Wo], in the layout of the input.

    Args:
        in_chs, mid_chs, out_chs, dw_kernel_size, stride, act_layer, se_ratio: as
            ``reference.GhostBottleneck``.

    Raises:
        In forward: as ``functional.ghost_module``.

    Source: GhostNet, CVPR 2020, section 3.2.
    """

    _ghost_ops: BottleneckState | None = None

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
        super().__init__(in_chs, mid_chs, out_chs, dw_kernel_size, stride, act_layer, se_ratio)
        self.ghost1 = FusedGhostModule.from_reference(self.ghost1)
        self.ghost2 = FusedGhostModule.from_reference(self.ghost2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chs, H, W] -> [N, out_chs, Ho, Wo]."""
        if not torch.compiler.is_compiling():
            if self._ghost_ops is None:
                self._ghost_ops = BottleneckState()
            out = self._ghost_ops.run(self, x)
            if out is not None:
                return out
        return super().forward(x)

    def reset_cache(self) -> None:
        """Forget the packed weights; the next call makes them anew."""
        self._ghost_ops = None

    def train(self, mode: bool = True) -> FusedGhostBottleneck:
        """As ``nn.Module.train``."""
        self.reset_cache()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> FusedGhostBottleneck:
        self.reset_cache()
        return super()._apply(fn, recurse)
