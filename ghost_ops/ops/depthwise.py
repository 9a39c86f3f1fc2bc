"""Depthwise convolutions with batch norm and activation: folded in inference, and in training.

Native kernels: ``depthwise_conv`` on the CPU and on CUDA, ``depthwise_conv_sums`` on CUDA,
``depthwise_norm`` and its gradient on the CPU; for NCHW and channels_last in the dtypes of the
Ghost operators. On other devices, and with the eager backend, PyTorch's operators run. Parameters
are in the compute dtype: float64 for float64, else float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..conventions import compute_dtype, empty_map, memory_format
from .define import native, operator
from .select import runs_native

_KERNEL_SIZES, _STRIDES = (1, 3, 5, 7), (1, 2)


def has_depthwise(kernel_size: int, stride: int) -> bool:
    """Whether ``depthwise_conv`` computes a convolution of this kernel size and stride."""
    return kernel_size in _KERNEL_SIZES and stride in _STRIDES


@operator(
    "depthwise_conv(Tensor x, Tensor weight, Tensor shift, int kernel_size, int stride, int act, "
    "float slope) -> Tensor",
    lambda a: empty_map(a.x, a.x.size(1), a.stride),
)
def eager_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    kernel_size: int,
    stride: int,
    act: int,
    slope: float,
) -> Tensor:
    # A convolution on a GPU accumulates in float32: conversions of x would only double the bytes.
    dtype = x.dtype if x.is_cuda else weight.dtype
    weight, shift = weight.to(dtype), shift.to(dtype)
    u = F.conv2d(x.to(dtype), weight, shift, stride, kernel_size // 2, 1, weight.size(0))
    out = activations.apply(u, act, slope, inplace=True).to(x.dtype)
    return out.contiguous(memory_format=memory_format(x))


def _fake_depthwise_conv_sums(a: Any) -> tuple[Tensor, Tensor]:
    # The kernel chooses the number of parts.
    parts = torch.library.get_ctx().new_dynamic_size()
    sums = a.weight.new_empty(a.x.size(0), parts, a.x.size(1))
    return empty_map(a.x, a.x.size(1), a.stride), sums


@operator(
    "depthwise_conv_sums(Tensor x, Tensor weight, Tensor shift, int kernel_size, int stride, "
    "int act, float slope) -> (Tensor out, Tensor sums)",
    _fake_depthwise_conv_sums,
)
def eager_depthwise_conv_sums(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    kernel_size: int,
    stride: int,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    out = eager_depthwise_conv(x, weight, shift, kernel_size, stride, act, slope)
    return out, out.sum((2, 3), dtype=weight.dtype)[:, None]


def _wide(
    x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, stride: int
) -> tuple[Tensor, ...]:
    """x, weight, gamma, beta [C, 1, 1] and u = depthwise(x, weight) in the compute dtype."""
    wide = compute_dtype(x.dtype)
    x, weight = x.to(wide), weight.to(wide)
    ones, zeros = x.new_ones(x.size(1), 1, 1), x.new_zeros(x.size(1), 1, 1)
    gamma = ones if gamma is None else gamma.to(wide).view_as(ones)
    beta = zeros if beta is None else beta.to(wide).view_as(zeros)
    u = F.conv2d(x, weight, None, stride, weight.size(-1) // 2, 1, weight.size(0))
    return x, weight, gamma, beta, u


def _fake_depthwise_norm(a: Any) -> tuple[Tensor, ...]:
    channels = a.x.size(1)
    stats = a.x.new_empty(channels if a.batch_stats else 0, dtype=compute_dtype(a.x.dtype))
    return empty_map(a.x, channels, a.stride), stats, torch.empty_like(stats)


@operator(
    "depthwise_norm(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, "
    "Tensor? var, float eps, bool batch_stats, int stride, int act, float slope) "
    "-> (Tensor out, Tensor mean, Tensor var)",
    _fake_depthwise_norm,
)
def eager_depthwise_norm(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    batch_stats: bool,
    stride: int,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(norm(u)), mean, var) with u = depthwise(x, weight).

    With batch_stats the norm uses the statistics of the batch, which are returned [C]. Without, the
    norm uses mean and var [C], there is no norm if they are None, and the two results are empty.
    """
    _, _, gamma, beta, u = _wide(x, weight, gamma, beta, stride)
    stats = u.new_empty(0), u.new_empty(0)
    if batch_stats:
        var, mean = torch.var_mean(u, (0, 2, 3), correction=0)
        stats = mean, var
    if mean is not None and var is not None:
        mean, var = (t.to(u.dtype).view_as(gamma) for t in (mean, var))
        u = (u - mean) * torch.rsqrt(var + eps) * gamma + beta
    out = activations.apply(u, act, slope).to(x.dtype)
    return out.contiguous(memory_format=memory_format(x)), *stats


def _fake_depthwise_norm_backward(a: Any) -> tuple[Tensor, ...]:
    channels = a.x.size(1)
    vector = a.x.new_empty(0 if a.mean is None else channels, dtype=compute_dtype(a.x.dtype))
    dx = empty_map(a.x, channels) if a.need_dx else a.x.new_empty(0)
    dw = vector.new_empty(a.weight.shape if a.need_dw else 0)
    return dx, dw, vector, torch.empty_like(vector)


@operator(
    "depthwise_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, "
    "Tensor? mean, Tensor? var, float eps, bool batch_stats, int stride, int act, float slope, "
    "bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw, Tensor dgamma, Tensor dbeta)",
    _fake_depthwise_norm_backward,
)
def eager_depthwise_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    batch_stats: bool,
    stride: int,
    act: int,
    slope: float,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``depthwise_norm``; empty if not needed.

    mean, var: [C], the statistics that the forward used; None without a norm.
    """
    data, weight, gamma, beta, u = _wide(x, weight, gamma, beta, stride)
    g, dims = grad.to(u.dtype), (0, 2, 3)
    inv = torch.ones_like(gamma)
    if mean is not None and var is not None:
        mean, var = (t.to(u.dtype).view_as(gamma) for t in (mean, var))
        inv = torch.rsqrt(var + eps)
        u = (u - mean) * inv
    g, _ = activations.backward(g, u * gamma + beta, act, slope)
    dbeta, dgamma = g.sum(dims), (g * u).sum(dims)
    if batch_stats:
        g = g - (dbeta.view_as(gamma) + u * dgamma.view_as(gamma)) / (g.numel() // g.size(1))
    if mean is None:
        dbeta, dgamma = u.new_empty(0), u.new_empty(0)
    else:
        g = g * (inv * gamma)
    half = weight.size(-1) // 2
    geometry = None, (stride, stride), (half, half), (1, 1), False, (0, 0), x.size(1)
    dx, dw, _ = torch.ops.aten.convolution_backward.default(
        g, data, weight, *geometry, [need_dx, need_dw, False]
    )
    dx = dx.to(x.dtype).contiguous(memory_format=memory_format(x)) if need_dx else x.new_empty(0)
    return dx, dw.contiguous() if need_dw else u.new_empty(0), dgamma, dbeta


depthwise_norm = native.depthwise_norm
depthwise_norm_backward = native.depthwise_norm_backward


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    stride: int = 1,
    act: int = activations.NONE,
    slope: float = activations.DEFAULT_SLOPE,
) -> Tensor:
    """act(depthwise(x, weight) + shift), with zero padding of k // 2. Not differentiable.

    Args:
        x: [N, C, H, W], dense, NCHW or channels_last.
        weight: [C, 1, k, k] as ``fold`` gives it, k in 1, 3, 5, 7.
        shift: [C], as ``fold`` gives it.
        stride: 1 or 2.
        act, slope: a code of ``activations`` and its slope.

    Returns:
        [N, C, Ho, Wo] with Ho = (H - 1) // stride + 1, and Wo alike, in the dtype and layout of x.

    Raises:
        RuntimeError: a shape, dtype, kernel size or stride that does not fit.
    """
    k = _checked(x, weight, shift, stride)
    function = native.depthwise_conv if runs_native(x) else eager_depthwise_conv
    return function(x, weight, shift, k, stride, act, slope)


def depthwise_conv_sums(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    stride: int = 1,
    act: int = activations.NONE,
    slope: float = activations.DEFAULT_SLOPE,
) -> tuple[Tensor, Tensor]:
    """``depthwise_conv``, and the sums over pixels of its output that a gate needs.

    Args, Raises: as ``depthwise_conv``.

    Returns:
        The output, and sums [N, parts, C] in the compute dtype: one sum for each of several parts
        of an image, in a fixed order.
    """
    k = _checked(x, weight, shift, stride)
    function = native.depthwise_conv_sums if runs_native(x) else eager_depthwise_conv_sums
    return function(x, weight, shift, k, stride, act, slope)


def _checked(x: Tensor, weight: Tensor, shift: Tensor, stride: int) -> int:
    """The kernel size of a depthwise convolution. RuntimeError if the arguments do not fit."""
    k = weight.size(-1)
    if not has_depthwise(k, stride):
        raise RuntimeError(
            f"depthwise_conv needs a kernel size in {_KERNEL_SIZES} and a stride in {_STRIDES}, "
            f"got {k} and {stride}"
        )
    if weight.shape != (x.size(1), 1, k, k) or shift.shape != (x.size(1),):
        raise RuntimeError(
            f"depthwise_conv needs a weight of [{x.size(1)}, 1, k, k] and a shift of "
            f"[{x.size(1)}] for x of shape {list(x.shape)}, got {list(weight.shape)} and "
            f"{list(shift.shape)}"
        )
    return k
