"""The forward of a Ghost module outside of autograd, and the update of running statistics.

A primary convolution that is a plain 1x1 (groups 1, no padding, equal strides) is part of the fused
operators. PyTorch runs every other primary convolution, and the fused operators compute the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conventions import LOW_PRECISION, contiguous, dense, in_format, memory_format
from ..formula import FROZEN, NO_SLOPES, Norms, Settings, Slopes, Statistics, ghost_formula
from ..ops import eager
from ..ops.sync import combine
from .checks import ops_for


def library_conv(x: Tensor, w1: Tensor, settings: Settings) -> Tensor:
    """u [N, m, Ho, Wo], from PyTorch's convolution."""
    s = settings
    return F.conv2d(x, w1, None, s.stride, s.padding, s.dilation, s.groups)


def frozen_forward(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    slopes: Slopes = NO_SLOPES,
) -> Tensor:
    """[N, out_channels, Ho, Wo] with constant statistics, outside of autograd.

    x [N, C, H, W] is dense; w1 None: x is u.
    """
    functions = ops_for(x, w2)
    if functions is eager and x.dtype in LOW_PRECISION:
        # Folded weights lose digits in low precision, and float32 is slow.
        out = ghost_formula(x, w1, w2, norms, settings, FROZEN, slopes=slopes)
        return in_format(out, memory_format(x))
    packed = pack(functions, w1, w2, norms, settings, slopes)
    m = x.size(1) if w1 is None else w1.size(0)
    arguments = apply_arguments(m, w2, settings, w1 is not None)
    return functions.ghost_apply(x, packed, None, None, *arguments)


def pack(
    functions: Any,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    slopes: Slopes = NO_SLOPES,
) -> Tensor:
    """The result of ``functions.ghost_pack``. w1 None: without a primary convolution."""
    n = Norms(*map(contiguous, norms))
    first = contiguous(w1), *n[:4], settings.eps1
    second = contiguous(w2), *n[4:], settings.eps2
    return functions.ghost_pack(*first, *second, *map(contiguous, slopes))


def apply_arguments(m: int, w2: Tensor, settings: Settings, has_primary: bool) -> tuple:
    """The arguments of ``ghost_apply`` after x, packed, residual and gate, for m intrinsic maps."""
    s, stride = settings, settings.stride[0] if has_primary else 1
    sizes = m, s.out_channels, w2.size(0) // m + 1, w2.size(-1), stride
    return *sizes, s.act1, s.slope1, s.act2, s.slope2, has_primary


def train_forward(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    slopes: Slopes,
    keep_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, mean1, var1, mean2, var2, u or empty) outside of autograd. x dense; w1 None: x is u.

    A norm with mean and var uses them, and its two results are empty.
    """
    s, n, (prelu1, prelu2) = settings, Norms(*map(contiguous, norms)), map(contiguous, slopes)
    first = contiguous(w1), *n[:4], s.eps1, prelu1
    second = contiguous(w2), *n[4:], s.eps2, prelu2
    numbers = s.out_channels, 1 if w1 is None else s.stride[0], s.act1, s.slope1, s.act2, s.slope2
    return ops_for(x, w2).ghost_train_forward(x, *first, *second, *numbers, keep_u)


def forward_over_processes(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
    slopes: Slopes,
    keep_u: bool,
) -> tuple[Tensor | None, ...]:
    """The results of ``train_forward``, and (count1, count2): values per channel in all processes.

    Count1 or count2 is None if the norm does not cross processes. For each norm that crosses
    processes there is one collective, which every process must join, also with an empty batch.
    PyTorch computes the primary convolution, so that it runs once for all passes.

    Raises:
        ValueError: in every process, if a channel has one value in all processes together.
    """
    functions, s, n = ops_for(x, w2), settings, norms
    u = x if w1 is None else dense(library_conv(x, w1, s))
    values, m = u.numel() // u.size(1), u.size(1)
    count1 = count2 = None
    if stats.batch1:
        mean1, var1 = functions.ghost_primary_stats(u, None, 1)
        if stats.group1 is not None:
            mean1, var1, count1 = combine(mean1, var1, values, stats.group1)
        n = n._replace(mean1=mean1, var1=var1)
    if stats.group2 is not None:
        without2 = Norms(*n[:4], None, None, None, None)
        packed = pack(functions, None, w2, without2, settings, Slopes(slopes.slopes1))
        mean2, var2 = functions.ghost_cheap_stats(
            u, packed, m, w2.size(0) // m + 1, w2.size(-1), 1, s.act1, s.slope1, False
        )
        mean2, var2, count2 = combine(mean2, var2, values, stats.group2)
        n = n._replace(mean2=mean2, var2=var2)
    out, *found, _ = train_forward(u, None, w2, n, settings, slopes, False)
    used = (n.mean1, n.var1, n.mean2, n.var2)
    made = (stats.batch1, stats.batch1, stats.group2 is not None, stats.group2 is not None)
    found = [t if own else f for t, own, f in zip(used, made, found, strict=True)]
    return out, *found, u if keep_u else u.new_empty(0), count1, count2


class RunningUpdate(NamedTuple):
    """How a training step changes the running statistics of one batch norm."""

    momentum: float | None = 0.0  # share of this batch; None: the average over all batches
    batches: Tensor | None = None  # counter of batches, incremented; required if momentum is None


def share(update: RunningUpdate) -> float:
    """The share of this batch in the updated running statistics, as a number."""
    if update.momentum is not None:
        return update.momentum
    return 0.0 if update.batches is None else 1.0 / (float(update.batches) + 1.0)


def update_running(
    functions: Any,
    norms: Norms,
    stats: Sequence[Tensor],
    update1: RunningUpdate,
    update2: RunningUpdate,
    count: int,
) -> None:
    """Update running statistics and counters of both batch norms, in one launch if a kernel exists.

    stats: (mean1, var1, mean2, var2) of the batch. count: values per channel of the batch.
    """
    n = norms
    running = [t for t in (n.mean1, n.var1, n.mean2, n.var2) if t is not None]
    changed = [*running, *(t for t in (update1.batches, update2.batches) if t is not None)]
    if not changed:
        return
    mean1, var1, mean2, var2 = stats
    first = n.mean1, n.var1, update1.batches, mean1, var1, update1.momentum
    second = n.mean2, n.var2, update2.batches, mean2, var2, update2.momentum
    arguments = *first, *second, count
    # In a compiled graph the compiler fuses these few operations for any batch size; the int count
    # of the operator would specialise the graph. The kernels need contiguous tensors of one dtype.
    if (
        functions is eager
        or torch.compiler.is_compiling()
        or not all(t.is_contiguous() and t.dtype is running[0].dtype for t in running)
    ):
        with torch.no_grad():
            eager.ghost_update_running_(*arguments)
        return
    functions.ghost_update_running_(*arguments)
    # The kernel writes without autograd: raise the versions that autograd and caches check.
    torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])
