"""How close does the primary product alone come to the GEMM peak?

    python -m benchmarks.product
    python -m benchmarks.product --quick

The 1 x 1 convolution of every GhostNet and YOLO shape with its batch norm folded in, without an
activation and without ghost maps: ``FusedGhostModule`` of ratio 1, called as users call it, against
PyTorch and the engines that are installed. A product of K input channels, m intrinsic maps and P
pixels has 2 K m P FLOPs; the peak is that of a square ``torch.mm`` in the same rounds. Shapes of
K = 200 or more, which arithmetic binds, give the means.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import engines, report, session, shapes
from benchmarks.measure import Measurer, failures
from benchmarks.session import Task
from benchmarks.shapes import Shape

DEEP = 200  # input channels from which on a product counts in the means
PROVIDERS = ("eager", "folded", "fused")


def products(chosen: Sequence[Shape]) -> list[Shape]:
    """The primary convolutions of ``chosen`` as Ghost modules of ratio 1, each once."""
    alone = {"ratio": 1, "dw_size": 1, "activation": "none", "count": 1}
    return list(dict.fromkeys(replace(s, oup=s.intrinsic, **alone) for s in chosen))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = session.make_parser("product", __doc__.partition("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--shapes", nargs="+", help="Ghost modules: all, ghostnet, yolo, quick, names or globs"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        help="names, families or globs (default: eager, folded, fused and the engines installed)",
    )

    def check(arguments: argparse.Namespace) -> None:
        if any(batch < 1 for batch in arguments.batch):
            raise ValueError(f"batch: expected positive integers, got {arguments.batch}")
        chosen = arguments.shapes or ["quick" if arguments.quick else "all"]
        arguments.shapes = products(shapes.select(chosen))
        arguments.batch = sorted(set(arguments.batch))
        arguments.providers = engines.choose(arguments.providers, PROVIDERS)

    return session.parse(parser, argv, check)


def share(row: report.Row) -> tuple[float, float, float]:
    """Rate over the GEMM peak of the same rounds: of the median, then of p80 and of p20."""
    rates = (row["flops"] / row[key] for key in ("median_s", "p80_s", "p20_s"))
    median, low, high = (rate / row["gemm_peak"] for rate in rates)
    return median, low, high


def deep(rows: Sequence[report.Row]) -> dict[tuple[int, str], list[report.Row]]:
    """(batch, provider) -> the timed rows with K of ``DEEP`` or more."""
    found: dict[tuple[int, str], list[report.Row]] = {}
    for row in report.timed(rows):
        if row["inner"] >= DEEP:
            found.setdefault((row["batch"], row["provider"]), []).append(row)
    return found


def mean_shares(rows: Sequence[report.Row]) -> list[dict[str, Any]]:
    """Geometric means over K >= ``DEEP``, by batch and provider."""
    found = []
    for (batch, provider), part in sorted(deep(rows).items()):
        mean = report.geometric_mean([share(row)[0] for row in part])
        found.append({"batch": batch, "provider": provider, "shapes": len(part), "share": mean})
    return found


HEADINGS = ("product", "batch") + 3 * ("us", "GFLOP/s", "of peak") + ("best peer",)


def table_lines(rows: Sequence[report.Row]) -> list[list[str]]:
    """Cells under ``HEADINGS``: every product of ours in NCHW and in NHWC, and of the best peer."""
    lines = []
    for (_, batch, _), part in report.groups(rows).items():
        for shape, cell in report.by_shape(part).items():
            best = report.fastest(cell, "pytorch", "engine")
            line = [shape, str(batch)]
            for row in (*(cell.get(name) for name in report.FUSED), best):
                line += ["", "", ""] if row is None else [
                    f"{1e6 * row['median_s']:.1f}", f"{row['gflops']:.0f}", f"{share(row)[0]:.0%}"
                ]  # fmt: skip
            lines.append([*line, best["provider"] if best else ""])
    return lines


def print_report(console: Any, rows: Sequence[report.Row], means: Sequence[dict[str, Any]]) -> None:
    """Every product, then the geometric means."""
    title = "The primary product alone: ghost_ops in NCHW, in NHWC, and the best peer"
    table = report.plain_table(title, HEADINGS, text=("best peer",))
    for line in table_lines(rows):
        table.add_row(*line)
    console.print(table)
    for mean in means:
        console.print(
            f"batch {mean['batch']}, {mean['provider']}: {mean['share']:.0%} of the GEMM peak "
            f"(geometric mean, {mean['shapes']} shapes with K >= {DEEP})"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if ghost_ops failed a check, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    run = session.start("product", argv, arguments)
    if run is None:
        return 2
    engines.print_missing(run.console)
    measurer = Measurer(run, arguments.providers)
    work: list[Task] = [
        (f"b{b} {s.name}", functools.partial(measurer.eval, s, b, inner=s.inp))
        for b in arguments.batch
        for s in arguments.shapes
    ]
    status = run.run(work)
    means = mean_shares(run.rows)
    print_report(run.console, run.rows, means)
    return session.finish(run, status, means, failures(run.rows))


if __name__ == "__main__":
    raise SystemExit(main())
