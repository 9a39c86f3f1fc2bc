"""Fuse other people's models, and look at a photograph with them before and after.

    python -m examples.photograph              a GhostNet of timm's and a Ghost YOLO of Ultralytics'
    python -m examples.photograph --model timm --batch 16

The models are made here with random weights (batch norms with the statistics of the photograph),
the photograph is one that scikit-learn ships. Printed are what ``fuse`` did, how far the outputs
are apart, and the time of a call on one thread, before and after, taken in turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import ghost_ops
from examples import third_party


def photograph(size: int, batch: int) -> Tensor:
    """Crops of a photograph of a temple, [batch, 3, size, size], values from 0 to 1."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy())
    image = image.permute(2, 0, 1)[None].float() / 255
    height, width = image.shape[2:]
    side = min(height, width)
    crops = []
    for index in range(batch):
        left = (width - side) * index // max(batch - 1, 1)
        crop = image[:, :, :side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops)


def timm_ghostnet() -> nn.Module:
    """timm's ``ghostnet_100``."""
    return third_party.timm().create_model("ghostnet_100")


def ultralytics_yolo() -> nn.Module:
    """The smallest Ghost YOLO: backbone and neck of GhostConv and C3Ghost, with its heads."""
    tasks = third_party.ultralytics("nn.tasks")
    return tasks.DetectionModel("yolov8n-ghost.yaml", verbose=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm": (timm_ghostnet, 224),
    "ultralytics": (ultralytics_yolo, 320),
}


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in eval mode, its batch norms with the statistics of x."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


def tensors(out: object) -> list[Tensor]:
    """All tensors of a model's output, whatever it packs them in."""
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return [t for part in parts for t in tensors(part)]


def compare(name: str, batch: int, rounds: int) -> bool:
    """Print the comparison; whether the outputs agree to the rounding of float32."""
    make, size = MODELS[name]
    torch.manual_seed(0)
    x = photograph(size, batch)
    model = settle(make(), photograph(size, 8))
    before = copy.deepcopy(model)

    model = ghost_ops.fuse(model)  # the one line
    print(ghost_ops.report(model))

    with torch.inference_mode():
        got, want = tensors(model(x)), tensors(before(x))
        errors = [
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)
        ]
        timers = [Timer("run(x)", globals={"run": run, "x": x}) for run in (before, model)]
        number = max(1, round(0.05 / timers[1].timeit(3).mean))
        samples = [[timer.timeit(number).mean for timer in timers] for _ in range(rounds)]
    old, new = map(statistics.median, zip(*samples, strict=True))
    print(
        f"{name}, {batch} x {size} x {size}: outputs differ by {max(errors):.1e} of the largest; "
        f"{old * 1e3:.1f} ms before, {new * 1e3:.1f} ms after, {old / new:.2f} times as fast\n"
    )
    return max(errors) < 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if outputs disagree, 2 if a package is missing."""
    parser = argparse.ArgumentParser(
        "examples.photograph", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS, "both"], default="both")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args(argv)
    if arguments.batch < 1 or arguments.rounds < 1:
        parser.error("batch and rounds must be positive")
    torch.set_num_threads(1)
    agree = True
    for name in MODELS if arguments.model == "both" else (arguments.model,):
        try:
            agree &= compare(name, arguments.batch, arguments.rounds)
        except ImportError as error:
            hint = 'install it with: pip install "ghost_ops[examples]"'
            print(f"error: {name}: {error}\n{hint}", file=sys.stderr)
            return 2
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
