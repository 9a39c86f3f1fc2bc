"""Residual blocks of two Ghost modules, such as Ghost-ResNet's: act(ghost2(ghost1(x)) + shortcut).

A batch norm and an activation may follow each Ghost module, outside of it, as in
``relu(bn2(ghost2(relu(bn1(ghost1(x))))) + x)``. In eval mode without gradients, on a CPU with
native kernels, they are folded, so that each Ghost module is one operator and the sum is part of
the second; an activation of the sum is computed in place. A shortcut that is a convolution or a
Ghost module is one more operator. In training, all that follows a Ghost module's primary
convolution is one operator, with the sum and its activation behind the second. Everything else is
the block's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import activations
from ..autograd import autocast_dtype
from .bottleneck import check_shapes
from .branch import (
    match_branch,
)
from .conv import why_not_on_cpu
from .fused import FusedInference
from .ghost import (
    Ghost,
    GhostForm,
    PackedGhost,
    match_ghost,
)
from .guards import Refusal
from .read import Reading
from .symbols import Node


class Residual:
    """The parts of a residual block, bound to its modules."""

    alone = False

    def __init__(
        self, ghost1: Ghost, ghost2: Ghost, shortcut: Ghost | None, act: tuple[int, float]
    ) -> None:
        self.ghost1, self.ghost2, self.shortcut, self.act = ghost1, ghost2, shortcut, act
        self.ghosts = (ghost1, ghost2) if shortcut is None else (ghost1, ghost2, shortcut)
        self.first = ghost1.first
        self.dw_size = max(ghost.dw_size for ghost in self.ghosts)
        self.layers = tuple(layer for ghost in self.ghosts for layer in ghost.layers)

    def check(self, x: Tensor) -> None:
        """Nothing: what does not fit goes to the block's own forward."""

    def why_not_packed(self) -> str:
        reasons = (ghost.why_not_packed() for ghost in self.ghosts)
        return why_not_on_cpu(self.first, self.layers) or next(filter(None, reasons), "")

    def learns(self, x: Tensor) -> bool:
        """Whether ``learn`` computes it on x."""
        if self.shortcut is None and autocast_dtype(x.device.type) not in (None, x.dtype):
            return False  # the sum's dtype depends on whether it is in place
        return all(g.cheap is None or g.learns(x) for g in self.ghosts)

    def learn(self, x: Tensor) -> Tensor | str:
        """The output, differentiable; or why it has to be the block's own forward."""
        side: Tensor | str = x
        if self.shortcut is not None and self.shortcut.cheap is not None:
            side = self.shortcut.learn(x)
        elif self.shortcut is not None:
            side = self.shortcut.primary.then(self.shortcut.first(x))
        y = self.ghost1.learn(x)
        if isinstance(y, str) or isinstance(side, str):
            return y if isinstance(y, str) else side
        return self.ghost2.learn(y, side, self.act)

    def run(self, x: Tensor) -> str:
        return ""  # its own forward, without a warning

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        return PackedResidual(self, backend), ()

    def description(self) -> str:
        """In words, for the report."""
        side = "x"
        if self.shortcut is not None:
            side = "ghost" if self.shortcut.cheap is not None else "conv"
        return f"residual block: ghost + ghost + {side}"


class PackedResidual:
    """A residual block in inference: folded and packed."""

    def __init__(self, parts: Residual, backend: str) -> None:
        self.ghost1, self.ghost2 = (PackedGhost(g, backend) for g in (parts.ghost1, parts.ghost2))
        self.shortcut = None if parts.shortcut is None else PackedGhost(parts.shortcut, backend)
        self.act = parts.act

    def __call__(self, x: Tensor) -> Tensor:
        """The block's output for a dense x that fits."""
        y = self.ghost1(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return activations.apply(self.ghost2(y, x), *self.act, inplace=True)


class ResidualForm(NamedTuple):
    """Where the parts of a residual block are."""

    ghost1: GhostForm
    ghost2: GhostForm
    shortcut: GhostForm | None
    act: tuple[int, float]

    def bind(self, module: nn.Module) -> Residual:
        ghosts = [self.ghost1.bind(module), self.ghost2.bind(module)]
        shortcut = None if self.shortcut is None else self.shortcut.bind(module)
        for ghost in (*ghosts, *([] if shortcut is None else [shortcut])):
            if not ghost.is_conv() or (ghost.tail and ghost.after is None):
                raise Refusal("there is no kernel for one of its Ghost modules")
        main, side = [g.primary for g in ghosts], [shortcut.primary] if shortcut else []
        source = ghosts[0].first.in_channels
        channels = shortcut.settings.out_channels if shortcut else source
        check_shapes(main, side, (ghosts[1].settings.out_channels, channels))
        return Residual(ghosts[0], ghosts[1], shortcut, self.act)

    def shape(self, module: nn.Module) -> None:
        return None  # it is no operator of a graph


def match_residual(reading: Reading) -> ResidualForm:
    """The residual block whose result a reading is.

    Raises:
        Refusal: it is none.
    """
    out, act = reading.out, (activations.NONE, activations.DEFAULT_SLOPE)
    if out.op == "act":
        act, (out,) = out.args, out.inputs  # type: ignore[assignment]
    if out.op != "add" or len(out.inputs) != 2:
        raise Refusal("its forward does not end with a sum")
    reason = Refusal("")
    for main, short in (out.inputs, out.inputs[::-1]):
        try:
            ghost2, node = _match_ghost(reading, main)
            ghost1, x = _match_ghost(reading, node)
        except Refusal as refusal:
            reason = refusal
            continue
        if x.op != "input":
            raise Refusal("its first Ghost module does not take its input")
        return ResidualForm(ghost1, ghost2, _match_shortcut(reading, short), act)
    raise reason


def _match_ghost(reading: Reading, node: Node) -> tuple[GhostForm, Node]:
    form, x = match_ghost(reading, node)
    if form.cheap is None or form.gate is not None:
        raise Refusal("a Ghost module inside it has a ratio of 1, or a gate")
    return form, x


def _match_shortcut(reading: Reading, node: Node) -> GhostForm | None:
    if node.op == "input":
        return None
    try:
        form, x = _match_ghost(reading, node)
    except Refusal:
        branch, x = match_branch(reading, node, "the shortcut")
        form = GhostForm(branch, None, None, None, ())
    if x.op != "input":
        raise Refusal("its shortcut does not start at its input")
    return form


class FusedResidual(FusedInference):
    """A residual block made fused by ``fuse``."""

    _ghost_kind = "residual block"
    _ghost_device = "cpu"

    @classmethod
    def _ghost_match(cls, reading: Reading) -> ResidualForm:
        return match_residual(reading)

    def _ghost_eager(self, x: Tensor) -> Tensor | str:
        if self.training or torch.is_grad_enabled():
            parts = self._ghost_state().parts
            return parts.learn(x) if isinstance(parts, Residual) and parts.learns(x) else ""
        return super()._ghost_eager(x)
