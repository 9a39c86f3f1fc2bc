"""How redundant are feature maps? The question behind GhostNet (its Table 2 and Figure 1).

    python -m examples.redundancy

Can one feature map be had from another by a d x d convolution? A plain CNN is trained on
handwritten digits; for each map after a layer the best other map is found, the filter fitted by
least squares on half of the images, and the mean squared error taken on the other half. As control
the maps of other images are used. Prints a table and writes a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import Digits, accuracy, train

KERNELS = (1, 3, 5, 7)
SOURCES = {"same image": "#0072B2", "other images": "#7F7F7F"}


def plain_network() -> nn.Sequential:
    """A small CNN for [N, 1, 28, 28] digits; its ReLU outputs are the maps looked at."""

    def layer(inp: int, oup: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inp, oup, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(oup), nn.ReLU())

    maps = (layer(1, 16, 1), layer(16, 16, 1), layer(16, 32, 2), layer(32, 32, 1), layer(32, 64, 2))
    return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64 * 4, 10))


LAYERS = {1: "28 x 28", 3: "14 x 14"}  # index in the network -> size of its maps


def map_errors(source: Tensor, target: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """How well each target map is a d x d convolution of each source map.

    Args:
        source: [N, C, H, W] float64; the first half of the images is for fitting.
        target: [N, K, H, W] float64.
        d: odd kernel size; zero padding d // 2, no bias.

    Returns:
        Mean squared error on the second half [C, K], and the mean square of the targets there [K].
    """
    half = source.size(0) // 2

    def rows(maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).reshape(-1, maps.size(1))

    fit_to, test_to = rows(target[:half]), rows(target[half:])
    errors = []
    for i in range(source.size(1)):
        taps = F.unfold(source[:, i : i + 1], d, padding=d // 2)  # [N, d * d, H * W]
        taps = taps.transpose(1, 2)
        fit, test = taps[:half].reshape(-1, d * d), taps[half:].reshape(-1, d * d)
        # Normal equations, without directions that the map does not have (borders that are 0).
        kernel = torch.linalg.pinv(fit.T @ fit, rtol=1e-12, hermitian=True) @ (fit.T @ fit_to)
        errors.append((test @ kernel - test_to).square().mean(0))
    return torch.stack(errors), test_to.square().mean(0)


def _best_other(errors: Tensor) -> Tensor:
    """Index of the best source for each target, itself excluded: [K]."""
    own = torch.eye(len(errors), dtype=torch.bool)
    return errors.masked_fill(own, float("inf")).argmin(0)


def measure(network: nn.Sequential, images: Tensor) -> list[dict[str, Any]]:
    """A row for each layer, kernel size and source: the error of every map."""
    rows = []
    for index, size in LAYERS.items():
        with torch.inference_mode():
            maps = network[: index + 1](images).double()
        maps = maps[:, maps.square().mean((0, 2, 3)) > 1e-6]  # without those that are always 0
        for d in KERNELS:
            for source in SOURCES:
                given = maps if source == "same image" else maps.roll(1, 0)
                errors, power = map_errors(given, maps, d)
                best = _best_other(errors)
                each = errors[best, torch.arange(len(best))]
                row: dict[str, Any] = {"maps": f"{maps.size(1)} of {size}", "source": source}
                row |= {"d": d, "mse": each.mean().item(), "each": (each / power).tolist()}
                rows.append({**row, "median": (each / power).median().item()})
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The error of each map over the kernel size, a panel a layer; the line is the median."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row["maps"] for row in rows))
    figure = Figure(figsize=(0.8 + 3.6 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for source, colour in SOURCES.items():
            found = [row for row in rows if (row["maps"], row["source"]) == (panel, source)]
            ds = [row["d"] for row in found]
            for row in found:
                points = [row["d"]] * len(row["each"]), row["each"]
                axes.scatter(*points, s=6, color=colour, alpha=0.45, linewidth=0)
            axes.plot(ds, [row["median"] for row in found], "o-", color=colour, label=source)
        axes.set(title=panel, xlabel="kernel size d", xticks=KERNELS, ylim=(0, 1.2))
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.supylabel("MSE over mean square", fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 if a package is missing."""
    parser = argparse.ArgumentParser("python -m examples.redundancy", description=main.__doc__)
    parser.add_argument("--digits", type=int, default=5000, help="a fifth of them for testing")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="whose maps are looked at")
    parser.add_argument("--out", type=Path, default=Path("results/redundancy.png"))
    arguments = parser.parse_args(argv)
    try:
        digits = Digits.load(arguments.digits, 0)
    except (ImportError, ValueError) as error:
        print(f'error: {error}; packages come with: pip install "ghost_ops[demo]"', file=sys.stderr)
        return 2
    torch.manual_seed(0)
    network = plain_network()
    train(network, digits, batch=64, epochs=arguments.epochs)
    print(f"test accuracy {accuracy(network, digits.test_x, digits.test_y):.1%}")
    rows = measure(network.eval(), digits.test_x[: arguments.images])
    print(f"{'maps':14}{'source':14}{'d':>3}{'MSE':>9}{'MSE / mean square (median map)':>32}")
    for r in rows:
        print(f"{r['maps']:14}{r['source']:14}{r['d']:3}{r['mse']:9.4f}{r['median']:32.3f}")
    draw(rows, arguments.out)
    print(f"picture in {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
