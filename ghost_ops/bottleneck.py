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

from . import activations, convert_probe, layers, model_ops
from .autograd import backend_for, dense
from .convert_forward import (
    Converted,
    ConvertedGhost,
    PackedGhost,
    PackedWhole,
    Values,
    Watch,
    _rebuild,
)
from .convert_layouts import (
    Branch,
    Layout,
    Refusal,
    _is_nothing,
    candidate,
    check_hooks,
    read,
    read_branch,
    settings_of,
)
from .nn import FusedGhostModule
from .reference import GhostBottleneck, SqueezeExcite, hard_sigmoid

__all__ = ["FusedGhostBottleneck", "SqueezeExcite"]

_GATES: dict[int, Callable[[Tensor], Tensor]] = {
    model_ops.HARD_SIGMOID: hard_sigmoid,
    model_ops.SIGMOID: torch.sigmoid,
}


class Gate(NamedTuple):
    """A squeeze-and-excitation: x * gate(expand(act(reduce(mean of x))))."""

    module: nn.Module
    reduce: nn.Conv2d
    expand: nn.Conv2d
    act: int
    slope: float
    code: int  # of the gate function, one of model_ops

    def run(self, x: Tensor) -> Tensor:
        """The module's output; differentiable."""
        w1, b1, w2, b2 = self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias
        if not layers.can_train(x, w1, b1, w2, b2):
            return self.module(x)
        return layers.SqueezeExciteFunction.apply(
            x, w1, b1, w2, b2, self.act, self.slope, self.code
        )

    def formula(self, x: Tensor) -> Tensor:
        s = self.reduce(x.mean((2, 3), keepdim=True))
        s = activations.apply(s, self.act, self.slope)
        return x * _GATES[self.code](self.expand(s))


class Parts(NamedTuple):
    """What a bottleneck is made of."""

    ghost1: nn.Module
    dw: Branch | None
    gate: Gate | None
    ghost2: nn.Module
    shortcut: tuple[Branch, Branch] | None

    def run(self, x: Tensor) -> Tensor:
        """The bottleneck's output; differentiable, norms in the mode that they are in."""
        y = self.ghost1(x)
        if self.dw is not None:
            y = _norm_and_act(self.dw, layers.depthwise(self.dw.conv, y))
        if self.gate is not None:
            y = self.gate.run(y)
        y = self.ghost2(y)
        if self.shortcut is not None:
            dw, conv = self.shortcut
            x = _run_branch(conv, _norm_and_act(dw, layers.depthwise(dw.conv, x)))
        y += x  # legal: no Ghost module keeps its output for backward
        return y

    def formula(self, x: Tensor) -> Tensor:
        """The bottleneck in plain PyTorch, the Ghost modules as they are."""
        y = self.ghost1(x)
        if self.dw is not None:
            y = _run_branch(self.dw, y)
        if self.gate is not None:
            y = self.gate.formula(y)
        y = self.ghost2(y)
        if self.shortcut is None:
            return y + x
        return y + _run_branch(self.shortcut[1], _run_branch(self.shortcut[0], x))

    def verify(self, module: nn.Module) -> None:
        """Raise ``Refusal`` if the module's forward is not ``formula``."""
        generator = torch.Generator().manual_seed(0)
        copy = convert_probe.clone(module, generator)
        parts = read_bottleneck(copy)
        assert parts is not None
        channels = _layout_of(self.ghost1)[0].primary.conv.in_channels
        x = torch.randn(2, channels, 9, 8, generator=generator, dtype=torch.float64)
        for mode in ("eval", "training"):
            copy.train(mode == "training")
            got = convert_probe.run(lambda: copy(x.clone()))
            convert_probe.compare(got, convert_probe.run(lambda: parts.formula(x.clone())), mode)

    def attach(self, module: nn.Module) -> None:
        """Give the module what ``ConvertedBottleneck`` needs."""
        module.__dict__["_ghost_ops"] = BottleneckState()

    def modules(self) -> tuple[nn.Module, ...]:
        """Every module inside that the packed form computes in the place of."""
        found: list[nn.Module] = []
        for part in (self.ghost1, self.ghost2):
            found += part.modules()
        for branch in (self.dw, *(self.shortcut or ())):
            found += branch.modules if branch is not None else ()
        if self.gate is not None:
            found += self.gate.module.modules()
        return tuple(dict.fromkeys(found))

    def description(self) -> str:
        """In words, for the report."""
        words = ["ghost"]
        if self.dw is not None:
            words.append(f"depthwise {self.dw.conv.kernel_size[0]}x{self.dw.conv.kernel_size[0]}")
        if self.gate is not None:
            words.append("squeeze-excite")
        words.append("ghost")
        words.append("x" if self.shortcut is None else "shortcut")
        return " + ".join(words)


def _norm_and_act(branch: Branch, x: Tensor) -> Tensor:
    for leaf in (branch.bn, branch.act):
        x = x if leaf is None else leaf(x)
    return x


def _run_branch(branch: Branch, x: Tensor) -> Tensor:
    return _norm_and_act(branch, branch.conv(x))


def _layout_of(ghost: nn.Module) -> tuple[Layout, int]:
    """The layout of a Ghost module and its number of output channels.

    Raises:
        Refusal: it cannot be computed by the fused ops now.
    """
    if isinstance(ghost, ConvertedGhost):
        state: Converted = ghost.__dict__["_ghost_ops"]
        if state.watch is not None and not state.watch.same():
            state.refresh(ghost)
        if state.layout is None:
            raise Refusal(state.reason)
        return state.layout, state.out_channels
    names = candidate(ghost)
    if names is None:
        raise Refusal(f"a {type(ghost).__name__} is not a Ghost module")
    layout = read(ghost, names)
    if isinstance(ghost, FusedGhostModule):
        return layout, ghost.oup
    return layout, layout.primary.conv.out_channels + layout.cheap.conv.out_channels


def _is_ghost(module: nn.Module | None) -> bool:
    if module is None:
        return False
    return isinstance(module, (FusedGhostModule, ConvertedGhost)) or candidate(module) is not None


def read_bottleneck(module: nn.Module) -> Parts | None:
    """The parts of a Ghost bottleneck, or None if the module is not like one.

    Raises:
        Refusal: it is like one, but an invariant does not hold.
    """
    children = module._modules
    if _is_ghost(children.get("ghost1")) and _is_ghost(children.get("ghost2")):
        middle = [children.get(name) for name in ("conv_dw", "bn_dw")]
        ghosts = children["ghost1"], children["ghost2"]
        se = children.get("se")
        known = {"ghost1", "ghost2", "conv_dw", "bn_dw", "se", "shortcut"}
        main: tuple[nn.Module, ...] = ()
    elif isinstance(children.get("conv"), nn.Sequential) and len(children["conv"]) == 3:
        first, dw, last = children["conv"]
        if not (_is_ghost(first) and _is_ghost(last)):
            return None
        middle, ghosts, se = [dw], (first, last), None
        known, main = {"conv", "shortcut"}, (children["conv"],)
    else:
        return None
    for name, child in children.items():
        # One without parameters, such as a dropout, is for `verify` to judge.
        if name not in known and child is not None and any(True for _ in child.parameters()):
            raise Refusal(f"it has a further child, {name}")
    if "forward" in module.__dict__:
        raise Refusal("its forward is replaced on the object")
    layouts = [_layout_of(ghost) for ghost in ghosts]
    if layouts[1][0].gate is not None:
        raise Refusal("its second Ghost module has an attention gate")
    middle = [m for m in middle if m is not None and not _is_nothing(m)]
    dw = _depthwise(nn.Sequential(*middle), "conv_dw") if middle else None
    gate = None if se is None or _is_nothing(se) else _read_gate(se)
    shortcut = _read_shortcut(children.get("shortcut"))
    check_hooks(main, "it")
    parts = Parts(ghosts[0], dw, gate, ghosts[1], shortcut)
    check_hooks(parts.modules(), "it")
    return parts


def _depthwise(module: nn.Module, name: str) -> Branch:
    branch = read_branch(module, name)
    conv = branch.conv
    k, s = conv.kernel_size[0], conv.stride[0]
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise Refusal(f"{name} is not depthwise, one filter a channel")
    if not model_ops.has_depthwise(k, s) or conv.kernel_size != (k, k) or conv.stride != (s, s):
        raise Refusal(f"{name} has kernel {conv.kernel_size} and stride {conv.stride}")
    if conv.padding != (k // 2, k // 2) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        raise Refusal(f"{name} does not pad with {k // 2} zeros, half its kernel")
    return branch


def _read_shortcut(module: nn.Module | None) -> tuple[Branch, Branch] | None:
    if module is None or _is_nothing(module):
        return None
    leaves = list(module.children())
    split = len(leaves) // 2
    first = _depthwise(nn.Sequential(*leaves[:split]), "the shortcut's first half")
    second = read_branch(nn.Sequential(*leaves[split:]), "the shortcut's second half")
    conv = second.conv
    if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1, 1), (1, 1), (0, 0), 1):
        raise Refusal("the shortcut's second convolution is not a plain 1x1")
    extra = tuple(module.modules())
    return first._replace(modules=(*extra, *first.modules[1:])), second


def _read_gate(module: nn.Module) -> Gate:
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    acts = [(m, activations.of_module(m)) for m in module.children() if not _is_nothing(m)]
    known = [found for _, found in acts if found is not None]
    if len(convs) != 2 or len(known) != 1:
        raise Refusal(f"its {type(module).__name__} is not two convolutions and an activation")
    for conv in convs:
        if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.bias is None:
            raise Refusal(f"its {type(module).__name__} has a convolution other than 1x1 with bias")
    generator = torch.Generator().manual_seed(0)
    copy = convert_probe.clone(module, generator).eval()
    own = [m for m in copy.modules() if isinstance(m, nn.Conv2d)]
    x = torch.randn(2, convs[0].in_channels, 3, 4, generator=generator, dtype=torch.float64)
    reason = Refusal("its gate is not a function")
    for code in _GATES:
        gate = Gate(module, *convs, *known[0], code)
        trial = Gate(copy, *own, *known[0], code)
        try:
            got = convert_probe.run(lambda: copy(x.clone()))
            want = convert_probe.run(lambda trial=trial: trial.formula(x))
            convert_probe.compare(got, want, "eval")
            return gate
        except Refusal as refusal:
            reason = refusal
    raise Refusal(f"its {type(module).__name__} is not squeeze-and-excitation: {reason}")


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
        layout1, out1 = _layout_of(parts.ghost1)
        layout2, out2 = _layout_of(parts.ghost2)
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
        y = self.ghost1(x)
        if self.short_conv is not None:
            y.mul_(convert_probe.gate_of(x, self.short_conv, (y.size(2), y.size(3))))
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
            layouts = [_layout_of(ghost)[0] for ghost in (parts.ghost1, parts.ghost2)]
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
