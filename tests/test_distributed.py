"""Several processes: SyncBatchNorm, alone and fused, gives the numbers of one with the whole batch.

Every check runs in two processes over gloo. Each of them computes what one process would have, from
the same seed, and compares its part.
"""

from __future__ import annotations

import contextlib
import copy
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ghost_forms import GhostConv, Sliced, randomize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import ghost_ops
from ghost_ops import SyncBatchNorm, convert_sync_batchnorm, sync
from ghost_ops.reference import GhostBottleneck, GhostModule

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


def dtype_of(module: nn.Module) -> torch.dtype:
    """float32 or float64; the latter for a module without tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors), torch.float64)


def summed(t: Tensor) -> Tensor:
    """The sum over both processes."""
    t = t.clone()
    dist.all_reduce(t)
    return t


def close(got: Tensor, want: Tensor, what: str, tolerance: float | None = None) -> None:
    limit, got = TOLERANCE[got.dtype] if tolerance is None else tolerance, got.to(want.dtype)
    if not want.numel():
        assert got.shape == want.shape, what
        return
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= limit, f"{what}: differs by {error:.1e}"


def compare(
    rank: int, split: nn.Module, whole: nn.Module, x: Tensor, sizes: tuple[int, int], steps: int = 1
) -> set[str]:
    """Training steps of ``split`` on this process's images, of ``whole`` on all of them.

    x in the dtype of ``whole``. Returns the names of the autograd functions of ``split``.
    """
    mine, functions = part(rank, sizes), set()
    dtype = dtype_of(split)
    for _ in range(steps):
        ours, all_of_x = x[mine].to(dtype), x.clone().requires_grad_()
        if not x.is_contiguous():
            ours = ours.contiguous(memory_format=torch.channels_last)
        ours = ours.detach().requires_grad_()
        got, want = split(ours), whole(all_of_x)
        functions = functions_behind(got)
        close(got, want[mine], "output")
        weights = torch.linspace(-1, 1, want.numel(), dtype=x.dtype).view_as(want).sin()
        for net in (split, whole):
            net.zero_grad()
        (want.square() * weights).sum().backward()
        (got.square() * weights[mine].to(dtype)).sum().backward()
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
    return functions


def functions_behind(out: Tensor) -> set[str]:
    """Names of the autograd functions that made a tensor."""
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {type(node).__name__ for node in found}


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
    plain: Any = getattr(nn, kind.split()[0])
    whole, split = (randomized(plain(5, **SETTINGS[settings])).double() for _ in range(2))
    converted = convert_sync_batchnorm(split).to(torch.float32 if low else torch.float64)
    assert type(converted) is SyncBatchNorm
    x = (torch.randn(SHAPES[kind]) * 2 + 3).double()
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


class Scaled(nn.BatchNorm2d):
    """Computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_convert() -> None:
    """Parameters, buffers, hooks, modes and sharing stay; subclasses are left as they are."""
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
    assert all(a is b for a, b in zip(net.parameters(), (*before[0].parameters(),
                                      *before[1].parameters(), *before[2].parameters()),
                                      strict=True))  # fmt: skip
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    net[0](torch.randn(2, 3, 4, 4))
    assert calls == [1]
    again = convert_sync_batchnorm(nn.SyncBatchNorm(3, eps=0.1, momentum=None))
    assert type(again) is SyncBatchNorm
    assert (again.eps, again.momentum) == (0.1, None)


# --- fused ------------------------------------------------------------------------------------


class Tailed(nn.Module):
    """With one batch norm, behind the concatenation, as in Ghost-ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.cheap = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
        self.bn = nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.relu(self.bn(torch.cat([y, self.cheap(y)], 1)))


def prelus() -> nn.Module:
    return Sliced(6, 10, act1=nn.PReLU(5), act2=nn.PReLU(1))


def with_biases() -> nn.Module:
    """Convolutions with biases, which the statistics take out again."""
    module: Any = Sliced(6, 10)
    for branch in (module.primary_conv, module.cheap_operation):
        branch[0].bias = nn.Parameter(torch.zeros(5))
    return module


def bottleneck() -> nn.Module:
    return GhostBottleneck(6, 14, 9, stride=2, se_ratio=0.25)


FUSED: dict[str, Callable[[], nn.Module]] = {
    "stride 2, odd": lambda: GhostModule(6, 9, stride=2),
    "ratio 3": lambda: GhostModule(6, 12, ratio=3, dw_size=5),
    "ratio 1": lambda: GhostModule(6, 5, ratio=1),
    "3x3": lambda: GhostModule(6, 10, kernel_size=3, relu=False),
    "x wide, u kept": lambda: GhostModule(6, 2),
    "SiLU": lambda: GhostConv(6, 10),
    "PReLU": prelus,
    "biases": with_biases,
    "bottleneck": bottleneck,
    "norm behind": Tailed,
}
WAYS = {
    "torch's before": (nn.SyncBatchNorm.convert_sync_batchnorm, True),
    "torch's after": (nn.SyncBatchNorm.convert_sync_batchnorm, False),
    "ours before": (convert_sync_batchnorm, True),
    "ours after": (convert_sync_batchnorm, False),
}


def converted(module: nn.Module, way: str, group: Any = None) -> nn.Module:
    """Fused, with its norms over the processes of a group."""
    convert, before = WAYS[way]
    if before:
        module = convert(module, group)
        ghost_ops.fuse(module)
        return module
    ghost_ops.fuse(module)
    return convert(module, group)


def check_fused(
    rank: int, form: str, way: str, dtype: torch.dtype, sizes: tuple[int, int], nhwc: bool
) -> None:
    whole = randomize(FUSED[form]()).double()
    split = converted(copy.deepcopy(whole), way).to(dtype)
    x = torch.randn(8, 6, 7, 6, dtype=torch.float64)
    if nhwc:
        x = x.contiguous(memory_format=torch.channels_last)
    functions = compare(rank, split, whole, x, sizes, steps=2)
    # The norms of a bottleneck that are not in its Ghost modules.
    outside = form in ("bottleneck", "norm behind")
    assert "GhostModuleFunctionBackward" in functions or form == "norm behind"
    assert ("SyncBatchNormFunctionBackward" in functions) == outside
    compare_evaluation(split.eval(), whole.eval(), x)


def check_eager_backend(rank: int, form: str) -> None:
    """The same passes in plain PyTorch."""
    with ghost_ops.use_backend("eager"):
        whole = randomize(FUSED[form]()).double()
        split = converted(copy.deepcopy(whole), "ours before")
        compare(rank, split, whole, torch.randn(8, 6, 7, 6, dtype=torch.float64), (5, 3))


def compare_evaluation(split: nn.Module, whole: nn.Module, x: Tensor) -> None:
    """In eval mode without gradients, with packed weights, also after a change of a parameter."""
    dtype = dtype_of(split)
    with torch.no_grad():
        for _ in range(2):
            close(split(x.to(dtype)), whole(x), "evaluation")
            for net in (split, whole):
                next(net.parameters()).mul_(1.5)
    state: Any = split._ghost_state()
    assert state.packed is not None


@pytest.mark.parametrize("form", FUSED)
def test_fused(workers: Callable, form: str) -> None:
    for way in WAYS:
        workers(check_fused, form, way, torch.float64, (5, 3), False)
    for nhwc in (False, True):
        workers(check_fused, form, "ours before", torch.float32, (4, 4), nhwc)
    workers(check_eager_backend, form)
    for sizes in ((7, 1), (8, 0), (0, 8)):
        workers(check_fused, form, "ours after", torch.float64, sizes, sizes[0] == 7)


def check_converted_in_use(rank: int, convert: str) -> None:
    """After calls in both modes, whose packed weights and guards are of the plain norms."""
    whole = randomize(bottleneck()).double()
    fused = copy.deepcopy(whole)
    ghost_ops.fuse(fused)
    x = torch.randn(8, 6, 7, 6, dtype=torch.float64)
    for net in (fused, whole):
        net(x)
        with torch.no_grad():
            net.eval()(x)
    convert_with, _ = WAYS[convert]
    assert convert_with(fused) is fused
    with torch.no_grad():
        close(fused(x), whole(x), "evaluation")
    functions = compare(rank, fused.train(), whole.train(), x, (5, 3))
    assert "GhostModuleFunctionBackward" in functions
    compare_evaluation(fused.eval(), whole.eval(), x)


@pytest.mark.parametrize("convert", ["torch's after", "ours after"])
def test_converted_in_use(workers: Callable, convert: str) -> None:
    workers(check_converted_in_use, convert)


def check_shapes(rank: int) -> None:
    """Images of another size in every process, as the layers one by one."""
    fused = converted(randomize(GhostModule(6, 9, dw_size=5)).double(), "ours before")
    layers = copy.deepcopy(fused)
    ghost_ops.unfuse(layers)
    x = torch.randn((3, 6, 8, 5) if rank == 0 else (2, 6, 3, 9), dtype=torch.float64)
    compare_nets(fused, layers, x)


def compare_nets(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    """A training step of two modules with the same norms on the same input."""
    results = []
    for net in (first, second):
        given = x.clone().requires_grad_()
        out = net(given)
        (
            out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out).sin()
        ).sum().backward()
        grads = [p.grad for p in net.parameters()]
        results.append([out, given.grad, *grads, *(b.to(x.dtype) for b in net.buffers())])
    names = ["output", "input", *(n for n, _ in first.named_parameters())]
    names += [n for n, _ in first.named_buffers()]
    for name, got, want in zip(names, *results, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            close(got, want, name)


def test_shapes(workers: Callable) -> None:
    workers(check_shapes)


MIXED: dict[str, tuple[str, str]] = {
    "first": ("sync", "plain"),
    "second": ("plain", "sync"),
    "second frozen": ("sync", "frozen"),
    "first frozen": ("frozen", "sync"),
    "other groups": ("sync", "alone"),
    "average": ("average", "sync"),
    "not tracked": ("sync", "not tracked"),
    "not affine": ("not affine", "sync"),
}


def norm_as(bn: Any, kind: str, rank: int) -> Any:
    """A batch norm over all processes, but for its kind."""
    if kind == "plain":
        return bn
    group = dist.new_group([rank], use_local_synchronization=True) if kind == "alone" else None
    if kind == "not tracked":
        bn.track_running_stats, bn.num_batches_tracked = False, None
        bn.running_mean = bn.running_var = None
    if kind == "not affine":
        bn.weight = bn.bias = None
    if kind == "average":
        bn.momentum = None
    bn = convert_sync_batchnorm(bn, group)
    return bn.eval() if kind == "frozen" else bn


def check_mixed(rank: int, kinds: tuple[str, str], act: str) -> None:
    """Norms of several kinds in one module, as its layers one by one."""
    made = prelus() if act == "prelu" else GhostModule(6, 10)
    fused: Any = randomize(made).double()
    branches = fused.primary_conv, fused.cheap_operation
    for branch, kind in zip(branches, kinds, strict=True):
        branch[1] = norm_as(branch[1], kind, rank)
    layers = copy.deepcopy(fused)
    ghost_ops.fuse(fused)
    for seed in range(2):
        x = torch.randn(5 - rank, 6, 7, 6, dtype=torch.float64)
        compare_nets(fused, layers, x + seed)
    assert "GhostModuleFunctionBackward" in functions_behind(fused(x))
    layers(x)
    for p, q in zip(fused.parameters(), layers.parameters(), strict=True):
        p.requires_grad_(False), q.requires_grad_(False)
    for index in (0, 1):  # parameters of one of the branches learn
        for net in (fused, layers):
            net.zero_grad()
            for i, branch in enumerate((net.primary_conv, net.cheap_operation)):
                branch.requires_grad_(i == index)
        compare_nets(fused, layers, x)


@pytest.mark.parametrize("kinds", MIXED)
def test_mixed(workers: Callable, kinds: str) -> None:
    for act in ("relu", "prelu"):
        workers(check_mixed, MIXED[kinds], act)


def check_one_value_fused(rank: int) -> None:
    for way in WAYS:
        module = converted(randomize(GhostModule(6, 9)).double(), way)
        before = {name: t.clone() for name, t in module.state_dict().items()}
        x = torch.randn(1, 6, 1, 1, dtype=torch.float64)
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode, pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                module(x[part(rank, (1, 0))])
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        assert module(x).isfinite().all()  # one in each is enough


def test_one_value_fused(workers: Callable) -> None:
    workers(check_one_value_fused)


def check_empty_everywhere(rank: int) -> None:
    module = converted(randomize(GhostModule(6, 9)).double(), "ours before")
    before = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.randn(0, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.shape == (0, 9, 3, 3)
    assert x.grad is not None
    state = module.state_dict().items()
    assert all(torch.equal(t, before[n]) for n, t in state if "batches" not in n)


def test_empty_everywhere(workers: Callable) -> None:
    workers(check_empty_everywhere)


def check_double_backward_fused(rank: int, form: str) -> None:
    """Gradients of a function of gradients, those of one process."""
    whole = randomize(FUSED[form]()).double()
    split = converted(copy.deepcopy(whole), "ours before")
    x, mine = torch.randn(6, 6, 5, 4, dtype=torch.float64), part(rank, (4, 2))
    seconds = []
    for net, share in ((split, mine), (whole, slice(None))):
        given = x[share].clone().requires_grad_()
        out = net(given)
        shape = torch.Size((6, *out.shape[1:]))
        weights = torch.linspace(-1, 1, shape.numel()).double().view(shape)[share]
        first = torch.autograd.grad((out.sin() * weights).sum(), given, create_graph=True)[0]
        penalty = (first.square() * torch.linspace(0, 2, x.numel()).view_as(x)[share]).sum()
        inputs = [given, *net.parameters()]
        seconds.append(torch.autograd.grad(penalty, inputs, allow_unused=True))
    close(seconds[0][0], seconds[1][0][mine], "second gradient of the input")
    for got, want in zip(seconds[0][1:], seconds[1][1:], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            close(summed(got), want, "second gradient of a parameter", 1e-9)


@pytest.mark.parametrize("form", ["stride 2, odd", "3x3", "SiLU", "PReLU"])
def test_double_backward_fused(workers: Callable, form: str) -> None:
    workers(check_double_backward_fused, form)


def check_group_fused(rank: int, folder: str) -> None:
    """A group of its own for every process, and one that was destroyed."""
    module = randomize(GhostModule(6, 9)).double()
    plain = copy.deepcopy(module)
    alone = dist.new_group([rank], use_local_synchronization=True)
    both = dist.new_group([0, 1])
    x = torch.randn(3 + rank, 6, 4, 4, dtype=torch.float64)
    fused = converted(copy.deepcopy(module), "ours before", alone)
    compare_nets(fused, plain, x)
    fused = converted(copy.deepcopy(module), "torch's after", both)
    fused(x)
    dist.destroy_process_group(both)
    before = {name: t.clone() for name, t in fused.state_dict().items()}
    with pytest.raises(ValueError, match="rocess group"):
        fused(x)
    assert all(torch.equal(t, before[name]) for name, t in fused.state_dict().items())
    dist.barrier()
    dist.destroy_process_group()
    fused = converted(copy.deepcopy(module), "torch's after")
    compare_nets(fused, module, x)  # without groups it is an ordinary norm
    processes.join_group(rank, pathlib.Path(folder) / "again")


def test_group_fused(workers: Callable, tmp_path: pathlib.Path) -> None:
    workers(check_group_fused, str(tmp_path))


def check_compiled_fused(rank: int) -> None:
    """One graph with the exchanges in it, for batches that differ."""
    torch.compiler.reset()
    whole = randomize(GhostModule(6, 9)).double()
    split = converted(copy.deepcopy(whole), "ours before")
    compiled: Any = torch.compile(split, fullgraph=True, backend="aot_eager")
    for sizes in ((4, 2), (3, 3)):
        x, mine = torch.randn(6, 6, 5, 4, dtype=torch.float64), part(rank, sizes)
        ours, all_of_x = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
        got, want = compiled(ours), whole(all_of_x)
        close(got, want[mine], "output")
        for net, out in ((split, got), (whole, want)):
            net.zero_grad()
            out.sin().sum().backward()
        close(ours.grad, all_of_x.grad[mine], "gradient")
        for (name, p), q in zip(split.named_parameters(), whole.parameters(), strict=True):
            close(summed(p.grad), q.grad, name)
        for (name, b), c in zip(split.named_buffers(), whole.buffers(), strict=True):
            close(b.double(), c.double(), name)


def test_compiled_fused(workers: Callable) -> None:
    workers(check_compiled_fused)


# --- networks ---------------------------------------------------------------------------------


def network(small: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if small:
        net = nn.Sequential(GhostModule(3, 8, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(8, 4))  # fmt: skip
        return randomize(net).double()
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        GhostBottleneck(8, 16, 8), GhostBottleneck(8, 20, 12, stride=2, se_ratio=0.25),
        GhostConv(12, 16), Sliced(16, 16, act1=nn.PReLU(), act2=nn.PReLU(8)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return randomize(net).double()


def batch(index: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(100 + index)
    return torch.randn(8, 3, 18, 16, generator=gen, dtype=torch.float64), torch.arange(8) % 4


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def trained(net: nn.Module, accumulate: int) -> dict[str, Tensor]:
    """The state of one process after three steps on whole batches."""
    optimizer = optimizer_of(net)
    for i in range(3):
        optimizer.zero_grad()
        for j in range(accumulate):
            x, y = batch(i * accumulate + j)
            (F.cross_entropy(net(x), y, reduction="sum") / 8).backward()
        optimizer.step()
    return net.state_dict()


def check_ddp(rank: int, way: str, accumulate: int, compiled: bool) -> None:
    """Uneven batches: DDP averages the gradients, so each process scales its own loss."""
    torch.compiler.reset()
    net = converted(network(compiled), way)
    parallel: Any = nn.parallel.DistributedDataParallel(net)
    call = torch.compile(parallel, backend="aot_eager") if compiled else parallel
    optimizer, mine = optimizer_of(net), part(rank, (5, 3))
    for i in range(3):
        optimizer.zero_grad()
        for j in range(accumulate):
            x, y = batch(i * accumulate + j)
            with contextlib.ExitStack() as stack:
                if j + 1 < accumulate:
                    stack.enter_context(parallel.no_sync())
                loss = F.cross_entropy(call(x[mine]), y[mine], reduction="sum")
                (loss * processes.WORLD / 8).backward()
        optimizer.step()
    want = trained(network(compiled), accumulate)
    assert list(net.state_dict()) == list(want)
    for name, got in net.state_dict().items():
        close(got.double(), want[name].double(), name, 1e-9)
    same = network(compiled)
    same.load_state_dict(net.state_dict())  # and back, into a model that is fused
    net.load_state_dict(want)
    with torch.no_grad():
        close(net.eval()(batch(0)[0]), same.eval()(batch(0)[0]), "evaluation", 1e-9)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", ["ours before", "ours after"])
def test_ddp(workers: Callable, way: str, accumulate: int) -> None:
    workers(check_ddp, way, accumulate, False)


def check_refusal(rank: int) -> None:
    """What PyTorch's SyncBatchNorm cannot do, ours does: see ``check_ddp``."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    with pytest.raises(ValueError, match="only work with GPU modules"):
        nn.parallel.DistributedDataParallel(net)


def test_refusal(workers: Callable) -> None:
    workers(check_refusal)


def test_ddp_compiled(workers: Callable) -> None:
    workers(check_ddp, "ours before", 1, True)


def check_fsdp(rank: int) -> None:
    """Sharded parameters; then evaluation, and steps of the optimizer in between."""
    net = converted(network(), "ours before")
    mesh = init_device_mesh("cpu", (processes.WORLD,))
    for module in net[3:7]:
        fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    plain = network()
    optimizers, mine = [optimizer_of(net), optimizer_of(plain)], part(rank, (4, 4))
    for i in range(5):
        if i == 3:
            net.eval(), plain.eval()
        x, y = batch(i)
        pairs = ((net, mine, 2 / 8), (plain, slice(None), 1 / 8))
        for (model, share, factor), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            (F.cross_entropy(model(x[share]), y[share], reduction="sum") * factor).backward()
            optimizer.step()
        if i >= 3:
            with torch.no_grad():
                close(net(x), plain(x), "evaluation", 1e-9)
    for (name, got), want in zip(
        net.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        got = got.full_tensor() if isinstance(got, DTensor) else got
        close(got.double(), want.double(), name, 1e-9)


def test_fsdp(workers: Callable) -> None:
    workers(check_fsdp)


def check_checkpointed(rank: int, reentrant: bool) -> None:
    """Numbers as without; running statistics move as often as those of the layers do."""
    plain = convert_sync_batchnorm(network())
    fused, kept = (converted(network(), "ours before") for _ in range(2))
    x, y = batch(0)
    mine = part(rank, (5, 3))
    found = []
    for net, recompute in ((plain, True), (fused, True), (kept, False)):
        given = x[mine].clone().requires_grad_()
        y1: Any = given
        for block in (net[:5], net[5:]):
            if recompute:
                with set_checkpoint_early_stop(False):
                    y1 = checkpoint(block, y1, use_reentrant=reentrant)
            else:
                y1 = block(y1)
        F.cross_entropy(y1, y[mine], reduction="sum").backward()
        found.append([y1, given.grad, *(p.grad for p in net.parameters())])
    for want, got, without in zip(*found, strict=True):
        close(got, want, "of the layers", 1e-9)
        close(got, without, "without", 1e-9)
    for (name, want), got in zip(plain.named_buffers(), fused.buffers(), strict=True):
        close(got.double(), want.double(), name, 1e-9)
        if name.endswith("num_batches_tracked"):
            assert got == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(workers: Callable, reentrant: bool) -> None:
    workers(check_checkpointed, reentrant)
