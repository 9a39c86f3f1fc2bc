"""Promise: SyncBatchNorm gives the numbers of one process with the whole batch.

Every check runs in two processes over gloo, see ``distributed_checks``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from distributed_checks import close, compare, part, summed
from torch import Tensor, nn

from ghost_ops import SyncBatchNorm, convert_sync_batchnorm, sync

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


def randomized(bn: Any) -> Any:
    """Fill parameters and running statistics with values in [0.5, 1.5)."""
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for t in (*bn.parameters(), *bn.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=gen) + 0.5)
    return bn


SHAPES = {
    "BatchNorm1d": (8, 5),
    "BatchNorm1d with length": (8, 5, 6),
    "BatchNorm2d": (8, 5, 6, 4),
    "BatchNorm3d": (8, 5, 3, 2, 4),
}


SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "momentum None": {"momentum": None},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def check_norm(rank: int, kind: str, settings: str, sizes: tuple[int, int], low: bool) -> None:
    plain: Any = getattr(nn, kind.split()[0])
    whole, split = (randomized(plain(5, **SETTINGS[settings])).double() for _ in range(2))
    converted = convert_sync_batchnorm(split).to(torch.float32 if low else torch.float64)
    assert type(converted) is SyncBatchNorm
    x = (torch.randn(SHAPES[kind]) * 2 + 3).double()
    compare(rank, converted, whole, x, sizes, steps=2)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        compare(rank, converted, whole, x, sizes)
    if converted.track_running_stats:  # else each process uses its own batch's, as PyTorch does
        compare(rank, converted.eval(), whole.eval(), x, (4, 4))


@pytest.mark.parametrize("low", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("sizes", [(4, 4), (7, 1), (8, 0)], ids=str)
def test_norm(workers: Callable, sizes: tuple[int, int], low: bool) -> None:
    for kind in SHAPES:
        workers(check_norm, kind, "all", sizes, low)
    for settings in SETTINGS:
        workers(check_norm, "BatchNorm2d", settings, sizes, low)


def check_low_precision(rank: int) -> None:
    """bfloat16 with float32 parameters: at most twice PyTorch's own error against float64."""
    x = torch.randn(8, 5, 6, 4).bfloat16()
    plain, exact = randomized(nn.BatchNorm2d(5)), randomized(nn.BatchNorm2d(5)).double()
    split = convert_sync_batchnorm(randomized(nn.BatchNorm2d(5)))
    found = []
    for bn, given in ((plain, x), (exact, x.double()), (split, x[part(rank, (5, 3))])):
        given = given.clone().requires_grad_()
        out = bn(given)
        assert out.dtype is given.dtype
        out.square().sum().backward()
        mine = part(rank, (5, 3)) if bn is not split else slice(None)
        found.append([out[mine].double(), given.grad[mine].double(), bn.running_var.double()])
    for eager, want, got in zip(*found, strict=True):
        assert (got - want).abs().max() <= 2 * (eager - want).abs().max() + 1e-6


def test_low_precision(workers: Callable) -> None:
    workers(check_low_precision)


def check_double_backward(rank: int) -> None:
    """Gradients of a function of gradients."""
    bn, plain = randomized(SyncBatchNorm(3)).double(), randomized(nn.BatchNorm2d(3)).double()
    x, mine = torch.randn(6, 3, 4, 5, dtype=torch.float64), part(rank, (4, 2))
    seconds = []
    for net, given, share in ((bn, x[mine], mine), (plain, x, slice(None))):
        given = given.clone().requires_grad_()
        weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)[share]
        loss = (net(given).sin() * weights).sum()
        first = torch.autograd.grad(loss, [given, *net.parameters()], create_graph=True)
        # The gradients of parameters are sums over the processes; the penalty is linear in them.
        penalty = (first[0].square() * weights.cos()).sum() + first[1].sum() + first[2].sum()
        seconds.append(torch.autograd.grad(penalty, [given, *net.parameters()], allow_unused=True))
    close(seconds[0][0], seconds[1][0][mine], "second gradient of the input")
    for got, want in zip(seconds[0][1:], seconds[1][1:], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            close(summed(got), want, "second gradient of a parameter")


def test_double_backward(workers: Callable) -> None:
    workers(check_double_backward)


def check_combine(rank: int) -> None:
    """A mean of 10^4 costs no digits; both processes get the same bits."""
    x = torch.randn(9, 3) + 1e4
    mine = x[part(rank, (8, 1))]
    mean, var, count = sync.combine(
        mine.mean(0), mine.var(0, correction=0), len(mine), dist.group.WORLD
    )
    assert count.dtype is torch.float64
    assert count == 9
    close(mean, x.double().mean(0).float(), "mean", 1e-7)
    close(var, x.double().var(0, correction=0).float(), "var", 1e-3)
    others = [torch.empty_like(torch.cat([mean, var])) for _ in range(processes.WORLD)]
    dist.all_gather(others, torch.cat([mean, var]))
    assert torch.equal(others[0], others[1])
    nothing = torch.full((3,), torch.nan)
    mean, var, count = sync.combine(nothing, nothing, 0, dist.group.WORLD)
    assert count == 0
    assert not mean.any()
    assert not var.any()
    means = sync.mean_gradients(mine.sum(0), mine.sum(0) * 2, torch.tensor(9.0), dist.group.WORLD)
    close(means, torch.stack([x.mean(0), 2 * x.mean(0)]), "means", 1e-6)


def test_combine(workers: Callable) -> None:
    workers(check_combine)


def check_one_value(rank: int) -> None:
    """One value per channel in all processes together: both raise, and no state changes."""
    bn = randomized(SyncBatchNorm(3)).double()
    before = {name: t.clone() for name, t in bn.state_dict().items()}
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        bn(x[part(rank, (1, 0))])
    assert all(torch.equal(t, before[name]) for name, t in bn.state_dict().items())
    assert bn(x).abs().max() < 2  # one value in each process is enough
    with pytest.raises(ValueError, match="at least 2D"):
        bn(x[0, :, 0, 0])


def test_one_value(workers: Callable) -> None:
    workers(check_one_value)


def check_groups(rank: int, folder: str) -> None:
    """``process_group`` is used; a destroyed group raises; without a group a process is alone."""
    x, mine = torch.randn(6, 3, 4, 4), part(rank, (4, 2))
    both, alone, only = (
        dist.new_group([0, 1]),
        dist.new_group([rank], use_local_synchronization=True),
        dist.new_group([0]),
    )
    plain = nn.BatchNorm2d(3)
    close(SyncBatchNorm(3, process_group=both)(x[mine]), plain(x)[mine], "all")
    for group in (alone, only):  # the second leaves out one of the processes
        net = nn.Sequential(nn.BatchNorm2d(3))
        convert_sync_batchnorm(net, group)
        assert net[0].process_group is group
        assert sync.group_of(net[0]) is None
        close(net(x[mine]), plain(x[mine]), "its own")
    bn = SyncBatchNorm(3, process_group=both)
    assert sync.group_of(bn) is both
    assert sync.group_of(bn.eval()) is None
    before = bn.train().running_mean.clone()
    dist.destroy_process_group(both)
    with pytest.raises(ValueError, match="rocess group"):
        bn(x[mine])
    assert torch.equal(bn.running_mean, before)
    dist.barrier()
    dist.destroy_process_group()
    close(SyncBatchNorm(3)(x[mine]), plain(x[mine]), "without a group")
    processes.join_group(rank, pathlib.Path(folder) / "again")


def test_groups(workers: Callable, tmp_path: pathlib.Path) -> None:
    workers(check_groups, str(tmp_path))


def check_compiled_norm(rank: int) -> None:
    torch.compiler.reset()
    split = randomized(SyncBatchNorm(5)).double()
    whole = randomized(nn.BatchNorm2d(5)).double()
    compiled = torch.compile(split, fullgraph=True, backend="aot_eager")
    for sizes in ((4, 2), (2, 4)):
        x = torch.randn(6, 5, 4, 3, dtype=torch.float64)
        mine = part(rank, sizes)
        ours, all_of_x = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
        got, want = compiled(ours), whole(all_of_x)
        close(got, want[mine], "output")
        got.square().sum().backward()
        want.square().sum().backward()
        close(ours.grad, all_of_x.grad[mine], "gradient")
        close(split.running_var, whole.running_var, "running_var")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        compiled(torch.randn(1, 5, 1, 1, dtype=torch.float64)[part(rank, (1, 0))])


def test_compiled_norm(workers: Callable) -> None:
    workers(check_compiled_norm)


class Scaled(nn.BatchNorm2d):
    """A subclass with another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_convert() -> None:
    """Parameters, buffers, hooks, modes and sharing stay; subclasses are not converted."""
    shared = nn.BatchNorm2d(3)
    net = nn.Sequential(shared, nn.BatchNorm1d(2).eval(), Scaled(3), nn.Sequential(shared))
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    state, before = net.state_dict(), list(net)
    assert convert_sync_batchnorm(net) is net
    assert [type(m) for m in net][:3] == [SyncBatchNorm, SyncBatchNorm, Scaled]
    assert net[2] is before[2]
    assert net[0] is net[3][0]
    assert net[0] is not shared
    assert not net[1].training
    assert net[0].training
    parameters = [p for layer in before[:3] for p in layer.parameters()]
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    net[0](torch.randn(2, 3, 4, 4))
    assert calls == [1]
    again = convert_sync_batchnorm(nn.SyncBatchNorm(3, eps=0.1, momentum=None))
    assert type(again) is SyncBatchNorm
    assert (again.eps, again.momentum) == (0.1, None)
