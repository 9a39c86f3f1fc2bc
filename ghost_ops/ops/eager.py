"""The ops of ``ops.py`` in plain PyTorch: one function for each, same name, same signature.

They run wherever no native kernel is registered, and where the eager backend is asked for; then
``functional.py`` calls them directly, so that torch.compile traces through them. A forward costs
the passes over memory that the reference costs, a backward one more forward (it recomputes).

Notation, in every function: x [N, C, H, W]; w1 [m, C, 1, 1]; w2 [g, 1, d, d]; gamma1, beta1,
mean1, var1 [m]; gamma2, beta2, mean2, var2 [g]; out [N, oup, Ho, Wo]. Statistics, packed parameters
and the gradients of gamma and beta are in the compute dtype: float64 for float64, else float32.
Reductions are PyTorch's own: their bits may depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations

_aten = torch.ops.aten


class NEEDS:
    """Bits of ``ghost_backward``'s mask: the gradients that are wanted."""

    DX = 1
    DW1 = 2
    NORM1 = 4  # dgamma1 and dbeta1
    PRELU1 = 8
    DW2 = 16
    NORM2 = 32
    PRELU2 = 64
    ALL = 127


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of results for input x: channels_last only where x is that and not also NCHW.

    A single channel is both; its stride then tells which of them it was made as, as in PyTorch.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    one_map = x.size(1) == 1 and x.size(2) * x.size(3) > 1
    if x.is_contiguous() and not (one_map and x.stride(1) == 1):
        return torch.contiguous_format
    return torch.channels_last


def packed_offsets(channels: int, m: int, g: int, d: int, has_primary: bool) -> tuple[int, ...]:
    """Where the five parts of a packed tensor end; the last one is its numel.

    The parts are w1 * scale1 and shift1 (or scale1 and shift1 alone), w2 * scale2, shift2, and
    w2 * scale2 again as [d * d, g]. The first two are rounded up to 16 channels, the native
    kernels' panel.
    """
    if has_primary:
        rows = -(-m // 16) * 16
        first, second = rows * channels, rows
    else:
        first, second = m, m
    third = first + second + g * d * d
    return first, first + second, third, third + g, third + g + g * d * d


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is dtype else t.to(dtype)


def _scale_shift(
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    size: int,
    like: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Batch norm as v * scale + shift. Without mean and var that is gamma and beta themselves."""
    gamma, beta = _cast(gamma, dtype), _cast(beta, dtype)
    mean, var = _cast(mean, dtype), _cast(var, dtype)
    if var is not None:
        scale = torch.rsqrt(var + eps)
        scale = scale if gamma is None else scale * gamma
    else:
        scale = like.new_ones(size, dtype=dtype) if gamma is None else gamma
    if mean is None:
        shift = like.new_zeros(size, dtype=dtype) if beta is None else beta
    else:
        shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
    return scale, shift


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
    """Both batch norms folded into the weights: 1-D, of ``packed_offsets``'s size.

    Slopes per channel of a PReLU, prelu1 [m] and prelu2 [g], come after it.
    """
    m = intrinsic_count(w1, gamma1, beta1, mean1, var1)
    g, d = w2.size(0), w2.size(-1)
    dtype = compute_dtype(w2.dtype)
    scale1, shift1 = _scale_shift(gamma1, beta1, mean1, var1, eps1, m, w2, dtype)
    scale2, shift2 = _scale_shift(gamma2, beta2, mean2, var2, eps2, g, w2, dtype)
    taps = (_cast(w2, dtype) * scale2.view(-1, 1, 1, 1)).reshape(g, d * d)
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
    folded1 = (_cast(w1, dtype).reshape(m, channels) * scale1.view(-1, 1)).reshape(-1)
    if first > m * channels:
        folded1 = F.pad(folded1, (0, first - m * channels))
        shift1 = F.pad(shift1, (0, second - first - m))
    return torch.cat([folded1, shift1, *cheap, *slopes])


def intrinsic_count(w1: Tensor | None, *per_channel: Tensor | None) -> int:
    """m, from the primary weight or the first batch norm."""
    for t in (w1, *per_channel):
        if t is not None:
            return t.size(0)
    raise RuntimeError("ghost_pack: without w1, gamma1, beta1, mean1 or var1 must be given")


def _join(y: Tensor, z: Tensor | None, out_channels: int, x: Tensor) -> Tensor:
    """concat(y, z)[:, :out_channels] as a dense tensor in the dtype and memory format of x."""
    m = y.size(1)
    if z is None:
        out = y if out_channels == m else y[:, :out_channels]
    else:
        out = torch.cat([y, z if out_channels == m + z.size(1) else z[:, : out_channels - m]], 1)
    return in_format(out if out.dtype is x.dtype else out.to(x.dtype), memory_format(x))


def in_format(t: Tensor, fmt: torch.memory_format) -> Tensor:
    """t in a memory format: itself where it is.

    Not by ``contiguous`` alone: dynamo of PyTorch 2.11 drops the gradient of a result that the last
    operation gave back as it got it.
    """
    return t if t.is_contiguous(memory_format=fmt) else t.contiguous(memory_format=fmt)


def _overwrites() -> bool:
    """Whether activations may work in place: a graph that is compiled is spared it, see above."""
    return not torch.compiler.is_compiling()


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
    """The whole module with folded batch norms, times the gate, plus the residual, where given.

    The gate [N, out_channels, Hg, Wg] is brought to the size of the output by nearest neighbours.
    Computes in the dtype of ``packed``: weights with a batch norm folded in would lose digits in
    bfloat16 or float16 that the module without folding keeps.
    """
    g = intrinsic * (ratio - 1)
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
    y = activations.apply(y, act1, slope1, True, slopes1)
    z = None
    if g:
        w2 = packed[second:third].view(g, 1, dw_size, dw_size)
        z = F.conv2d(y, w2, packed[third:fourth], 1, dw_size // 2, 1, intrinsic)
        z = activations.apply(z, act2, slope2, True, slopes2)
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
    return _batch_norm(x.to(packed.dtype), zero, one, scale, shift, 0.0)


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Batch norm with given statistics. ``F.batch_norm`` of PyTorch 2.10 refuses an eps of 0."""
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, cudnn)


def _statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over N, H, W, in the compute dtype; zeros where there is nothing."""
    dtype = compute_dtype(u.dtype)
    channels = u.size(1)
    if u.numel() == 0:
        return u.new_zeros(channels, dtype=dtype), u.new_zeros(channels, dtype=dtype)
    if type(u) is not Tensor or u.is_meta or torch.compiler.is_compiling():
        var, mean = torch.var_mean(_cast(u, dtype), (0, 2, 3), correction=0)
        return mean, var
    # Batch norm's own statistics, which need no float32 copy of u. The running statistics are
    # there to make the results float32; with momentum 1 their old values do not count.
    sink = u.new_zeros(channels, dtype=dtype)
    mean, var = torch.batch_norm_update_stats(u, sink, torch.zeros_like(sink), 1.0)
    return mean, var


def ghost_primary_stats(x: Tensor, w1: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [m] of u = conv(x, w1); without w1 x is u."""
    return _statistics(x if w1 is None else F.conv2d(x, w1, None, stride))


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
    """Mean and biased variance [g] of v; ``packed`` was built without batch norm 2.

    It ends with the slopes [m] if act1 is a PReLU.
    """
    g = intrinsic * (ratio - 1)
    _, second, third, _, end = packed_offsets(x.size(1), intrinsic, g, dw_size, has_primary)
    slopes1 = packed[end : end + intrinsic] if act1 == activations.PRELU else None
    expected = end if slopes1 is None else end + intrinsic
    if packed.numel() != expected:
        raise RuntimeError(f"packed has {packed.numel()} elements, expected {expected}")
    if g == 0:
        return packed.new_empty(0), packed.new_empty(0)
    y = _affine_or_conv(x, packed, intrinsic, g, dw_size, stride, has_primary)
    y = activations.apply(y, act1, slope1, _overwrites(), slopes1)
    w2 = packed[second:third].view(g, 1, dw_size, dw_size)
    return _statistics(F.conv2d(y, w2, None, 1, dw_size // 2, 1, intrinsic))


def _norm(
    u: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Batch norm of u with given statistics; parameters in the compute dtype, result as u."""
    dtype = compute_dtype(u.dtype)
    mean, var = _cast(mean, dtype), _cast(var, dtype)
    return _batch_norm(u, mean, var, _cast(gamma, dtype), _cast(beta, dtype), eps)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, mean1, var1, mean2, var2, u or empty).

    Each norm uses the batch's statistics, which are returned, or the given ones, and then those
    results are empty. prelu1 [m] and prelu2 [g] are slopes, where act1 or act2 is a PReLU.
    """
    u = x if w1 is None else F.conv2d(x, w1, None, stride)
    y, *stats1 = _normalise(u, mean1, var1, gamma1, beta1, eps1)
    y = activations.apply(y, act1, slope1, _overwrites(), prelu1)
    if w2.size(0) == 0:
        z, stats2 = None, [stats1[0].new_empty(0), stats1[0].new_empty(0)]
    else:
        v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
        z, *stats2 = _normalise(v, mean2, var2, gamma2, beta2, eps2)
        z = activations.apply(z, act2, slope2, _overwrites(), prelu2)
    out = _join(y, z, out_channels, x)
    if not keep_u:
        return out, *stats1, *stats2, x.new_empty(0)
    # The results of an op may not alias its arguments.
    kept = u.clone() if w1 is None else u.contiguous(memory_format=memory_format(x))
    return out, *stats1, *stats2, kept


def _normalise(
    u: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(bn(u), mean, var): the batch's statistics; two empty ones where they are given."""
    if (mean is None) != (var is None):
        raise RuntimeError("mean and var of a norm must both be given, or neither")
    if mean is None or var is None:
        mean, var = _statistics(u)
        return _norm(u, mean, var, gamma, beta, eps), mean, var
    nothing = (u.new_empty(0, dtype=compute_dtype(u.dtype)) for _ in range(2))
    return _norm(u, mean, var, gamma, beta, eps), *nothing


def _norm_backward(
    grad: Tensor,
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    eps: float,
    batch_stats: bool,
    means: Tensor | None,
    need_du: bool,
    need_sums: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(du, dgamma, dbeta) of batch norm, None for what is not needed.

    means: [2, C], the means of grad and of grad * normalised u that du uses; None: this batch's.
    """
    dtype = compute_dtype(u.dtype)
    mean, var, gamma = _cast(mean, dtype), _cast(var, dtype), _cast(gamma, dtype)
    layout = memory_format(u)
    # With one layout throughout, PyTorch takes its vectorised path.
    grad = grad.contiguous(memory_format=layout)
    invstd = torch.rsqrt(var + eps)
    du, given = None, batch_stats and means is not None
    if given and need_du:
        scale = invstd if gamma is None else invstd * gamma
        columns = mean, invstd, scale, *means
        mean_, invstd_, scale_, first, second = (t.view(-1, 1, 1) for t in columns)
        normed = (u - mean_).mul_(invstd_ * second).add_(first)
        du = _cast((grad - normed).mul_(scale_), u.dtype)
    dgamma, dbeta, ours = None, None, need_du and not given
    if ours or need_sums:
        found, dgamma, dbeta = _aten.native_batch_norm_backward.default(
            grad, u, gamma, mean, var, mean, invstd, batch_stats, eps, [ours, need_sums, need_sums]
        )
        du = found if ours else du
    return du, dgamma, dbeta


def onednn_corrupts(x: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether oneDNN's weight gradient of this convolution may write out of bounds.

    ``jit_avx2_1x1_convolution_bwd_weights_t`` does, and the process aborts at a later ``free``:
    float32, 1x1, stride 2 or 3, channels_last, 2 to 7 input channels, images of about 14 columns
    and more. Seen in torch 2.10 and 2.13, on processors with AVX2 and without AVX-512, or with
    DNNL_MAX_CPU_ISA=AVX2; tests/onednn_fault.py shows it. The condition here is wider, which costs
    nothing.
    """
    few = weight.size(1) < 8 and weight.shape[2:] == (1, 1) and max(stride) > 1
    return few and x.dtype is torch.float32 and x.device.type == "cpu"


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of a convolution without bias, None for what is not needed."""
    product = need_dw and groups == 1 and not any(padding) and onednn_corrupts(x, weight, stride)
    dx, dw = None, None
    if need_dx or not product:
        dx, dw, _ = _aten.convolution_backward.default(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups,
            [need_dx, need_dw and not product, False],
        )  # fmt: skip
    if product:
        seen = x[:, :, :: stride[0], :: stride[1]]
        dw = (grad.flatten(2) @ seen.flatten(2).transpose(1, 2)).sum(0).view_as(weight)
    return dx, dw


def _channel_sums(t: Tensor) -> Tensor:
    return t.sum((0, 2, 3), dtype=compute_dtype(t.dtype))


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

    Everything between is recomputed. Backwards through the formula of ``reference.py``::

        db  = act2'(grad of z),  dprelu2 = sum of grad of z * min(b, 0) with b = bn2(v)
        dv  = bn2'(db),  dw2 = dv correlated with y
        da  = act1'(grad of y + w2 applied backwards to dv),  dprelu1 likewise
        du  = bn1'(da),  dw1 = du correlated with x,  dx = w1 applied backwards to du

    Args:
        batch_stats1, batch_stats2: whether a norm's mean and var are functions of the batch.
        means1, means2: [2, m] and [2, g], with batch_stats: the means over all values of all
            processes of da (db) and of da * normalised u (db * normalised v); None: this batch's.
        needs: a mask of ``NEEDS``. What is not needed is empty, and costs nothing.
    """
    m, g = mean1.size(0), w2.size(0)
    need_du = bool(needs & (NEEDS.DX | NEEDS.DW1))
    need_dy = need_du or bool(needs & (NEEDS.NORM1 | NEEDS.PRELU1))
    need_dw2 = bool(needs & NEEDS.DW2)
    need_db = need_dy or bool(needs & (NEEDS.DW2 | NEEDS.NORM2 | NEEDS.PRELU2))
    if x.numel() == 0:
        return _zero_gradients(x, w1, w2, m, prelu1, prelu2, needs)
    # dgamma1, dbeta1, dprelu1 and those of the second norm; results may not alias each other.
    dtype = compute_dtype(x.dtype)
    first, second = ([x.new_empty(0, dtype=dtype) for _ in range(3)] for _ in range(2))
    dx, dw1 = x.new_empty(0), x.new_empty(0)
    dw2 = torch.zeros_like(w2) if need_dw2 else x.new_empty(0)
    if u is None:
        u = x if w1 is None else F.conv2d(x, w1, None, stride)
    a = _norm(u, mean1, var1, gamma1, beta1, eps1)
    dy = grad_out[:, :m]
    if g and need_db:
        y = activations.apply(a, act1, slope1, False, prelu1)
        padding = w2.size(-1) // 2
        v = F.conv2d(y, w2, None, 1, padding, 1, m)
        b = _norm(v, mean2, var2, gamma2, beta2, eps2)
        dz = grad_out[:, m:]
        if dz.size(1) < g:
            dz = F.pad(dz, (0, 0, 0, 0, 0, g - dz.size(1)))
        db, slopes = activations.backward(dz, b, act2, slope2, prelu2)
        if slopes is not None and needs & NEEDS.PRELU2:
            second[2] = _channel_sums(slopes)
        dv, dgamma2, dbeta2 = _norm_backward(
            db, v, mean2, var2, gamma2, eps2, batch_stats2, means2, need_dy or need_dw2,
            bool(needs & NEEDS.NORM2),
        )  # fmt: skip
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
        du, dgamma1, dbeta1 = _norm_backward(
            da, u, mean1, var1, gamma1, eps1, batch_stats1, means1, need_du,
            bool(needs & NEEDS.NORM1),
        )  # fmt: skip
        if dgamma1 is not None and dbeta1 is not None:
            first[:2] = dgamma1, dbeta1
        if du is not None:
            dx, dw1 = _primary_backward(du, x, w1, stride, needs)
    return dx, dw1, *first, dw2, *second  # type: ignore[return-value]


def _primary_backward(
    du: Tensor, x: Tensor, w1: Tensor | None, stride: int, needs: int
) -> tuple[Tensor, Tensor]:
    """(dx, dw1), empty where not needed; without w1 x is u."""
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
    """The gradients of a batch of no images."""
    g, n = w2.size(0), NEEDS

    def like(t: Tensor | None, need: int) -> Tensor:
        return torch.zeros_like(t) if t is not None and needs & need else x.new_empty(0)

    def vector(size: int, need: int) -> Tensor:
        return x.new_zeros(size if needs & need else 0, dtype=compute_dtype(x.dtype))

    return (
        like(x, n.DX), like(w1, n.DW1), vector(m, n.NORM1), vector(m, n.NORM1),
        vector(0 if prelu1 is None else m, n.PRELU1), like(w2, n.DW2), vector(g, n.NORM2),
        vector(g, n.NORM2), vector(0 if prelu2 is None else g, n.PRELU2),
    )  # fmt: skip


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
    """Running statistics and batch counters of both batch norms, after a batch of count pixels.

    running = (1 - momentum) * running + momentum * stat, the variance made unbiased first; a
    momentum of None is the average over all batches, 1 / counter. An empty batch (count 0) counts
    and changes no statistics, as in PyTorch.
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
