"""The forward operators in Triton, with the signatures of ``ops.eager``.

Launches: pack 1; apply 1 or 2; a training forward 3 or 4 (a pass that computes statistics also
folds them, see ``kernels.partial``). These functions check, allocate and launch; all arithmetic is
in the kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...activations import PRELU
from ...conventions import intrinsic_count, memory_format
from . import layout
from .checks import (
    check_cheap,
    check_gate,
    check_image,
    check_pairs,
    check_primary,
    check_problem,
    check_same_shape,
    check_slopes,
    check_vectors,
)
from .forward_launches import Moments, launch_cheap, launch_fused, launch_primary
from .kernels.fold import pack_kernel, update_running_kernel
from .launch import (
    Epilogue,
    Norm,
    device_of,
    maps,
    on_device,
    vectors,
    zeros,
)
from .plan import Device, Problem, passes, stashes_u

_BLOCK = 256  # elements of a program of the elementwise kernels


class Packing(NamedTuple):
    """One convolution as pack_kernel reads and writes it.

    Attributes:
        weight, weight_out: [size], or None; written in the dtype of the second.
        norm: [channels].
        scale, shift: [channels], written.
        prelu, prelu_out: [channels], or None.
    """

    weight: Tensor | None
    weight_out: Tensor | None
    norm: Norm
    scale: Tensor
    shift: Tensor
    prelu: Tensor | None
    prelu_out: Tensor | None
    size: int
    channels: int


class Running(NamedTuple):
    """One batch norm as update_running_kernel updates it: vectors [channels], or None."""

    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    mean: Tensor
    var: Tensor
    momentum: float | None
    channels: int


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
    """The weights, and both batch norms as scale and shift: 1-D float32, as ``layout`` says."""
    m = intrinsic_count(w1, gamma1, beta1, mean1, var1)
    channels = 0 if w1 is None else w1.size(1)
    check_primary(w1, w2, m, channels)
    g, d = check_cheap(w2, w2, m)
    check_vectors(w2, m, gamma1=gamma1, beta1=beta1, mean1=mean1, var1=var1, prelu1=prelu1)
    check_vectors(w2, g, gamma2=gamma2, beta2=beta2, mean2=mean2, var2=var2, prelu2=prelu2)
    has_prelu = prelu1 is not None, prelu2 is not None
    numel = layout.packed_numel(channels, m, g, d, w2.dtype, w1 is not None)
    numel += m * has_prelu[0] + g * has_prelu[1]
    packed = w2.new_empty(numel, dtype=torch.float32)
    to = layout.split(packed, channels, m, g, d, w2.dtype, w1 is not None, has_prelu)
    size1, size2 = m * channels, g * d * d
    norm1 = Norm(gamma1, beta1, mean1, var1, eps1)
    norm2 = Norm(gamma2, beta2, mean2, var2, eps2)
    first = Packing(w1, to.w1, norm1, to.scale1, to.shift1, prelu1, to.prelu1, size1, m)
    second = Packing(w2, to.w2, norm2, to.scale2, to.shift2, prelu2, to.prelu2, size2, g)
    programs = math.ceil(max(size1, size2, m, g) / _BLOCK)
    with on_device(w2):
        pack_kernel[(programs,)](first, second, B=_BLOCK, enable_fp_fusion=True)
    return packed


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
    """As ``ghost_apply`` of ``ops.eager``, with ``packed`` from this file's ``ghost_pack``."""
    sizes, acts = (intrinsic, ratio, out_channels, dw_size, stride), (act1, slope1, act2, slope2)
    p = problem_of(x, *sizes, *acts, has_primary, prelu=True)
    has_prelu = act1 == PRELU, act2 == PRELU
    parts = layout.split(packed, p.c, p.m, p.g, p.dw_size, x.dtype, has_primary, has_prelu)
    norm1 = Norm(parts.scale1, parts.shift1, slope=either(slope1, parts.prelu1))
    norm2 = Norm(parts.scale2, parts.shift2, slope=either(slope2, parts.prelu2))
    out = maps(x, p, p.out_channels)
    if residual is not None:
        check_same_shape("residual", residual, out)
    if gate is not None:
        check_gate(gate, out)
    if out.numel() == 0:
        return out
    device = device_of(x)
    with on_device(x):
        epilogue = Epilogue.of(gate, residual, out)
        plain = gate is None and residual is None
        if plain:
            _whole(x, parts.w1, parts.w2, p, device, norm1, norm2, out)
            return out
        # Ghosts are computed from y without gate and residual, so y needs memory besides out.
        y = maps(x, p, p.m) if p.g else None
        launch_primary(x, parts.w1, p, device, norm=norm1, y=y, out=out, epilogue=epilogue)
        if y is not None:
            launch_cheap(y, parts.w2, p, device, norm=norm2, out=out, epilogue=epilogue)
    return out


def either(slope: float, prelu: Tensor | None) -> float | Tensor:
    """The slopes of the PReLU if they are given, else the scalar slope."""
    return slope if prelu is None else prelu


def _whole(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    p: Problem,
    device: Device,
    norm1: Norm,
    norm2: Norm,
    out: Tensor,
) -> None:
    """Write out with both norms known, in one launch or two."""
    if passes(p, device, stores_z=True).one_pass:
        launch_fused(x, w1, w2, p, device, norm1=norm1, norm2=norm2, y=out, out=out)
        return
    launch_primary(x, w1, p, device, norm=norm1, y=out)
    if p.g:
        launch_cheap(out, w2, p, device, norm=norm2, out=out)


def ghost_primary_stats(x: Tensor, w1: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [m] of u = conv(x, w1), or of u = x without w1."""
    m = x.size(1) if w1 is None else w1.size(0)
    if w1 is None:
        stride = 1
    p = problem_of(x, m, 1, m, 1, stride, 0, 0.0, 0, 0.0, w1 is not None)
    check_primary(w1, x, m, p.c)
    if x.numel() == 0:
        return zeros(x, m)
    with on_device(x):
        moments = launch_primary(x, w1, p, device_of(x), moments=True)
    assert moments is not None
    return moments


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
    """Mean and biased variance [g] of v; y is in scratch memory that is freed with the call."""
    sizes = intrinsic, ratio, intrinsic * ratio, dw_size, stride
    p = problem_of(x, *sizes, act1, slope1, 0, 0.0, has_primary, prelu=True)
    has_prelu = act1 == PRELU, False
    parts = layout.split(packed, p.c, p.m, p.g, p.dw_size, x.dtype, has_primary, has_prelu)
    if x.numel() == 0 or p.g == 0:
        return zeros(x, p.g)
    norm1 = Norm(parts.scale1, parts.shift1, slope=either(slope1, parts.prelu1))
    with on_device(x):
        return _second_pass(x, parts.w1, parts.w2, p, device_of(x), norm1, maps(x, p, p.m))


def _second_pass(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    p: Problem,
    device: Device,
    norm1: Norm,
    y: Tensor,
) -> Moments:
    """Write y, and return the statistics of v."""
    if passes(p, device, stores_z=False).one_pass:
        moments = launch_fused(x, w1, w2, p, device, norm1=norm1, y=y, moments=True)
    else:
        launch_primary(x, w1, p, device, norm=norm1, y=y)
        moments = launch_cheap(y, w2, p, device, moments=True)
    assert moments is not None
    return moments


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
    """(out, mean1, var1, mean2, var2, u or empty), as ``ghost_train_forward`` of ``ops.eager``.

    Pass 1 computes u and its statistics, pass 2 y (into out) and the statistics of v, pass 3 z. A
    norm with given mean and var needs no pass for statistics, and its two results are empty. If
    batch norm 1 has given statistics, pass 1 runs only to keep u.
    """
    m = x.size(1) if w1 is None else w1.size(0)
    check_primary(w1, x, m, x.size(1))
    g, d = check_cheap(w2, x, m)
    check_vectors(x, m, gamma1=gamma1, beta1=beta1, mean1=mean1, var1=var1)
    check_vectors(x, g, gamma2=gamma2, beta2=beta2, mean2=mean2, var2=var2)
    check_pairs(mean1=mean1, var1=var1)
    check_pairs(mean2=mean2, var2=var2)
    check_slopes(x, act1, m, prelu1=prelu1)
    check_slopes(x, act2, g, prelu2=prelu2)
    sizes, acts = (m, g // m + 1, out_channels, d, stride), (act1, slope1, act2, slope2)
    p = problem_of(x, *sizes, *acts, w1 is not None, prelu=True)
    out = maps(x, p, p.out_channels)
    batch1, batch2 = mean1 is None, mean2 is None
    if x.numel() == 0:
        u = maps(x, p, m) if keep_u else x.new_empty(0)
        return out, *zeros(x, m if batch1 else 0), *zeros(x, g if batch2 else 0), u
    device = device_of(x)
    stash = maps(x, p, m) if keep_u or (batch1 and stashes_u(p)) else None
    found1, found2 = vectors(x, 0), vectors(x, 0)
    with on_device(x):
        if batch1:
            moments = launch_primary(x, w1, p, device, u=stash, moments=True)
            assert moments is not None
            found1 = mean1, var1 = moments
        elif stash is not None:
            launch_primary(x, w1, p, device, u=stash)
        norm1 = Norm(gamma1, beta1, mean1, var1, eps1, either(slope1, prelu1))
        norm2 = Norm(gamma2, beta2, mean2, var2, eps2, either(slope2, prelu2))
        source, weight, q = (x, w1, p) if stash is None else (stash, None, p.given_u())
        if g and batch2:
            found2 = mean2, var2 = _second_pass(source, weight, w2, q, device, norm1, out)
            launch_cheap(out, w2, q, device, norm=norm2._replace(mean=mean2, var=var2), out=out)
        elif g:
            _whole(source, weight, w2, q, device, norm1, norm2, out)
        else:
            launch_primary(source, weight, q, device, norm=norm1, y=out)
    kept = stash if keep_u and stash is not None else x.new_empty(0)
    return out, *found1, *found2, kept


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
    """Update running statistics and batch counters of both batch norms, in one launch."""
    norms: list[Running] = []
    for running_mean, running_var, batches, mean, var, momentum in (
        (running_mean1, running_var1, batches1, mean1, var1, momentum1),
        (running_mean2, running_var2, batches2, mean2, var2, momentum2),
    ):
        size = mean.numel()
        if running_mean is None or running_var is None or count == 0 or size == 0:
            running_mean = running_var = None
            momentum = 0.0
        else:
            check_vectors(running_mean, size, running_mean=running_mean, running_var=running_var)
            check_vectors(running_mean, size, mean=mean, var=var)
            if momentum is None and batches is None:
                raise RuntimeError("a momentum of None needs the counter of batches")
        norms.append(Running(running_mean, running_var, batches, mean, var, momentum, size))
    unbiased = count / (count - 1) if count > 1 else 1.0
    with on_device(mean1):
        update_running_kernel[(2,)](*norms, unbiased, B=_BLOCK, enable_fp_fusion=True)


def problem_of(
    x: Tensor,
    m: int,
    ratio: int,
    out_channels: int,
    d: int,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    has_primary: bool,
    *,
    prelu: bool = False,
) -> Problem:
    """The ``Problem`` of x and these numbers, checked. prelu: the code of a PReLU is allowed."""
    check_image("x", x)
    nhwc = memory_format(x) is torch.channels_last
    sizes, acts = (*x.shape, m, ratio, out_channels, d, stride), (act1, slope1, act2, slope2)
    p = Problem(*sizes, *acts, nhwc, x.dtype, has_primary)
    check_problem(x, p, prelu)
    return p
