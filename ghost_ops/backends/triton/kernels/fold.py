"""Small kernels around the passes: running statistics, packing.

All of them are bound by the latency of a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import scale_shift


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
def _copy(from_ptr, to_ptr, i, size):
    if to_ptr is not None:
        value = tl.load(from_ptr + i, mask=i < size, other=0.0)
        tl.store(to_ptr + i, value.to(to_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def pack_kernel(
    w1_ptr, w1_out_ptr,  # [size1], or None; written in the dtype of the second
    gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1,  # [channels1] each, or None
    scale1_ptr, shift1_ptr,  # [channels1], written
    prelu1_ptr, prelu1_out_ptr,  # [channels1], or None
    size1, channels1,
    w2_ptr, w2_out_ptr, gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2, scale2_ptr, shift2_ptr,
    prelu2_ptr, prelu2_out_ptr, size2, channels2,  # the same of the cheap operation
    B: tl.constexpr,
):  # fmt: skip
    """Both batch norms as scale and shift, the weights next to them, and slopes.

    Grid: as many programs as the longest of the vectors has blocks of B.
    """
    i = tl.program_id(0) * B + tl.arange(0, B)
    _copy(w1_ptr, w1_out_ptr, i, size1)
    _copy(w2_ptr, w2_out_ptr, i, size2)
    _copy(prelu1_ptr, prelu1_out_ptr, i, channels1)
    _copy(prelu2_ptr, prelu2_out_ptr, i, channels2)
    cm = i < channels1
    scale, shift = scale_shift(i, cm, gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1)
    tl.store(scale1_ptr + i, scale, mask=cm)
    tl.store(shift1_ptr + i, shift, mask=cm)
    cm = i < channels2
    scale, shift = scale_shift(i, cm, gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2)
    tl.store(scale2_ptr + i, scale, mask=cm)
    tl.store(shift2_ptr + i, shift, mask=cm)
