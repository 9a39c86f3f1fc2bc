"""Batch norm in plain PyTorch, for the eager implementations of the operators.

Statistics, parameters and their gradients are in the compute dtype: float64 for float64, else
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..conventions import compute_dtype, memory_format

_aten = torch.ops.aten


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is dtype else t.to(dtype)


def scale_shift(
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    size: int,
    like: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(scale, shift) [size] of batch norm as v * scale + shift, in ``dtype``.

    Without mean and var they are gamma and beta. like: a tensor on the device of the results.
    """
    gamma, beta = cast(gamma, dtype), cast(beta, dtype)
    mean, var = cast(mean, dtype), cast(var, dtype)
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


def batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Batch norm with given statistics. ``F.batch_norm`` of PyTorch 2.10 refuses an eps of 0."""
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, cudnn)


def norm(
    u: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Batch norm of u with given statistics, in the dtype of u; computes in the compute dtype."""
    dtype = compute_dtype(u.dtype)
    mean, var = cast(mean, dtype), cast(var, dtype)
    return batch_norm(u, mean, var, cast(gamma, dtype), cast(beta, dtype), eps)


def statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over N, H, W, in the compute dtype; zeros for no values."""
    dtype = compute_dtype(u.dtype)
    channels = u.size(1)
    if u.numel() == 0:
        return u.new_zeros(channels, dtype=dtype), u.new_zeros(channels, dtype=dtype)
    if type(u) is not Tensor or u.is_meta or torch.compiler.is_compiling():
        var, mean = torch.var_mean(cast(u, dtype), (0, 2, 3), correction=0)
        return mean, var
    # This operator needs no float32 copy of u. Its results have the dtype of the running statistics
    # that it is given; with momentum 1 their old values have no effect.
    sink = u.new_zeros(channels, dtype=dtype)
    mean, var = torch.batch_norm_update_stats(u, sink, torch.zeros_like(sink), 1.0)
    return mean, var


def normalise(
    u: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(bn(u), mean, var) with the batch's statistics; (bn(u), empty, empty) with given ones."""
    if (mean is None) != (var is None):
        raise RuntimeError("mean and var of a norm must both be given, or neither")
    if mean is None or var is None:
        mean, var = statistics(u)
        return norm(u, mean, var, gamma, beta, eps), mean, var
    dtype = compute_dtype(u.dtype)
    out = norm(u, mean, var, gamma, beta, eps)
    return out, u.new_empty(0, dtype=dtype), u.new_empty(0, dtype=dtype)


def norm_backward(
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
    """(du, dgamma, dbeta) of batch norm; None for a gradient that is not needed.

    means: [2, C], the means of grad and of grad * normalised u in du; None: those of this batch.
    """
    dtype = compute_dtype(u.dtype)
    mean, var, gamma = cast(mean, dtype), cast(var, dtype), cast(gamma, dtype)
    layout = memory_format(u)
    # PyTorch takes its vectorised path only if all operands have one layout.
    grad = grad.contiguous(memory_format=layout)
    invstd = torch.rsqrt(var + eps)
    du, given = None, batch_stats and means is not None
    if given and need_du:
        scale = invstd if gamma is None else invstd * gamma
        columns = mean, invstd, scale, *means
        mean_, invstd_, scale_, first, second = (t.view(-1, 1, 1) for t in columns)
        normed = (u - mean_).mul_(invstd_ * second).add_(first)
        du = cast((grad - normed).mul_(scale_), u.dtype)
    dgamma, dbeta, ours = None, None, need_du and not given
    if ours or need_sums:
        found, dgamma, dbeta = _aten.native_batch_norm_backward.default(
            grad, u, gamma, mean, var, mean, invstd, batch_stats, eps, [ours, need_sums, need_sums]
        )
        du = found if ours else du
    return du, dgamma, dbeta
