"""Depthwise convolution and squeeze-and-excitation in training, over ``model_ops``.

Both are for contiguous (NCHW) float32 or float64 where there are native kernels (``can_train``);
everything else goes through PyTorch's own operators. They save what those save: x, and of the gate
the means and the hidden values, a few numbers an image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations, backends, model_ops
from .autograd import autocast_dtype, in_transform
from .reference import hard_sigmoid

_aten = torch.ops.aten


def can_train(x: Tensor, *weights: Tensor) -> bool:
    """Whether these layers compute on x with these weights."""
    return (
        type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous()
        and all(w.dtype is x.dtype and w.device == x.device for w in weights)
        and autocast_dtype(x.device.type) is None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_transform()
        and backends.select(x.device.type, x.dtype) == "native"
    )


class DepthwiseConv(torch.autograd.Function):
    """F.conv2d(x, weight, None, stride, k // 2, groups=C), differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        zero = weight.new_zeros(weight.size(0))
        return model_ops.depthwise_conv(x, weight.contiguous(), zero, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        k, needs = weight.size(-1), ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = _again(
                lambda x, w: F.conv2d(x, w, None, ctx.stride, k // 2, 1, w.size(0)),
                (x, weight), needs, grad,
            )  # fmt: skip
            return *grads, None
        dx, dw = model_ops._depthwise_conv_backward(
            grad.contiguous(), x, weight.contiguous(), k, ctx.stride, needs[0]
        )
        return dx if needs[0] else None, dw if needs[1] else None, None


def _again(function: Any, inputs: tuple, needs: tuple, grad: Tensor) -> list[Tensor | None]:
    """Gradients with a graph of their own."""
    # Aliases, so that the gradient of one input does not run on into another that depends on it.
    inputs = tuple(t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=False))
    wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [next(found) if need else None for _, need in zip(inputs, needs, strict=False)]


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for a depthwise convolution with k // 2 zeros on every side, and without a bias."""
    weight = conv.weight
    if conv.bias is None and can_train(x, weight):
        return DepthwiseConv.apply(x, weight, conv.stride[0])
    return conv(x)


def _gate_formula(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: int, slope: float, code: int
) -> Tensor:
    hidden = F.conv2d(x.mean((2, 3), keepdim=True), w1, b1)
    s = F.conv2d(activations.apply(hidden, act, slope), w2, b2)
    return x * (hard_sigmoid(s) if code == model_ops.HARD_SIGMOID else torch.sigmoid(s))


class SqueezeExciteFunction(torch.autograd.Function):
    """x * gate(expand(act(reduce(mean of x)))), differentiable twice.

    With g the gradient, e the input of the gate's function and P pixels::

        de = gate'(e) * sum over pixels of g * x
        dx = g * gate + (the gradient of the mean, from de) / P
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        act: int, slope: float, code: int,
    ) -> Tensor:  # fmt: skip
        mean = x.mean((2, 3))
        hidden = torch.addmm(b1, mean, w1.flatten(1).t())
        activated = activations.apply(hidden, act, slope)
        e = torch.addmm(b2, activated, w2.flatten(1).t())
        gate = hard_sigmoid(e) if code == model_ops.HARD_SIGMOID else torch.sigmoid(e)
        ctx.save_for_backward(x, w1, b1, w2, b2, mean, hidden, activated, e, gate)
        ctx.settings = act, slope, code
        return model_ops._plane_affine(x, gate, torch.zeros_like(gate))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, b2, mean, hidden, activated, e, gate = ctx.saved_tensors
        act, slope, code = ctx.settings
        if torch.is_grad_enabled():
            inputs = (x, w1, b1, w2, b2)
            grads = _again(
                lambda *t: _gate_formula(*t, act, slope, code), inputs, ctx.needs_input_grad, grad
            )
            return *grads, None, None, None
        grad = grad.contiguous()
        dgate = model_ops._plane_dot(grad, x)
        if code == model_ops.HARD_SIGMOID:
            # Not ATen's own, which has a sixth in float32 only, even for float64.
            de = _aten.hardtanh_backward.default(dgate, e, -3.0, 3.0) / 6.0
        else:
            de = _aten.sigmoid_backward.default(dgate, gate)
        dhidden, _ = activations.backward(de @ w2.flatten(1), hidden, act, slope)
        dmean = (dhidden @ w1.flatten(1)) / (x.size(2) * x.size(3))
        needs = ctx.needs_input_grad
        return (
            model_ops._plane_affine(grad, gate, dmean) if needs[0] else None,
            (dhidden.t() @ mean).view_as(w1) if needs[1] else None,
            dhidden.sum(0) if needs[2] else None,
            (de.t() @ activated).view_as(w2) if needs[3] else None,
            de.sum(0) if needs[4] else None,
            None,
            None,
            None,
        )
