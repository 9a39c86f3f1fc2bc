"""Ghost bottlenecks: ghost, optional strided depthwise convolution and gate, ghost, shortcut.

In eval mode without gradients a bottleneck runs as few operators: batch norms are folded, weights
are packed once, and the epilogue of the second Ghost module adds the shortcut::

    y   = ghost1(x)                                  one op
    y   = bn_dw(conv_dw(y))      if stride > 1       one op, ``ghost_ops::depthwise_conv``
    y   = y * gate(y)            if squeeze-excite   one op, ``ghost_ops::squeeze_excite_``
    out = ghost2(y) + shortcut                       one op

A shortcut other than the identity is one more depthwise op and one 1x1 convolution (a Ghost module
of ratio 1), whose result ghost2 adds. The other order, in which the 1x1 convolution adds the result
of ghost2, would move the same bytes: three maps of the output's size.

On a CPU all of this is one ``Program``. On a GPU the gate is a separate op,
``ghost_ops::squeeze_excite_gate``. Its input is the sums of the depthwise op, if there is one.
ghost2 multiplies y by the gate while it reads y, so the gated map is never written.

In training a bottleneck calls its children one after the other. On a CPU the depthwise convolutions
with their norms, and the gate, are fused functions too (``autograd.layers``); the shortcut's 1x1
convolution with its norm runs as a Ghost module of ratio 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .. import ops
from .branch import (
    Branch,
    BranchForm,
    is_plain,
    layer_at,
    match_branch,
    padding_of,
    why_not_together,
)
from .depthwise import PackedDepthwise, bind_depthwise, run_depthwise
from .fused import Fused
from .gate import Gate, GateForm, PackedGate, find_gate
from .ghost import GhostForm, match_ghost
from .ghost_parts import Ghost, PackedGhost, half_size_gate, packed_conv, run_conv
from .graph import OutputShape, numbers_of
from .guards import Path, Refusal
from .program import Program
from .read import Reading
from .symbols import Node


class Bottleneck:
    """The parts of a bottleneck.

    Attributes:
        ghosts: the two Ghost modules, which are called in training.
        ghost1, ghost2: the parts of these two modules.
        dw: the depthwise convolution between them, or None.
        gate: the squeeze-and-excitation between them, or None.
        shortcut: a depthwise and a 1x1 convolution; None for the identity.
        inplace: the shortcut is added in place, so the sum has the dtype of ghost2's output.
        layers, first, dw_size, alone: as in ``state.Parts``.
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
        """As ``Ghost.check``."""
        self.ghost1.check(x)

    def why_not_packed(self) -> str:
        """Why the bottleneck cannot be packed in its present modes; empty if it can."""
        return (
            why_not_together(self.layers)
            or self.ghost1.why_not_packed()
            or self.ghost2.why_not_packed()
        )

    def run(self, x: Tensor) -> Tensor:
        """The output, differentiable."""
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
            y += x  # allowed: no Ghost module saves its output for backward
            return y
        return y + x

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        """An operator or a function, and its arguments after a dense x that fits."""
        packed = PackedBottleneck(self, backend)
        return packed.program().packed() if packed.is_program(backend) else (packed, ())

    def description(self) -> str:
        """The bottleneck in words, for the report."""
        words = ["ghost"]
        if self.dw is not None:
            words.append(f"depthwise {self.dw.conv.kernel_size[0]}x{self.dw.conv.kernel_size[0]}")
        if self.gate is not None:
            words.append("squeeze-excite")
        words.append("ghost")
        words.append("x" if self.shortcut is None else "shortcut")
        return "bottleneck: " + " + ".join(words)


class PackedBottleneck:
    """A bottleneck in inference: batch norms folded, weights packed for one backend."""

    def __init__(self, parts: Bottleneck, backend: str) -> None:
        self.short_conv = parts.ghost1.gate
        self.ghost1 = PackedGhost(parts.ghost1, backend)
        self.ghost2 = PackedGhost(parts.ghost2, backend)
        self.dw = PackedDepthwise(parts.dw) if parts.dw is not None else None
        self.gate = PackedGate(parts.gate) if parts.gate is not None else None
        # Whether an op computes the gate alone, without the product of the gate and y.
        self.makes_gate = self.gate is not None and ops.on_gpu(parts.first.weight)
        self.shortcut: tuple[PackedDepthwise, PackedGhost] | None = None
        if parts.shortcut is not None:
            dw, conv = parts.shortcut
            self.shortcut = PackedDepthwise(dw), packed_conv(conv, backend)

    def is_program(self, backend: str) -> bool:
        """Whether the whole bottleneck can be one program of the CPU."""
        ghosts = [self.ghost1, self.ghost2, *([self.shortcut[1]] if self.shortcut else [])]
        return (
            backend == "native"
            and not ops.on_gpu(self.ghost1.packed)
            and all(ghost.is_one_operator() for ghost in ghosts)
        )

    def program(self) -> Program:
        """The program of the whole bottleneck."""
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
        y = self.ghost1(x, None, None if gate is None else half_size_gate(x, gate))
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


class BottleneckForm(NamedTuple):
    """The paths of a bottleneck's modules; attributes as in ``Bottleneck``."""

    ghosts: tuple[Path, Path]
    ghost1: GhostForm
    dw: BranchForm | None
    gate: GateForm | None
    ghost2: GhostForm
    shortcut: tuple[BranchForm, BranchForm] | None
    inplace: bool

    def bind(self, module: nn.Module) -> Bottleneck:
        """The parts in a module, as ``state.Form.bind``."""
        shortcut = None
        if self.shortcut is not None:
            first, second = self.shortcut
            conv = second.bind(module)
            if not is_plain(conv.conv) or conv.prelu is not None:
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
        """The data that decide the output's shape, as ``state.Form.shape``."""
        shape1, shape2 = self.ghost1.shape(module), self.ghost2.shape(module)
        if shape1 is None or shape2 is None:
            return None
        dw: tuple[int, ...] = ()
        if self.dw is not None:
            conv = layer_at(module, self.dw.conv, nn.Conv2d)
            dw = numbers_of(conv, padding_of(conv))
        return OutputShape(shape2.out_channels, (*shape1.convs, *dw, *shape2.convs))


def _check_sum(parts: Bottleneck) -> None:
    """Raise ``Refusal`` if the shortcut's shape may differ, or a hook computes a weight."""
    main = [parts.ghost1.primary, parts.ghost2.primary, *([parts.dw] if parts.dw else [])]
    side = list(parts.shortcut or ())
    channels = side[-1].conv.out_channels if side else parts.first.in_channels
    _check_shapes(main, side, (parts.ghost2.settings.out_channels, channels))
    direct = [b.conv for b in (*main[2:], *side)]
    direct += [] if parts.gate is None else [parts.gate.reduce, parts.gate.expand]
    if any(len(conv._forward_pre_hooks) for conv in direct):
        raise Refusal("a weight outside of its Ghost modules is made by a hook")


def _check_shapes(main: list[Branch], side: list[Branch], channels: tuple[int, int]) -> None:
    """Raise ``Refusal`` if the outputs of two paths, with these channels, may differ in shape."""
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


def match_bottleneck(reading: Reading) -> BottleneckForm:
    """The bottleneck that a reading's forward computes.

    Raises:
        Refusal: the forward computes no bottleneck.
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
    """The bottleneck whose second Ghost module reads ``node``, and adds the shortcut ``short``."""
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
    """(form, path, input node) of the module that computes a node and is a Ghost module.

    Raises:
        Refusal: no Ghost module computes the node, or no single child module does.
    """
    form, x = match_ghost(reading, node)
    if form.cheap is None:
        raise Refusal("a Ghost module inside it has a ratio of 1")
    path = next((call.path for call in reading.calls.get(node, ()) if call.x is x), None)
    if path is None:
        raise Refusal("a Ghost module inside it is not a module of its own")
    return form, path, x


def _match_shortcut(reading: Reading, node: Node) -> tuple[BranchForm, BranchForm] | None:
    """The two convolutions of a shortcut; None for the identity."""
    if node.op == "input":
        return None
    second, node = match_branch(reading, node, "the shortcut")
    first, node = match_branch(reading, node, "the shortcut")
    if node.op != "input":
        raise Refusal("its shortcut does not start at its input")
    return first, second


class FusedBottleneck(Fused):
    """A fused Ghost bottleneck."""

    _ghost_kind = "bottleneck"

    @classmethod
    def _ghost_match(cls, reading: Reading) -> BottleneckForm:
        return match_bottleneck(reading)
