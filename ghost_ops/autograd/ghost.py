"""The autograd function over the ops, and the choice of path around it.

What is saved for backward: x, the parameters, the statistics per channel; and u (the primary
convolution's output) where it has at most a quarter as many bytes as x. Never the output, so an
in-place ``out += shortcut`` afterwards is legal. Backward recomputes the rest.

A primary convolution that is a plain 1x1 (groups 1, no padding, one stride) goes into the fused
ops. Any other runs through the library convolution, and what comes after it is fused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, sync
from ..ops import eager as eager_ops
from ..ops import ghost as ops
from ..ops.eager import NEEDS
from ..reference import FROZEN, NO_SLOPES, Norms, Settings, Slopes, Statistics, ghost_formula

LOW_PRECISION = (torch.bfloat16, torch.float16)

LARGEST_DW_SIZE = 7
_announced: set[str] = set()


def ops_named(backend: str) -> Any:
    """The functions ``ghost_*`` of a backend: the operators, or eager ones called directly."""
    if backend == "triton":
        return ops.triton
    return ops.native if backend == "native" else eager_ops


def direct(function: Any) -> Any:
    """What an operator's overload calls, so that it can be called without it; else the same."""
    return getattr(function, "_op", function)


def backend_for(x: Tensor, dw_size: int) -> str:
    """The backend that computes on x with a depthwise kernel of this size.

    Raises:
        RuntimeError: a fused one was requested explicitly and has no such kernel.
    """
    backend = backends.select(x.device.type, x.dtype)
    if backend != "eager" and dw_size > LARGEST_DW_SIZE:
        return _without_kernel(dw_size)
    return backend


def _without_kernel(dw_size: int) -> str:
    reason = f"there is no fused kernel for dw_size={dw_size}, only up to {LARGEST_DW_SIZE}"
    if (requested := backends.requested()) != "auto":
        raise RuntimeError(f"backend {requested!r} was requested and cannot run: {reason}")
    _announce(reason)
    return "eager"


def _announce(reason: str) -> None:
    if reason in _announced or torch.compiler.is_compiling():
        return
    _announced.add(reason)
    warnings.warn(
        f"ghost_ops runs plain PyTorch operators, slower: {reason}", UserWarning, stacklevel=3
    )


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast runs convolutions on a device type; None where it is off."""
    # Autocast does not know the meta device, and raises.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager:
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def ops_for(x: Tensor, w2: Tensor) -> Any:
    """The functions ``ghost_*`` that compute on x with cheap weight w2."""
    return ops_named(backend_for(x, w2.size(-1)))


def needs_grad(x: Tensor, w1: Tensor | None, w2: Tensor, norms: Norms, slopes: Slopes) -> bool:
    """Whether autograd records this call."""
    if not torch.is_grad_enabled():
        return False
    n = norms
    inputs = (x, w1, w2, n.gamma1, n.beta1, n.gamma2, n.beta2, *slopes)
    return any(t is not None and t.requires_grad for t in inputs)


def is_fused_primary(w1: Tensor, settings: Settings) -> bool:
    """Whether the primary convolution is one that the ops have in them."""
    return is_fused_geometry(settings) and w1.size(2) == 1 and w1.size(3) == 1


def is_fused_geometry(settings: Settings) -> bool:
    """As ``is_fused_primary``, of a convolution that has a 1x1 kernel."""
    s = settings
    return s.groups == 1 and s.padding == (0, 0) and s.stride[0] == s.stride[1]


def dense(x: Tensor) -> Tensor:
    """x itself if its memory is dense, NCHW or channels_last; else a copy that is.

    The copy has the format that the strides of x are nearest to, which is what PyTorch's own
    convolutions do with sliced or expanded inputs.
    """
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=_nearest_format(x))


def _nearest_format(x: Tensor) -> torch.memory_format:
    least = 0
    for dim in (1, 3, 2, 0):
        stride = x.stride(dim)
        if x.size(dim) == 0 or stride < least or (dim == 0 and stride == x.stride(1)):
            return torch.contiguous_format
        if dim == 1 and stride == 0:
            return torch.contiguous_format
        least = stride * max(x.size(dim), 1)
    return torch.channels_last


def _packable(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def library_conv(x: Tensor, w1: Tensor, settings: Settings) -> Tensor:
    """u, from the library convolution."""
    s = settings
    return F.conv2d(x, w1, None, s.stride, s.padding, s.dilation, s.groups)


def frozen_forward(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    slopes: Slopes = NO_SLOPES,
) -> Tensor:
    """The module with constant statistics, outside autograd. x dense; w1 None: x is u."""
    functions = ops_for(x, w2)
    if functions is eager_ops and x.dtype in LOW_PRECISION:
        # Folding in low precision would lose digits, and in float32 it would be slow.
        out = ghost_formula(x, w1, w2, norms, settings, FROZEN, slopes=slopes)
        return eager_ops.in_format(out, eager_ops.memory_format(x))
    packed = pack(functions, w1, w2, norms, settings, slopes)
    m = x.size(1) if w1 is None else w1.size(0)
    arguments = apply_arguments(m, w2, settings, w1 is not None)
    return functions.ghost_apply(x, packed, None, None, *arguments)


def pack(
    functions: Any,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    slopes: Slopes = NO_SLOPES,
) -> Tensor:
    """Packed parameters for ``apply_arguments``. w1 None: without primary convolution."""
    gamma1, beta1, mean1, var1, gamma2, beta2, mean2, var2 = map(_packable, norms)
    return functions.ghost_pack(
        _packable(w1), gamma1, beta1, mean1, var1, settings.eps1,
        _packable(w2), gamma2, beta2, mean2, var2, settings.eps2, *map(_packable, slopes),
    )  # fmt: skip


def apply_arguments(m: int, w2: Tensor, settings: Settings, has_primary: bool) -> tuple:
    """What ``ghost_apply`` takes after x, packed, residual and gate, for m intrinsic maps."""
    s = settings
    return (
        m, s.out_channels, w2.size(0) // m + 1, w2.size(-1), s.stride[0] if has_primary else 1,
        s.act1, s.slope1, s.act2, s.slope2, has_primary,
    )  # fmt: skip


def train_forward(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    slopes: Slopes,
    keep_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, mean1, var1, mean2, var2, u or empty), outside autograd. x dense; w1 None: x is u.

    The statistics that norms has are used as they are, and those results are empty.
    """
    s, n, (prelu1, prelu2) = settings, Norms(*map(_packable, norms)), map(_packable, slopes)
    return ops_for(x, w2).ghost_train_forward(
        x, _packable(w1), n.gamma1, n.beta1, n.mean1, n.var1, s.eps1, prelu1,
        _packable(w2), n.gamma2, n.beta2, n.mean2, n.var2, s.eps2, prelu2,
        s.out_channels, 1 if w1 is None else s.stride[0],
        s.act1, s.slope1, s.act2, s.slope2, keep_u,
    )  # fmt: skip


def _forward_over_processes(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
    slopes: Slopes,
    keep_u: bool,
) -> tuple[Tensor | None, ...]:
    """As ``train_forward``, and (count1, count2): the values of a channel in all processes.

    A count is None where its norm does not cross processes. Each such norm has one collective,
    which every process takes part in, with a batch of no images too. The primary convolution is the
    library's, so that it runs once for all passes.

    Raises:
        ValueError: in all processes, if a channel has one value in all of them together.
    """
    functions, s, n = ops_for(x, w2), settings, norms
    u = x if w1 is None else dense(library_conv(x, w1, s))
    values, m = u.numel() // u.size(1), u.size(1)
    count1 = count2 = None
    if stats.batch1:
        mean1, var1 = functions.ghost_primary_stats(u, None, 1)
        if stats.group1 is not None:
            mean1, var1, count1 = sync.combine(mean1, var1, values, stats.group1)
        n = n._replace(mean1=mean1, var1=var1)
    if stats.group2 is not None:
        without2 = Norms(*n[:4], None, None, None, None)
        packed = pack(functions, None, w2, without2, settings, Slopes(slopes.slopes1))
        mean2, var2 = functions.ghost_cheap_stats(
            u, packed, m, w2.size(0) // m + 1, w2.size(-1), 1, s.act1, s.slope1, False
        )
        mean2, var2, count2 = sync.combine(mean2, var2, values, stats.group2)
        n = n._replace(mean2=mean2, var2=var2)
    out, *found, _ = train_forward(u, None, w2, n, settings, slopes, False)
    used = (n.mean1, n.var1, n.mean2, n.var2)
    made = (stats.batch1, stats.batch1, stats.group2 is not None, stats.group2 is not None)
    found = [t if own else f for t, own, f in zip(used, made, found, strict=True)]
    return out, *found, u if keep_u else u.new_empty(0), count1, count2


def _keeps_u(x: Tensor, w1: Tensor, settings: Settings) -> bool:
    """The memory contract's rule: u has at most a quarter of the elements of x."""
    s, m = settings, w1.size(0)
    n, _, h, w = x.shape
    ho = (h + 2 * s.padding[0] - s.dilation[0] * (w1.size(2) - 1) - 1) // s.stride[0] + 1
    wo = (w + 2 * s.padding[1] - s.dilation[1] * (w1.size(3) - 1) - 1) // s.stride[1] + 1
    return n * m * ho * wo * 4 <= x.numel()


class GhostModuleFunction(torch.autograd.Function):
    """``ghost_formula`` with fused forward and backward, differentiable twice.

    Inputs: x, w1 (None: x is u), w2, gamma1, beta1, mean1, var1, gamma2, beta2, mean2, var2,
    slopes1 [m], slopes2 [g] (None without a PReLU), settings, stats. The mean and var of a norm
    with the batch's statistics are None. The result is out where both norms have constant ones.
    Otherwise it is (out, mean1, var1, mean2, var2, *counts), all but out not differentiable, with
    empty statistics for a constant norm, and a count of the values of a channel in all processes
    for each norm that crosses them.
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
        keep = w1 is not None and _keeps_u(x, w1, settings)
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
            out, *found, kept, count1, count2 = _forward_over_processes(
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
    """Backward through ``ghost_backward``; nothing in it is differentiable again."""
    x, w1, w2, *rest = ctx.saved_tensors
    norms, slopes, (u, *counts) = Norms(*rest[:8]), Slopes(*rest[8:10]), rest[10:]
    s, stats, needs = ctx.settings, ctx.stats, ctx.needs_input_grad
    need_dx, need_dw1 = needs[0], w1 is not None and needs[1]
    fused = w1 is not None and is_fused_primary(w1, s)
    through_conv = w1 is not None and not fused
    mask = _wanted(needs, through_conv, w2)
    data = dense(x)
    if through_conv:
        u = dense(library_conv(data, w1, s)) if u is None else u
    elif fused and u is None and stats.cross_processes():
        u = dense(library_conv(data, w1, s))  # once, for all calls
    if stats.cross_processes():
        grad_out = grad_out.contiguous(memory_format=eager_ops.memory_format(data))
    weight, wide = _packable(w1) if fused else None, Norms(*map(_packable, norms))
    prelu1, prelu2 = map(_packable, slopes)
    backward, cheap = ops_for(x, w2).ghost_backward, _packable(w2)

    def call(part: int, means1: Tensor | None, means2: Tensor | None) -> Sequence[Tensor]:
        n = wide
        return backward(
            grad_out, u if through_conv else data, u if fused else None,
            weight, n.gamma1, n.beta1, n.mean1, n.var1, s.eps1, prelu1, means1,
            cheap, n.gamma2, n.beta2, n.mean2, n.var2, s.eps2, prelu2, means2,
            s.stride[0] if fused else 1, s.act1, s.slope1, s.act2, s.slope2,
            stats.batch1, stats.batch2, part,
        )  # fmt: skip

    if stats.cross_processes():
        grads = _over_processes(call, mask, stats, *counts)
    else:
        grads = call(mask, None, None) if mask else [None] * 9
    dx, dw1, dgamma1, dbeta1, dprelu1, dw2, dgamma2, dbeta2, dprelu2 = grads
    if through_conv and (need_dx or need_dw1):
        dx, dw1 = eager_ops.conv_backward(
            dx, data, w1, s.stride, s.padding, s.dilation, s.groups, need_dx, need_dw1
        )
    ghosts = w2.size(0) > 0  # without any, those parameters take no part, as in the reference
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


def _wanted(needs: Sequence[bool], through_conv: bool, w2: Tensor) -> int:
    """The mask of ``NEEDS`` for the inputs of ``GhostModuleFunction`` that need a gradient.

    through_conv: the operator's x is u, and w1 is no operand of it.
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


_OF_RESULTS = (
    NEEDS.DX, NEEDS.DW1, NEEDS.NORM1, NEEDS.NORM1, NEEDS.PRELU1,
    NEEDS.DW2, NEEDS.NORM2, NEEDS.NORM2, NEEDS.PRELU2,
)  # fmt: skip


def _over_processes(
    call: Callable[[int, Tensor | None, Tensor | None], Sequence[Tensor]],
    mask: int,
    stats: Statistics,
    count1: Tensor | None,
    count2: Tensor | None,
) -> list[Tensor | None]:
    """The results of ``ghost_backward`` with its means taken over all processes.

    Parameter gradients stay those of this process. Whether a norm has a collective depends on the
    mask alone, never on the batch of this process, so that all processes agree.
    """
    n, results = NEEDS, [None] * 9
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
        means2 = sync.mean_gradients(results[7], results[6], count2, stats.group2)
    if stats.group1 is not None and left & (n.DX | n.DW1):
        step(n.NORM1 | left & ~(n.DX | n.DW1))
        means1 = sync.mean_gradients(results[3], results[2], count1, stats.group1)
    if left:
        step(left)
    return results


def gradient(grad: Tensor, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient in the parameter's dtype, if it is wanted."""
    if parameter is None or not needed:
        return None
    return grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype)


def _differentiable_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Backward with a graph of its own, through the reference formula."""
    *tensors, _, _, _ = ctx.saved_tensors
    settings, stats = ctx.settings, ctx.stats

    def formula(x: Tensor, w1: Tensor | None, w2: Tensor, *rest: Tensor | None) -> Tensor:
        norms, slopes = _without_stats(Norms(*rest[:8]), stats), Slopes(*rest[8:])
        return ghost_formula(x, w1, w2, norms, settings, stats, slopes=slopes)

    return *differentiate(formula, tensors, ctx.needs_input_grad, grad_out), None, None


def differentiate(
    formula: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_out: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of a formula of tensors, with a graph of their own; None where none is needed."""
    needs = needs[: len(tensors)]
    # Aliases, so that the gradient of one input does not run on into another that depends on it.
    tensors = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
    with _without_autocast(grad_out.device.type):
        out = formula(*tensors)
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        grads = torch.autograd.grad(out, wanted, grad_out, create_graph=True, allow_unused=True)
    found = iter(grads)
    return tuple(next(found) if need else None for need in needs)


def _without_stats(norms: Norms, stats: Statistics) -> Norms:
    """norms without the mean and var of those that use the batch's."""
    if stats.batch1:
        norms = norms._replace(mean1=None, var1=None)
    return norms._replace(mean2=None, var2=None) if stats.batch2 else norms


class RunningUpdate(NamedTuple):
    """How a training step changes the running statistics of one batch norm."""

    momentum: float | None = 0.0  # share of this batch; None: the average over all batches
    batches: Tensor | None = None  # their counter, raised by one; needed where momentum is None


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
    """The Ghost module on checked arguments, by the path that grad mode and autocast ask for.

    The mean and var of norms are the running statistics, or None. Those of a norm that uses the
    batch's are updated.
    """
    if w2.size(0) == 0:  # there is no second norm
        stats = stats._replace(batch2=stats.batch1, group2=None)
    if in_transform():
        if stats.cross_processes():
            raise RuntimeError(
                "SyncBatchNorm over several processes runs neither under torch.func transforms nor "
                "with forward-mode differentiation"
            )
        _announce(
            "torch.func transforms and forward-mode differentiation know nothing of fused operators"
        )
        shares = [share(update) for update in (update1, update2)]
        out = ghost_formula(x, w1, w2, norms, settings, stats, *shares, slopes)
        for update, batch in ((update1, stats.batch1), (update2, stats.batch2)):
            if batch and update.batches is not None:
                update.batches.add_(1)
        return out
    device_type = x.device.type
    to = autocast_dtype(device_type)
    if to is not None:
        # As autocast treats the convolutions of the reference: their operands, float64 excepted.
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
            out, mean1, var1, mean2, var2, _, *counts = _forward_over_processes(
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
    """The running statistics of the norms that use the batch's, of values a channel.

    counts: those of all processes, for each norm that crosses them.
    """
    nothing, left = RunningUpdate(), list(counts)
    for group, norm, stat, update in (
        (stats.group1, norms[2:4], found[:2], update1),
        (stats.group2, norms[6:], found[2:], update2),
    ):
        if group is not None:
            sync.update_running(*norm, *update, *stat, left.pop(0), values)
    if not stats.batch1 or stats.group1 is not None:
        norms, update1 = norms._replace(mean1=None, var1=None), nothing
    if not stats.batch2 or stats.group2 is not None:
        norms, update2 = norms._replace(mean2=None, var2=None), nothing
    update_running(functions, norms, found, update1, update2, values)


def _with_constants(settings: Settings) -> Settings:
    """The same, with floats that are constants of the graph that is being compiled.

    Where everything is dynamic they are symbols, made inside the first autograd function that needs
    one and then unknown to the next ("lift_tracked_freevar_to_input"). As the key of a set a
    symbol becomes the number that it is, guarded.
    """
    names = ("eps1", "eps2", "slope1", "slope2")
    numbers = {}
    for name in names:
        (numbers[name],) = {getattr(settings, name) + 0.0}
    return settings._replace(**numbers)


def share(update: RunningUpdate) -> float:
    """The share of this batch in the running statistics, as a number."""
    if update.momentum is not None:
        return update.momentum
    return 0.0 if update.batches is None else 1.0 / (float(update.batches) + 1.0)


def update_running(
    functions: Any,
    norms: Norms,
    stats: Sequence[Tensor],
    update1: RunningUpdate,
    update2: RunningUpdate,
    count: int,
) -> None:
    """Running statistics and counters of both batch norms, in one launch where there is a kernel.

    stats: (mean1, var1, mean2, var2) of the batch, which has count values per channel.
    """
    n = norms
    running = [t for t in (n.mean1, n.var1, n.mean2, n.var2) if t is not None]
    changed = [*running, *(t for t in (update1.batches, update2.batches) if t is not None)]
    if not changed:
        return
    mean1, var1, mean2, var2 = stats
    arguments = (
        n.mean1, n.var1, update1.batches, mean1, var1, update1.momentum,
        n.mean2, n.var2, update2.batches, mean2, var2, update2.momentum, count,
    )  # fmt: skip
    # A compiled graph fuses the few operations itself, for any batch size; the operator's count is
    # an int, which would tie the graph to one. And the kernels know one dtype, contiguous.
    if (
        functions is eager_ops
        or torch.compiler.is_compiling()
        or not all(t.is_contiguous() and t.dtype is running[0].dtype for t in running)
    ):
        with torch.no_grad():
            eager_ops.ghost_update_running_(*arguments)
        return
    functions.ghost_update_running_(*arguments)
    # The kernel writes memory that autograd does not watch: tell it, and tell caches.
    torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])
