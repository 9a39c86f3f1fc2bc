"""The operators of the Ghost module: schema, fake and implementation in plain PyTorch.

The dispatcher runs an implementation on a device without a native kernel. For the eager backend
``autograd`` calls the function directly, so that torch.compile traces through it. A forward makes
as many passes over memory as the reference; a backward recomputes the forward first.

Notation, in every function: x [N, C, H, W]; w1 [m, C, 1, 1]; w2 [g, 1, d, d]; gamma1, beta1,
mean1, var1 [m]; gamma2, beta2, mean2, var2 [g]; out [N, out_channels, Ho, Wo].

Dtypes: x, w1 and w2 are one of float32, float64, bfloat16 and float16; gamma, beta, mean and var
have that dtype or float32 (float64 for float64). Statistics, packed parameters and the gradients of
gamma and beta are in the compute dtype: float64 for float64, else float32. Layouts: x and residual
are dense, NCHW or channels_last; weights and vectors are contiguous; grad_out has any strides.
Activations are the codes of ``activations.py``.

Reductions are those of PyTorch: the last bits of their results may depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations, backends
from ..conventions import (
    NEEDS,
    compute_dtype,
    empty_map,
    ghosts_per_map,
    in_format,
    intrinsic_count,
    memory_format,
)
from .conv_gradient import conv_backward
from .define import operator
from .norms import batch_norm, cast, norm, norm_backward, normalise, scale_shift, statistics


def packed_offsets(channels: int, m: int, g: int, d: int, has_primary: bool) -> tuple[int, ...]:
    """Ends of the five parts of a packed tensor without slopes; the last end is its numel.

    The parts are w1 * scale1 and shift1 (scale1 and shift1 without a primary convolution),
    w2 * scale2, shift2, and w2 * scale2 again as [d * d, g]. The first two are rounded up to 16
    channels, the panel of the native kernels.
    """
    if has_primary:
        rows = -(-m // 16) * 16
        first, second = rows * channels, rows
    else:
        first, second = m, m
    third = first + second + g * d * d
    return first, first + second, third, third + g, third + g + g * d * d


def packed_numel(
    channels: int, m: int, g: int, d: int, has_primary: bool, has_pairs: bool = False
) -> int:
    """Number of elements of a packed tensor without slopes, of the eager and native backends.

    has_pairs: see ``packs_pairs``.
    """
    numel, rows = packed_offsets(channels, m, g, d, has_primary)[-1], -(-m // 16) * 16
    return -(-numel // 16) * 16 + rows * channels // 2 + rows if has_pairs else numel


def packs_pairs(w1: Tensor | None, w2: Tensor) -> bool:
    """Whether the CPU's ``ghost_pack`` appends w1 in bfloat16, for the product on AMX tiles."""
    return (
        w1 is not None
        and (w1.device.type, w1.dtype) == ("cpu", torch.bfloat16)
        and w2.dtype is not torch.float64
        and w1.size(1) % 2 == 0
        and backends.native.load()
        and backends.native.library().machine(1)["amx"]
    )


def pack_sizes(a: Any) -> tuple[int, int, int, int]:
    """(C or 0 without w1, m, g, d) from the arguments of ``ghost_pack``."""
    m = intrinsic_count(a.w1, a.gamma1, a.beta1, a.mean1, a.var1)
    return 0 if a.w1 is None else a.w1.size(1), m, a.w2.size(0), a.w2.size(-1)


def slope_count(a: Any) -> int:
    """Number of PReLU slopes among the arguments of ``ghost_pack``."""
    return sum(t.numel() for t in (a.prelu1, a.prelu2) if t is not None)


def _vectors(like: Tensor, size: int, count: int = 2) -> tuple[Tensor, ...]:
    """``count`` uninitialised vectors of the compute dtype."""
    dtype = compute_dtype(like.dtype)
    return tuple(like.new_empty(size, dtype=dtype) for _ in range(count))


def _fake_pack(a: Any) -> Tensor:
    numel = packed_numel(*pack_sizes(a), a.w1 is not None, packs_pairs(a.w1, a.w2))
    return a.w2.new_empty(numel + slope_count(a), dtype=compute_dtype(a.w2.dtype))


@operator(
    "ghost_pack(Tensor? w1, Tensor? gamma1, Tensor? beta1, Tensor? mean1, Tensor? var1, "
    "float eps1, Tensor w2, Tensor? gamma2, Tensor? beta2, Tensor? mean2, Tensor? var2, "
    "float eps2, Tensor? prelu1=None, Tensor? prelu2=None) -> Tensor",
    _fake_pack,
)
def ghost_pack(
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    eps1: float,
    w2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps2: float,
    prelu1: Tensor | None = None,
    prelu2: Tensor | None = None,
) -> Tensor:
    """The weights with both batch norms folded in: one 1-D tensor in the compute dtype.

    It holds the parts of ``packed_offsets``, then the PReLU slopes prelu1 [m] and prelu2 [g] if
    they are given.
    """
    m = intrinsic_count(w1, gamma1, beta1, mean1, var1)
    g, d = w2.size(0), w2.size(-1)
    dtype = compute_dtype(w2.dtype)
    scale1, shift1 = scale_shift(gamma1, beta1, mean1, var1, eps1, m, w2, dtype)
    scale2, shift2 = scale_shift(gamma2, beta2, mean2, var2, eps2, g, w2, dtype)
    taps = (cast(w2, dtype) * scale2.view(-1, 1, 1, 1)).reshape(g, d * d)
    cheap = [taps.reshape(-1), shift2, taps.t().reshape(-1)]
    slopes = []
    for name, t, size in (("prelu1", prelu1, m), ("prelu2", prelu2, g)):
        if t is not None and t.numel() != size:
            raise RuntimeError(f"{name} must have {size} elements, got {t.numel()}")
        slopes += [] if t is None else [t.to(dtype).reshape(-1)]
    if w1 is None:
        return torch.cat([scale1, shift1, *cheap, *slopes])
    channels = w1.size(1)
    first, second, *_ = packed_offsets(channels, m, g, d, True)
    folded1 = (cast(w1, dtype).reshape(m, channels) * scale1.view(-1, 1)).reshape(-1)
    if first > m * channels:
        folded1 = F.pad(folded1, (0, first - m * channels))
        shift1 = F.pad(shift1, (0, second - first - m))
    return torch.cat([folded1, shift1, *cheap, *slopes])


def _join(y: Tensor, z: Tensor | None, out_channels: int, x: Tensor) -> Tensor:
    """concat(y, z)[:, :out_channels] as a dense tensor in the dtype and memory format of x."""
    m = y.size(1)
    if z is None:
        out = y if out_channels == m else y[:, :out_channels]
    else:
        out = torch.cat([y, z if out_channels == m + z.size(1) else z[:, : out_channels - m]], 1)
    return in_format(out if out.dtype is x.dtype else out.to(x.dtype), memory_format(x))


def _overwrites(t: Tensor) -> bool:
    """Whether activations may overwrite t; False while a graph is traced."""
    return type(t) is Tensor and not torch.compiler.is_compiling()


@operator(
    "ghost_apply(Tensor x, Tensor packed, Tensor? residual, Tensor? gate, int intrinsic, "
    "int out_channels, int ratio, int dw_size, int stride, int act1, float slope1, int act2, "
    "float slope2, bool has_primary) -> Tensor",
    lambda a: empty_map(a.x, a.out_channels, a.stride if a.has_primary else 1),
)
def ghost_apply(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    intrinsic: int,
    out_channels: int,
    ratio: int,
    dw_size: int,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    has_primary: bool,
) -> Tensor:
    """concat(y, z)[:, :out_channels] * gate + residual, with both batch norms folded in.

    The gate [N, out_channels, Hg, Wg] and the residual [N, out_channels, Ho, Wo] are optional; the
    gate is resized to the output by nearest neighbours. The convolutions run in the dtype of
    ``packed``: folded weights would lose digits in bfloat16 or float16.
    """
    g = intrinsic * ghosts_per_map(ratio)
    _, second, third, fourth, end = packed_offsets(x.size(1), intrinsic, g, dw_size, has_primary)
    slopes1 = packed[end : end + intrinsic] if act1 == activations.PRELU else None
    slopes2 = packed[packed.numel() - g :] if act2 == activations.PRELU else None
    expected = end + sum(t.numel() for t in (slopes1, slopes2) if t is not None)
    if packed.numel() != expected:
        raise RuntimeError(
            f"packed has {packed.numel()} elements; {x.size(1)} input channels, {intrinsic} "
            f"intrinsic and {g} ghost maps with a {dw_size}x{dw_size} kernel need {expected}"
        )
    y = _affine_or_conv(x, packed, intrinsic, g, dw_size, stride, has_primary)
    y = activations.apply(y, act1, slope1, type(y) is Tensor, slopes1)
    z = None
    if g:
        w2 = packed[second:third].view(g, 1, dw_size, dw_size)
        z = F.conv2d(y, w2, packed[third:fourth], 1, dw_size // 2, 1, intrinsic)
        z = activations.apply(z, act2, slope2, type(z) is Tensor, slopes2)
    out = _join(y, z, out_channels, x)
    if gate is not None:
        if gate.dim() != 4 or gate.shape[:2] != out.shape[:2] or gate.dtype is not x.dtype:
            raise RuntimeError(
                f"gate must be [{out.size(0)}, {out.size(1)}, Hg, Wg] of the dtype of x, got "
                f"{list(gate.shape)} of {gate.dtype}"
            )
        out = out.mul_(F.interpolate(gate, out.shape[2:], mode="nearest"))
    return out if residual is None else out.add_(residual)


def _affine_or_conv(
    x: Tensor, packed: Tensor, m: int, g: int, d: int, stride: int, has_primary: bool
) -> Tensor:
    """bn1(u) [N, m, Ho, Wo] in the dtype of the packed parameters."""
    channels = x.size(1)
    first, second, *_ = packed_offsets(channels, m, g, d, has_primary)
    if has_primary:
        w1 = packed[: m * channels].view(m, channels, 1, 1)
        return F.conv2d(x.to(packed.dtype), w1, packed[first : first + m], stride)
    scale, shift = packed[:first], packed[first:second]
    zero, one = torch.zeros_like(shift), torch.ones_like(scale)
    return batch_norm(x.to(packed.dtype), zero, one, scale, shift, 0.0)


@operator(
    "ghost_primary_stats(Tensor x, Tensor? w1, int stride) -> (Tensor mean, Tensor var)",
    lambda a: _vectors(a.x, (a.x.size(1) if a.w1 is None else a.w1.size(0))),
)
def ghost_primary_stats(x: Tensor, w1: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [m] of u = conv(x, w1), or of u = x without w1."""
    return statistics(x if w1 is None else F.conv2d(x, w1, None, stride))


@operator(
    "ghost_cheap_stats(Tensor x, Tensor packed, int intrinsic, int ratio, int dw_size, "
    "int stride, int act1, float slope1, bool has_primary) -> (Tensor mean, Tensor var)",
    lambda a: _vectors(a.packed, a.intrinsic * ghosts_per_map(a.ratio)),
)
def ghost_cheap_stats(
    x: Tensor,
    packed: Tensor,
    intrinsic: int,
    ratio: int,
    dw_size: int,
    stride: int,
    act1: int,
    slope1: float,
    has_primary: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [g] of v = depthwise(y, w2).

    ``packed`` is the result of ``ghost_pack`` without batch norm 2, and with prelu1 if act1 is a
    PReLU.
    """
    g = intrinsic * ghosts_per_map(ratio)
    _, second, third, _, end = packed_offsets(x.size(1), intrinsic, g, dw_size, has_primary)
    slopes1 = packed[end : end + intrinsic] if act1 == activations.PRELU else None
    expected = end if slopes1 is None else end + intrinsic
    if packed.numel() != expected:
        raise RuntimeError(f"packed has {packed.numel()} elements, expected {expected}")
    if g == 0:
        return packed.new_empty(0), packed.new_empty(0)
    y = _affine_or_conv(x, packed, intrinsic, g, dw_size, stride, has_primary)
    y = activations.apply(y, act1, slope1, _overwrites(y), slopes1)
    w2 = packed[second:third].view(g, 1, dw_size, dw_size)
    return statistics(F.conv2d(y, w2, None, 1, dw_size // 2, 1, intrinsic))


def _fake_train_forward(a: Any) -> tuple[Tensor, ...]:
    m = a.x.size(1) if a.w1 is None else a.w1.size(0)
    stride = 1 if a.w1 is None else a.stride
    out = empty_map(a.x, a.out_channels, stride)
    stats1 = _vectors(a.x, m if a.mean1 is None else 0)
    stats2 = _vectors(a.x, a.w2.size(0) if a.mean2 is None else 0)
    return out, *stats1, *stats2, empty_map(a.x, m, stride) if a.keep_u else a.x.new_empty(0)


@operator(
    "ghost_train_forward(Tensor x, Tensor? w1, Tensor? gamma1, Tensor? beta1, Tensor? mean1, "
    "Tensor? var1, float eps1, Tensor? prelu1, Tensor w2, Tensor? gamma2, Tensor? beta2, "
    "Tensor? mean2, Tensor? var2, float eps2, Tensor? prelu2, int out_channels, int stride, "
    "int act1, float slope1, int act2, float slope2, bool keep_u) "
    "-> (Tensor out, Tensor mean1, Tensor var1, Tensor mean2, Tensor var2, Tensor u)",
    _fake_train_forward,
)
def ghost_train_forward(
    x: Tensor,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    eps1: float,
    prelu1: Tensor | None,
    w2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps2: float,
    prelu2: Tensor | None,
    out_channels: int,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    keep_u: bool,
) -> tuple[Tensor, ...]:
    """(out, mean1, var1, mean2, var2, u or empty).

    A norm without mean and var uses the statistics of the batch and returns them; for a norm with
    mean and var the two returned statistics are empty. prelu1 [m] and prelu2 [g] are the slopes if
    act1 or act2 is a PReLU.
    """
    u = x if w1 is None else F.conv2d(x, w1, None, stride)
    y, *stats1 = normalise(u, mean1, var1, gamma1, beta1, eps1)
    y = activations.apply(y, act1, slope1, _overwrites(y), prelu1)
    if w2.size(0) == 0:
        z, stats2 = None, [stats1[0].new_empty(0), stats1[0].new_empty(0)]
    else:
        v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
        z, *stats2 = normalise(v, mean2, var2, gamma2, beta2, eps2)
        z = activations.apply(z, act2, slope2, _overwrites(z), prelu2)
    out = _join(y, z, out_channels, x)
    if not keep_u:
        return out, *stats1, *stats2, x.new_empty(0)
    # A result of an operator must not share memory with an argument.
    kept = u.clone() if w1 is None else u.contiguous(memory_format=memory_format(x))
    return out, *stats1, *stats2, kept


def _channel_sums(t: Tensor) -> Tensor:
    return t.sum((0, 2, 3), dtype=compute_dtype(t.dtype))


def _fake_backward(a: Any) -> tuple[Tensor, ...]:
    x, w1, w2, n = a.x, a.w1, a.w2, NEEDS
    m, g = a.mean1.size(0), w2.size(0)
    dx = torch.empty_like(x, memory_format=memory_format(x)) if a.needs & n.DX else x.new_empty(0)
    dw1 = w1.new_empty(w1.shape) if w1 is not None and a.needs & n.DW1 else x.new_empty(0)
    dw2 = w2.new_empty(w2.shape) if a.needs & n.DW2 else x.new_empty(0)
    norm1 = _vectors(x, m if a.needs & n.NORM1 else 0)
    norm2 = _vectors(x, g if a.needs & n.NORM2 else 0)
    slopes1 = _vectors(x, m if a.needs & n.PRELU1 and a.prelu1 is not None else 0, 1)
    slopes2 = _vectors(x, g if a.needs & n.PRELU2 and a.prelu2 is not None else 0, 1)
    return dx, dw1, *norm1, *slopes1, dw2, *norm2, *slopes2


@operator(
    "ghost_backward(Tensor grad_out, Tensor x, Tensor? u, Tensor? w1, Tensor? gamma1, "
    "Tensor? beta1, Tensor mean1, Tensor var1, float eps1, Tensor? prelu1, Tensor? means1, "
    "Tensor w2, Tensor? gamma2, Tensor? beta2, Tensor mean2, Tensor var2, float eps2, "
    "Tensor? prelu2, Tensor? means2, int stride, int act1, float slope1, int act2, float slope2, "
    "bool batch_stats1, bool batch_stats2, int needs) "
    "-> (Tensor dx, Tensor dw1, Tensor dgamma1, Tensor dbeta1, Tensor dprelu1, Tensor dw2, "
    "Tensor dgamma2, Tensor dbeta2, Tensor dprelu2)",
    _fake_backward,
)
def ghost_backward(
    grad_out: Tensor,
    x: Tensor,
    u: Tensor | None,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    eps1: float,
    prelu1: Tensor | None,
    means1: Tensor | None,
    w2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    eps2: float,
    prelu2: Tensor | None,
    means2: Tensor | None,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    batch_stats1: bool,
    batch_stats2: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dw1, dgamma1, dbeta1, dprelu1, dw2, dgamma2, dbeta2, dprelu2).

    Recomputes y and v, and u if u is None. The gradient of the formula in ``formula.py``, with
    a = bn1(u), b = bn2(v) and f' the product with the derivative of f::

        dz  = grad_out[:, m:],  db = act2'(dz),  dprelu2 = sum of dz * min(b, 0)
        dv  = bn2'(db),         dw2 = dv correlated with y
        dy  = grad_out[:, :m] + transposed depthwise(dv, w2)
        da  = act1'(dy),        dprelu1 = sum of dy * min(a, 0)
        du  = bn1'(da),         dw1 = du correlated with x,  dx = transposed conv(du, w1)

    Args:
        grad_out: [N, out_channels, Ho, Wo].
        u: [N, m, Ho, Wo] as saved by the forward, or None.
        mean1, var1: [m], the statistics that the forward used; mean2, var2: [g].
        batch_stats1, batch_stats2: whether mean and var of the norm were computed from the batch.
        means1: [2, m], for batch_stats1: the means of da and of da * normalised u over all
            processes. None: the means over this batch. means2: [2, g], of db and normalised v.
        needs: a mask of ``NEEDS``. Gradients outside of the mask are empty and not computed.
    """
    m, g = mean1.size(0), w2.size(0)
    need_du = bool(needs & (NEEDS.DX | NEEDS.DW1))
    need_dy = need_du or bool(needs & (NEEDS.NORM1 | NEEDS.PRELU1))
    need_dw2 = bool(needs & NEEDS.DW2)
    need_db = need_dy or bool(needs & (NEEDS.DW2 | NEEDS.NORM2 | NEEDS.PRELU2))
    if x.numel() == 0:
        return _zero_gradients(x, w1, w2, m, prelu1, prelu2, needs)
    # [dgamma1, dbeta1, dprelu1] and [dgamma2, dbeta2, dprelu2]: six tensors, because two results of
    # an operator must not share memory.
    dtype = compute_dtype(x.dtype)
    first, second = ([x.new_empty(0, dtype=dtype) for _ in range(3)] for _ in range(2))
    dx, dw1 = x.new_empty(0), x.new_empty(0)
    dw2 = torch.zeros_like(w2) if need_dw2 else x.new_empty(0)
    if u is None:
        u = x if w1 is None else F.conv2d(x, w1, None, stride)
    a = norm(u, mean1, var1, gamma1, beta1, eps1)
    dy = grad_out[:, :m]
    if g and need_db:
        y = activations.apply(a, act1, slope1, False, prelu1)
        padding = w2.size(-1) // 2
        v = F.conv2d(y, w2, None, 1, padding, 1, m)
        b = norm(v, mean2, var2, gamma2, beta2, eps2)
        dz = grad_out[:, m:]
        if dz.size(1) < g:
            dz = F.pad(dz, (0, 0, 0, 0, 0, g - dz.size(1)))
        db, slopes = activations.backward(dz, b, act2, slope2, prelu2)
        if slopes is not None and needs & NEEDS.PRELU2:
            second[2] = _channel_sums(slopes)
        wanted = need_dy or need_dw2, bool(needs & NEEDS.NORM2)
        dv, dgamma2, dbeta2 = norm_backward(
            db, v, mean2, var2, gamma2, eps2, batch_stats2, means2, *wanted
        )
        if dgamma2 is not None and dbeta2 is not None:
            second[:2] = dgamma2, dbeta2
        if dv is not None:
            from_v, found_dw2 = conv_backward(
                dv, y, w2, (1, 1), (padding, padding), (1, 1), m, need_dy, need_dw2
            )
            dw2 = dw2 if found_dw2 is None else found_dw2.contiguous()
            dy = dy if from_v is None else from_v.add_(dy)
    elif dy.size(1) < m:
        dy = F.pad(dy, (0, 0, 0, 0, 0, m - dy.size(1)))
    if need_dy:
        da, slopes = activations.backward(dy, a, act1, slope1, prelu1)
        if slopes is not None and needs & NEEDS.PRELU1:
            first[2] = _channel_sums(slopes)
        wanted = need_du, bool(needs & NEEDS.NORM1)
        du, dgamma1, dbeta1 = norm_backward(
            da, u, mean1, var1, gamma1, eps1, batch_stats1, means1, *wanted
        )
        if dgamma1 is not None and dbeta1 is not None:
            first[:2] = dgamma1, dbeta1
        if du is not None:
            dx, dw1 = _primary_backward(du, x, w1, stride, needs)
    return dx, dw1, *first, dw2, *second  # type: ignore[return-value]


def _primary_backward(
    du: Tensor, x: Tensor, w1: Tensor | None, stride: int, needs: int
) -> tuple[Tensor, Tensor]:
    """(dx, dw1) from du [N, m, Ho, Wo]; a gradient that is not needed is empty. w1 None: x is u."""
    need_dx, need_dw1 = bool(needs & NEEDS.DX), bool(needs & NEEDS.DW1)
    dx, dw1 = x.new_empty(0), x.new_empty(0)
    if w1 is None:
        return du.contiguous(memory_format=memory_format(x)) if need_dx else dx, dw1
    grad_x, grad_w = conv_backward(
        du, x, w1, (stride, stride), (0, 0), (1, 1), 1, need_dx, need_dw1
    )
    if grad_x is not None:
        dx = grad_x.contiguous(memory_format=memory_format(x))
    return dx, dw1 if grad_w is None else grad_w.contiguous()


def _zero_gradients(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    m: int,
    prelu1: Tensor | None,
    prelu2: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of ``ghost_backward`` for an empty batch: zeros, or empty if not needed."""
    g, n = w2.size(0), NEEDS

    def like(t: Tensor | None, need: int) -> Tensor:
        return torch.zeros_like(t) if t is not None and needs & need else x.new_empty(0)

    def vector(size: int, need: int) -> Tensor:
        return x.new_zeros(size if needs & need else 0, dtype=compute_dtype(x.dtype))

    first = vector(m, n.NORM1), vector(m, n.NORM1), vector(0 if prelu1 is None else m, n.PRELU1)
    second = vector(g, n.NORM2), vector(g, n.NORM2), vector(0 if prelu2 is None else g, n.PRELU2)
    return like(x, n.DX), like(w1, n.DW1), *first, like(w2, n.DW2), *second


@operator(
    "ghost_update_running_(Tensor(a!)? running_mean1, Tensor(b!)? running_var1, "
    "Tensor(c!)? batches1, Tensor mean1, Tensor var1, float? momentum1, "
    "Tensor(d!)? running_mean2, Tensor(e!)? running_var2, Tensor(f!)? batches2, Tensor mean2, "
    "Tensor var2, float? momentum2, int count) -> ()",
    lambda a: None,
)
def ghost_update_running_(
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    batches1: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    momentum1: float | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    batches2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    momentum2: float | None,
    count: int,
) -> None:
    """Update the running statistics and the batch counters of both batch norms in place.

    running = (1 - momentum) * running + momentum * stat, with the unbiased variance. A momentum of
    None stands for 1 / counter, the average over all batches. ``count`` is the number of values per
    channel. An empty batch (count 0) increments the counters and changes no statistic, as in
    PyTorch.
    """
    for running_mean, running_var, batches, mean, var, momentum in (
        (running_mean1, running_var1, batches1, mean1, var1, momentum1),
        (running_mean2, running_var2, batches2, mean2, var2, momentum2),
    ):
        if batches is not None:
            batches.add_(1)
        if running_mean is None or running_var is None or count == 0:
            continue
        if momentum is None and batches is None:
            raise RuntimeError("a momentum of None needs the counter of batches")
        weight = (1.0 / batches).to(mean.dtype) if momentum is None else momentum
        unbiased = var * (count / (count - 1)) if count > 1 else var
        for running, stat in ((running_mean, mean), (running_var, unbiased)):
            if running.dtype is stat.dtype:
                running.lerp_(stat, weight)
            else:
                running.copy_(torch.lerp(running.to(stat.dtype), stat, weight))
