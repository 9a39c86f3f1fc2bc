"""``Ghost``: the layers of one Ghost module, and the fused ops that compute its output.

With conv, norm and act for a convolution, batch norm and activation (norm and act may be missing)::

    y   = act(norm(conv(x)))
    z   = act(norm(depthwise(y)))
    out = concat(y, z)[:, :out_channels]            the slice may be missing
    out = out * gate(x)                             GhostModuleV2's attention gate
    out = tail(out)                                 activations, batch norms, other modules

A module of ratio 1 has no z: it is one convolution with norm and activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, ops
from ..autograd import layers
from ..autograd.checks import direct, is_fused_geometry, is_fused_primary, ops_named
from ..autograd.forward import RunningUpdate, apply_arguments, library_conv, pack
from ..autograd.ghost import run
from ..autograd.tail import Norm, TailSettings, ghost_tail, has_kernel
from ..conventions import compute_dtype, dense
from ..formula import FROZEN, Norms, Settings, Slopes, Statistics
from ..functional import check
from ..sync import group_of, run_norm
from .branch import NO_ACT, Branch, why_not_together
from .program import Program
from .read import PARAMETER_HOOKS

Tail = tuple[nn.Module | tuple[int, float], ...]  # modules, and (code, slope) of activations


class FoldableTail(NamedTuple):
    """A tail that can be folded into the operator: a batch norm, an activation, or both."""

    bn: nn.BatchNorm2d | None
    act: int
    slope: float


class Ghost:
    """The parts of a Ghost module.

    Attributes:
        primary, cheap: the two branches; cheap is None for ratio 1.
        gate: the short_conv of GhostModuleV2.
        tail: the layers behind the concatenation.
        foldable_tail: ``tail`` as one norm and activation, if they can be folded into
            ``ghost_conv_apply``; else None.
        tail_branch: the cheap branch with the norm and activation of ``foldable_tail``, if
            ``ghost_tail`` computes them in training; else None.
        settings: the numbers of the module.
        hooks: pairs (hook, layer): forward pre-hooks that compute a weight of the layer.
        layers, first, dw_size, alone: as in ``state.Parts``.
    """

    def __init__(
        self,
        primary: Branch,
        cheap: Branch | None,
        out_channels: int,
        gate: nn.Module | None = None,
        tail: Tail = (),
        foldable_tail: FoldableTail | None = None,
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
        act2, slope2 = NO_ACT if cheap is None else (cheap.act, cheap.slope)
        self.settings = Settings(
            out_channels=out_channels,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=primary.padding,
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            eps1=0.0 if primary.bn is None else primary.bn.eps,
            eps2=0.0 if cheap is None or cheap.bn is None else cheap.bn.eps,
            act1=primary.act,
            slope1=primary.slope,
            act2=act2,
            slope2=slope2,
        )
        linear = primary.act == act2 == activations.NONE
        if foldable_tail is not None and not (linear and self.is_conv()):
            foldable_tail = None
        self.foldable_tail = foldable_tail
        self.tail_branch: Branch | None = None
        if foldable_tail is not None and foldable_tail.bn is not None:
            self.layers += (foldable_tail.bn,)  # GhostForm.bind: this norm has no pre-hooks
            assert cheap is not None
            if primary.bn is None and cheap.bn is None and cheap.conv.bias is None:
                self.tail_branch = cheap._replace(**foldable_tail._asdict())

    def is_conv(self) -> bool:
        """Whether ``ghost_conv_apply`` computes the module, and has a kernel for it."""
        s = self.settings
        return (
            ops.has_conv(self.first.kernel_size)
            and (s.groups, s.dilation) == (1, (1, 1))
            and s.stride[0] == s.stride[1]
            and s.padding[0] == s.padding[1]
            and activations.PRELU not in (s.act1, s.act2)
            and self.gate is None
        )

    def has_plain_primary(self) -> bool:
        """Whether the ops for training compute the primary convolution too."""
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
        """The source of both norms' statistics."""
        batch, group = self.primary.uses_batch_stats(), self.primary.group()
        if self.cheap is None:
            return Statistics(batch, batch, group)
        return Statistics(batch, self.cheap.uses_batch_stats(), group, self.cheap.group())

    def slopes(self) -> Slopes:
        """The slopes of the PReLUs."""
        second = None if self.cheap is None else self.cheap.slopes()
        return Slopes(self.primary.slopes(), second)

    # Execution

    def check(self, x: Tensor) -> None:
        """Raise the error of ``functional.ghost_module`` if x does not fit."""
        w1, w2 = self.weights()
        check(x, w1, w2, self.norms(w1, w2), self.settings, FROZEN)

    def why_not_packed(self) -> str:
        """Why the module cannot be packed in its present modes; empty if it can."""
        for branch in (self.primary, self.cheap):
            if branch is not None and branch.uses_batch_stats():
                return "its batch norms use the batch's statistics"
        if self.hooks:
            return "its weights are computed at every call"
        return self.why_not_fused() or self.why_not_shapes(*self.weights())

    def why_not_fused(self) -> str:
        """Why the fused ops cannot compute the present layers; empty if they can.

        Does not read the weights: a parametrisation computes a weight at each access, and each
        computation may change its state.
        """
        for branch in (self.primary, self.cheap):
            bn = None if branch is None else branch.bn
            if bn is not None and (bn.running_mean is None) != (bn.running_var is None):
                return "a batch norm has one of two running statistics"
        return ""

    def why_not_shapes(self, w1: Tensor, w2: Tensor) -> str:
        """Why the fused ops cannot take weights of these shapes; empty if they can."""
        for branch in (self.primary, self.cheap):
            bias = None if branch is None else branch.conv.bias
            if bias is not None and bias.shape != (branch.conv.out_channels,):
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

    def can_run_tail_op(self, x: Tensor) -> bool:
        """Whether ``run_tail_op`` computes the module on x."""
        if self.tail_branch is None or not has_kernel(x, self.dw_size):
            return False
        bn = self.tail_branch.bn
        return (
            bn is not None
            and (bn.running_mean is None) == (bn.running_var is None)
            and group_of(bn) is None
        )

    def run_tail_op(
        self, x: Tensor, residual: Tensor | None = None, act: tuple[int, float] = NO_ACT
    ) -> Tensor | str:
        """The output, or act(output + residual) with a residual; differentiable.

        PyTorch runs the primary convolution, and ``ghost_tail`` the rest. Returns a reason instead
        of the output as ``state.Parts.run`` does.

        Args:
            x: [N, C, H, W].
            residual: [N, out_channels, Ho, Wo], or None.
            act: (code, slope) of the activation of the sum; unused without a residual.
        """
        branch = self.tail_branch
        assert branch is not None and branch.bn is not None
        for hook, layer in self.hooks:
            hook(layer, None)
        w1, w2 = self.weights()
        reason = self.why_not_shapes(w1, w2)
        if reason:
            return reason
        s, own = self.settings, (branch.act, branch.slope)
        y = F.conv2d(x, w1, self.first.bias, s.stride, s.padding, s.dilation, s.groups)
        # The operator can add the residual only if the module has no activation before the sum.
        inside = residual is not None and own[0] == activations.NONE
        settings = TailSettings(
            s.out_channels, branch.bn.eps, *(act if inside else own), branch.uses_batch_stats()
        )
        norm, update = Norm(*branch.norm(w2)), branch.running_update()
        out = ghost_tail(y, w2, norm, residual if inside else None, settings, update)
        if residual is None or inside:
            return out
        return activations.apply(out + residual, *act)

    def run(self, x: Tensor) -> Tensor | str:
        """The output, differentiable; or a reason, as in ``state.Parts.run``."""
        if self.can_run_tail_op(x):
            return self.run_tail_op(x)
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
            # An empty batch changes the running mean only if another process has images.
            if branch is not None and (x.size(0) > 0 or stats.cross_processes()):
                branch.add_bias_to_running_mean()
        if self.gate is not None:
            out = out * _full_size(half_size_gate(x, self.gate), out)
        return _run_tail(self.tail, out)

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        """(operator, arguments): operator(x, *arguments) is the output for a dense x that fits."""
        packed = PackedGhost(self, backend)
        if packed.is_one_operator():
            return packed.operator, (packed.packed, None, *packed.arguments)
        return packed.whole, ()

    def description(self) -> str:
        """The module in words, for the report."""
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
        if not self.has_plain_primary() and self.tail_branch is None:
            text += ", fused in inference only"
        if self.gate is not None:
            text += ", attention gate"
        return text + (", then other layers" if self.tail else "")


class PackedGhost:
    """A Ghost module in inference: batch norms folded, weights packed for one backend.

    Attributes:
        operator: ``ghost_apply`` or ``ghost_conv_apply``; its arguments are x, ``packed``, a
            residual and ``arguments``.
        is_conv: the operator is ``ghost_conv_apply``.
        takes_gate: the operator can multiply x by a gate [N, C] while it reads x.
        library_w1: weight of the primary convolution if PyTorch runs it before the operator; None
            if the operator computes it.
        gate: the short_conv of GhostModuleV2, or None.
        tail: the layers behind the operator.
    """

    def __init__(self, ghost: Ghost, backend: str) -> None:
        w1, w2 = (w.detach() for w in ghost.weights())
        functions, self.settings = ops_named(backend), ghost.settings
        self.gate, self.tail = ghost.gate, ghost.tail
        fused = is_fused_primary(w1, self.settings)
        conv = backend == "native" and not ops.on_gpu(w1) and ghost.is_conv()
        self.is_conv = False
        folded = ghost.foldable_tail if conv and not why_not_together(ghost.layers) else None
        gated = fused and backend == "native" and self.settings.stride == (1, 1)
        self.takes_gate = gated and folded is None
        self.library_w1 = None if fused or conv else w1
        with torch.no_grad():
            norms, slopes = ghost.norms(w1, w2), ghost.slopes()
            if conv and (folded is not None or not fused):
                self._pack_conv(functions, w1, w2, norms, folded)
                return
            weight = w1 if fused else None
            self.packed = pack(functions, weight, w2, norms, self.settings, slopes)
        self.operator = direct(functions.ghost_apply)
        # The first argument is the gate of the output.
        self.arguments = (None, *apply_arguments(w1.size(0), w2, self.settings, fused))

    def _pack_conv(
        self, functions: Any, w1: Tensor, w2: Tensor, norms: Norms, folded: FoldableTail | None
    ) -> None:
        """Pack for ``ghost_conv_apply``, with the tail ``folded`` if it is given.

        Args:
            w1: [m, C, k, k].
            w2: [g, 1, d, d].
        """
        s, m, k = self.settings, w1.size(0), w1.size(-1)
        rows = w1.permute(0, 2, 3, 1).reshape(m, -1, 1, 1)
        ends: tuple[Tensor, ...] = ()
        if folded is not None:
            s = s._replace(act2=folded.act, slope2=folded.slope)
            rows, w2, norms, ends = _fold_tail(rows, w2, norms, s, folded.bn)
            self.tail = ()
        self.is_conv = True
        self.packed = torch.cat([pack(functions, rows, w2, norms, s), *ends])
        *numbers, _ = apply_arguments(m, w2, s, True)
        self.operator = direct(ops.native_ghost_conv_apply)
        self.arguments = (k, s.padding[0], bool(ends), *numbers)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        in_gate: Tensor | None = None,
    ) -> Tensor:
        """operator(x * in_gate) * gate + residual.

        Does not run the module's own gate and tail; ``whole`` does.

        Args:
            x: [N, C, H, W], dense, of the packed dtype.
            residual: [N, out_channels, Ho, Wo], or None.
            gate: [N, out_channels, h, w], resized to the output by nearest neighbours, or None;
                must be None if ``is_conv``.
            in_gate: [N, C], or None; must be None unless ``takes_gate``.
        """
        if in_gate is not None:
            numbers = self.arguments[1:]
            return ops.ghost_apply_gated(x, in_gate, self.packed, residual, gate, *numbers)
        if self.library_w1 is not None:
            x = dense(library_conv(x, self.library_w1, self.settings))
        if gate is not None:
            return self.operator(x, self.packed, residual, gate, *self.arguments[1:])
        return self.operator(x, self.packed, residual, *self.arguments)

    def is_one_operator(self) -> bool:
        """Whether ``operator`` computes the whole module."""
        return self.library_w1 is None and self.gate is None and not self.tail

    def add_to(self, program: Program, x: int, residual: int | None = None) -> int:
        """Add the module to a program.

        Args:
            x, residual: numbers of values of the program.

        Returns:
            The number of the output.
        """
        arguments = self.arguments if self.is_conv else self.arguments[1:]
        return program.ghost(x, self.packed, arguments, residual, is_conv=self.is_conv)

    def whole(self, x: Tensor) -> Tensor:
        """The module's output for a dense x that fits, with the module's own gate and tail."""
        gate = None if self.gate is None else half_size_gate(x, self.gate)
        if gate is not None and (
            gate.dtype is not x.dtype or gate.size(1) != self.settings.out_channels
        ):
            out = self(x)
            out = out * _full_size(gate, out)
        else:
            out = self(x, None, gate)
        return _run_tail(self.tail, out)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over pixels of the output, [N, out_channels], for a dense x that fits."""
        few = x.size(2) * x.size(3) <= ops.MOST_POOLED
        if self.takes_gate and few:
            _, intrinsic, out_channels, _, _, _, act, slope, *_ = self.arguments
            if intrinsic != out_channels:
                return self(x).mean((2, 3))
            return ops.ghost_apply_pooled(x, self.packed, intrinsic, act, slope)
        return self(x).mean((2, 3))


def _fold_tail(
    w1: Tensor, w2: Tensor, norms: Norms, settings: Settings, bn: nn.BatchNorm2d | None
) -> tuple[Tensor, Tensor, Norms, tuple[Tensor, Tensor]]:
    """Fold a batch norm behind the concatenation into the weights.

    Args:
        w1: [m, C * k * k, 1, 1].
        w2: [g, 1, d, d].
        bn: the norm of the out_channels channels; None for a tail without a norm.

    Returns:
        (w1, w2, norms, (scale, shift)). The norm of the ghost channels is folded into w2 and the
        second norm of ``norms``; scale and shift [m] remain to be applied to y. w1 is unchanged;
        the other tensors have the compute dtype.
    """
    m, total, wide = w1.size(0), w1.size(0) + w2.size(0), compute_dtype(w1.dtype)
    scale, shift = w2.new_ones(total, dtype=torch.float64), w2.new_zeros(total, dtype=torch.float64)
    if bn is not None:
        kept = slice(settings.out_channels)  # the module drops the ghost channels beyond these
        one = scale[kept].view(-1, 1, 1, 1)
        given = bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
        factor, shift[kept] = ops.fold(one, None, *given)
        scale[kept] = factor.flatten()
    given2 = norms.gamma2, norms.beta2, norms.mean2, norms.var2, settings.eps2
    w2, shift2 = ops.fold(w2.to(torch.float64), None, *given2)
    w2 = w2 * scale[m:].view(-1, 1, 1, 1)
    shift2 = torch.addcmul(shift[m:], shift2, scale[m:])
    first = [None if t is None else t.to(wide) for t in norms[:4]]
    norms = Norms(*[*first, None, shift2.to(wide), None, None])
    return w1, w2.to(wide), norms, (scale[:m].to(wide), shift[:m].to(wide))


def packed_conv(branch: Branch, backend: str) -> PackedGhost:
    """A packed convolution with batch norm and activation: a Ghost module of ratio 1."""
    return PackedGhost(Ghost(branch, None, branch.conv.out_channels), backend)


def run_conv(branch: Branch, x: Tensor) -> Tensor:
    """The output of a branch whose convolution is not depthwise; differentiable.

    If there are kernels for x, the branch runs as a Ghost module of ratio 1: only x is saved for
    backward, which computes the convolution again.
    """
    if layers.has_kernels(x):
        out = Ghost(branch, None, branch.conv.out_channels).run(x)
        if isinstance(out, Tensor):
            return out
    return branch.then(branch.conv(x))


def half_size_gate(x: Tensor, short_conv: nn.Module) -> Tensor:
    """GhostModuleV2's gate, [N, out_channels, H // 2, W // 2], from x halved by average pooling.

    Source: GhostNetV2, NeurIPS 2022 (arXiv:2211.12905), section 4.1, decoupled fully connected
    attention.
    """
    return torch.sigmoid(short_conv(F.avg_pool2d(x, kernel_size=2, stride=2)))


def _full_size(gate: Tensor, out: Tensor) -> Tensor:
    """A half-size gate interpolated to the height and width of the output."""
    return F.interpolate(gate, size=out.shape[2:], mode="nearest")


def _run_tail(tail: Tail, x: Tensor) -> Tensor:
    """The output of the layers behind the concatenation; x may be overwritten."""
    inplace = not torch.is_grad_enabled()
    for step in tail:
        x = activations.apply(x, *step, inplace) if isinstance(step, tuple) else run_norm(step, x)
    return x
