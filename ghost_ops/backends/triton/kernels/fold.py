"""Small kernels around the passes: running statistics, packing.

Binding resource of all of them: the latency of a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import scale_shift


@triton.jit
def _update_running(norm, unbiased, B: tl.constexpr):
    """Update one batch norm, in one program.

    The barrier separates the threads' loads of the batch counter from its increment.
    """
    if norm.batches is not None:
        raised = tl.load(norm.batches) + 1
        tl.debug_barrier()
        tl.store(norm.batches, raised)
        share = 1.0 / raised.to(tl.float32) if norm.momentum is None else norm.momentum
    else:
        share = norm.momentum
    if norm.running_mean is not None:
        start = 0
        while start < norm.channels:
            i = start + tl.arange(0, B)
            im = i < norm.channels
            old_mean = tl.load(norm.running_mean + i, mask=im, other=0.0).to(tl.float32)
            old_var = tl.load(norm.running_var + i, mask=im, other=0.0).to(tl.float32)
            mean = tl.load(norm.mean + i, mask=im, other=0.0).to(tl.float32)
            var = tl.load(norm.var + i, mask=im, other=0.0).to(tl.float32) * unbiased
            # With momentum 1 the old value has no effect, even if it is NaN or infinite.
            mean = tl.where(share == 1.0, mean, old_mean + share * (mean - old_mean))
            var = tl.where(share == 1.0, var, old_var + share * (var - old_var))
            mean = mean.to(norm.running_mean.dtype.element_ty)
            tl.store(norm.running_mean + i, mean, mask=im)
            var = var.to(norm.running_var.dtype.element_ty)
            tl.store(norm.running_var + i, var, mask=im)
            start += B


@triton.jit
def update_running_kernel(norm1, norm2, unbiased, B: tl.constexpr):
    """running += momentum * (statistic - running), the variance times ``unbiased`` first.

    norm1, norm2: ``forward.Running``. Grid: one program per batch norm.
    """
    if tl.program_id(0) == 0:
        _update_running(norm1, unbiased, B)
    else:
        _update_running(norm2, unbiased, B)


@triton.jit
def _copy(from_ptr, to_ptr, i, size):
    if to_ptr is not None:
        value = tl.load(from_ptr + i, mask=i < size, other=0.0)
        tl.store(to_ptr + i, value.to(to_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _pack(layer, i):
    """Elements i of one convolution with its batch norm and slopes."""
    _copy(layer.weight, layer.weight_out, i, layer.size)
    _copy(layer.prelu, layer.prelu_out, i, layer.channels)
    cm = i < layer.channels
    scale, shift = scale_shift(layer.norm, i, cm)
    tl.store(layer.scale + i, scale, mask=cm)
    tl.store(layer.shift + i, shift, mask=cm)


@triton.jit
def pack_kernel(layer1, layer2, B: tl.constexpr):
    """Write both batch norms as scale and shift, the weights and the slopes.

    layer1, layer2: ``forward.Packing``. Grid: ceil(longest vector / B) programs.
    """
    i = tl.program_id(0) * B + tl.arange(0, B)
    _pack(layer1, i)
    _pack(layer2, i)
