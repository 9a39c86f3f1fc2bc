"""Batch norm over all processes of a group, on any device that the group's backend reaches.

PyTorch's ``SyncBatchNorm`` runs on GPUs only, and DistributedDataParallel refuses a model on a CPU
that contains one. The ``SyncBatchNorm`` of this file runs over every backend of torch.distributed,
gloo included. Both classes run fused inside a Ghost module: ``autograd`` splits its passes at the
statistics, and ``combine`` and ``mean_gradients`` of ``ops.sync`` exchange them between processes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import arguments
from .conventions import compute_dtype
from .modes import differentiate
from .ops.sync import combine, mean_gradients


def group_of(bn: nn.Module) -> Any:
    """The ``ProcessGroup`` over which a norm computes its statistics in its present mode.

    None if the norm uses the statistics of this process alone: the norm is no SyncBatchNorm or is
    in eval mode, or there is no process group, or the group has one process.

    Raises:
        ValueError: the norm's ``process_group`` was destroyed.
    """
    if not (isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm)) and bn.training):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    if dist.get_world_size(group) <= 1:  # -1: this process is not in the group
        return None
    if not torch.compiler.is_compiling():
        dist.get_backend(group)  # raises ValueError if the group was destroyed
    return group


class _AllReduce(torch.autograd.Function):
    """Sum over all processes. Its gradient is the sum of the gradients of all processes.

    Differentiable any number of times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None


def sync_formula(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, group: Any
) -> Tensor:
    """Batch norm over all processes in plain PyTorch, differentiable any number of times.

    All processes must differentiate the result the same number of times, because each
    differentiation makes two all-reduces.

    Args:
        x: [N, C, *]; N may differ between processes, and be 0.
        gamma, beta: [C], or None for 1 and 0.
        eps: added to the variance.
        group: a ``ProcessGroup``.

    Returns:
        (x - mean) / sqrt(var + eps) * gamma + beta, [N, C, *] in the dtype of x.
    """
    dims, shape = (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))
    wide = x.to(compute_dtype(x.dtype))
    count = wide.new_full((1,), x.numel() // x.size(1))
    total = _AllReduce.apply(torch.cat([wide.sum(dims), count]), group)
    count = total[-1].detach().clamp(min=1)
    centred = wide - (total[:-1] / count).view(shape)
    # The second all-reduce sums squares of centred values: E[x^2] - E[x]^2 would lose digits.
    var = _AllReduce.apply(centred.square().sum(dims), group) / count
    out = centred * torch.rsqrt(var + eps).view(shape)
    if gamma is not None:
        out = out * gamma.view(shape)
    if beta is not None:
        out = out + beta.view(shape)
    return out.to(x.dtype)


class SyncBatchNormFunction(torch.autograd.Function):
    """``sync_formula`` with given statistics, differentiable twice.

    Inputs: x, gamma, beta, eps and group as in ``sync_formula``; mean, var and count are the
    results of ``combine``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: Any,
    ) -> Tensor:
        ctx.eps, ctx.group = eps, group
        ctx.save_for_backward(x, gamma, beta, mean, var, count)
        weight, bias = (None if t is None else t.to(mean.dtype) for t in (gamma, beta))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, var, count = ctx.saved_tensors
        needs, eps, group = ctx.needs_input_grad, ctx.eps, ctx.group
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def formula(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
                return sync_formula(x, gamma, beta, eps, group)

            return *differentiate(formula, (x, gamma, beta), needs, grad_out), *(None,) * 5
        scale = inv_std = torch.rsqrt(var + eps)
        scale = scale if gamma is None else scale * gamma
        if x.numel() == 0:
            dx, dgamma, dbeta = torch.empty_like(x), *(torch.zeros_like(mean) for _ in range(2))
        else:
            wide = None if gamma is None else gamma.to(mean.dtype)
            ones = torch.ones_like(mean) if wide is None else wide  # without one, no sums
            dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                grad_out, x, ones, mean, var, mean, inv_std, False, eps, [needs[0], True, True]
            )
        if needs[0]:
            means = mean_gradients(dbeta, dgamma, count, group)
            shape = (1, -1, *(1,) * (x.dim() - 2))
            of_x = (-scale * inv_std * means[1]).view(shape)
            change = (x - mean.view(shape)) * of_x - (scale * means[0]).view(shape)
            dx = (dx + change).to(x.dtype)
        return (
            dx if needs[0] else None,
            dgamma.to(gamma.dtype) if needs[1] else None,
            dbeta.to(beta.dtype) if needs[2] else None,
            *(None,) * 5,
        )


def _forward(bn: Any, x: Tensor, group: Any) -> Tensor:
    """The training output of a SyncBatchNorm, PyTorch's or this file's, over a process group."""
    count = x.numel() // x.size(1)
    with torch.no_grad():
        mean, var, total = combine(*_statistics(x), count, group)
    if bn.track_running_stats:
        running = bn.running_mean, bn.running_var, bn.momentum, bn.num_batches_tracked
        update_running(*running, mean, var, total, count)
    return SyncBatchNormFunction.apply(x, bn.weight, bn.bias, mean, var, total, bn.eps, group)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of the values of this process."""
    wide = x.to(compute_dtype(x.dtype))
    if wide.numel() == 0 or torch.compiler.is_compiling():
        var, mean = torch.var_mean(wide, (0, *range(2, x.dim())), correction=0)
        return mean, var
    return torch.batch_norm_update_stats(wide, None, None, 0.0)  # faster than var_mean


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    total: Tensor,
    count: int,
) -> None:
    """Update the running statistics and the batch counter of one norm in place.

    No number is copied from the device to the host. All processes compute the same bits.

    Args:
        running_mean, running_var: [C], or None: only the counter changes.
        momentum: share of the batch; None for the average over all batches.
        batches: the counter of batches, or None.
        mean, var: [C], the statistics over all processes, from ``combine``.
        total: values per channel in all processes, from ``combine``.
        count: values per channel in this process.
    """
    with torch.no_grad():
        if batches is not None:
            batches.add_(1)
        if running_mean is None or running_var is None:
            return
        weight: Any = momentum
        if weight is None:
            if batches is None:
                return
            weight = (1.0 / batches).to(running_mean.dtype)
        if count == 0:  # total may be 0 too; then the weight is 0
            weight = (total > 0).to(running_mean.dtype) * weight
        unbiased = var * (total / (total - 1)).to(var.dtype)
        running_mean.lerp_(mean.to(running_mean.dtype), weight)
        running_var.lerp_(unbiased.to(running_var.dtype), weight)


def refuses(bn: nn.Module, x: Tensor) -> bool:
    """Whether a module is PyTorch's SyncBatchNorm and would raise because x is on a CPU."""
    return isinstance(bn, nn.SyncBatchNorm) and x.device.type == "cpu" and group_of(bn) is not None


def run_norm(bn: nn.Module, x: Tensor) -> Tensor:
    """``bn(x)``; also computes the cases for which PyTorch's SyncBatchNorm raises (``refuses``)."""
    return _forward(bn, x, group_of(bn)) if refuses(bn, x) else bn(x)


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics in training are over the batches of all processes.

    ::

        out = (x - mean) / sqrt(var + eps) * weight + bias

    [N, C, *] -> [N, C, *], in float32, float64, bfloat16 or float16, on any device that the group's
    backend reaches. Arguments, parameters, buffers and behaviour are those of
    ``torch.nn.SyncBatchNorm``. The batches of the processes may differ in size, and may be empty.
    Outputs, gradients and running statistics are those of one process with the joined batch.
    Without a process group, in a group of one process and in eval mode the module is an ordinary
    batch norm. Differentiable twice; if one process runs backward, all processes must.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as ``torch.nn.BatchNorm2d``.
        process_group: the processes that share statistics; None: all processes.
        device, dtype: of the parameters and buffers.

    Raises:
        In forward:
        ValueError: a channel has one value in all processes together (raised in each process,
            before a running statistic changes); the process group was destroyed; the input has
            less than two dimensions.

    Source: the formula of the joined statistics stands in ``ops.sync``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        group = group_of(self)
        return super().forward(input) if group is None else _forward(self, input, group)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group  # cannot be copied
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


# Batch norms with which a Ghost module can be fused.
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every batch norm of a model by a ``SyncBatchNorm``.

    Works as ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, but for any device. Call it before
    or after ``fuse``, and before the model is wrapped in DistributedDataParallel. Parameters,
    buffers, state_dict keys, hooks and modes do not change. Subclasses of PyTorch's batch norms are
    not converted, because a subclass may compute something else.

    Args:
        model: the model, changed in place.
        process_group: the processes that share statistics; None: all processes.

    Returns:
        The model; a new module if ``model`` itself is a batch norm.

    Raises:
        TypeError: model is not a module.
    """
    arguments.module("model", model)
    return _converted(model, process_group, {})


def _converted(
    module: nn.Module, process_group: Any, done: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in done:
        return done[module]
    new = module
    if type(module) in _CONVERTED:
        # A new object, so that guards on the old module fail.
        new = SyncBatchNorm.__new__(SyncBatchNorm)
        new.__dict__.update(module.__dict__)
        new.process_group = process_group
    done[module] = new
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _converted(child, process_group, done)
    return new
