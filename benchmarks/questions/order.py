"""Does it matter whether a network is fused before or after it changes its mode?

    python -m benchmarks order
    python -m benchmarks order --networks ghostnet-1.0 --mode eval --batch 1

In each mode the first row is the network that ``fuse`` gets in that mode, the others are networks
that were fused in the other mode, and then changed it; one of them made a call in that mode before.
All take turns. Every network is checked against its own unfused copy in float64. Each ratio is the
time of the first row over that of the other: 1 if the order does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

import ghost_ops
from benchmarks.harness import providers, timing
from benchmarks.harness.measure import Entry, Measurer
from benchmarks.harness.rows import Point, Row, ratio, split, timed
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.subjects import NETWORKS, Call, NetworkSubject
from benchmarks.questions.question import POSITIVE, Question, number
from benchmarks.report.table import Table, cell, times, untimed

MODES = ("eval", "train")
FIRST = "mode, fuse"
ORDERS = (FIRST, "fuse, mode", "fuse, call, mode")


def prepare(subject: NetworkSubject, order: str, training: bool) -> nn.Module:
    """A copy of the network, fused and in the mode that is measured."""
    network = copy.deepcopy(subject.plain)
    if order == FIRST:
        return ghost_ops.fuse(network.train(training))
    ghost_ops.fuse(network.train(not training))
    if order == "fuse, call, mode" and training:
        with torch.no_grad():
            network(subject.x)
    elif order == "fuse, call, mode":
        subject.bind(network, lambda x: x).step()
    return network.train(training)


def bind(subject: NetworkSubject, network: nn.Module, training: bool) -> tuple[Call, Callable]:
    """The call whose results are compared, and the call that is timed."""
    if training:
        bound = subject.bind(network, lambda x: x.to(next(network.parameters()).dtype))
        return bound.compared, bound.step
    x = subject.x.to(next(network.parameters()).dtype)
    return lambda: (network(x)[subject.images],), functools.partial(network, x)


def measure(measurer: Measurer, mode: str, subject: NetworkSubject) -> None:
    """One network in one mode: every order, interleaved."""
    training, provider = mode == "train", measurer.chosen[-1]
    networks = {order: prepare(subject, order, training) for order in ORDERS}
    entries: list[Entry] = []
    with contextlib.nullcontext() if training else torch.inference_mode():
        for order, network in networks.items():
            plain = ghost_ops.unfuse(copy.deepcopy(network))
            exact = bind(subject, copy.deepcopy(plain).double(), training)[0]()
            eager = timing.relative_errors(bind(subject, plain, training)[0](), exact)
            call, run = bind(subject, network, training)
            call()  # packs
            errors = timing.relative_errors(call(), exact)
            check = timing.check_errors(errors, eager, subject.allowed(len(exact)))
            row = measurer.row(mode, subject, provider, order=order)
            if check.ok:
                entries.append((row, run, check))
            else:
                row["note"] = f"wrong result: error {check.error:.2e}, allowed {check.allowed:.2e}"
        measurer.time_entries(entries)


class Order(Question):
    name = "order"
    title = "Mode and fuse in either order"
    purpose = "fused before against after a change of mode: inference, training step"

    def options(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--mode", nargs="+", default=list(MODES), choices=MODES)
        default = "(default: ghostnet-1.0, or ghostnet-0.5 with --quick)"
        add("--networks", nargs="+", choices=tuple(NETWORKS), help=default)
        add("--size", type=number(32), help="of the images (224, or 96 with --quick)")
        add("--batch", type=POSITIVE, nargs="+", help="of eval (1 and 16; --quick: 1)")
        # Batch norm needs two images.
        add("--train-batch", type=number(2), help="of train (16, or 4 with --quick)")

    def check(self, arguments: argparse.Namespace) -> None:
        quick = arguments.quick
        arguments.networks = arguments.networks or ["ghostnet-0.5" if quick else "ghostnet-1.0"]
        arguments.batch = sorted(set(arguments.batch or ([1] if quick else [1, 16])))
        arguments.train_batch = arguments.train_batch or (4 if quick else 16)

    def tasks(self, run: Session) -> list[Task]:
        given = run.arguments
        measurer = Measurer(run, providers.select(["eager_nchw", "fused_nchw"]))

        def task(mode: str, key: str, batch: int) -> Task:
            network = NETWORKS[key]
            size = given.size or min(network.size, 96 if given.quick else network.size)

            def work() -> None:
                measure(measurer, mode, NetworkSubject(network, size, batch, given.dtype))

            return f"{mode} b{batch} {network.title}", work

        return [
            task(mode, key, batch)
            for mode in given.mode
            for key in given.networks
            for batch in (given.batch if mode == "eval" else [given.train_batch])
        ]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        body = []
        for first, row in pairs(rows):
            numbers = [cell(row, key, 1e3, 2) for key in ("median_s", "p20_s", "p80_s")]
            body.append((f"{label(row)}: {row['order']}", *numbers, times(ratio(first, row)[0])))
        headings = ("network", "ms", "p20", "p80", f"{FIRST} over it")
        return [Table("Milliseconds, medians", headings, body), untimed(rows)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        for first, row in pairs(rows):
            if row is not first:
                mean = f"{row['mode']}: time of {FIRST!r} over {row['order']!r}"
                yield Point(mean, ratio(first, row), label(row))


def label(row: Row) -> str:
    """Network, mode and batch of a row."""
    return f"{row['shape']}, {row['mode']}, batch {row['batch']}"


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each timed row beside the first order of its network, mode and batch."""
    found = []
    for part in split(timed(rows), "shape", "mode", "batch").values():
        first = next((row for row in part if row["order"] == FIRST), None)
        found += [(first, row) for row in part if first is not None]
    return found
