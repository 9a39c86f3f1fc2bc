"""Small kernels between the passes: partial results into whole ones, running statistics, packing.

All of them are bound by the latency of a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import scale_shift


@triton.jit
def fold_moments_kernel(
    part_ptr,  # mean [parts, CH], M2 [parts, CH], count [parts]
    mean_ptr, var_ptr,  # [CH], written
    parts, CH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of everything from partial moments, by Chan's formula.

    Tile map: a program owns BC channels and takes the rows BP at a time, in their order.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cm = c < CH
    plane = tl.cast(parts, tl.int64) * CH
    count = 0.0
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    start = 0
    while start < parts:
        row = start + tl.arange(0, BP)
        rm = row < parts
        at = row.to(tl.int64)[:, None] * CH + c[None, :]
        mask = rm[:, None] & cm[None, :]
        counts = tl.load(part_ptr + 2 * plane + row, mask=rm, other=0.0)
        means = tl.load(part_ptr + at, mask=mask, other=0.0)
        m2s = tl.load(part_ptr + plane + at, mask=mask, other=0.0)
        added = tl.sum(counts, 0)
        # A part without values has mean 0 and weight 0.
        chunk_mean = tl.sum(means * counts[:, None], 0) / tl.where(added > 0.0, added, 1.0)
        off = means - chunk_mean[None, :]
        chunk_m2 = tl.sum(m2s + off * off * counts[:, None], 0)
        total = count + added
        share = added / tl.where(total > 0.0, total, 1.0)
        delta = chunk_mean - mean
        m2 += chunk_m2 + delta * delta * count * share
        mean += delta * share
        count = total
        start += BP
    tl.store(mean_ptr + c, mean, mask=cm)
    tl.store(var_ptr + c, m2 / tl.where(count > 0.0, count, 1.0), mask=cm)


@triton.jit
def fold_sums_kernel(
    part_ptr,  # [planes, parts, size]
    first_ptr, second_ptr,  # [size], written; second None if there is one plane
    parts, size, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Sums over the parts, in their order. Grid: size / BS x planes."""
    plane = tl.program_id(1)
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    am = at < size
    base = part_ptr + plane * tl.cast(parts, tl.int64) * size
    total = tl.zeros((BS,), tl.float32)
    start = 0
    while start < parts:
        row = start + tl.arange(0, BP)
        mask = (row < parts)[:, None] & am[None, :]
        part = tl.load(base + row.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
        total += tl.sum(part, 0)
        start += BP
    if second_ptr is not None:
        if plane == 1:
            tl.store(second_ptr + at, total.to(second_ptr.dtype.element_ty), mask=am)
        else:
            tl.store(first_ptr + at, total.to(first_ptr.dtype.element_ty), mask=am)
    else:
        tl.store(first_ptr + at, total.to(first_ptr.dtype.element_ty), mask=am)


@triton.jit
def _update_running(
    running_mean_ptr, running_var_ptr, batches_ptr, mean_ptr, var_ptr, momentum, unbiased, size,
    B: tl.constexpr,
):  # fmt: skip
    """One batch norm, by one program: all of its threads read the counter that one raises."""
    if batches_ptr is not None:
        raised = tl.load(batches_ptr) + 1
        tl.debug_barrier()
        tl.store(batches_ptr, raised)
        share = 1.0 / raised.to(tl.float32) if momentum is None else momentum
    else:
        share = momentum
    if running_mean_ptr is not None:
        start = 0
        while start < size:
            i = start + tl.arange(0, B)
            im = i < size
            old_mean = tl.load(running_mean_ptr + i, mask=im, other=0.0).to(tl.float32)
            old_var = tl.load(running_var_ptr + i, mask=im, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + i, mask=im, other=0.0).to(tl.float32)
            var = tl.load(var_ptr + i, mask=im, other=0.0).to(tl.float32) * unbiased
            # With momentum 1 the old value must not count, whatever it is.
            mean = tl.where(share == 1.0, mean, old_mean + share * (mean - old_mean))
            var = tl.where(share == 1.0, var, old_var + share * (var - old_var))
            tl.store(running_mean_ptr + i, mean.to(running_mean_ptr.dtype.element_ty), mask=im)
            tl.store(running_var_ptr + i, var.to(running_var_ptr.dtype.element_ty), mask=im)
            start += B


@triton.jit
def update_running_kernel(
    running_mean1_ptr, running_var1_ptr, batches1_ptr, mean1_ptr, var1_ptr, momentum1, size1,
    running_mean2_ptr, running_var2_ptr, batches2_ptr, mean2_ptr, var2_ptr, momentum2, size2,
    unbiased, B: tl.constexpr,
):  # fmt: skip
    """running += momentum * (statistic - running), the variance times ``unbiased`` first.

    Grid: one program a batch norm. Bound by launch latency.
    """
    if tl.program_id(0) == 0:
        _update_running(
            running_mean1_ptr, running_var1_ptr, batches1_ptr, mean1_ptr, var1_ptr, momentum1,
            unbiased, size1, B,
        )  # fmt: skip
    else:
        _update_running(
            running_mean2_ptr, running_var2_ptr, batches2_ptr, mean2_ptr, var2_ptr, momentum2,
            unbiased, size2, B,
        )  # fmt: skip


@triton.jit
def pack_kernel(
    w_ptr, packed_ptr,  # [size] weights, copied in the dtype of packed; both None: no weights
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps,  # [channels] each, or None
    scale_ptr, shift_ptr,  # [channels], written
    size, channels, B: tl.constexpr,
):  # fmt: skip
    """Batch norm as scale and shift, and the weights next to them."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    if packed_ptr is not None:
        w = tl.load(w_ptr + i, mask=i < size, other=0.0)
        tl.store(packed_ptr + i, w.to(packed_ptr.dtype.element_ty), mask=i < size)
    cm = i < channels
    scale, shift = scale_shift(i, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    tl.store(scale_ptr + i, scale, mask=cm)
    tl.store(shift_ptr + i, shift, mask=cm)
