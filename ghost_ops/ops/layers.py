"""Operators for what stands between the Ghost modules of a network.

``depthwise_conv``: a depthwise convolution with a batch norm folded in and an activation;
``squeeze_excite_``: x times its gate, in place. A GPU does without that pass over x: there
``depthwise_conv_sums`` also sums its output, ``squeeze_excite_gate`` makes the gate alone, and
``ghost_apply_gated`` multiplies x by it as it reads x. ``conv_stem`` is a network's first
convolution, folded; ``ghost_apply_pooled`` its last one, with the pooling. ``ghost_conv_apply`` is
a Ghost module, or a convolution, with a kernel of any size.
In training ``depthwise_norm``, a depthwise convolution with a batch norm and an activation, and its
gradients; and the two passes over planes that the gradient of a gate needs (``layers``; these two
contiguous only).

Native kernels for NCHW and channels_last, in the dtypes of the Ghost ops: on the CPU for
``depthwise_conv``, ``squeeze_excite_``, ``ghost_conv_apply`` and training's four, on CUDA for the
others and ``depthwise_conv``. Elsewhere, and with the eager backend, PyTorch's operators.
Parameters are in the compute dtype: float64 for float64, else float32; the two matrices of a gate
on CUDA in x's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, backends
from ..autograd.ghost import dense
from ..reference import hard_sigmoid
from . import eager as eager_ops
from .eager import compute_dtype, memory_format
from .ghost import native

HARD_SIGMOID, SIGMOID = range(2)  # codes of the gate's function

_library = torch.library.Library("ghost_ops", "FRAGMENT")
_KERNEL_SIZES, _STRIDES = (1, 3, 5, 7), (1, 2)
_LARGEST_CONV = 7  # kernel size that ``ghost_conv_apply`` is chosen for
MOST_POOLED = 512  # pixels of a map that ``ghost_apply_pooled`` takes
_FORMATS = (torch.contiguous_format, torch.channels_last)  # by (is channels_last)

SCHEMAS = (
    "depthwise_conv(Tensor x, Tensor weight, Tensor shift, int kernel_size, int stride, int act, "
    "float slope) -> Tensor",
    "depthwise_conv_sums(Tensor x, Tensor weight, Tensor shift, int kernel_size, int stride, "
    "int act, float slope) -> (Tensor out, Tensor sums)",
    "depthwise_norm(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, "
    "Tensor? var, float eps, bool batch_stats, int stride, int act, float slope) "
    "-> (Tensor out, Tensor mean, Tensor var)",
    "depthwise_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, "
    "Tensor? mean, Tensor? var, float eps, bool batch_stats, int stride, int act, float slope, "
    "bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw, Tensor dgamma, Tensor dbeta)",
    "plane_affine(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    "plane_dot(Tensor x, Tensor other) -> Tensor",
    "squeeze_excite_(Tensor(a!) x, Tensor w_reduce, Tensor b_reduce, Tensor w_expand, "
    "Tensor b_expand, int act, float slope, int gate) -> ()",
    "squeeze_excite_gate(Tensor x, Tensor? sums, Tensor w_reduce, Tensor b_reduce, "
    "Tensor w_expand, Tensor b_expand, int act, float slope, int gate) -> Tensor",
    "conv_stem(Tensor x, Tensor weight, Tensor shift, int stride, int act, float slope, "
    "bool channels_last) -> Tensor",
    "ghost_apply_pooled(Tensor x, Tensor packed, int channels, int act, float slope) -> Tensor",
    "ghost_apply_gated(Tensor x, Tensor in_gate, Tensor packed, Tensor? residual, Tensor? gate, "
    "int intrinsic, int out_channels, int ratio, int dw_size, int stride, int act1, float slope1, "
    "int act2, float slope2, bool has_primary) -> Tensor",
    "ghost_conv_apply(Tensor x, Tensor packed, Tensor? residual, int kernel_size, int padding, "
    "bool tail, int intrinsic, int out_channels, int ratio, int dw_size, int stride, int act1, "
    "float slope1, int act2, float slope2) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)


def on_gpu(t: Tensor) -> bool:
    """Whether the kernels of a GPU compute on t: what is packed, and which operators run."""
    return t.is_cuda


def has_depthwise(kernel_size: int, stride: int) -> bool:
    """Whether ``depthwise_conv`` computes such a convolution."""
    return kernel_size in _KERNEL_SIZES and stride in _STRIDES


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
        Weight like ``weight`` and shift [M]. On a GPU the memory of the weight is
        [k, k, C / groups, M]: its kernels read neighbouring channels of one tap.
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


def pack_gate(
    w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gate's tensors as ``squeeze_excite_`` and ``squeeze_excite_gate`` take them.

    Args:
        w_reduce: [R, C, 1, 1]. b_reduce: [R]. w_expand: [C, R, 1, 1]. b_expand: [C].

    Returns:
        [R, C], [R], [R, C] (transposed) and [C].
    """
    wide = compute_dtype(w_reduce.dtype)
    # A GPU is bound by the bytes of the matrices.
    narrow = w_reduce.dtype if on_gpu(w_reduce) else wide
    reduce, expand = (
        t.detach().to(narrow).contiguous() for t in (w_reduce.flatten(1), w_expand.flatten(1).t())
    )
    return reduce, b_reduce.detach().to(wide), expand, b_expand.detach().to(wide)


def _eager_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    kernel_size: int,
    stride: int,
    act: int,
    slope: float,
) -> Tensor:
    # A GPU's convolution accumulates in float32: conversions of x would only double the bytes.
    dtype = x.dtype if x.is_cuda else weight.dtype
    weight, shift = weight.to(dtype), shift.to(dtype)
    u = F.conv2d(x.to(dtype), weight, shift, stride, kernel_size // 2, 1, weight.size(0))
    out = activations.apply(u, act, slope, inplace=True).to(x.dtype)
    return out.contiguous(memory_format=memory_format(x))


def _eager_depthwise_conv_sums(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    kernel_size: int,
    stride: int,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    out = _eager_depthwise_conv(x, weight, shift, kernel_size, stride, act, slope)
    return out, out.sum((2, 3), dtype=weight.dtype)[:, None]


def _wide_depthwise(
    x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, stride: int
) -> tuple[Tensor, ...]:
    """x, weight, gamma, beta [C, 1, 1] and u in the compute dtype."""
    wide = compute_dtype(x.dtype)
    x, weight = x.to(wide), weight.to(wide)
    ones, zeros = x.new_ones(x.size(1), 1, 1), x.new_zeros(x.size(1), 1, 1)
    gamma = ones if gamma is None else gamma.to(wide).view_as(ones)
    beta = zeros if beta is None else beta.to(wide).view_as(zeros)
    u = F.conv2d(x, weight, None, stride, weight.size(-1) // 2, 1, weight.size(0))
    return x, weight, gamma, beta, u


def _eager_depthwise_norm(
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
    _, _, gamma, beta, u = _wide_depthwise(x, weight, gamma, beta, stride)
    stats = u.new_empty(0), u.new_empty(0)
    if batch_stats:
        var, mean = torch.var_mean(u, (0, 2, 3), correction=0)
        stats = mean, var
    if mean is not None and var is not None:
        mean, var = (t.to(u.dtype).view_as(gamma) for t in (mean, var))
        u = (u - mean) * torch.rsqrt(var + eps) * gamma + beta
    out = activations.apply(u, act, slope).to(x.dtype)
    return out.contiguous(memory_format=memory_format(x)), *stats


def _eager_depthwise_norm_backward(
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
    data, weight, gamma, beta, u = _wide_depthwise(x, weight, gamma, beta, stride)
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
    dx, dw, _ = torch.ops.aten.convolution_backward.default(
        g, data, weight, None, (stride, stride), (half, half), (1, 1), False, (0, 0), x.size(1),
        [need_dx, need_dw, False],
    )  # fmt: skip
    dx = dx.to(x.dtype).contiguous(memory_format=memory_format(x)) if need_dx else x.new_empty(0)
    return dx, dw.contiguous() if need_dw else u.new_empty(0), dgamma, dbeta


def _eager_plane_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out = torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None])
    return out.to(x.dtype).contiguous()


def _eager_plane_dot(x: Tensor, other: Tensor) -> Tensor:
    wide = compute_dtype(x.dtype)
    return (x.to(wide) * other.to(wide)).sum((2, 3))


def _eager_squeeze_excite_(
    x: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int,
    slope: float,
    gate: int,
) -> None:
    parameters = w_reduce, b_reduce, w_expand, b_expand
    x.mul_(_eager_squeeze_excite_gate(x, None, *parameters, act, slope, gate)[:, :, None, None])


def _eager_squeeze_excite_gate(
    x: Tensor,
    sums: Tensor | None,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int,
    slope: float,
    gate: int,
) -> Tensor:
    wide = b_reduce.dtype
    s = x.mean((2, 3), dtype=wide) if sums is None else sums.sum(1) / (x.size(2) * x.size(3))
    s = activations.apply(torch.addmm(b_reduce, s, w_reduce.to(wide).t()), act, slope)
    s = torch.addmm(b_expand, s, w_expand.to(wide))
    s = hard_sigmoid(s) if gate == HARD_SIGMOID else torch.sigmoid(s)
    return s.to(x.dtype)


def _eager_conv_stem(
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


def _eager_ghost_apply_pooled(
    x: Tensor, packed: Tensor, channels: int, act: int, slope: float
) -> Tensor:
    numbers = (channels, channels, 1, 1, 1, act, slope, activations.NONE, 0.0, True)
    return native.ghost_apply(x, packed, None, None, *numbers).mean((2, 3))


def _eager_ghost_apply_gated(x: Tensor, in_gate: Tensor, *arguments: Any) -> Tensor:
    return native.ghost_apply(dense(x * in_gate[:, :, None, None]), *arguments)


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

    The pixels under the kernel become channels of a 1x1 convolution, so that how the weights are
    packed does not matter here.
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
    # Its strides are those of a new tensor, also where they do not matter.
    return torch.empty_like(out, memory_format=memory_format(x)).copy_(out)


def _eager_ghost_conv_apply(*arguments: Any) -> Tensor:
    return _conv_apply(native.ghost_apply, *arguments)


def _conv_size(size: int, kernel_size: int, padding: int, stride: int) -> int:
    return (size + 2 * padding - kernel_size) // stride + 1


def _map(x: Tensor, channels: int, stride: int) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, channels, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_depthwise_conv(x, weight, shift, kernel_size, stride, act, slope):
    return _map(x, x.size(1), stride)


def _fake_depthwise_conv_sums(x, weight, shift, kernel_size, stride, act, slope):
    # In how many parts is the kernel's choice.
    parts = torch.library.get_ctx().new_dynamic_size()
    return _map(x, x.size(1), stride), weight.new_empty(x.size(0), parts, x.size(1))


def _fake_depthwise_norm(
    x, weight, gamma, beta, mean, var, eps, batch_stats, stride, act, slope
):  # fmt: skip
    stats = x.new_empty(x.size(1) if batch_stats else 0, dtype=compute_dtype(x.dtype))
    return _map(x, x.size(1), stride), stats, torch.empty_like(stats)


def _fake_depthwise_norm_backward(
    grad, x, weight, gamma, beta, mean, var, eps, batch_stats, stride, act, slope, need_dx, need_dw
):  # fmt: skip
    size = 0 if mean is None else x.size(1)
    vector = x.new_empty(size, dtype=compute_dtype(x.dtype))
    dx = _map(x, x.size(1), 1) if need_dx else x.new_empty(0)
    dw = vector.new_empty(weight.shape if need_dw else 0)
    return dx, dw, vector, torch.empty_like(vector)


def _fake_plane_affine(x, scale, shift):
    return x.new_empty(x.shape)


def _fake_plane_dot(x, other):
    return x.new_empty(x.shape[:2], dtype=compute_dtype(x.dtype))


def _fake_squeeze_excite_(x, w_reduce, b_reduce, w_expand, b_expand, act, slope, gate):
    return None


def _fake_squeeze_excite_gate(
    x, sums, w_reduce, b_reduce, w_expand, b_expand, act, slope, gate
):  # fmt: skip
    return x.new_empty(x.shape[:2])


def _fake_conv_stem(x, weight, shift, stride, act, slope, channels_last):
    return _map(x, weight.size(0), stride).contiguous(memory_format=_FORMATS[channels_last])


def _fake_ghost_apply_pooled(x, packed, channels, act, slope):
    return x.new_empty(x.size(0), channels)


def _fake_ghost_apply_gated(
    x, in_gate, packed, residual, gate, intrinsic, out_channels, ratio, dw_size, stride, act1,
    slope1, act2, slope2, has_primary,
):  # fmt: skip
    return _map(x, out_channels, stride)


def _fake_ghost_conv_apply(
    x, packed, residual, kernel_size, padding, tail, intrinsic, out_channels, ratio, dw_size,
    stride, act1, slope1, act2, slope2,
):  # fmt: skip
    size = [_conv_size(x.size(i), kernel_size, padding, stride) for i in (2, 3)]
    shape = (x.size(0), out_channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


_EAGER = (
    _eager_depthwise_conv,
    _eager_depthwise_conv_sums,
    _eager_depthwise_norm,
    _eager_depthwise_norm_backward,
    _eager_plane_affine,
    _eager_plane_dot,
    _eager_squeeze_excite_,
    _eager_squeeze_excite_gate,
    _eager_conv_stem,
    _eager_ghost_apply_pooled,
    _eager_ghost_apply_gated,
    _eager_ghost_conv_apply,
)
_FAKES = (
    _fake_depthwise_conv,
    _fake_depthwise_conv_sums,
    _fake_depthwise_norm,
    _fake_depthwise_norm_backward,
    _fake_plane_affine,
    _fake_plane_dot,
    _fake_squeeze_excite_,
    _fake_squeeze_excite_gate,
    _fake_conv_stem,
    _fake_ghost_apply_pooled,
    _fake_ghost_apply_gated,
    _fake_ghost_conv_apply,
)

for _schema, _name, _function, _fake in zip(SCHEMAS, NAMES, _EAGER, _FAKES, strict=True):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, torch.no_grad()(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ghost_ops::{_name}", _fake, lib=_library)

_depthwise_conv = torch.ops.ghost_ops.depthwise_conv.default
depthwise_norm = torch.ops.ghost_ops.depthwise_norm.default
depthwise_norm_backward = torch.ops.ghost_ops.depthwise_norm_backward.default
_plane_affine = torch.ops.ghost_ops.plane_affine.default
_plane_dot = torch.ops.ghost_ops.plane_dot.default
_squeeze_excite_ = torch.ops.ghost_ops.squeeze_excite_.default
_depthwise_conv_sums = torch.ops.ghost_ops.depthwise_conv_sums.default
_squeeze_excite_gate = torch.ops.ghost_ops.squeeze_excite_gate.default
_conv_stem = torch.ops.ghost_ops.conv_stem.default
ghost_apply_pooled = torch.ops.ghost_ops.ghost_apply_pooled.default
ghost_apply_gated = torch.ops.ghost_ops.ghost_apply_gated.default
native_ghost_conv_apply = torch.ops.ghost_ops.ghost_conv_apply.default

# Only the CPU has it, and nothing that is traced calls it.
_library.define("run_program(Tensor x, Tensor[] tensors, Tensor code) -> Tensor")
native_run_program = torch.ops.ghost_ops.run_program.default


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

    y = act1(conv(x, w1) + shift1); z = act2(depthwise(y, w2) + shift2);
    out = concat(y', z)[:, :out_channels] + residual, where y' = act2(tail_scale * y + tail_shift)
    with a tail, else y.

    Args:
        x: [N, C, H, W], dense, NCHW or channels_last.
        packed: 1-D, what the ``ghost_pack`` of the backend in force gives for
            ``w1.permute(0, 2, 3, 1).reshape(m, k * k * C, 1, 1)``, the norms and w2; with a tail
            tail_scale [m] and tail_shift [m] come after it. In the compute dtype.
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
    if _native(x):
        return native_ghost_conv_apply(x, packed, residual, *numbers)
    return _conv_apply(eager_ops.ghost_apply, x, packed, residual, *numbers)


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
        and stride in _STRIDES
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
        weight: [O, C, 3, 3] as ``fold`` gives it; O even, at most 512. shift: [O], likewise.
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
            f"an even O of at most 512, and a stride in {_STRIDES}; got {list(weight.shape)} and "
            f"{stride}"
        )
    function = _conv_stem if _native(x) else _eager_conv_stem
    return function(x, weight, shift, stride, act, slope, channels_last)


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
        shift: [C], likewise.
        stride: 1 or 2.
        act, slope: a code of ``activations``.

    Returns:
        [N, C, Ho, Wo] with Ho = (H - 1) // stride + 1, and Wo alike, in the dtype and layout of x.

    Raises:
        RuntimeError: a shape, dtype, kernel size or stride that does not fit.
    """
    k = _checked(x, weight, shift, stride)
    function = _depthwise_conv if _native(x) else _eager_depthwise_conv
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
        The output, and sums [N, parts, C] in the compute dtype: those of parts of an image, in a
        fixed order.
    """
    k = _checked(x, weight, shift, stride)
    function = _depthwise_conv_sums if _native(x) else _eager_depthwise_conv_sums
    return function(x, weight, shift, k, stride, act, slope)


def _checked(x: Tensor, weight: Tensor, shift: Tensor, stride: int) -> int:
    """The kernel size of a depthwise convolution whose arguments fit together."""
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


def squeeze_excite_(
    x: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int = activations.RELU,
    slope: float = activations.DEFAULT_SLOPE,
    gate: int = HARD_SIGMOID,
) -> None:
    """x *= gate(act(mean of x * w_reduce + b_reduce) * w_expand + b_expand), in place.

    Args:
        x: [N, C, H, W], dense, NCHW or channels_last.
        w_reduce, b_reduce, w_expand, b_expand: as ``pack_gate`` gives them.
        act, slope: a code of ``activations``. gate: HARD_SIGMOID or SIGMOID.

    Raises:
        RuntimeError: a shape or dtype that does not fit.

    Source: Hu et al., arXiv:1709.01507.
    """
    arguments = w_reduce, b_reduce, w_expand, b_expand, act, slope, gate
    if on_gpu(x):
        x.mul_(squeeze_excite_gate(x, None, *arguments)[:, :, None, None])
        return
    if not _native(x):
        _eager_squeeze_excite_(x, *arguments)
        return
    _squeeze_excite_(x, *arguments)
    if not x.is_inference():
        # The kernel writes memory that autograd does not watch: tell it, and tell caches.
        torch.autograd.graph.increment_version(x)


def squeeze_excite_gate(
    x: Tensor,
    sums: Tensor | None,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int = activations.RELU,
    slope: float = activations.DEFAULT_SLOPE,
    gate: int = HARD_SIGMOID,
) -> Tensor:
    """gate(act(mean of x * w_reduce + b_reduce) * w_expand + b_expand), which x is left without.

    Args:
        sums: of ``depthwise_conv_sums``, if x is its output; x is not read then.
        The others: as ``squeeze_excite_``.

    Returns:
        [N, C] in the dtype of x.

    Raises, Source: as ``squeeze_excite_``.
    """
    function = _squeeze_excite_gate if _native(x) else _eager_squeeze_excite_gate
    return function(x, sums, w_reduce, b_reduce, w_expand, b_expand, act, slope, gate)


def _native(x: Tensor) -> bool:
    return backends.select(x.device.type, x.dtype) == "native"
