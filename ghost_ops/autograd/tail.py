"""Training of a Ghost module whose batch norm and activation follow the concatenation.

With y the output of the primary convolution::

    v   = depthwise(y, w2)
    out = act(bn(concat(y, v)[:, :out_channels]) + residual)        the residual is optional

Ghost-ResNet has this form. PyTorch's convolution computes y. Native kernels on the CPU compute the
rest, forward and backward. Saved for backward are y, residual, the parameters and the statistics
per channel, but neither the concatenation nor the output of the norm.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations, backends
from ..conventions import compute_dtype, dense
from ..formula import Norms
from ..modes import autocast_dtype, differentiate, in_transform
from ..ops.define import native
from ..ops.tail import ghost_tail_backward, ghost_tail_forward
from .checks import LARGEST_DW_SIZE
from .forward import RunningUpdate, share, update_running
from .ghost import gradient


class Norm(NamedTuple):
    """Tensors [out_channels] of the batch norm, or None; mean and var: the running statistics."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class TailSettings(NamedTuple):
    """Numbers of the layer."""

    out_channels: int
    eps: float
    act: int
    slope: float
    batch_stats: bool


def has_kernel(x: Tensor, dw_size: int) -> bool:
    """Whether native kernels compute on x with a depthwise kernel of this size."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and dw_size <= LARGEST_DW_SIZE
        and not in_transform()
        and backends.select("cpu", x.dtype) == "native"
    )


def tail_formula(
    y: Tensor,
    w2: Tensor,
    norm: Norm,
    residual: Tensor | None,
    settings: TailSettings,
    momentum: float = 0.0,
) -> Tensor:
    """The formula of this file's docstring in plain PyTorch, differentiable any number of times.

    Args:
        y: [N, m, H, W].
        w2: [g, 1, d, d].
        residual: [N, out_channels, H, W], or None.
        momentum: share of the batch's statistics in the running statistics, which are updated.
    """
    n, s = norm, settings
    v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
    u = torch.cat([y, v], 1)[:, : s.out_channels]
    u = F.batch_norm(u, n.mean, n.var, n.gamma, n.beta, s.batch_stats, momentum, s.eps)
    return activations.apply(u if residual is None else u + residual, s.act, s.slope)


class GhostTailFunction(torch.autograd.Function):
    """``tail_formula`` with fused forward and backward, differentiable twice.

    Inputs: y, w2, gamma, beta, mean, var, residual, settings; mean and var are None with the
    batch's statistics. The result is (out, mean, var); the statistics are the batch's, or empty,
    and not differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        w2: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        residual: Tensor | None,
        settings: TailSettings,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        out, *stats = _run(y, w2, Norm(gamma, beta, mean, var), residual, settings)
        ctx.mark_non_differentiable(*stats)
        if settings.batch_stats:
            mean, var = stats
        ctx.save_for_backward(y, w2, gamma, beta, mean, var, residual)
        return out, *stats

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 8
        tensors, s, needs = ctx.saved_tensors, ctx.settings, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *differentiate(functools.partial(_formula, s), tensors, needs, grad_out), None
        y, w2, gamma, beta, mean, var, residual = tensors
        norm = gamma, beta, mean, var, s.eps
        numbers = s.act, s.slope, s.batch_stats, needs[0], needs[6]
        dy, dw2, dgamma, dbeta, dresidual = ghost_tail_backward(
            grad_out, dense(y), w2, *norm, residual, *numbers
        )
        return (
            dy if needs[0] else None,
            dw2 if needs[1] else None,
            gradient(dgamma, gamma, needs[2]),
            gradient(dbeta, beta, needs[3]),
            None,
            None,
            dresidual if needs[6] else None,
            None,
        )


def _run(
    y: Tensor, w2: Tensor, norm: Norm, residual: Tensor | None, settings: TailSettings
) -> tuple[Tensor, Tensor, Tensor]:
    s = settings
    return ghost_tail_forward(dense(y), w2, *norm, s.eps, residual, s.out_channels, s.act, s.slope)


def _formula(
    settings: TailSettings,
    y: Tensor,
    w2: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    stats = (None, None) if settings.batch_stats else (mean, var)
    return tail_formula(y, w2, Norm(gamma, beta, *stats), residual, settings)


def ghost_tail(
    y: Tensor,
    w2: Tensor,
    norm: Norm,
    residual: Tensor | None,
    settings: TailSettings,
    update: RunningUpdate,
) -> Tensor:
    """``tail_formula`` by the path that grad mode and autocast require. Requires ``has_kernel``.

    If ``settings.batch_stats``, mean and var of norm are the running statistics to update, or None.
    Cases that the kernels do not compute, such as an empty batch, run in plain PyTorch.
    """
    if autocast_dtype("cpu") is not None:
        with torch.autocast("cpu", enabled=False):
            w2 = w2 if w2.dtype is y.dtype else w2.to(y.dtype)
            return ghost_tail(y, w2, norm, residual, settings, update)
    s = settings
    if not _fits(y, w2, norm, residual, s):
        out = tail_formula(y, w2, norm, residual, s, share(update))
        if s.batch_stats and update.batches is not None:
            update.batches.add_(1)
        return out
    given = norm._replace(mean=None, var=None) if s.batch_stats else norm
    differentiable = (y, w2, norm.gamma, norm.beta, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        out, mean, var = GhostTailFunction.apply(y, w2, *given, residual, s)
    else:
        out, mean, var = _run(y, w2, given, residual, s)
    if s.batch_stats:
        norms = Norms(None, None, norm.mean, norm.var, None, None, None, None)
        stats = [mean, var, mean, var]  # there is no second norm
        update_running(native, norms, stats, update, RunningUpdate(), out.numel() // out.size(1))
    return out


def _fits(
    y: Tensor, w2: Tensor, norm: Norm, residual: Tensor | None, settings: TailSettings
) -> bool:
    """Whether the kernels compute this call."""
    dtypes, size = (y.dtype, compute_dtype(y.dtype)), (settings.out_channels,)
    n, _, h, w = y.shape
    return (
        n * h * w > settings.batch_stats
        and w2.dtype is y.dtype
        and all(t is None or (t.dtype in dtypes and t.shape == size) for t in norm)
        and (residual is None or (residual.dtype is y.dtype and residual.shape == (n, *size, h, w)))
    )
