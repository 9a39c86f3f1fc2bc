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

In training a bottleneck is the composition of its children; on a CPU the depthwise convolutions
with their norms and the gate are functions of ours too (``layers``), and the shortcut's 1x1
convolution with its norm is a Ghost module of ratio 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import activations
from ..activations import hard_sigmoid
from ..autograd import layers
from ..autograd.tail import Norm
from ..conventions import memory_format
from ..ops import layers as model_ops
from ..sync import NORMS, group_of
from .branch import (
    Branch,
    BranchForm,
    called,
    layer_at,
    match_branch,
    padding_of,
    why_not_together,
)
from .fused import Fused
from .ghost import (
    Ghost,
    GhostForm,
    PackedGhost,
    match_ghost,
    packed_conv,
    small_gate,
)
from .graph import OutputShape, numbers_of
from .guards import Path, Refusal, at
from .program import Program
from .read import Reading
from .symbols import Node


class Gate(NamedTuple):
    """A squeeze-and-excitation: x * gate(expand(act(reduce(mean of x))))."""

    reduce: nn.Conv2d
    expand: nn.Conv2d
    act: int
    slope: float
    code: int  # of the gate function, one of model_ops
    modules: tuple[nn.Module, ...]  # all that are called in it

    def run(self, x: Tensor) -> Tensor:
        """x times its gate; differentiable."""
        w1, b1, w2, b2 = self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias
        if layers.can_train(x, w1, b1, w2, b2):  # type: ignore[arg-type]
            return layers.SqueezeExciteFunction.apply(
                x, w1, b1, w2, b2, self.act, self.slope, self.code
            )
        s = activations.apply(self.reduce(x.mean((2, 3), keepdim=True)), self.act, self.slope)
        s = self.expand(s)
        return x * (hard_sigmoid(s) if self.code == model_ops.HARD_SIGMOID else torch.sigmoid(s))


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
    weight = conv.weight  # may be computed at every access
    norm = Norm(None, None, None, None) if bn is None else Norm(*branch.norm(weight))
    settings = layers.DepthwiseSettings(
        conv.stride[0], 0.0 if bn is None else bn.eps, branch.uses_batch_stats(), branch.act,
        branch.slope,
    )  # fmt: skip
    out = layers.depthwise(x, weight, norm, settings, branch.running_update())
    return branch.then(conv._conv_forward(x, weight, None)) if out is None else out


def run_conv(branch: Branch, x: Tensor) -> Tensor:
    """The output of a branch whose convolution is not depthwise; differentiable.

    Where there are kernels it is a Ghost module without ghosts: backward computes the convolution
    again, and nothing but x is kept.
    """
    if layers.has_kernels(x):
        out = Ghost(branch, None, branch.conv.out_channels).run(x)
        if isinstance(out, Tensor):
            return out
    return branch.then(branch.conv(x))


class Bottleneck:
    """The parts of a bottleneck, bound to its modules.

    Attributes:
        ghosts: the two Ghost modules, called as they are in training.
        ghost1, ghost2: their parts.
        inplace: the shortcut is added in place, which keeps the dtype.
    """

    alone = False

    def __init__(
        self,
        ghosts: tuple[nn.Module, nn.Module],
        ghost1: Ghost,
        dw: Branch | None,
        gate: Gate | None,
        ghost2: Ghost,
        shortcut: tuple[Branch, Branch] | None,
        inplace: bool,
    ) -> None:
        self.inplace = inplace
        self.ghosts, self.ghost1, self.dw, self.gate = ghosts, ghost1, dw, gate
        self.ghost2, self.shortcut = ghost2, shortcut
        self.first = ghost1.first
        self.dw_size = max(ghost1.dw_size, ghost2.dw_size)
        found = [*ghost1.layers, *ghost2.layers]
        for branch in (dw, *(shortcut or ())):
            found += () if branch is None else branch.layers
        if gate is not None:
            found += [gate.reduce, gate.expand]
        self.layers = tuple(found)

    def check(self, x: Tensor) -> None:
        self.ghost1.check(x)

    def why_not_packed(self) -> str:
        return (
            why_not_together(self.layers)
            or self.ghost1.why_not_packed()
            or self.ghost2.why_not_packed()
        )

    def run(self, x: Tensor) -> Tensor:
        y = self.ghosts[0](x)
        if self.dw is not None:
            y = run_depthwise(self.dw, y)
        if self.gate is not None:
            y = self.gate.run(y)
        y = self.ghosts[1](y)
        if self.shortcut is not None:
            dw, conv = self.shortcut
            x = run_conv(conv, run_depthwise(dw, x))
        if self.inplace or (y.dtype is x.dtype and y.shape == x.shape):
            y += x  # legal: no Ghost module keeps its output for backward
            return y
        return y + x

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        packed = PackedBottleneck(self, backend)
        return packed.program().packed() if packed.is_program(backend) else (packed, ())

    def description(self) -> str:
        """In words, for the report."""
        words = ["ghost"]
        if self.dw is not None:
            words.append(f"depthwise {self.dw.conv.kernel_size[0]}x{self.dw.conv.kernel_size[0]}")
        if self.gate is not None:
            words.append("squeeze-excite")
        words.append("ghost")
        words.append("x" if self.shortcut is None else "shortcut")
        return "bottleneck: " + " + ".join(words)


class PackedDepthwise:
    """A depthwise convolution with its batch norm folded in."""

    def __init__(self, branch: Branch) -> None:
        conv, bn = branch.conv, branch.bn
        norm = (None, None, None, None, 0.0)
        if bn is not None:
            norm = (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        self.weight, self.shift = model_ops.fold(conv.weight, conv.bias, *norm)
        # The same numbers in the order in which channels_last reads them.
        self.taps_first = self.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        self.arguments = (conv.stride[0], branch.act, branch.slope)

    def __call__(self, x: Tensor) -> Tensor:
        nchw = memory_format(x) == torch.contiguous_format
        weight = self.weight if nchw else self.taps_first
        return model_ops.depthwise_conv(x, weight, self.shift, *self.arguments)

    def add_to(self, program: Program, x: int) -> int:
        """The number of the output in a program, for the value x of it."""
        return program.depthwise(x, self.weight, self.taps_first, self.shift, self.arguments)

    def with_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and its sums over pixels."""
        return model_ops.depthwise_conv_sums(x, self.weight, self.shift, *self.arguments)


class PackedGate:
    """The packed tensors of a squeeze-and-excitation."""

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


class PackedBottleneck:
    """A bottleneck in inference: folded and packed."""

    def __init__(self, parts: Bottleneck, backend: str) -> None:
        self.short_conv = parts.ghost1.gate
        self.ghost1 = PackedGhost(parts.ghost1, backend)
        self.ghost2 = PackedGhost(parts.ghost2, backend)
        self.dw = PackedDepthwise(parts.dw) if parts.dw is not None else None
        self.gate = PackedGate(parts.gate) if parts.gate is not None else None
        # Whether the gate is made apart from the map that it multiplies.
        self.makes_gate = self.gate is not None and model_ops.on_gpu(parts.first.weight)
        self.shortcut: tuple[PackedDepthwise, PackedGhost] | None = None
        if parts.shortcut is not None:
            dw, conv = parts.shortcut
            self.shortcut = PackedDepthwise(dw), packed_conv(conv, backend)

    def is_program(self, backend: str) -> bool:
        """Whether it can be one of the CPU's operators."""
        ghosts = [self.ghost1, self.ghost2, *([self.shortcut[1]] if self.shortcut else [])]
        return (
            backend == "native"
            and not model_ops.on_gpu(self.ghost1.packed)
            and all(ghost.is_one_operator() for ghost in ghosts)
        )

    def program(self) -> Program:
        """All of it."""
        program = Program()
        x, y = 0, self.ghost1.add_to(program, 0)
        if self.dw is not None:
            y = self.dw.add_to(program, y)
        if self.gate is not None:
            y = program.excite(y, self.gate.tensors, self.gate.arguments)
        if self.shortcut is not None:
            dw, conv = self.shortcut
            x = conv.add_to(program, dw.add_to(program, x))
        self.ghost2.add_to(program, y, x)
        return program

    def __call__(self, x: Tensor) -> Tensor:
        """The bottleneck's output for a dense x that fits."""
        gate = self.short_conv
        y = self.ghost1(x, None, None if gate is None else small_gate(x, gate))
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


class GateForm(NamedTuple):
    """Where the parts of a squeeze-and-excitation are."""

    reduce: Path
    expand: Path
    act: int
    slope: float
    code: int
    modules: tuple[Path, ...]

    def bind(self, module: nn.Module) -> Gate:
        """The gate in a module. Raises ``Refusal`` if its convolutions are not 1x1 with bias."""
        convs = [layer_at(module, path, nn.Conv2d) for path in (self.reduce, self.expand)]
        for conv in convs:
            if not _is_plain(conv) or conv.bias is None:
                raise Refusal("its gate has a convolution other than 1x1 with bias")
        if convs[1].out_channels != convs[0].in_channels:
            raise Refusal("its gate has another number of channels than its input")
        modules: list[Any] = [at(module, path) for path in self.modules]
        return Gate(*convs, self.act, self.slope, self.code, tuple(modules))


class BottleneckForm(NamedTuple):
    """Where the parts of a bottleneck are."""

    ghosts: tuple[Path, Path]
    ghost1: GhostForm
    dw: BranchForm | None
    gate: GateForm | None
    ghost2: GhostForm
    shortcut: tuple[BranchForm, BranchForm] | None
    inplace: bool

    def bind(self, module: nn.Module) -> Bottleneck:
        shortcut = None
        if self.shortcut is not None:
            first, second = self.shortcut
            conv = second.bind(module)
            if not _is_plain(conv.conv) or conv.prelu is not None:
                raise Refusal("the shortcut's second convolution is not a plain 1x1")
            shortcut = bind_depthwise(first, module), conv
        ghosts = [layer_at(module, path, nn.Module) for path in self.ghosts]
        parts = Bottleneck(
            (ghosts[0], ghosts[1]),
            self.ghost1.bind(module),
            None if self.dw is None else bind_depthwise(self.dw, module),
            None if self.gate is None else self.gate.bind(module),
            self.ghost2.bind(module),
            shortcut,
            self.inplace,
        )
        _check_sum(parts)
        return parts

    def shape(self, module: nn.Module) -> OutputShape | None:
        shape1, shape2 = self.ghost1.shape(module), self.ghost2.shape(module)
        if shape1 is None or shape2 is None:
            return None
        dw: tuple[int, ...] = ()
        if self.dw is not None:
            conv = layer_at(module, self.dw.conv, nn.Conv2d)
            dw = numbers_of(conv, padding_of(conv))
        return OutputShape(shape2.out_channels, (*shape1.convs, *dw, *shape2.convs))


def _check_sum(parts: Bottleneck) -> None:
    """Raise ``Refusal`` if the shortcut may have another shape, or a weight is made by a hook."""
    main = [parts.ghost1.primary, parts.ghost2.primary, *([parts.dw] if parts.dw else [])]
    side = list(parts.shortcut or ())
    channels = side[-1].conv.out_channels if side else parts.first.in_channels
    check_shapes(main, side, (parts.ghost2.settings.out_channels, channels))
    direct = [b.conv for b in (*main[2:], *side)]
    direct += [] if parts.gate is None else [parts.gate.reduce, parts.gate.expand]
    if any(len(conv._forward_pre_hooks) for conv in direct):
        raise Refusal("a weight outside of its Ghost modules is made by a hook")


def check_shapes(main: list[Branch], side: list[Branch], channels: tuple[int, int]) -> None:
    """Raise ``Refusal`` if what two paths give, with these channels, may differ in shape."""
    for branch in (*main, *side):
        conv = branch.conv
        for pad, d, k in zip(branch.padding, conv.dilation, conv.kernel_size, strict=True):
            if 2 * pad != d * (k - 1):
                raise Refusal("a convolution changes height and width by its padding")
    strides = []
    for path in (main, side):
        height = width = 1
        for branch in path:
            height *= branch.conv.stride[0]
            width *= branch.conv.stride[1]
        strides.append((height, width))
    if strides[0] != strides[1] or channels[0] != channels[1]:
        raise Refusal("its shortcut has another shape than what it is added to")


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a 1x1 with nothing else to it."""
    return (
        conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
    )


def bind_depthwise(form: BranchForm, module: nn.Module) -> Branch:
    branch, name = form.bind(module), ".".join(form.conv)
    conv = branch.conv
    if branch.prelu is not None:
        raise Refusal(f"{name} has a PReLU, which only Ghost modules compute")
    k, s = conv.kernel_size[0], conv.stride[0]
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise Refusal(f"{name} is not depthwise, one filter a channel")
    if not model_ops.has_depthwise(k, s) or conv.kernel_size != (k, k) or conv.stride != (s, s):
        raise Refusal(f"{name} has kernel {conv.kernel_size} and stride {conv.stride}")
    if branch.padding != (k // 2, k // 2) or conv.dilation != (1, 1):
        raise Refusal(f"{name} does not pad with {k // 2} zeros, half its kernel")
    return branch


def match_bottleneck(reading: Reading) -> BottleneckForm:
    """The bottleneck whose result a reading is.

    Raises:
        Refusal: it is none.
    """
    out = reading.out
    if out.op != "add" or len(out.inputs) != 2:
        raise Refusal("its forward does not end with a sum")
    reason = Refusal("its forward is no sum of a Ghost module and a shortcut")
    for main, short in (out.inputs, out.inputs[::-1]):
        try:
            ghost2, path2, node = _match_module(reading, main)
        except Refusal as refusal:
            reason = refusal
            continue
        return _match_first_half(reading, ghost2, path2, node, short)
    raise reason


def _match_first_half(
    reading: Reading, ghost2: GhostForm, path2: Path, node: Node, short: Node
) -> BottleneckForm:
    gate = dw = None
    found = find_gate(reading, node)
    if found is not None:
        gate, node = found
    try:
        ghost1, path1, x = _match_module(reading, node)
    except Refusal as refusal:
        try:
            dw, node = match_branch(reading, node, "conv_dw")
        except Refusal:
            if found is None and node.op == "mul":
                raise Refusal("its gate is not squeeze-and-excitation") from None
            raise refusal from None
        ghost1, path1, x = _match_module(reading, node)
    if x.op != "input":
        raise Refusal("its first Ghost module does not take its input")
    if ghost2.gate is not None or ghost1.tail or ghost2.tail:
        raise Refusal("its second Ghost module has a gate, or layers follow one")
    shortcut, inplace = _match_shortcut(reading, short), bool(reading.out.args)
    return BottleneckForm((path1, path2), ghost1, dw, gate, ghost2, shortcut, inplace)


def _match_module(reading: Reading, node: Node) -> tuple[GhostForm, Path, Node]:
    """A Ghost module that is a child of its own: its form, its path, and its input."""
    form, x = match_ghost(reading, node)
    if form.cheap is None:
        raise Refusal("a Ghost module inside it has a ratio of 1")
    path = next((call.path for call in reading.calls.get(node, ()) if call.x is x), None)
    if path is None:
        raise Refusal("a Ghost module inside it is not a module of its own")
    return form, path, x


def _match_shortcut(reading: Reading, node: Node) -> tuple[BranchForm, BranchForm] | None:
    if node.op == "input":
        return None
    second, node = match_branch(reading, node, "the shortcut")
    first, node = match_branch(reading, node, "the shortcut")
    if node.op != "input":
        raise Refusal("its shortcut does not start at its input")
    return first, second


def find_gate(reading: Reading, node: Node) -> tuple[GateForm, Node] | None:
    """The squeeze-and-excitation whose result a node is, and the node of its input."""
    pairs = (node.inputs, node.inputs[::-1]) if node.op == "mul" and len(node.inputs) == 2 else ()
    for x, gate in pairs:
        code, s = _gate_function(gate)
        if s is None or s.op != "conv":
            continue
        expand, (s,) = s.args[0], s.inputs
        act = (activations.NONE, activations.DEFAULT_SLOPE)
        if s.op == "act":
            act, (s,) = s.args, s.inputs  # type: ignore[assignment]
        if s.op == "conv" and s.inputs[0].op == "mean" and s.inputs[0].inputs[0] is x:
            modules = (*called(reading, node), s.args[0], expand)
            return GateForm(s.args[0], expand, *act, code, modules), x
    return None


def _gate_function(gate: Node) -> tuple[int, Node | None]:
    """The function at the end of a gate, and its input; None if it is none of ours."""
    if gate.op == "sigmoid":
        return model_ops.SIGMOID, gate.inputs[0]
    if gate.op == "hardsigmoid":
        return model_ops.HARD_SIGMOID, gate.inputs[0]
    if gate.op == "div" and gate.args == (6,):  # relu6(x + 3) / 6
        (act,) = gate.inputs
        if act.op == "clamp6" or (act.op == "act" and act.args[0] == activations.RELU6):
            (add,) = act.inputs
            if add.op == "add" and add.args == (3,):
                return model_ops.HARD_SIGMOID, add.inputs[0]
    return -1, None


class FusedBottleneck(Fused):
    """A bottleneck made fused by ``fuse``."""

    _ghost_kind = "bottleneck"

    @classmethod
    def _ghost_match(cls, reading: Reading) -> BottleneckForm:
        return match_bottleneck(reading)
