"""Batch norm over all processes of a group, on any device that the group's backend reaches.

PyTorch's ``SyncBatchNorm`` runs on GPUs only, and DistributedDataParallel refuses models that have
one on a CPU. This one runs over any backend, gloo included. A Ghost module with either of them
inside runs as its children, unfused, and says so: its statistics are not those of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _AllReduce(torch.autograd.Function):
    """Sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics in training are over the batches of all processes.

    [N, C, H, W] -> the same. The processes may have batches of different sizes. Numbers, gradients
    and running statistics are those of one process with the whole batch. Without a process group,
    in a group of one and in eval mode it is ``nn.BatchNorm2d``.

    Raises:
        ValueError: one value per channel in all processes together.
    """

    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        wide = input.double() if input.dtype is torch.float64 else input.float()
        count = wide.new_tensor([input.numel() / input.size(1)])
        total = _AllReduce.apply(torch.cat([wide.sum(dims), count]), group)
        values = total[-1].detach()
        if values <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, in all processes together"
            )
        centred = wide - (total[:-1] / values).view(shape)
        # From centred values, in a second exchange: E[u^2] - E[u]^2 would lose digits.
        var = _AllReduce.apply(centred.square().sum(dims), group) / values
        if self.track_running_stats and self.running_mean is not None:
            self._update((total[:-1] / values).detach(), var.detach() * (values / (values - 1)))
        out = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum or 0.0)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum or 0.0)


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Let every BatchNorm2d of a model take its statistics over all processes.

    Parameters, buffers, keys, hooks and mode stay.

    Args:
        model: what to convert, before it is wrapped in DistributedDataParallel.
        process_group: the processes; all of them if None.

    Returns:
        The model, changed in place; a new module if it is a BatchNorm2d itself.
    """
    return _converted(model, process_group, {})


def _converted(
    module: nn.Module, process_group: Any, done: dict[nn.Module, nn.Module]
) -> nn.Module:
    if module in done:
        return done[module]
    new = module
    if type(module) is nn.BatchNorm2d:
        # A new object, so that whoever keeps something about the old one notices.
        new = SyncBatchNorm.__new__(SyncBatchNorm)
        new.__dict__.update(module.__dict__)
        new.process_group = process_group
    done[module] = new
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _converted(child, process_group, done)
    return new
