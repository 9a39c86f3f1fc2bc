"""One Ghost module: its formula found in what its forward computes, and computed by the fused ops.

With conv, norm, act for a convolution, batch norm and activation (norm and act may be missing)::

    y   = act(norm(conv(x)))
    z   = act(norm(depthwise(y)))
    out = concat(y, z)[:, :out_channels]            perhaps not sliced
    out = out * gate(x)                             GhostModuleV2's attention gate
    out = tail(out)                                 activations, batch norms, other modules

However a forward is written, as Sequentials, flat attributes or functions, this is what is looked
for in its expression (``read``). A ratio of 1 has no z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations
from ..autograd.checks import direct, is_fused_geometry, is_fused_primary, ops_named
from ..autograd.forward import RunningUpdate, apply_arguments, library_conv, pack
from ..autograd.ghost import run
from ..autograd.tail import Norm, TailSettings, ghost_tail, has_kernel
from ..conventions import compute_dtype, dense
from ..functional import check
from ..ops import layers as model_ops
from ..reference import FROZEN, Norms, Settings, Slopes, Statistics
from ..sync import group_of, refuses, run_norm
from .branch import (
    NO_ACT,
    Branch,
    BranchForm,
    layer_at,
    match_branch,
    padding_of,
    what_it_is,
    why_not_together,
)
from .fused import Fused
from .graph import OutputShape, numbers_of
from .guards import Path, Refusal, at
from .program import Program
from .read import PARAMETER_HOOKS, Reading
from .symbols import Node


class After(NamedTuple):
    """A batch norm and an activation behind the concatenation, which can be folded."""

    bn: nn.BatchNorm2d | None
    act: int
    slope: float


class Ghost:
    """The parts of a Ghost module, bound to its layers.

    Attributes:
        tail: what follows the concatenation, to be called.
        after: the same, if ``ghost_conv_apply`` can have it folded in.
        normed: the cheap branch with the norm and activation of ``after``, if ``ghost_tail``
            computes them in training.
    """

    def __init__(
        self,
        primary: Branch,
        cheap: Branch | None,
        out_channels: int,
        gate: nn.Module | None = None,
        tail: tuple[nn.Module | tuple[int, float], ...] = (),
        after: After | None = None,
    ) -> None:
        self.primary, self.cheap, self.gate, self.tail = primary, cheap, gate, tail
        self.first = conv = primary.conv
        self.alone = gate is None and not tail
        self.layers = primary.layers + (() if cheap is None else cheap.layers)
        self.dw_size = 1 if cheap is None else cheap.conv.kernel_size[0]
        self.hooks = tuple(
            (hook, layer)
            for layer in self.layers
            for hook in layer._forward_pre_hooks.values()
            if isinstance(hook, PARAMETER_HOOKS)
        )
        act2 = NO_ACT if cheap is None else (cheap.act, cheap.slope)
        self.settings = Settings(
            out_channels, conv.stride, primary.padding, conv.dilation, conv.groups,
            0.0 if primary.bn is None else primary.bn.eps,
            0.0 if cheap is None or cheap.bn is None else cheap.bn.eps,
            primary.act, primary.slope, *act2,
        )  # fmt: skip
        linear = primary.act == act2[0] == activations.NONE
        self.after = after if after is not None and linear and self.is_conv() else None
        self.normed: Branch | None = None
        if self.after is not None and self.after.bn is not None:
            self.layers += (self.after.bn,)  # behind the hooks, which leave it out
            assert cheap is not None
            if primary.bn is None and cheap.bn is None and cheap.conv.bias is None:
                self.normed = cheap._replace(**self.after._asdict())

    def is_conv(self) -> bool:
        """Whether ``ghost_conv_apply`` computes it, and has a kernel."""
        s = self.settings
        return (
            model_ops.has_conv(self.first.kernel_size)
            and (s.groups, s.dilation) == (1, (1, 1))
            and s.stride[0] == s.stride[1]
            and s.padding[0] == s.padding[1]
            and activations.PRELU not in (s.act1, s.act2)
            and self.gate is None
        )

    def has_plain_primary(self) -> bool:
        """Whether its primary convolution is one that training's ops have in them."""
        s = self.settings
        return self.first.kernel_size == (1, 1) and is_fused_geometry(s)

    # Tensors

    def weights(self) -> tuple[Tensor, Tensor]:
        """w1 [m, C / groups, k, k] and w2 [g, 1, d, d]; g is 0 without a cheap branch."""
        w1 = self.primary.conv.weight
        if self.cheap is None:
            return w1, w1.new_empty(0, 1, 1, 1)
        return w1, self.cheap.conv.weight

    def norms(self, w1: Tensor, w2: Tensor) -> Norms:
        """The tensors of both norms."""
        first = self.primary.norm(w1)
        if self.cheap is not None:
            return Norms(*first, *self.cheap.norm(w2))
        empty = None if first[2] is None else w1.new_empty(0)
        return Norms(*first, None, None, empty, empty)

    def statistics(self) -> Statistics:
        """Where the statistics of both norms come from."""
        batch, group = self.primary.uses_batch_stats(), self.primary.group()
        if self.cheap is None:
            return Statistics(batch, batch, group)
        return Statistics(batch, self.cheap.uses_batch_stats(), group, self.cheap.group())

    def slopes(self) -> Slopes:
        """The slopes of the PReLUs."""
        second = None if self.cheap is None else self.cheap.slopes()
        return Slopes(self.primary.slopes(), second)

    # Paths

    def check(self, x: Tensor) -> None:
        w1, w2 = self.weights()
        check(x, w1, w2, self.norms(w1, w2), self.settings, FROZEN)

    def why_not_packed(self) -> str:
        for branch in (self.primary, self.cheap):
            if branch is not None and branch.uses_batch_stats():
                return "its batch norms use the batch's statistics"
        if self.hooks:
            return "its weights are computed at every call"
        return self.why_not_fused() or self.why_not_shapes(*self.weights())

    def why_not_fused(self) -> str:
        """Why these layers, as they are now, are not for the fused ops; empty if they are.

        Without a look at the weights, which may be computed: to do so twice can change them.
        """
        for branch in (self.primary, self.cheap):
            bn = None if branch is None else branch.bn
            if bn is not None and (bn.running_mean is None) != (bn.running_var is None):
                return "a batch norm has one of two running statistics"
        return ""

    def why_not_shapes(self, w1: Tensor, w2: Tensor) -> str:
        """Why weights of these shapes are not for the fused ops; empty if they are."""
        for branch in (self.primary, self.cheap):
            bias = None if branch is None else branch.conv.bias
            if bias is not None and bias.shape != (branch.conv.out_channels,):  # type: ignore[union-attr]
                return f"a convolution has a bias of shape {list(bias.shape)}"
        conv = self.primary.conv
        if w1.shape != (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size):
            return f"its primary convolution has a weight of shape {list(w1.shape)}"
        if self.cheap is None:
            return ""
        conv = self.cheap.conv
        if w2.shape != (conv.out_channels, 1, *conv.kernel_size):
            return f"its cheap convolution has a weight of shape {list(w2.shape)}"
        return ""

    def learns(self, x: Tensor) -> bool:
        """Whether ``learn`` computes it on x."""
        if self.normed is None or not has_kernel(x, self.dw_size):
            return False
        bn = self.normed.bn
        return (
            bn is not None
            and (bn.running_mean is None) == (bn.running_var is None)
            and group_of(bn) is None
        )

    def learn(
        self, x: Tensor, residual: Tensor | None = None, act: tuple[int, float] = NO_ACT
    ) -> Tensor | str:
        """act(output + residual), differentiable, the tail being one operator; or why not."""
        assert self.normed is not None and self.normed.bn is not None
        for hook, layer in self.hooks:
            hook(layer, None)
        normed, (w1, w2) = self.normed, self.weights()
        reason = self.why_not_shapes(w1, w2)
        if reason:
            return reason
        s, own = self.settings, (normed.act, normed.slope)
        y = F.conv2d(x, w1, self.first.bias, s.stride, s.padding, s.dilation, s.groups)
        # An activation between the norm and the sum keeps the sum out of the operator.
        inside = residual is not None and own[0] == activations.NONE
        settings = TailSettings(
            s.out_channels, normed.bn.eps, *(act if inside else own), normed.uses_batch_stats()
        )
        norm, update = Norm(*normed.norm(w2)), normed.running_update()
        out = ghost_tail(y, w2, norm, residual if inside else None, settings, update)
        if residual is None or inside:
            return out
        return activations.apply(out + residual, *act)

    def run(self, x: Tensor) -> Tensor | str:
        if self.learns(x):
            return self.learn(x)
        reason = self.why_not_fused()
        if reason:
            return reason
        for hook, layer in self.hooks:
            hook(layer, None)
        w1, w2 = self.weights()
        reason = self.why_not_shapes(w1, w2)
        if reason:
            return reason
        stats, norms, slopes = self.statistics(), self.norms(w1, w2), self.slopes()
        check(x, w1, w2, norms, self.settings, stats)
        cheap = RunningUpdate() if self.cheap is None else self.cheap.running_update()
        updates = self.primary.running_update(), cheap
        out = run(x, w1, w2, norms, self.settings, stats, *updates, slopes)
        for branch in (self.primary, self.cheap):
            # A batch of no images moves no statistics, if no other process has some.
            if branch is not None and (x.size(0) > 0 or stats.cross_processes()):
                branch.add_bias_to_running_mean()
        if self.gate is not None:
            out = out * grown(small_gate(x, self.gate), out)
        return run_tail(self.tail, out)

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        packed = PackedGhost(self, backend)
        if packed.library_w1 is not None or packed.gate is not None or packed.tail:
            return packed.whole, ()
        return packed.operator, (packed.packed, None, *packed.arguments)

    def description(self) -> str:
        """In words, for the report."""
        conv = self.primary.conv
        k = conv.kernel_size
        text = f"{conv.in_channels} -> {self.settings.out_channels} channels"
        if k != (1, 1) or conv.stride != (1, 1) or conv.groups > 1:
            text += f", primary {k[0]}x{k[1]} stride {conv.stride[0]}"
            text += f" groups {conv.groups}" if conv.groups > 1 else ""
        text += f", cheap {self.dw_size}x{self.dw_size}"
        branches = [b for b in (self.primary, self.cheap) if b is not None]
        if all(branch.bn is None for branch in branches):
            text += ", no batch norm"
        if any(branch.prelu is not None for branch in branches):
            text += ", PReLU"
        if not self.has_plain_primary() and self.normed is None:
            text += ", fused in inference only"
        if self.gate is not None:
            text += ", attention gate"
        return text + (", then other layers" if self.tail else "")


class PackedGhost:
    """A Ghost module with its batch norms folded in, for one backend.

    Attributes:
        operator: takes x, ``packed``, a residual and ``arguments``.
        is_conv: it is ``ghost_conv_apply``, else ``ghost_apply``.
        library_w1: of a primary convolution that runs before it.
        tail: what is to be called behind it.
    """

    def __init__(self, ghost: Ghost, backend: str) -> None:
        w1, w2 = (w.detach() for w in ghost.weights())
        functions, self.settings = ops_named(backend), ghost.settings
        self.gate, self.tail = ghost.gate, ghost.tail
        fused = is_fused_primary(w1, self.settings)
        conv = backend == "native" and not model_ops.on_gpu(w1) and ghost.is_conv()
        self.is_conv = False
        after = ghost.after if conv and not why_not_together(ghost.layers) else None
        # Whether x may come with a gate that is applied as it is read.
        gated = fused and backend == "native" and self.settings.stride == (1, 1)
        self.takes_gate = gated and after is None
        self.library_w1 = None if fused or conv else w1
        with torch.no_grad():
            norms, slopes = ghost.norms(w1, w2), ghost.slopes()
            if conv and (after is not None or not fused):
                self._pack_conv(functions, w1, w2, norms, after)
                return
            weight = w1 if fused else None
            self.packed = pack(functions, weight, w2, norms, self.settings, slopes)
        self.operator = direct(functions.ghost_apply)
        # The first is the gate.
        self.arguments = (None, *apply_arguments(w1.size(0), w2, self.settings, fused))

    def _pack_conv(
        self, functions: Any, w1: Tensor, w2: Tensor, norms: Norms, after: After | None
    ) -> None:
        """For ``ghost_conv_apply``, with what follows the concatenation folded in."""
        s, m, k = self.settings, w1.size(0), w1.size(-1)
        rows = w1.permute(0, 2, 3, 1).reshape(m, -1, 1, 1)
        ends: tuple[Tensor, ...] = ()
        if after is not None:
            s = s._replace(act2=after.act, slope2=after.slope)
            rows, w2, norms, ends = _fold_after(rows, w2, norms, s, after.bn)
            self.tail = ()
        self.is_conv = True
        self.packed = torch.cat([pack(functions, rows, w2, norms, s), *ends])
        *numbers, _ = apply_arguments(m, w2, s, True)
        self.operator = direct(model_ops.native_ghost_conv_apply)
        self.arguments = (k, s.padding[0], bool(ends), *numbers)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        in_gate: Tensor | None = None,
    ) -> Tensor:
        """The module's output for a dense x that fits, times the gate, plus the residual.

        in_gate: [N, C], multiplied to x as it is read; only where ``takes_gate``.
        """
        if in_gate is not None:
            numbers = self.arguments[1:]
            return model_ops.ghost_apply_gated(x, in_gate, self.packed, residual, gate, *numbers)
        if self.library_w1 is not None:
            x = dense(library_conv(x, self.library_w1, self.settings))
        if gate is not None:
            return self.operator(x, self.packed, residual, gate, *self.arguments[1:])
        return self.operator(x, self.packed, residual, *self.arguments)

    def is_one_operator(self) -> bool:
        """Whether all of it, but for a gate from outside, is the operator."""
        return self.library_w1 is None and self.gate is None and not self.tail

    def add_to(self, program: Program, x: int, residual: int | None = None) -> int:
        """The number of the module's output in a program, for the value x of it."""
        arguments = self.arguments if self.is_conv else self.arguments[1:]
        return program.ghost(x, self.packed, arguments, residual, is_conv=self.is_conv)

    def whole(self, x: Tensor) -> Tensor:
        """The module's output for a dense x that fits, with its own gate and tail."""
        gate = None if self.gate is None else small_gate(x, self.gate)
        if gate is not None and (
            gate.dtype is not x.dtype or gate.size(1) != self.settings.out_channels
        ):
            out = self(x)
            out = out * grown(gate, out)
        else:
            out = self(x, None, gate)
        return run_tail(self.tail, out)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over the pixels of the output, [N, out_channels], for a dense x that fits."""
        few = x.size(2) * x.size(3) <= model_ops.MOST_POOLED
        if self.takes_gate and few:
            _, intrinsic, out_channels, _, _, _, act, slope, *_ = self.arguments
            if intrinsic != out_channels:
                return self(x).mean((2, 3))
            return model_ops.ghost_apply_pooled(x, self.packed, intrinsic, act, slope)
        return self(x).mean((2, 3))


def _fold_after(
    w1: Tensor, w2: Tensor, norms: Norms, settings: Settings, bn: nn.BatchNorm2d | None
) -> tuple[Tensor, Tensor, Norms, tuple[Tensor, Tensor]]:
    """w1, w2 and norms with a batch norm behind the concatenation folded into those of z.

    All but w1 are in the compute dtype, and so are tail_scale and tail_shift [m], which are for y.
    """
    m, total, wide = w1.size(0), w1.size(0) + w2.size(0), compute_dtype(w1.dtype)
    scale, shift = w2.new_ones(total, dtype=torch.float64), w2.new_zeros(total, dtype=torch.float64)
    if bn is not None:
        some = slice(settings.out_channels)  # the others are cut off
        one = scale[some].view(-1, 1, 1, 1)
        given = bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
        factor, shift[some] = model_ops.fold(one, None, *given)
        scale[some] = factor.flatten()
    given2 = norms.gamma2, norms.beta2, norms.mean2, norms.var2, settings.eps2
    w2, shift2 = model_ops.fold(w2.to(torch.float64), None, *given2)
    w2 = w2 * scale[m:].view(-1, 1, 1, 1)
    shift2 = torch.addcmul(shift[m:], shift2, scale[m:])
    first = (None if t is None else t.to(wide) for t in norms[:4])
    norms = Norms(*first, None, shift2.to(wide), None, None)
    return w1, w2.to(wide), norms, (scale[:m].to(wide), shift[:m].to(wide))


def packed_conv(branch: Branch, backend: str) -> PackedGhost:
    """A convolution with its batch norm folded in: a Ghost module of ratio 1."""
    return PackedGhost(Ghost(branch, None, branch.conv.out_channels), backend)


def small_gate(x: Tensor, short_conv: nn.Module) -> Tensor:
    """GhostModuleV2's gate, [N, oup, H // 2, W // 2], from x halved by average pooling.

    Source: GhostNetV2, NeurIPS 2022 (arXiv:2211.12905), section 4.1, decoupled fully connected
    attention.
    """
    return torch.sigmoid(short_conv(F.avg_pool2d(x, kernel_size=2, stride=2)))


def grown(gate: Tensor, out: Tensor) -> Tensor:
    """A small gate brought to the height and width of the module's output."""
    return F.interpolate(gate, size=out.shape[2:], mode="nearest")


def run_tail(tail: tuple[nn.Module | tuple[int, float], ...], x: Tensor) -> Tensor:
    """What follows the concatenation, on an x that nobody else holds."""
    inplace = not torch.is_grad_enabled()
    for step in tail:
        x = activations.apply(x, *step, inplace) if isinstance(step, tuple) else run_norm(step, x)
    return x


class GhostForm(NamedTuple):
    """Where the parts of a Ghost module are.

    Attributes:
        stop: the number of channels that the concatenation is cut to; None: it is not.
        gate: of GhostModuleV2's short_conv.
        tail: pairs of "act" with code and slope, or of "bn" or "module" with a path.
    """

    primary: BranchForm
    cheap: BranchForm | None
    stop: int | None
    gate: Path | None
    tail: tuple[Any, ...]

    def bind(self, module: nn.Module) -> Ghost:
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
        once = [layer for b in (primary, cheap) if b is not None for layer in (b.conv, b.bn)]
        once += [] if gate is None else list(gate.modules())
        if len({id(layer) for layer in once if layer is not None}) < sum(
            m is not None for m in once
        ):
            raise Refusal("a layer is in it twice")
        tail: list[Any] = []
        for kind, step in self.tail:
            tail.append(step if kind == "act" else at(module, step))
        after = None
        kinds = [kind for kind, _ in self.tail]
        if cheap is not None and kinds in (["bn"], ["act"], ["bn", "act"]):
            bn = tail[0] if kinds[0] == "bn" else None
            after = After(bn, *(tail[-1] if kinds[-1] == "act" else NO_ACT))
            if bn is not None and (bn.num_features != out or bn._forward_pre_hooks):
                after = None
        return Ghost(primary, cheap, out, gate, tuple(tail), after)

    def shape(self, module: nn.Module) -> OutputShape | None:
        if any(kind != "act" for kind, _ in self.tail):
            return None
        conv = layer_at(module, self.primary.conv, nn.Conv2d)
        total = conv.out_channels
        if self.cheap is not None:
            total += layer_at(module, self.cheap.conv, nn.Conv2d).out_channels
        out = total if self.stop is None else min(self.stop, total)
        return OutputShape(out, numbers_of(conv, padding_of(conv)))


def _check_cheap(conv: nn.Conv2d, m: int, padding: tuple[int, int], name: str) -> None:
    """Raise ``Refusal`` with the first invariant of the formula that a cheap convolution breaks."""
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
    """The Ghost module whose result a node is, and the node of its input.

    Raises:
        Refusal: it is none.
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
    """The path of GhostModuleV2's short_conv."""
    if gate.op == "grow" and gate.inputs[0].op == "sigmoid" and gate.inputs[1] in like:
        for call in reading.calls.get(gate.inputs[0].inputs[0], ()):
            if call.x.op == "halve" and call.x.inputs[0] is x:
                return call.path
    raise Refusal("its forward multiplies the concatenation by something other than V2's gate")


class FusedGhost(Fused):
    """A Ghost module made fused by ``fuse``."""

    _ghost_backends = ("native", "triton", "eager")

    @classmethod
    def _ghost_match(cls, reading: Reading) -> GhostForm:
        form, x = match_ghost(reading, reading.out)
        if x.op != "input":
            raise Refusal("its primary convolution does not take its input")
        return form

    def _ghost_learns(self, parts: Ghost, x: Tensor) -> bool:
        # Behind the library's convolution the fused ops and their recomputation cost more than
        # they save: 0.57 to 0.77 of the speed of the layers, in a training step on a CPU.
        norms = (layer for layer in parts.layers if isinstance(layer, nn.SyncBatchNorm))
        fused = (
            parts.has_plain_primary()
            or parts.learns(x)
            or any(refuses(norm, x) for norm in norms)  # its own forward would not run
        )
        return self._ghost_made and torch.is_grad_enabled() and not fused
