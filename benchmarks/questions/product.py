"""How close does the primary product alone come to the GEMM peak?

    python -m benchmarks product

The 1 x 1 convolution of every GhostNet and YOLO shape with its batch norm folded in, without an
activation and without ghost maps: ``FusedGhostModule`` of ratio 1, called as users call it, against
PyTorch and the engines that are installed. A product of K input channels, m intrinsic maps and P
pixels has 2 K m P FLOPs; the peak is that of a square ``torch.mm`` in the same rounds. Shapes of
K = 200 or more, which arithmetic binds, give the means.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.harness.measure import Measurer
from benchmarks.harness.rows import FUSED, Point, Row, Triple, cells, fastest, timed
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.shapes import Shape
from benchmarks.harness.subjects import Subject
from benchmarks.questions.question import Question, each
from benchmarks.report.table import Table, cell, untimed

DEEP = 200  # least input channels of a product that counts in the means


def products(chosen: Sequence[Shape]) -> list[Shape]:
    """The primary convolutions of ``chosen`` as Ghost modules of ratio 1, each once."""
    alone = {"ratio": 1, "dw_size": 1, "activation": "none", "count": 1}
    return list(dict.fromkeys(replace(s, oup=s.intrinsic, **alone) for s in chosen))


def share(row: Row) -> Triple:
    """Rate over the GEMM peak of the same rounds: of the median, then of p80 and of p20."""
    rates = (row["flops"] / row[key] for key in ("median_s", "p80_s", "p20_s"))
    median, low, high = (rate / row["gemm_peak"] for rate in rates)
    return median, low, high


class Product(Question):
    name = "product"
    title = "The primary product alone"
    purpose = "the primary product alone, against the GEMM peak"
    has_batches = has_shapes = True
    default_providers = ("eager", "folded", "fused")

    def check(self, arguments: argparse.Namespace) -> None:
        arguments.shapes = products(arguments.shapes)

    def tasks(self, run: Session) -> list[Task]:
        measurer = Measurer(run)

        def work(subject: Subject) -> None:
            measurer.eval(subject, inner=subject.shape.inp)

        return each("", run.arguments, run.arguments.batch, work)

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Every product of ours in NCHW and in NHWC, and of the best peer."""
        lines = []
        for (batch, shape), found in cells(timed(rows), "batch", "shape").items():
            best = fastest(found, "pytorch", "engine")
            line: list[Any] = [shape, batch]
            for row in (*(found.get(name) for name in FUSED), best):
                part = f"{share(row)[0]:.0%}" if row else ""
                line += [cell(row), cell(row, "gflops", 1, 0), part]
            lines.append([*line, best["provider"] if best else ""])
        headings = ("product", "batch", *3 * ("us", "GFLOP/s", "of peak"), "best peer")
        return [Table("Ours in NCHW, ours in NHWC, the best peer", headings, lines), untimed(rows)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        deep = [row for row in timed(rows) if row["inner"] >= DEEP]
        for row in sorted(deep, key=lambda row: (row["batch"], row["provider"])):
            where = f"product, batch {row['batch']}, K >= {DEEP}"
            mean = f"{where}: share of the GEMM peak, {row['provider']}"
            yield Point(mean, share(row), row["shape"])
