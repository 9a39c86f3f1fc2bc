"""Collectives of a batch norm over all processes of a group, and their operators.

The operators make the collectives opaque to the compiler: an exception depends on their results.

With n values per channel in a process, mean and var of these, and N the sum of n over all processes
(Chan, Golub and LeVeque 1979)::

    MEAN = sum(n * mean) / N
    VAR  = sum(n * (var + (mean - MEAN)^2)) / N

Communicated per norm: forward 2 C + 1 numbers (mean, var, n) from every process to every other,
backward the sum of 2 C numbers (dbeta, dgamma).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .define import native, operator


def combine(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over all processes, by the formula of this file's docstring; one collective.

    The sums are in float64, and every process gets the same bits.

    Args:
        mean, var: [C], mean and biased variance of this process; not used if count is 0.
        count: values per channel in this process.
        group: a ``ProcessGroup``.

    Returns:
        Mean and biased variance [C] in the dtype of mean, and the number of values per channel in
        all processes, a 0-dim float64 tensor. All are zero if no process has a value.

    Raises:
        ValueError: in every process, if a channel has one value in all processes together.
    """
    if torch.compiler.is_compiling():
        return native.sync_combine(mean, var, count, group.group_name)
    return _combine(mean, var, count, group)


def _combine(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    if count == 0:
        mean = var = torch.zeros_like(mean)  # instead of 0 / 0
    local = torch.cat([mean, var, mean.new_full((1,), count)])
    gathered = local.new_empty(dist.get_world_size(group), local.numel())
    dist.all_gather(list(gathered.unbind()), local, group=group)
    means, variances, counts = gathered.double().split([mean.numel(), mean.numel(), 1], 1)
    total = counts.sum()
    # Reading total waits for the GPU. It can be 1 only if this process has at most one value.
    if count <= 1 and total == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 in all processes together"
        )
    share = counts / total.clamp(min=1)
    whole = (share * means).sum(0)
    spread = (share * (variances + (means - whole).square())).sum(0)
    return whole.to(mean.dtype), spread.to(mean.dtype), total


def _fake_combine(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = a.mean.new_empty((), dtype=torch.float64)
    return torch.empty_like(a.mean), torch.empty_like(a.mean), count


def _group_named(name: str) -> Any:
    distributed: Any = dist.distributed_c10d  # its stubs have a type of their own for names
    return distributed._resolve_process_group(name)


@operator(
    "sync_combine(Tensor mean, Tensor var, SymInt count, str group) -> (Tensor, Tensor, Tensor)",
    _fake_combine,
)
def eager_sync_combine(
    mean: Tensor, var: Tensor, count: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``combine`` with the name of a group, because a graph cannot contain the group object."""
    return _combine(mean, var, count, _group_named(group))


def mean_gradients(dbeta: Tensor, dgamma: Tensor, count: Tensor, group: Any) -> Tensor:
    """Means over all values of all processes of da and of da * uhat; one all-reduce.

    da is the gradient at the norm's output, uhat its normalised input.

    Args:
        dbeta, dgamma: [C], the sums of da and of da * uhat in this process.
        count: of ``combine``.
        group: a ``ProcessGroup``.

    Returns:
        [2, C], in the dtype of dbeta.
    """
    if torch.compiler.is_compiling():
        return native.sync_mean_gradients(dbeta, dgamma, count, group.group_name)
    return _mean_gradients(dbeta, dgamma, count, group)


def _mean_gradients(dbeta: Tensor, dgamma: Tensor, count: Tensor, group: Any) -> Tensor:
    sums = torch.stack([dbeta, dgamma])
    dist.all_reduce(sums, group=group)
    return sums.div_(count.clamp(min=1))


@operator(
    "sync_mean_gradients(Tensor dbeta, Tensor dgamma, Tensor count, str group) -> Tensor",
    lambda a: a.dbeta.new_empty(2, a.dbeta.numel()),
)
def eager_sync_mean_gradients(dbeta: Tensor, dgamma: Tensor, count: Tensor, group: str) -> Tensor:
    """``mean_gradients`` for the name of a group."""
    return _mean_gradients(dbeta, dgamma, count, _group_named(group))
