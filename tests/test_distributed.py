"""Promise: fused modules on two processes give the numbers of one process with the whole batch.

Fused modules with SyncBatchNorm, and networks under DistributedDataParallel, FSDP, checkpointing.
Every check runs in two processes over gloo, see ``distributed_checks``.
"""

from __future__ import annotations

import contextlib
import copy
import pathlib
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_checks import close, compare, dtype_of, part, summed
from ghost_forms import GhostConv, Sliced, randomize
from helpers import autograd_nodes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import ghost_ops
from ghost_ops import convert_sync_batchnorm
from ghost_ops.reference import GhostBottleneck, GhostModule

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


# --- fused ------------------------------------------------------------------------------------


class Tailed(nn.Module):
    """With one batch norm after the concatenation, as in Ghost-ResNet."""

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
    """Convolutions with biases, which the batch statistics cancel."""
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
    """The module fused, with its norms over the processes of a group."""
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
    """The same passes by the eager backend."""
    with ghost_ops.use_backend("eager"):
        whole = randomize(FUSED[form]()).double()
        split = converted(copy.deepcopy(whole), "ours before")
        compare(rank, split, whole, torch.randn(8, 6, 7, 6, dtype=torch.float64), (5, 3))


def compare_evaluation(split: nn.Module, whole: nn.Module, x: Tensor) -> None:
    """Evaluation without gradients, from packed weights, before and after a parameter changes."""
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
    """Norms are converted after calls in both modes: packed weights and guards are invalidated."""
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
    """The processes have images of different sizes; against the layers one by one."""
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
    """A batch norm over all processes, changed as its kind says."""
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
    """Two kinds of norms in one module, against its layers one by one."""
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
    assert "GhostModuleFunctionBackward" in autograd_nodes(fused(x))
    layers(x)
    for p, q in zip(fused.parameters(), layers.parameters(), strict=True):
        p.requires_grad_(False), q.requires_grad_(False)
    for index in (0, 1):  # only the parameters of one branch learn
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
    """Gradients of a function of gradients."""
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
    """One group per process, and a group that was destroyed."""
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
    """One graph, the exchanges included, for batches of different sizes."""
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


def head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)


def network(small: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if small:
        net = nn.Sequential(GhostModule(3, 8, stride=2), *head(8))
        return randomize(net).double()
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        GhostBottleneck(8, 16, 8),
        GhostBottleneck(8, 20, 12, stride=2, se_ratio=0.25),
        GhostConv(12, 16),
        Sliced(16, 16, act1=nn.PReLU(), act2=nn.PReLU(8)),
        *head(16),
    )
    return randomize(net).double()


def batch(index: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(100 + index)
    return torch.randn(8, 3, 18, 16, generator=gen, dtype=torch.float64), torch.arange(8) % 4


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def trained(net: nn.Module, accumulate: int) -> dict[str, Tensor]:
    """The state of a net that one process trains for three steps on whole batches."""
    optimizer = optimizer_of(net)
    for i in range(3):
        optimizer.zero_grad()
        for j in range(accumulate):
            x, y = batch(i * accumulate + j)
            (F.cross_entropy(net(x), y, reduction="sum") / 8).backward()
        optimizer.step()
    return net.state_dict()


def check_ddp(rank: int, way: str, accumulate: int, compiled: bool) -> None:
    """Batches of 5 and 3: DDP averages the gradients, so each process scales its loss."""
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
    same.load_state_dict(net.state_dict())  # from a fused model to a plain one
    net.load_state_dict(want)  # and back
    with torch.no_grad():
        close(net.eval()(batch(0)[0]), same.eval()(batch(0)[0]), "evaluation", 1e-9)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", ["ours before", "ours after"])
def test_ddp(workers: Callable, way: str, accumulate: int) -> None:
    workers(check_ddp, way, accumulate, False)


def check_refusal(rank: int) -> None:
    """PyTorch's SyncBatchNorm refuses DDP on a CPU; ours runs it, see ``check_ddp``."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    with pytest.raises(ValueError, match="only work with GPU modules"):
        nn.parallel.DistributedDataParallel(net)


def test_refusal(workers: Callable) -> None:
    workers(check_refusal)


def test_ddp_compiled(workers: Callable) -> None:
    workers(check_ddp, "ours before", 1, True)


def check_fsdp(rank: int) -> None:
    """Sharded parameters, in training and then in evaluation between steps of the optimizer."""
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
    """The numbers without checkpoints; running statistics move as often as those of the layers."""
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
