"""Depthwise convolutions with batch norm, and squeeze-and-excitation, in training.

These functions run the native kernels of ``ops.depthwise`` and ``ops.gate``. If there is no kernel,
the caller runs PyTorch's layers. Saved for backward:

- depthwise convolution, batch norm and activation: x and the statistics per channel. Backward
  recomputes the result of the convolution.
- squeeze-and-excitation: x, the means and the hidden values, a few numbers per image. For
  contiguous (NCHW) float32 and float64 only.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations, backends
from ..activations import hard_sigmoid
from ..conventions import compute_dtype, dense
from ..formula import Norms
from ..modes import autocast_dtype, differentiate, in_transform
from ..ops.define import native
from ..ops.depthwise import depthwise_norm, depthwise_norm_backward
from ..ops.gate import HARD_SIGMOID, plane_affine, plane_dot
from .forward import RunningUpdate, update_running
from .ghost import gradient
from .tail import Norm

_aten = torch.ops.aten


def has_kernels(x: Tensor) -> bool:
    """Whether the training kernels can run: device and dtype of x and modes of PyTorch allow it."""
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_transform()
        and backends.select("cpu", x.dtype) == "native"
    )


def can_train(x: Tensor, *weights: Tensor) -> bool:
    """Whether ``SqueezeExciteFunction`` computes on x with these weights."""
    return (
        type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and has_kernels(x)
        and x.is_contiguous()
        and all(w.dtype is x.dtype and w.device == x.device for w in weights)
        and autocast_dtype(x.device.type) is None
    )


class DepthwiseSettings(NamedTuple):
    """Numbers of the layer. If batch_stats is False, there is a norm only if mean is given."""

    stride: int
    eps: float
    batch_stats: bool
    act: int
    slope: float


class DepthwiseFunction(torch.autograd.Function):
    """act(norm(depthwise(x, weight))) with fused forward and backward, differentiable twice.

    Inputs: x, weight, gamma, beta, mean, var, settings; mean and var are None with the batch's
    statistics, and without a norm. The result is (out, mean, var); the statistics are the batch's,
    or empty, and not differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        settings: DepthwiseSettings,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        out, *stats = _run(x, weight, Norm(gamma, beta, mean, var), settings)
        ctx.mark_non_differentiable(*stats)
        if settings.batch_stats:
            mean, var = stats
        ctx.save_for_backward(x, weight, gamma, beta, mean, var)
        return out, *stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        tensors, s, needs = ctx.saved_tensors, ctx.settings, ctx.needs_input_grad
        if torch.is_grad_enabled():
            formula = functools.partial(_depthwise_formula, s)
            return *differentiate(formula, tensors, needs, grad), None
        x, weight, gamma, beta, mean, var = tensors
        numbers = s.eps, s.batch_stats, s.stride, s.act, s.slope
        dx, dw, dgamma, dbeta = depthwise_norm_backward(
            grad, dense(x), weight, gamma, beta, mean, var, *numbers, needs[0], needs[1]
        )
        return (
            dx if needs[0] else None,
            gradient(dw, weight, needs[1]),
            gradient(dgamma, gamma, needs[2]),
            gradient(dbeta, beta, needs[3]),
            None,
            None,
            None,
        )


def _run(
    x: Tensor, weight: Tensor, norm: Norm, settings: DepthwiseSettings
) -> tuple[Tensor, Tensor, Tensor]:
    s = settings
    return depthwise_norm(dense(x), weight, *norm, s.eps, s.batch_stats, s.stride, s.act, s.slope)


def _depthwise_formula(
    settings: DepthwiseSettings,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> Tensor:
    s = settings
    u = F.conv2d(x, weight, None, s.stride, weight.size(-1) // 2, 1, weight.size(0))
    if s.batch_stats:
        u = F.batch_norm(u, None, None, gamma, beta, True, 0.0, s.eps)
    elif mean is not None:
        u = F.batch_norm(u, mean, var, gamma, beta, False, 0.0, s.eps)
    return activations.apply(u, s.act, s.slope)


def depthwise(
    x: Tensor, weight: Tensor, norm: Norm, settings: DepthwiseSettings, update: RunningUpdate
) -> Tensor | None:
    """A depthwise convolution with k // 2 zeros on every side, its batch norm and activation.

    Requires ``has_kernels(x)``.

    Args:
        x: [N, C, H, W].
        weight: [C, 1, k, k].
        norm: [C] each. With the batch's statistics, mean and var are the running ones to update, or
            None. Without a norm all four are None.
        update: of the running statistics.

    Returns:
        [N, C, Ho, Wo], differentiable. None if the kernels cannot compute it; in this case no
        running statistic has changed.
    """
    s, wide, channels = settings, compute_dtype(x.dtype), (weight.size(0),)
    to = autocast_dtype("cpu")
    if to is not None:
        if x.dtype is not torch.float64:
            x, weight = x.to(to), weight.to(to)
        with torch.autocast("cpu", enabled=False):
            return depthwise(x, weight, norm, settings, update)
    n, c, h, w = x.shape
    pixels = n * ((h - 1) // s.stride + 1) * ((w - 1) // s.stride + 1)
    if (
        c != weight.size(0)
        or weight.dtype is not x.dtype
        or pixels == s.batch_stats
        or not all(t is None or (t.dtype in (x.dtype, wide) and t.shape == channels) for t in norm)
    ):
        return None
    given = norm._replace(mean=None, var=None) if s.batch_stats else norm
    differentiable = (x, weight, norm.gamma, norm.beta)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        out, mean, var = DepthwiseFunction.apply(x, weight, *given, s)
    else:
        out, mean, var = _run(x, weight, given, s)
    if s.batch_stats:
        norms = Norms(None, None, norm.mean, norm.var, None, None, None, None)
        stats = [mean, var, mean, var]  # there is no second norm
        update_running(native, norms, stats, update, RunningUpdate(), pixels)
    return out


def _gate_formula(
    act: int, slope: float, code: int, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    hidden = F.conv2d(x.mean((2, 3), keepdim=True), w1, b1)
    s = F.conv2d(activations.apply(hidden, act, slope), w2, b2)
    return x * (hard_sigmoid(s) if code == HARD_SIGMOID else torch.sigmoid(s))


class SqueezeExciteFunction(torch.autograd.Function):
    """x * gate(e) with e = expand(act(reduce(mean of x over pixels))), differentiable twice.

    Inputs: x [N, C, H, W]; w1 [R, C, 1, 1], b1 [R]: reduce; w2 [C, R, 1, 1], b2 [C]: expand; act,
    slope; code of the gate's function. With g the gradient at the output and P = H * W::

        de = gate'(e) * sum over pixels of g * x
        dx = g * gate(e) + (gradient at the mean, from de) / P
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        act: int,
        slope: float,
        code: int,
    ) -> Tensor:
        mean = x.mean((2, 3))
        hidden = torch.addmm(b1, mean, w1.flatten(1).t())
        activated = activations.apply(hidden, act, slope)
        e = torch.addmm(b2, activated, w2.flatten(1).t())
        gate = hard_sigmoid(e) if code == HARD_SIGMOID else torch.sigmoid(e)
        ctx.save_for_backward(x, w1, b1, w2, b2, mean, hidden, activated, e, gate)
        ctx.settings = act, slope, code
        return plane_affine(x, gate, torch.zeros_like(gate))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, b2, mean, hidden, activated, e, gate = ctx.saved_tensors
        act, slope, code = ctx.settings
        if torch.is_grad_enabled():
            formula = functools.partial(_gate_formula, act, slope, code)
            inputs = (x, w1, b1, w2, b2)
            return *differentiate(formula, inputs, ctx.needs_input_grad, grad), None, None, None
        grad = grad.contiguous()
        dgate = plane_dot(grad, x)
        if code == HARD_SIGMOID:
            # ATen's hard sigmoid multiplies by a sixth in float32, even for float64.
            de = _aten.hardtanh_backward.default(dgate, e, -3.0, 3.0) / 6.0
        else:
            de = _aten.sigmoid_backward.default(dgate, gate)
        dhidden, _ = activations.backward(de @ w2.flatten(1), hidden, act, slope)
        dmean = (dhidden @ w1.flatten(1)) / (x.size(2) * x.size(3))
        needs = ctx.needs_input_grad
        return (
            plane_affine(grad, gate, dmean) if needs[0] else None,
            (dhidden.t() @ mean).view_as(w1) if needs[1] else None,
            dhidden.sum(0) if needs[2] else None,
            (de.t() @ activated).view_as(w2) if needs[3] else None,
            de.sum(0) if needs[4] else None,
            None,
            None,
            None,
        )
