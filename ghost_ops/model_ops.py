"""Operators for what stands between the Ghost modules of a bottleneck.

``depthwise_conv``: a depthwise convolution with a batch norm folded in and an activation;
``squeeze_excite_``: x times its gate, in place. In training ``depthwise_conv_backward``, and the
two passes over planes that the gradient of a gate needs (``layers``; these three contiguous only).
Native kernels on the CPU for NCHW and channels_last, in the dtypes of the Ghost ops; elsewhere, and
with the eager backend, PyTorch's operators. Parameters are in the compute dtype: float64 for
float64, else float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, backends
from .eager_ops import compute_dtype, memory_format
from .reference import hard_sigmoid

HARD_SIGMOID, SIGMOID = range(2)  # codes of the gate's function

_library = torch.library.Library("ghost_ops", "FRAGMENT")
_KERNEL_SIZES, _STRIDES = (1, 3, 5, 7), (1, 2)

SCHEMAS = (
    "depthwise_conv(Tensor x, Tensor weight, Tensor shift, int kernel_size, int stride, int act, "
    "float slope) -> Tensor",
    "depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, int kernel_size, int stride, "
    "bool need_dx) -> (Tensor dx, Tensor dw)",
    "plane_affine(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    "plane_dot(Tensor x, Tensor other) -> Tensor",
    "squeeze_excite_(Tensor(a!) x, Tensor w_reduce, Tensor b_reduce, Tensor w_expand, "
    "Tensor b_expand, int act, float slope, int gate) -> ()",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)


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

    Computed in float64; the results are in the compute dtype, on CUDA in that of ``weight``.

    Args:
        weight: [M, C / groups, k, k].
        bias, gamma, beta, mean, var: [M], or None for 0, 1, 0, 0 and 1 (without eps).

    Returns:
        Contiguous weight like ``weight`` and shift [M].
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
    # On CUDA the library's convolution runs in the dtype of its input and accumulates in float32:
    # float32 operands would double the bytes, and conversions of x double them again.
    dtype = weight.dtype if weight.is_cuda else compute_dtype(weight.dtype)
    folded = weight.detach().to(wide) * scale.view(-1, 1, 1, 1)
    return folded.to(dtype).contiguous(), shift.to(dtype)


def pack_gate(
    w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gate's tensors as ``squeeze_excite_`` takes them.

    Args:
        w_reduce: [R, C, 1, 1]. b_reduce: [R]. w_expand: [C, R, 1, 1]. b_expand: [C].

    Returns:
        [R, C], [R], [R, C] (transposed) and [C].
    """
    dtype = compute_dtype(w_reduce.dtype)
    reduce, expand = w_reduce.flatten(1), w_expand.flatten(1).t()
    return tuple(t.detach().to(dtype).contiguous() for t in (reduce, b_reduce, expand, b_expand))


def _eager_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    kernel_size: int,
    stride: int,
    act: int,
    slope: float,
) -> Tensor:
    u = F.conv2d(x.to(weight.dtype), weight, shift, stride, kernel_size // 2, 1, weight.size(0))
    out = activations.apply(u, act, slope, inplace=True).to(x.dtype)
    return out.contiguous(memory_format=memory_format(x))


def _eager_depthwise_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kernel_size: int, stride: int, need_dx: bool
) -> tuple[Tensor, Tensor]:
    dx, dw, _ = torch.ops.aten.convolution_backward.default(
        grad.to(weight.dtype), x.to(weight.dtype), weight, None, (stride, stride),
        (kernel_size // 2, kernel_size // 2), (1, 1), False, (0, 0), x.size(1),
        [need_dx, True, False],
    )  # fmt: skip
    dx = dx.to(x.dtype).contiguous() if need_dx else x.new_empty(0)
    return dx, dw.contiguous()


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
    s = x.mean((2, 3), dtype=w_reduce.dtype)
    s = activations.apply(torch.addmm(b_reduce, s, w_reduce.t()), act, slope)
    s = torch.addmm(b_expand, s, w_expand)
    s = hard_sigmoid(s) if gate == HARD_SIGMOID else torch.sigmoid(s)
    x.mul_(s.to(x.dtype)[:, :, None, None])


def _fake_depthwise_conv(x, weight, shift, kernel_size, stride, act, slope):
    n, c, h, w = x.shape
    shape = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_depthwise_conv_backward(grad, x, weight, kernel_size, stride, need_dx):
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(weight.shape)


def _fake_plane_affine(x, scale, shift):
    return x.new_empty(x.shape)


def _fake_plane_dot(x, other):
    return x.new_empty(x.shape[:2], dtype=compute_dtype(x.dtype))


def _fake_squeeze_excite_(x, w_reduce, b_reduce, w_expand, b_expand, act, slope, gate):
    return None


_EAGER = (
    _eager_depthwise_conv,
    _eager_depthwise_conv_backward,
    _eager_plane_affine,
    _eager_plane_dot,
    _eager_squeeze_excite_,
)
_FAKES = (
    _fake_depthwise_conv,
    _fake_depthwise_conv_backward,
    _fake_plane_affine,
    _fake_plane_dot,
    _fake_squeeze_excite_,
)

for _schema, _name, _function, _fake in zip(SCHEMAS, NAMES, _EAGER, _FAKES, strict=True):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, torch.no_grad()(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ghost_ops::{_name}", _fake, lib=_library)

_depthwise_conv = torch.ops.ghost_ops.depthwise_conv.default
_depthwise_conv_backward = torch.ops.ghost_ops.depthwise_conv_backward.default
_plane_affine = torch.ops.ghost_ops.plane_affine.default
_plane_dot = torch.ops.ghost_ops.plane_dot.default
_squeeze_excite_ = torch.ops.ghost_ops.squeeze_excite_.default


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
    function = _depthwise_conv if _native(x) else _eager_depthwise_conv
    return function(x, weight, shift, k, stride, act, slope)


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
    if not _native(x):
        _eager_squeeze_excite_(x, w_reduce, b_reduce, w_expand, b_expand, act, slope, gate)
        return
    _squeeze_excite_(x, w_reduce, b_reduce, w_expand, b_expand, act, slope, gate)
    if not x.is_inference():
        # The kernel writes memory that autograd does not watch: tell it, and tell caches.
        torch.autograd.graph.increment_version(x)


def _native(x: Tensor) -> bool:
    return backends.select(x.device.type, x.dtype) == "native"
