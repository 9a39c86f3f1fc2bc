"""Convolutions and Ghost modules of a network in inference, with batch norms folded in.

With native kernels on CUDA: ``conv_stem``, the first convolution of a network;
``ghost_apply_pooled``, the last convolution with the pooling; ``ghost_apply_gated``, a Ghost module
on a gated input. With native kernels on the CPU: ``ghost_conv_apply``, a Ghost module or
convolution with a kernel of any size. On other devices, and with the eager backend, PyTorch's
operators run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, backends
from ..conventions import compute_dtype, dense, empty_map, memory_format
from . import eager
from .define import declare, native, operator
from .select import on_gpu, runs_native

MOST_POOLED = 512  # pixels of a map that ``ghost_apply_pooled`` takes
_LARGEST_CONV = 7  # largest kernel size that ``ghost_conv_apply`` is chosen for
_STEM_STRIDES = (1, 2)
_FORMATS = (torch.contiguous_format, torch.channels_last)  # index: channels_last as a bool


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and shift of a convolution with its batch norm folded in.

    Computed in float64; the results are in the compute dtype.

    Args:
        weight: [M, C / groups, k, k].
        bias, gamma, beta, mean, var: [M], or None for 0, 1, 0, 0 and 1 (without eps).

    Returns:
        Weight [M, C / groups, k, k] and shift [M]. On a GPU the memory order of the weight is
        [k, k, C / groups, M], because the GPU kernels read neighbouring channels of one tap.
    """
    wide = torch.float64
    scale = weight.new_ones(weight.size(0), dtype=wide)
    if var is not None:
        scale = torch.rsqrt(var.to(wide) + eps)
    if gamma is not None:
        scale = scale * gamma.to(wide)
    shift = torch.zeros_like(scale) if bias is None else bias.to(wide)
    if mean is not None:
        shift = shift - mean.to(wide)
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.to(wide)
    dtype = compute_dtype(weight.dtype)
    folded = (weight.detach().to(wide) * scale.view(-1, 1, 1, 1)).to(dtype)
    if on_gpu(weight):
        folded = folded.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    else:
        folded = folded.contiguous()
    return folded, shift.to(dtype)


def _fake_conv_stem(a: Any) -> Tensor:
    out = empty_map(a.x, a.weight.size(0), a.stride)
    return out.contiguous(memory_format=_FORMATS[a.channels_last])


@operator(
    "conv_stem(Tensor x, Tensor weight, Tensor shift, int stride, int act, float slope, "
    "bool channels_last) -> Tensor",
    _fake_conv_stem,
)
def eager_conv_stem(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    stride: int,
    act: int,
    slope: float,
    channels_last: bool,
) -> Tensor:
    dtype = x.dtype if x.is_cuda else weight.dtype
    out = F.conv2d(x.to(dtype), weight.to(dtype), shift.to(dtype), stride, 1)
    out = activations.apply(out, act, slope, inplace=True).to(x.dtype)
    return out.contiguous(memory_format=_FORMATS[channels_last])


@operator(
    "ghost_apply_pooled(Tensor x, Tensor packed, int channels, int act, float slope) -> Tensor",
    lambda a: a.x.new_empty(a.x.size(0), a.channels),
)
def eager_ghost_apply_pooled(
    x: Tensor, packed: Tensor, channels: int, act: int, slope: float
) -> Tensor:
    numbers = (channels, channels, 1, 1, 1, act, slope, activations.NONE, 0.0, True)
    return native.ghost_apply(x, packed, None, None, *numbers).mean((2, 3))


@operator(
    "ghost_apply_gated(Tensor x, Tensor in_gate, Tensor packed, Tensor? residual, Tensor? gate, "
    "int intrinsic, int out_channels, int ratio, int dw_size, int stride, int act1, float slope1, "
    "int act2, float slope2, bool has_primary) -> Tensor",
    lambda a: empty_map(a.x, a.out_channels, a.stride),
)
def eager_ghost_apply_gated(x: Tensor, in_gate: Tensor, *arguments: Any) -> Tensor:
    return native.ghost_apply(dense(x * in_gate[:, :, None, None]), *arguments)


ghost_apply_pooled, ghost_apply_gated = native.ghost_apply_pooled, native.ghost_apply_gated


def _conv_size(size: int, kernel_size: int, padding: int, stride: int) -> int:
    return (size + 2 * padding - kernel_size) // stride + 1


def _conv_apply(
    apply: Callable[..., Tensor],
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None,
    kernel_size: int,
    padding: int,
    tail: bool,
    intrinsic: int,
    out_channels: int,
    ratio: int,
    dw_size: int,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
) -> Tensor:
    """``ghost_conv_apply`` through ``apply``, the ``ghost_apply`` that reads ``packed``.

    The pixels under the kernel become channels of a 1x1 convolution. So the function depends on the
    layout of ``packed`` only in the tail's scale and shift, which are its last 2 * m elements.
    """
    m, wide = intrinsic, packed.dtype
    taps = F.unfold(x.to(wide), kernel_size, padding=padding, stride=stride)
    height = _conv_size(x.size(2), kernel_size, padding, stride)
    width = _conv_size(x.size(3), kernel_size, padding, stride)
    taps = taps.view(x.size(0), x.size(1), kernel_size * kernel_size, height, width)
    taps = taps.transpose(1, 2).reshape(x.size(0), -1, height, width)
    rows = packed[: packed.numel() - 2 * m] if tail else packed
    numbers = (m, out_channels, ratio, dw_size, 1, act1, slope1, act2, slope2, True)
    out = apply(taps, rows, None, None, *numbers)
    if tail:
        scale, shift = packed[packed.numel() - 2 * m :].view(2, m, 1, 1)
        y = torch.addcmul(shift, out[:, :m], scale)
        out[:, :m] = activations.apply(y, act2, slope2, inplace=True)
    if residual is not None:
        if residual.shape != out.shape or residual.dtype is not x.dtype:
            raise RuntimeError(
                f"residual must be {list(out.shape)} of {x.dtype}, got {list(residual.shape)} of "
                f"{residual.dtype}"
            )
        out += residual
    out = out.to(x.dtype)
    # A new tensor, so that dimensions of size 1 have the usual strides too.
    return torch.empty_like(out, memory_format=memory_format(x)).copy_(out)


def _fake_ghost_conv_apply(a: Any) -> Tensor:
    size = [_conv_size(a.x.size(i), a.kernel_size, a.padding, a.stride) for i in (2, 3)]
    shape = (a.x.size(0), a.out_channels, *size)
    layout = memory_format(a.x)
    return torch.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=layout)


@operator(
    "ghost_conv_apply(Tensor x, Tensor packed, Tensor? residual, int kernel_size, int padding, "
    "bool tail, int intrinsic, int out_channels, int ratio, int dw_size, int stride, int act1, "
    "float slope1, int act2, float slope2) -> Tensor",
    _fake_ghost_conv_apply,
)
def eager_ghost_conv_apply(*arguments: Any) -> Tensor:
    return _conv_apply(native.ghost_apply, *arguments)


native_ghost_conv_apply = native.ghost_conv_apply
native_run_program = declare("run_program(Tensor x, Tensor[] tensors, Tensor code) -> Tensor")


def has_conv_kernel() -> bool:
    """Whether the native library has a kernel for ``ghost_conv_apply``; on the CPU only."""
    return _has_conv_kernel()


@functools.cache
def _has_conv_kernel() -> bool:
    name = "ghost_ops::ghost_conv_apply"
    return backends.native.load() and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


# A constant of compiled graphs.
has_conv_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_conv(kernel_size: tuple[int, ...]) -> bool:
    """Whether ``ghost_conv_apply`` has a kernel, and is chosen for this kernel size."""
    k = kernel_size[0]
    return has_conv_kernel() and kernel_size == (k, k) and k <= _LARGEST_CONV


def ghost_conv_apply(x: Tensor, packed: Tensor, residual: Tensor | None, *numbers: Any) -> Tensor:
    """A Ghost module with a k x k primary convolution and folded norms. Not differentiable.

    ::

        y   = act1(conv(x, w1) + shift1)
        z   = act2(depthwise(y, w2) + shift2)
        y'  = act2(tail_scale * y + tail_shift) with a tail, else y
        out = concat(y', z)[:, :out_channels] + residual

    Args:
        x: [N, C, H, W], dense, NCHW or channels_last.
        packed: 1-D, in the compute dtype: the result of the selected backend's ``ghost_pack`` for
            ``w1.permute(0, 2, 3, 1).reshape(m, k * k * C, 1, 1)``, the norms and w2; with a tail,
            followed by tail_scale [m] and tail_shift [m].
        residual: like the output, or None.
        numbers: kernel_size, padding, tail, intrinsic (m), out_channels, ratio, dw_size, stride,
            act1, slope1, act2, slope2. The kernel is square; ratio 1 has no z, and dw_size 1. No
            PReLU.

    Returns:
        [N, out_channels, Ho, Wo] with Ho = (H + 2 * padding - kernel_size) // stride + 1, and Wo
        alike, in the dtype and layout of x.

    Raises:
        RuntimeError: a shape or dtype that does not fit.
    """
    if runs_native(x):
        return native_ghost_conv_apply(x, packed, residual, *numbers)
    return _conv_apply(eager.ghost_apply, x, packed, residual, *numbers)


def has_stem(conv: nn.Conv2d) -> bool:
    """Whether ``conv_stem`` computes a convolution."""
    return (
        conv.groups == 1
        and (conv.padding, conv.dilation) == ((1, 1), (1, 1))
        and conv.stride[0] == conv.stride[1]
        and _is_stem(conv.weight, conv.stride[0])
    )


def _is_stem(weight: Tensor, stride: int) -> bool:
    out_channels, in_channels, *size = weight.shape
    return (
        size == [3, 3]
        and stride in _STEM_STRIDES
        and in_channels <= 4
        and out_channels <= 512
        and out_channels % 2 == 0
    )


def conv_stem(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    stride: int = 2,
    act: int = activations.NONE,
    slope: float = activations.DEFAULT_SLOPE,
    channels_last: bool = False,
) -> Tensor:
    """act(conv3x3(x, weight) + shift), with zero padding of 1. Not differentiable.

    Args:
        x: [N, C, H, W], dense, NCHW or channels_last; C at most 4.
        weight: [O, C, 3, 3] as ``fold`` returns it; O even, at most 512. shift: [O], from ``fold``.
        stride: 1 or 2. act, slope: a code of ``activations``.
        channels_last: the layout of the output.

    Returns:
        [N, O, Ho, Wo] with Ho = (H - 1) // stride + 1, and Wo alike, in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or stride that does not fit.
    """
    if weight.dim() != 4 or not _is_stem(weight, stride) or weight.size(1) != x.size(1):
        raise RuntimeError(
            f"conv_stem needs a weight of [O, {x.size(1)}, 3, 3] with at most 4 input channels and "
            f"an even O of at most 512, and a stride in {_STEM_STRIDES}; got {list(weight.shape)} "
            f"and {stride}"
        )
    function = native.conv_stem if runs_native(x) else eager_conv_stem
    return function(x, weight, shift, stride, act, slope, channels_last)
