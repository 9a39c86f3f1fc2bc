"""Train a small Ghost network on handwritten digits in several processes, fused and unfused.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --dtype float64

The data are the 1,797 digits that scikit-learn ships (8 x 8, scaled to 16 x 16). Three runs from
one seed: one process with the whole batch; then DistributedDataParallel with SyncBatchNorm, each
process with its share of the batch, with fused modules and without. The losses are those of one
process, but for rounding. Printed are the losses, what a step keeps for backward and sends to the
other processes, and its time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import ghost_ops
from ghost_ops.reference import GhostBottleneck, GhostModule


def network(classes: int = 10) -> nn.Sequential:
    """A small GhostNet for [N, 1, 16, 16] in plain PyTorch, from one seed."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        GhostBottleneck(16, 48, 24),
        GhostBottleneck(24, 72, 40, stride=2),
        GhostBottleneck(40, 120, 40, dw_kernel_size=5, se_ratio=0.25),
        GhostModule(40, 160),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(160, classes),
    )


def load(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 16, 16] and labels [N], in a fixed order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(digits.images).to(dtype).unsqueeze(1)[order] / 8 - 1
    return F.interpolate(x, scale_factor=2, mode="bilinear"), torch.from_numpy(digits.target)[order]


class Traffic(NamedTuple):
    """Collectives of one process in a step, and their bytes."""

    collectives: int  # SyncBatchNorm's
    bytes: int  # in these
    gradients: int  # bytes that DistributedDataParallel sends


@contextmanager
def traffic() -> Iterator[Callable[[], Traffic]]:
    """Count the collectives called inside; yields a function that returns the count so far."""
    sent: list[tuple[bool, int]] = []
    before = dist.all_gather, dist.all_reduce

    def counted(run: Callable[..., Any], index: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # DistributedDataParallel goes on with backward meanwhile.
            sent.append((kwargs.get("async_op", False), args[index].nbytes))
            return run(*args, **kwargs)

        return call

    def total() -> Traffic:
        norms = [size for ddp, size in sent if not ddp]
        return Traffic(len(norms), sum(norms), sum(size for ddp, size in sent if ddp))

    dist.all_gather, dist.all_reduce = counted(before[0], 1), counted(before[1], 0)
    try:
        yield total
    finally:
        dist.all_gather, dist.all_reduce = before


class Run(NamedTuple):
    """A model in training.

    Attributes:
        share: its images among those of a batch.
    """

    model: nn.Module
    share: slice
    losses: list[float]
    seconds: list[float]  # of each step
    busy: list[float]  # seconds of the processor, without those of waiting for others

    def step(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        """One step on a batch, timed."""
        start, busy = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x[self.share]), y[self.share])
        loss.backward()
        optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.busy.append(time.process_time() - busy)
        self.losses.append(loss.item())


def make(kind: str, dtype: torch.dtype) -> Run:
    """``one process``, ``fused`` or ``unfused``."""
    model: nn.Module = network().to(dtype)
    if kind == "one process":
        ghost_ops.fuse(model)
        return Run(model, slice(None), [], [], [])
    ghost_ops.convert_sync_batchnorm(model)
    if kind == "fused":
        ghost_ops.fuse(model)
    model = nn.parallel.DistributedDataParallel(model)
    # The default hook, but in Python, where its calls are counted.
    model.register_comm_hook(None, allreduce_hook)
    return Run(model, slice(dist.get_rank(), None, dist.get_world_size()), [], [], [])


def saved_bytes(run: Run, x: Tensor) -> int:
    """Bytes that forward keeps for backward, without the parameters."""
    known = {t.untyped_storage().data_ptr() for t in run.model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run.model(x[run.share])
    total = sum(kept.values())
    out.sum().backward()
    return total


def train(runs: dict[str, Run], x: Tensor, y: Tensor, arguments: argparse.Namespace) -> None:
    """All runs on the same batches, one after the other at every step."""
    optimizers = {
        name: torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
        for name, run in runs.items()
    }
    for index in range(arguments.steps):
        start = index * arguments.batch % (len(x) - arguments.batch + 1)
        batch = slice(start, start + arguments.batch)
        for name, run in runs.items():
            dist.barrier()
            run.step(optimizers[name], x[batch], y[batch])


def first_step(run: Run, x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
    """Results of a forward and backward, for the images of this process, by what they are."""
    given = x[run.share].clone().requires_grad_()
    out = run.model(given)
    # As one process has it; the parameters' gradients are averaged over the processes.
    F.cross_entropy(out, y[run.share]).backward()
    assert given.grad is not None
    of_input = given.grad * len(given) / len(x)
    results = {
        "output": [out.detach()],
        "gradient of the input": [of_input],
        "gradients of the parameters": [p.grad for p in run.model.parameters()],
        "running statistics": [b for b in run.model.buffers() if b.is_floating_point()],
    }
    run.model.zero_grad()
    return results


def differences(runs: dict[str, Run], x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Largest differences to one process, over the largest value there; fused and unfused.

    In float32 that of the input's gradient is larger where a value lies at the kink of a ReLU.
    """
    found = {name: first_step(run, x, y) for name, run in runs.items()}
    table: dict[str, list[float]] = {what: [] for what in found["fused"]}
    for name in ("fused", "unfused"):
        for what, values in found[name].items():
            wanted, part = found["one process"][what], runs[name].share
            if what in ("output", "gradient of the input"):
                wanted = [t[part] for t in wanted]
            largest = max(t.abs().max().item() for t in found["one process"][what])
            pairs = zip(values, wanted, strict=True)
            error = torch.tensor([max((a - b).abs().max().item() for a, b in pairs) / largest])
            dist.all_reduce(error, dist.ReduceOp.MAX)
            table[what].append(error.item())
    return table


def mean_losses(run: Run) -> list[float]:
    """The loss of the whole batch at every step, from the shares of all processes."""
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def measure(run: Run, x: Tensor) -> tuple[int, Traffic]:
    """Bytes that this process keeps for backward in a step, and what it sends."""
    with traffic() as sent:
        kept = saved_bytes(run, x)
        return kept, sent()


def show_losses(curves: dict[str, list[float]], shown: int = 8) -> None:
    """The losses of all runs at some steps, and how far the others are from one process."""
    one = curves["one process"]
    print(f"{'loss':10}" + "".join(f"{name:>14}" for name in curves))
    for index in sorted({*range(0, len(one), max(1, len(one) // shown)), len(one) - 1}):
        print(
            f"step {index + 1:<5}" + "".join(f"{curve[index]:14.6f}" for curve in curves.values())
        )
    for name in ("fused", "unfused"):
        largest = max(abs(a - b) for a, b in zip(curves[name], one, strict=True))
        print(f"largest difference of {name} to one process: {largest:.1e}")


def show_differences(table: dict[str, list[float]]) -> None:
    """How far the first step is from that of one process."""
    print(f"\n{'first step, to one process':30}{'fused':>10}{'unfused':>10}")
    for label, values in table.items():
        print(f"{label:30}" + "".join(f"{value:10.1e}" for value in values))


def show_costs(costs: dict[str, tuple[int, Traffic]], runs: dict[str, Run]) -> None:
    """What a step costs each process, fused and unfused."""
    names = ("fused", "unfused")
    rows = {
        "KiB kept for backward": [costs[name][0] / 1024 for name in names],
        "collectives of SyncBatchNorm": [costs[name][1].collectives for name in names],
        "KiB that these send": [costs[name][1].bytes / 1024 for name in names],
        "KiB of gradients, DDP": [costs[name][1].gradients / 1024 for name in names],
        "ms, median": [1e3 * statistics.median(runs[name].seconds) for name in names],
        "ms of the processor, median": [1e3 * statistics.median(runs[name].busy) for name in names],
    }
    print(f"\n{'a step of a process':30}{'fused':>10}{'unfused':>10}")
    for label, values in rows.items():
        print(f"{label:30}" + "".join(f"{value:10.1f}" for value in values))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "examples/distributed.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128, help="of all processes together")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 if scikit-learn is missing."""
    arguments = parse_arguments(argv)
    dtype = getattr(torch, arguments.dtype)
    try:
        x, y = load(dtype)
    except ImportError as error:
        print(f'error: {error}; pip install "ghost_ops[examples]"', file=sys.stderr)
        return 2
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    runs = {name: make(name, dtype) for name in ("one process", "fused", "unfused")}
    table = differences(runs, x[: arguments.batch], y[: arguments.batch])
    train(runs, x, y, arguments)
    curves = {name: mean_losses(run) for name, run in runs.items()}
    costs = {name: measure(runs[name], x[: arguments.batch]) for name in ("fused", "unfused")}
    if dist.get_rank() == 0:
        world = dist.get_world_size()
        print(f"{world} processes, {arguments.dtype}, {arguments.batch} images a step\n")
        show_losses(curves)
        show_differences(table)
        show_costs(costs, runs)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
