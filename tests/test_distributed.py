"""Several processes: SyncBatchNorm, alone and fused, gives the numbers of one with the whole batch.

Every check runs in two processes over gloo. Each of them computes what one process would have, from
the same seed, and compares its part.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghost_ops import SyncBatchNorm, convert_sync_batchnorm, sync

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[..., list[Any]]]:
    """Runs a function in both processes."""
    pair: processes.Pair | None = None

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        nonlocal pair
        if pair is None or not pair.is_open:
            pair = processes.Pair()
        return pair.run(function, *arguments)

    yield run
    if pair is not None and pair.is_open:
        pair.close()


# --- what the checks are made of --------------------------------------------------------------


def part(rank: int, sizes: tuple[int, int]) -> slice:
    """The images of a process."""
    return slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))


def summed(t: Tensor) -> Tensor:
    """The sum over both processes."""
    t = t.clone()
    dist.all_reduce(t)
    return t


def close(got: Tensor, want: Tensor, what: str, tolerance: float | None = None) -> None:
    limit = TOLERANCE[got.dtype] if tolerance is None else tolerance
    if not want.numel():
        assert got.shape == want.shape, what
        return
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= limit, f"{what}: differs by {error:.1e}"


def compare(
    rank: int, split: nn.Module, whole: nn.Module, x: Tensor, sizes: tuple[int, int], steps: int = 1
) -> None:
    """Training steps of ``split`` on this process's images, of ``whole`` on all of them."""
    mine = part(rank, sizes)
    for _ in range(steps):
        ours, all_of_x = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
        ours = ours if x.is_contiguous() else ours.contiguous(memory_format=torch.channels_last)
        ours = ours.detach().requires_grad_()
        got, want = split(ours), whole(all_of_x)
        close(got, want[mine], "output")
        weights = torch.linspace(-1, 1, want.numel(), dtype=x.dtype).view_as(want).sin()
        for net in (split, whole):
            net.zero_grad()
        (want.square() * weights).sum().backward()
        (got.square() * weights[mine]).sum().backward()
        assert ours.grad is not None
        assert all_of_x.grad is not None
        close(ours.grad, all_of_x.grad[mine], "gradient of the input")
        pairs = zip(split.named_parameters(), whole.named_parameters(), strict=True)
        for (name, p), (_, q) in pairs:
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                close(summed(p.grad), q.grad, f"gradient of {name}")
        with torch.no_grad():
            for p, q in zip(split.parameters(), whole.parameters(), strict=True):
                if q.grad is not None:
                    p -= 0.01 * summed(p.grad)
                    q -= 0.01 * q.grad
    state = whole.state_dict()
    assert list(split.state_dict()) == list(state)
    for name, got in split.state_dict().items():
        if got.is_floating_point():
            close(got, state[name], name)
        else:
            assert torch.equal(got, state[name]), name
        assert torch.equal(summed(got), got * processes.WORLD), f"{name} differs"


# --- the norm alone ---------------------------------------------------------------------------


def randomized(bn: Any) -> Any:
    """With other parameters and statistics than 0 and 1."""
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
    dtype = torch.float32 if low else torch.float64
    plain: Any = getattr(nn, kind.split()[0])
    whole = randomized(plain(5, dtype=dtype, **SETTINGS[settings]))
    split = randomized(plain(5, dtype=dtype, **SETTINGS[settings]))
    converted = convert_sync_batchnorm(split)
    assert type(converted) is SyncBatchNorm
    x = (torch.randn(SHAPES[kind]) * 2 + 3).to(dtype)
    compare(rank, converted, whole, x, sizes, steps=2)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        compare(rank, converted, whole, x, sizes)
    if converted.track_running_stats:  # else every process has statistics of its own, as PyTorch's
        compare(rank, converted.eval(), whole.eval(), x, (4, 4))


@pytest.mark.parametrize("low", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("sizes", [(4, 4), (7, 1), (8, 0)], ids=str)
def test_norm(workers: Callable, sizes: tuple[int, int], low: bool) -> None:
    for kind in SHAPES:
        workers(check_norm, kind, "all", sizes, low)
    for settings in SETTINGS:
        workers(check_norm, "BatchNorm2d", settings, sizes, low)


def check_low_precision(rank: int) -> None:
    """bfloat16 with float32 parameters: as far from float64 as PyTorch's own, at most twice."""
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
    """Gradients of a function of gradients, those of one process."""
    bn, plain = randomized(SyncBatchNorm(3)).double(), randomized(nn.BatchNorm2d(3)).double()
    x, mine = torch.randn(6, 3, 4, 5, dtype=torch.float64), part(rank, (4, 2))
    seconds = []
    for net, given, share in ((bn, x[mine], mine), (plain, x, slice(None))):
        given = given.clone().requires_grad_()
        weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)[share]
        loss = (net(given).sin() * weights).sum()
        first = torch.autograd.grad(loss, [given, *net.parameters()], create_graph=True)
        # Parameters' gradients are sums over the processes: linear in them.
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
    """A mean of 10^4 costs no digits; every process gets the same bits, whatever it has."""
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
    """In all processes together: an error in each of them, and nothing has changed."""
    bn = randomized(SyncBatchNorm(3)).double()
    before = {name: t.clone() for name, t in bn.state_dict().items()}
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        bn(x[part(rank, (1, 0))])
    assert all(torch.equal(t, before[name]) for name, t in bn.state_dict().items())
    assert bn(x).abs().max() < 2  # one in each is enough
    with pytest.raises(ValueError, match="at least 2D"):
        bn(x[0, :, 0, 0])


def test_one_value(workers: Callable) -> None:
    workers(check_one_value)


def check_groups(rank: int, folder: str) -> None:
    """``process_group`` is honoured; what was destroyed is an error, or one process."""
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
