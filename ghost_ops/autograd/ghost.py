"""The autograd function of the Ghost module, and the choice of path around it.

Saved for backward: x, the parameters, the statistics per channel; and u, the output of the primary
convolution, if it has at most a quarter of the bytes of x. Backward recomputes the rest. The output
is never saved, so that an in-place ``out += shortcut`` afterwards is legal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conventions import NEEDS, contiguous, dense, memory_format
from ..formula import NO_SLOPES, Norms, Settings, Slopes, Statistics, ghost_formula
from ..modes import autocast_dtype, differentiate, in_onnx_export, in_transform
from ..ops.conv_gradient import conv_backward
from ..ops.sync import mean_gradients
from ..sync import update_running as sync_update_running
from .checks import announce_eager, is_fused_primary, keeps_u, needs_grad, ops_for
from .forward import (
    RunningUpdate,
    forward_over_processes,
    frozen_forward,
    library_conv,
    share,
    train_forward,
    update_running,
)


class GhostModuleFunction(torch.autograd.Function):
    """``ghost_formula`` with fused forward and backward, differentiable twice.

    Inputs: x, w1 (None: x is u), w2, gamma1, beta1, mean1, var1, gamma2, beta2, mean2, var2,
    slopes1 [m], slopes2 [g] (None without a PReLU), settings, stats. mean and var are None for a
    norm that uses the statistics of the batch. If both norms have constant statistics, the result
    is out. Otherwise the result is (out, mean1, var1, mean2, var2, *counts), of which only out is
    differentiable. The statistics of a norm with constant statistics are empty. counts contains,
    for each norm that crosses processes, the number of values per channel in all processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor | None,
        w2: Tensor,
        gamma1: Tensor | None,
        beta1: Tensor | None,
        mean1: Tensor | None,
        var1: Tensor | None,
        gamma2: Tensor | None,
        beta2: Tensor | None,
        mean2: Tensor | None,
        var2: Tensor | None,
        slopes1: Tensor | None,
        slopes2: Tensor | None,
        settings: Settings,
        stats: Statistics,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.stats = settings, stats
        norms = Norms(gamma1, beta1, mean1, var1, gamma2, beta2, mean2, var2)
        slopes = Slopes(slopes1, slopes2)
        data, fused = dense(x), w1 is not None and is_fused_primary(w1, settings)
        keep = w1 is not None and keeps_u(x, w1, settings)
        weight, u = w1 if fused else None, None
        if w1 is not None and not fused:
            data = dense(library_conv(data, w1, settings))
            u = data if keep else None
        if not stats.use_batch():
            out = frozen_forward(data, weight, w2, norms, settings, slopes)
            ctx.save_for_backward(x, w1, w2, *norms, *slopes, u, None, None)
            return out
        arguments = data, weight, w2, norms, settings
        counts: Sequence[Tensor | None] = (None, None)
        if stats.cross_processes():
            out, *found, kept, count1, count2 = forward_over_processes(
                *arguments, stats, slopes, keep and fused
            )
            counts = count1, count2
        else:
            out, *found, kept = train_forward(*arguments, slopes, keep and fused)
        results = [*found, *(t for t in counts if t is not None)]
        ctx.mark_non_differentiable(*results)
        if stats.batch1:
            mean1, var1 = found[:2]
        if stats.batch2:
            mean2, var2 = found[2:]
        norms = Norms(gamma1, beta1, mean1, var1, gamma2, beta2, mean2, var2)
        u = kept if keep and fused else u
        ctx.save_for_backward(x, w1, w2, *norms, *slopes, u, *counts)
        return out, *results

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 15
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_out)
        device_type = grad_out.device.type
        if autocast_dtype(device_type) is None:
            return _fused_backward(ctx, grad_out)
        with torch.autocast(device_type, enabled=False):
            return _fused_backward(ctx, grad_out)


def _fused_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by the operator ``ghost_backward``; not differentiable again."""
    x, w1, w2, *rest = ctx.saved_tensors
    norms, slopes, (u, *counts) = Norms(*rest[:8]), Slopes(*rest[8:10]), rest[10:]
    s, stats, needs = ctx.settings, ctx.stats, ctx.needs_input_grad
    need_dx, need_dw1 = needs[0], w1 is not None and needs[1]
    fused = w1 is not None and is_fused_primary(w1, s)
    through_conv = w1 is not None and not fused
    mask = _needs_mask(needs, through_conv, w2)
    data = dense(x)
    if through_conv:
        u = dense(library_conv(data, w1, s)) if u is None else u
    elif fused and u is None and stats.cross_processes():
        u = dense(library_conv(data, w1, s))  # computed once for all calls of ghost_backward
    if stats.cross_processes():
        grad_out = grad_out.contiguous(memory_format=memory_format(data))
    weight, n = contiguous(w1) if fused else None, Norms(*map(contiguous, norms))
    prelu1, prelu2 = map(contiguous, slopes)
    backward, cheap = ops_for(x, w2).ghost_backward, contiguous(w2)

    def call(part: int, means1: Tensor | None, means2: Tensor | None) -> Sequence[Tensor]:
        images = grad_out, u if through_conv else data, u if fused else None
        first = weight, *n[:4], s.eps1, prelu1, means1
        second = cheap, *n[4:], s.eps2, prelu2, means2
        numbers = s.stride[0] if fused else 1, s.act1, s.slope1, s.act2, s.slope2
        return backward(*images, *first, *second, *numbers, stats.batch1, stats.batch2, part)

    grads: Sequence[Tensor | None]
    if stats.cross_processes():
        grads = _over_processes(call, mask, stats, *counts)
    else:
        grads = call(mask, None, None) if mask else [None] * 9
    dx, dw1, dgamma1, dbeta1, dprelu1, dw2, dgamma2, dbeta2, dprelu2 = grads
    if through_conv and (need_dx or need_dw1):
        dx, dw1 = conv_backward(
            dx, data, w1, s.stride, s.padding, s.dilation, s.groups, need_dx, need_dw1
        )
    ghosts = w2.size(0) > 0  # without ghosts, w2 and norm 2 get no gradient, as in the reference
    return (
        dx if need_dx else None,
        dw1 if need_dw1 else None,
        dw2 if needs[2] and ghosts else None,
        gradient(dgamma1, norms.gamma1, needs[3]),
        gradient(dbeta1, norms.beta1, needs[4]),
        None,
        None,
        gradient(dgamma2, norms.gamma2, needs[7] and ghosts),
        gradient(dbeta2, norms.beta2, needs[8] and ghosts),
        None,
        None,
        gradient(dprelu1, slopes.slopes1, needs[11]),
        gradient(dprelu2, slopes.slopes2, needs[12] and ghosts),
        None,
        None,
    )


def _needs_mask(needs: Sequence[bool], through_conv: bool, w2: Tensor) -> int:
    """The mask of ``NEEDS`` for the inputs of ``GhostModuleFunction`` that need a gradient.

    through_conv: u is the x of the operator, and there is no w1.
    """
    n = NEEDS
    mask = n.NORM1 if needs[3] or needs[4] else 0
    mask |= n.PRELU1 if needs[11] else 0
    if through_conv:
        mask |= n.DX if needs[0] or needs[1] else 0
    else:
        mask |= (n.DX if needs[0] else 0) | (n.DW1 if needs[1] else 0)
    if w2.size(0) == 0:
        return mask
    mask |= (n.DW2 if needs[2] else 0) | (n.PRELU2 if needs[12] else 0)
    return mask | (n.NORM2 if needs[7] or needs[8] else 0)


# The bit of NEEDS of each result of ``ghost_backward``.
_OF_RESULTS = (
    *(NEEDS.DX, NEEDS.DW1, NEEDS.NORM1, NEEDS.NORM1, NEEDS.PRELU1),
    *(NEEDS.DW2, NEEDS.NORM2, NEEDS.NORM2, NEEDS.PRELU2),
)


def _over_processes(
    call: Callable[[int, Tensor | None, Tensor | None], Sequence[Tensor]],
    mask: int,
    stats: Statistics,
    count1: Tensor | None,
    count2: Tensor | None,
) -> list[Tensor | None]:
    """The results of ``ghost_backward`` with means over all processes.

    The gradients of parameters are sums over the batch of this process. The mask alone decides
    whether a norm has a collective, not the batch of this process; therefore all processes join it.

    Args:
        call: ``ghost_backward`` with all arguments but needs, means1 and means2.
        mask: the needed gradients.
        count1, count2: values per channel in all processes; None if the norm does not cross them.
    """
    n = NEEDS
    results: list[Tensor | None] = [None] * 9
    left, means1, means2 = mask, None, None

    def step(part: int) -> None:
        nonlocal left
        grads = call(part, means1, means2)
        for index, (need, grad) in enumerate(zip(_OF_RESULTS, grads, strict=True)):
            if part & need:
                results[index] = grad
        left &= ~part

    if stats.group2 is not None and left & ~(n.NORM2 | n.PRELU2):
        step(n.NORM2 | left & n.PRELU2)
        means2 = mean_gradients(results[7], results[6], count2, stats.group2)
    if stats.group1 is not None and left & (n.DX | n.DW1):
        step(n.NORM1 | left & ~(n.DX | n.DW1))
        means1 = mean_gradients(results[3], results[2], count1, stats.group1)
    if left:
        step(left)
    return results


def gradient(grad: Tensor, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient in the parameter's dtype; None if it is not needed."""
    if parameter is None or not needed:
        return None
    return grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype)


def _differentiable_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by ``ghost_formula``, which can be differentiated again."""
    *tensors, _, _, _ = ctx.saved_tensors
    settings, stats = ctx.settings, ctx.stats

    def formula(x: Tensor, w1: Tensor | None, w2: Tensor, *rest: Tensor | None) -> Tensor:
        norms, slopes = _without_stats(Norms(*rest[:8]), stats), Slopes(*rest[8:])
        return ghost_formula(x, w1, w2, norms, settings, stats, slopes=slopes)

    return *differentiate(formula, tensors, ctx.needs_input_grad, grad_out), None, None


def _without_stats(norms: Norms, stats: Statistics) -> Norms:
    """norms with mean and var None for each norm that uses the statistics of the batch."""
    if stats.batch1:
        norms = norms._replace(mean1=None, var1=None)
    return norms._replace(mean2=None, var2=None) if stats.batch2 else norms


def run(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
    update1: RunningUpdate,
    update2: RunningUpdate,
    slopes: Slopes = NO_SLOPES,
) -> Tensor:
    """The Ghost module on checked arguments, by the path that grad mode and autocast require.

    Args:
        x: [N, C, H, W].
        w1, w2: as in ``ghost_formula``.
        norms: mean and var are the running statistics, or None. They are updated for a norm that
            uses the statistics of the batch.
        update1, update2: how they are updated.

    Returns:
        [N, out_channels, Ho, Wo].

    Raises:
        RuntimeError: a norm crosses processes under a torch.func transform or forward-mode
            differentiation.
    """
    if w2.size(0) == 0:  # there is no second norm
        stats = stats._replace(batch2=stats.batch1, group2=None)
    exporting = in_onnx_export()
    if exporting or in_transform():
        if stats.cross_processes():
            raise RuntimeError(
                "SyncBatchNorm over several processes runs neither under torch.func transforms nor "
                "with forward-mode differentiation nor in an ONNX export"
            )
        if not exporting:
            announce_eager(
                "torch.func transforms and forward-mode differentiation know nothing of fused "
                "operators"
            )
        share1, share2 = share(update1), share(update2)
        out = ghost_formula(x, w1, w2, norms, settings, stats, share1, share2, slopes)
        for update, batch in ((update1, stats.batch1), (update2, stats.batch2)):
            if batch and update.batches is not None:
                update.batches.add_(1)
        return out
    device_type = x.device.type
    to = autocast_dtype(device_type)
    if to is not None:
        # Autocast casts the operands of the reference's convolutions, except for float64.
        x, w1, w2 = (
            t if t is None or t.dtype in (to, torch.float64) else t.to(to) for t in (x, w1, w2)
        )
        with torch.autocast(device_type, enabled=False):
            return run(x, w1, w2, norms, settings, stats, update1, update2, slopes)
    given = _without_stats(norms, stats)
    if needs_grad(x, w1, w2, norms, slopes):
        if torch.compiler.is_compiling():
            settings = _with_constants(settings)
        result = GhostModuleFunction.apply(x, w1, w2, *given, *slopes, settings, stats)
        if not stats.use_batch():
            return result
        out, mean1, var1, mean2, var2, *counts = result
    else:
        data = dense(x)
        if w1 is not None and not is_fused_primary(w1, settings):
            data, w1 = dense(library_conv(data, w1, settings)), None
        if not stats.use_batch():
            return frozen_forward(data, w1, w2, given, settings, slopes)
        arguments = data, w1, w2, given, settings
        if stats.cross_processes():
            out, mean1, var1, mean2, var2, _, *counts = forward_over_processes(
                *arguments, stats, slopes, False
            )
            counts = [t for t in counts if t is not None]
        else:
            out, mean1, var1, mean2, var2, _ = train_forward(*arguments, slopes, False)
            counts = []
    if w2.size(0) == 0:
        norms, update2 = norms._replace(mean2=None, var2=None), RunningUpdate()
    values = out.numel() // out.size(1)
    found = mean1, var1, mean2, var2
    _update_both(ops_for(x, w2), norms, found, stats, update1, update2, values, counts)
    return out


def _update_both(
    functions: Any,
    norms: Norms,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    stats: Statistics,
    update1: RunningUpdate,
    update2: RunningUpdate,
    values: int,
    counts: Sequence[Tensor],
) -> None:
    """Update the running statistics of the norms that use the batch's statistics.

    Args:
        found: mean1, var1, mean2, var2 of the batch.
        values: values per channel in this process.
        counts: values per channel in all processes, for each norm that crosses processes.
    """
    nothing, left = RunningUpdate(), list(counts)
    for group, norm, stat, update in (
        (stats.group1, norms[2:4], found[:2], update1),
        (stats.group2, norms[6:], found[2:], update2),
    ):
        if group is not None:
            sync_update_running(*norm, *update, *stat, left.pop(0), values)
    if not stats.batch1 or stats.group1 is not None:
        norms, update1 = norms._replace(mean1=None, var1=None), nothing
    if not stats.batch2 or stats.group2 is not None:
        norms, update2 = norms._replace(mean2=None, var2=None), nothing
    update_running(functions, norms, found, update1, update2, values)


def _with_constants(settings: Settings) -> Settings:
    """settings with floats that are constants of the graph under compilation.

    With dynamic shapes dynamo makes a float a symbol. The symbol belongs to the first autograd
    function that uses it, and dynamo fails in the next one ("lift_tracked_freevar_to_input"). If a
    symbol is hashed, as the element of a set, dynamo guards its value and makes it a constant.
    """
    names = ("eps1", "eps2", "slope1", "slope2")
    numbers = {}
    for name in names:
        (numbers[name],) = {getattr(settings, name) + 0.0}
    return settings._replace(**numbers)
