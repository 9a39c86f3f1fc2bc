"""Ghost bottlenecks: ghost, optional strided depthwise convolution and gate, ghost, shortcut.

In eval mode without gradients a bottleneck runs as few operators: batch norms are folded, weights
packed once, the shortcut added in the epilogue of the second Ghost module::

    y   = ghost1(x)                                  one op
    y   = bn_dw(conv_dw(y))      if stride > 1       one op, ``ghost_ops::depthwise_conv``
    y   = y * gate(y)            if squeeze-excite   one op, ``ghost_ops::squeeze_excite_``
    out = ghost2(y) + shortcut                       one op

A shortcut that is no identity is one more depthwise op and one 1x1 convolution (a Ghost module of
ratio 1); the sum is then ghost2's as well. To add in the 1x1 convolution instead would move the
same bytes: three maps of the output either way.

On a GPU the gate is an op of its own, ``ghost_ops::squeeze_excite_gate``, from sums that the
depthwise op before it made, if there is one; ghost2 multiplies y by it as it reads y, and the gated
map is never written.

In training a bottleneck is the composition of its children, but for the depthwise convolutions and
the gate, whose forward and backward are ours too (``layers``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import activations, convert_probe, model_ops
from .autograd import backend_for, dense
from .bottleneck_parts import Gate, Parts, layout_of, read_bottleneck
from .compiled import OneOperator, OutputShape, attach, bottleneck_shape, in_graph
from .convert_forward import PackedGhost, PackedWhole, Watch, _rebuild
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

    def with_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and its sums over pixels."""
        return model_ops.depthwise_conv_sums(x, self.weight, self.shift, *self.arguments)


class _PackedGate:
    """The packed tensors of a squeeze-and-excitation."""

    __slots__ = ("arguments", "tensors")

    def __init__(self, gate: Gate) -> None:
        self.tensors = model_ops.pack_gate(
            gate.reduce.weight, gate.reduce.bias, gate.expand.weight, gate.expand.bias
        )
        self.arguments = (gate.act, gate.slope, gate.code)

    def __call__(self, x: Tensor) -> None:
        """x *= gate(x), in place."""
        model_ops.squeeze_excite_(x, *self.tensors, *self.arguments)

    def values(self, x: Tensor, sums: Tensor | None) -> Tensor:
        """gate(x) [N, C]; from the sums of x over its pixels, if they are there."""
        return model_ops.squeeze_excite_gate(x, sums, *self.tensors, *self.arguments)


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
            # Whether the gate is made apart from the map that it multiplies.
            self.makes_gate = self.gate is not None and model_ops.on_gpu(
                layout1.primary.conv.weight
            )
            self.shortcut: tuple[_PackedDepthwise, PackedGhost] | None = None
            if parts.shortcut is not None:
                dw, conv = parts.shortcut
                self.shortcut = _PackedDepthwise(dw), packed_conv(conv, backend)

    def __call__(self, x: Tensor) -> Tensor:
        """The bottleneck's output for an x that fits."""
        x = dense(x)
        gate = self.short_conv
        y = self.ghost1(x, None, None if gate is None else convert_probe.small_gate(x, gate))
        sums = in_gate = None
        if self.dw is not None:
            if self.makes_gate:
                y, sums = self.dw.with_sums(y)
            else:
                y = self.dw(y)
        if self.gate is not None:
            if not self.makes_gate:
                self.gate(y)
            elif self.ghost2.takes_gate:
                in_gate = self.gate.values(y, sums)
            else:
                y.mul_(self.gate.values(y, sums)[:, :, None, None])
        if self.shortcut is not None:
            dw, conv = self.shortcut
            x = conv(dw(x))
        return self.ghost2(y, x, in_gate=in_gate)


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
        if not PackedBottleneck.can_pack(modules, backend_for(x, dw_size)):
            return None
        return PackedBottleneck(module, parts, "native")


class ConvertedBottleneck(OneOperator):
    """The forward of a bottleneck made fused by ``fuse``, before its own class in the lookup."""

    _ghost_ops_base: type[nn.Module]
    _ghost_backends = ("native",)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chs, H, W] -> [N, out_chs, Ho, Wo]."""
        if torch.compiler.is_compiling():
            out = in_graph(self, x)
        else:
            out = self.__dict__["_ghost_ops"].run(self, x)
        return super().forward(x) if out is None else out

    def _ghost_packed(self, x: Tensor) -> Tensor | None:
        return self.__dict__["_ghost_ops"].infer(self, x)

    def _ghost_eager(self, x: Tensor) -> Tensor:
        out = self.__dict__["_ghost_ops"].run(self, x)
        return super().forward(x) if out is None else out

    def _ghost_shape(self) -> OutputShape | None:
        return bottleneck_shape(self)

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


class FusedGhostBottleneck(OneOperator, GhostBottleneck):
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
    _ghost_backends = ("native",)

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
        attach(self)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chs, H, W] -> [N, out_chs, Ho, Wo]."""
        out = in_graph(self, x) if torch.compiler.is_compiling() else self._state().run(self, x)
        return super().forward(x) if out is None else out

    def _state(self) -> BottleneckState:
        if self._ghost_ops is None:
            self._ghost_ops = BottleneckState()
        return self._ghost_ops

    def _ghost_packed(self, x: Tensor) -> Tensor | None:
        return self._state().infer(self, x)

    def _ghost_eager(self, x: Tensor) -> Tensor:
        out = self._state().run(self, x)
        return super().forward(x) if out is None else out

    def _ghost_shape(self) -> OutputShape | None:
        return bottleneck_shape(self)

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
