"""What a Ghost bottleneck is made of: read from its children, and its formula in their terms.

``read_bottleneck`` finds the parts by structure, in the forms of the authors' and timm's
(``ghost1``, ``conv_dw``, ``bn_dw``, ``se``, ``ghost2``, ``shortcut``) and of Ultralytics' and
cavaface's (``conv`` of three, ``shortcut``); ``Parts.verify`` tries on a copy whether the module's
forward is their formula. ``bottleneck`` packs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import activations, convert_probe, layers, model_ops
from .convert_forward import Converted, ConvertedGhost
from .convert_layouts import (
    Branch,
    Layout,
    Refusal,
    _is_nothing,
    candidate,
    check_hooks,
    read,
    read_branch,
)
from .nn import FusedGhostModule
from .reference import GhostModule, hard_sigmoid

_GATES: dict[int, Callable[[Tensor], Tensor]] = {
    model_ops.HARD_SIGMOID: hard_sigmoid,
    model_ops.SIGMOID: torch.sigmoid,
}


_FORWARDS = (FusedGhostModule.forward, GhostModule.forward)


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
        parts = read_bottleneck(copy, fused=False)
        assert parts is not None
        channels = layout_of(self.ghost1)[0].primary.conv.in_channels
        x = torch.randn(2, channels, 9, 8, generator=generator, dtype=torch.float64)
        for mode in ("eval", "training"):
            copy.train(mode == "training")
            got = convert_probe.run(lambda: copy(x.clone()))
            convert_probe.compare(got, convert_probe.run(lambda: parts.formula(x.clone())), mode)

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


def layout_of(ghost: nn.Module, fused: bool = True) -> tuple[Layout, int]:
    """The layout of a Ghost module and its number of output channels.

    Args:
        fused: it has to be a fused one, or the reference: what another class computes from the same
            children is known once it is fused.

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
    if names is None or (fused and type(ghost).forward not in _FORWARDS):
        raise Refusal(f"a {type(ghost).__name__} is not a fused Ghost module")
    layout = read(ghost, names)
    if isinstance(ghost, FusedGhostModule):
        return layout, ghost.oup
    return layout, layout.primary.conv.out_channels + layout.cheap.conv.out_channels


def _is_ghost(module: nn.Module | None) -> bool:
    if module is None:
        return False
    return isinstance(module, (FusedGhostModule, ConvertedGhost)) or candidate(module) is not None


def read_bottleneck(module: nn.Module, fused: bool = True) -> Parts | None:
    """The parts of a Ghost bottleneck, or None if the module is not like one.

    Args:
        fused: as of ``layout_of``.

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
    layouts = [layout_of(ghost, fused) for ghost in ghosts]
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
    if type(branch.act) is nn.PReLU:
        raise Refusal(f"{name} has a PReLU, which only Ghost modules compute")
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
