"""Ghost modules: matches the expression of a module's forward with the formula of ``ghost_parts``.

The match works on the expression that ``read`` returns. Therefore it does not matter whether a
forward is written with Sequentials, attributes or functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..sync import refuses
from .branch import NO_ACT, BranchForm, layer_at, match_branch, padding_of, what_it_is
from .fused import Fused
from .ghost_parts import FoldableTail, Ghost
from .graph import OutputShape, numbers_of
from .guards import Path, Refusal, at
from .read import Reading
from .symbols import Node


class GhostForm(NamedTuple):
    """The paths of a Ghost module's layers.

    Attributes:
        primary, cheap: the two branches; cheap is None for ratio 1.
        stop: the concatenation is sliced to this number of channels; None without a slice.
        gate: the path of GhostModuleV2's short_conv; None without a gate.
        tail: the layers behind the concatenation, in order: ("act", (code, slope)), ("bn", path) or
            ("module", path).
    """

    primary: BranchForm
    cheap: BranchForm | None
    stop: int | None
    gate: Path | None
    tail: tuple[Any, ...]

    def bind(self, module: nn.Module) -> Ghost:
        """The parts in a module, as ``state.Form.bind``."""
        primary = self.primary.bind(module)
        cheap = None if self.cheap is None else self.cheap.bind(module)
        m = total = primary.conv.out_channels
        if cheap is not None:
            assert self.cheap is not None
            _check_cheap(cheap.conv, m, cheap.padding, ".".join(self.cheap.conv))
            total += cheap.conv.out_channels
        out = total if self.stop is None else min(self.stop, total)
        if out < m:
            raise Refusal(f"its forward gives {out} channels, fewer than the {m} intrinsic maps")
        gate = None if self.gate is None else at(module, self.gate)
        branches = [b for b in (primary, cheap) if b is not None]
        once: list[nn.Module | None] = [layer for b in branches for layer in (b.conv, b.bn)]
        once += [] if gate is None else list(gate.modules())
        if len({id(layer) for layer in once if layer is not None}) < sum(
            m is not None for m in once
        ):
            raise Refusal("a layer is in it twice")
        tail: list[Any] = []
        for kind, step in self.tail:
            tail.append(step if kind == "act" else at(module, step))
        foldable = None
        kinds = [kind for kind, _ in self.tail]
        if cheap is not None and kinds in (["bn"], ["act"], ["bn", "act"]):
            bn = tail[0] if kinds[0] == "bn" else None
            foldable = FoldableTail(bn, *(tail[-1] if kinds[-1] == "act" else NO_ACT))
            if bn is not None and (bn.num_features != out or bn._forward_pre_hooks):
                foldable = None
        return Ghost(primary, cheap, out, gate, tuple(tail), foldable)

    def shape(self, module: nn.Module) -> OutputShape | None:
        """The data that decide the output's shape, as ``state.Form.shape``."""
        if any(kind != "act" for kind, _ in self.tail):
            return None
        conv = layer_at(module, self.primary.conv, nn.Conv2d)
        total = conv.out_channels
        if self.cheap is not None:
            total += layer_at(module, self.cheap.conv, nn.Conv2d).out_channels
        out = total if self.stop is None else min(self.stop, total)
        return OutputShape(out, numbers_of(conv, padding_of(conv)))


def _check_cheap(conv: nn.Conv2d, m: int, padding: tuple[int, int], name: str) -> None:
    """Raise ``Refusal`` for a cheap convolution that does not fit the formula.

    Args:
        m: the number of intrinsic channels.
        padding: of conv, as numbers.
        name: path of conv, for the message.
    """
    d = conv.kernel_size[0]
    if conv.in_channels != m:
        raise Refusal(f"{name} takes {conv.in_channels} channels, but its input has {m}")
    if conv.groups != m:
        raise Refusal(f"{name} is not depthwise: groups={conv.groups} for {m} channels")
    if conv.kernel_size != (d, d):
        raise Refusal(f"{name} has a kernel that is not square: {conv.kernel_size}")
    if d % 2 == 0:
        raise Refusal(f"{name} has an even kernel size, {d}")
    if conv.stride != (1, 1):
        raise Refusal(f"{name} has stride {conv.stride}, not 1")
    if conv.dilation != (1, 1):
        raise Refusal(f"{name} has dilation {conv.dilation}, not 1")
    if padding != (d // 2, d // 2):
        raise Refusal(f"{name} has padding {padding}, not {d // 2}, half its kernel")


def match_ghost(reading: Reading, node: Node) -> tuple[GhostForm, Node]:
    """The Ghost module that computes a node, and the node of its input.

    Raises:
        Refusal: no Ghost module computes the node.
    """
    tail: list[Any] = []
    while node.op in ("act", "bn", "prelu", "module"):
        kind = node.op if node.op in ("act", "bn") else "module"
        tail.insert(0, (kind, node.args if kind == "act" else node.args[0]))
        (node,) = node.inputs
    gate, whole = None, node
    if node.op == "mul" and len(node.inputs) == 2:
        a, b = node.inputs
        whole, gate = (a, b) if a.op in ("slice", "cat") else (b, a)
    stop, body = None, whole
    if whole.op == "slice":
        stop, (body,) = whole.args[0], whole.inputs
    if body.op != "cat":
        if body is whole or tail or gate is not None:
            what = what_it_is(body)
            raise Refusal(f"its forward ends with {what}, not a concatenation of two branches")
        primary, x = match_branch(reading, body, "it")  # of ratio 1
        return GhostForm(primary, None, stop, None, ()), x
    if len(body.inputs) != 2:
        raise Refusal(f"its forward concatenates {len(body.inputs)} tensors")
    y, z = body.inputs
    cheap, of = match_branch(reading, z, "its second branch")
    primary, x = match_branch(reading, y, "its first branch")
    if of is not y:
        raise Refusal("its second branch does not come from its first")
    path = None if gate is None else _match_gate(reading, gate, x, (whole, body, y, z))
    return GhostForm(primary, cheap, stop, path, tuple(tail)), x


def _match_gate(reading: Reading, gate: Node, x: Node, like: tuple[Node, ...]) -> Path:
    """The path of GhostModuleV2's short_conv.

    Args:
        gate: the node that multiplies the concatenation.
        x: the input of the Ghost module.
        like: nodes with the output's height and width; the gate is interpolated to one of them.
    """
    if gate.op == "grow" and gate.inputs[0].op == "sigmoid" and gate.inputs[1] in like:
        for call in reading.calls.get(gate.inputs[0].inputs[0], ()):
            if call.x.op == "halve" and call.x.inputs[0] is x:
                return call.path
    raise Refusal("its forward multiplies the concatenation by something other than V2's gate")


class FusedGhost(Fused):
    """A fused Ghost module."""

    _ghost_backends = ("native", "triton", "eager")

    @classmethod
    def _ghost_match(cls, reading: Reading) -> GhostForm:
        form, x = match_ghost(reading, reading.out)
        if x.op != "input":
            raise Refusal("its primary convolution does not take its input")
        return form

    def _ghost_prefers_plain(self, parts: Ghost, x: Tensor) -> bool:
        # Behind a library convolution a training step on a CPU with the fused ops, which recompute,
        # reaches 0.57 to 0.77 of the speed of the layers.
        norms = (layer for layer in parts.layers if isinstance(layer, nn.SyncBatchNorm))
        fused = (
            parts.has_plain_primary()
            or parts.can_run_tail_op(x)
            or any(refuses(norm, x) for norm in norms)  # the module's own forward would raise
        )
        return self._ghost_made and torch.is_grad_enabled() and not fused
