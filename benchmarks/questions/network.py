"""Whole networks: how fast in inference and in training, and what do they keep for backward?

    python -m benchmarks network            GhostNet 1.0x, 0.5x, 1.3x, a YOLO stack, Ghost-ResNets
    python -m benchmarks network --networks ghostnet-1.0 --mode eval --batch 1

Three modes, each answered with ratios inside one run (candidates take turns, medians):

- eval, on ``--threads``, batches 1 and 16 (1 and 32 for CIFAR networks): time of one call;
- train, on ``--train-threads`` (all cores by default): time of one step, that is forward, cross
  entropy, backward and SGD;
- saved: bytes that autograd keeps from the forward for the backward, parameters aside.

``ghost_ops`` stands for ``ghost_ops.fuse(network, inference=True)``. Logits, and in training the
loss and all gradients, are checked first against the plain network in float64. The floor counts
FLOPs at GEMM peak, and of memory traffic images, parameters and logits only.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence

from benchmarks.harness import machine
from benchmarks.harness import rows as results
from benchmarks.harness.measure import Measurer
from benchmarks.harness.rows import Point, Row
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.subjects import CIFAR, NETWORKS, Network, NetworkSubject
from benchmarks.questions.question import POSITIVE, Question, number
from benchmarks.report.table import Table, against_peers, cell, times, untimed

MODES = ("eval", "saved", "train")
CELL = ("mode", "batch", "shape")  # in which ours and its peers are compared


def sizes(network: Network, arguments: argparse.Namespace) -> tuple[int, list[int], int]:
    """Size of the images, batches of eval, batch of training: as given, or the network's own."""
    size, batches, train_batch = network.size, list(network.batches), network.train_batch
    if arguments.quick:
        size, batches, train_batch = min(size, 96), [1, 4], 4
    return arguments.size or size, arguments.batch or batches, arguments.train_batch or train_batch


def name(row: Row) -> str:
    """Network, mode and batch of a row."""
    return f"{row['shape']}, {row['mode']}, batch {row['batch']}"


class Networks(Question):
    name = "network"
    title = "Whole networks"
    purpose = "whole networks: inference, training step, saved memory"
    # A network takes torch.compile a minute or two: the first one gets them.
    full = ("--rounds", "3", "--compile-minutes", "1")
    quick = ("--quick", "--rounds", "3")
    default_providers = ("eager", "folded_cl", "compile", "compile_frozen", "fused")
    default_compile = "all"

    def options(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--mode", nargs="+", default=list(MODES), choices=MODES)
        default = "(default: all, or ghostnet-0.5 and yolo with --quick)"
        add("--networks", nargs="+", choices=tuple(NETWORKS), help=default)
        size = "of the images (224, or 96 with --quick; CIFAR networks: 32)"
        add("--size", type=number(32), help=size)
        batch = "of eval (1 and 16, CIFAR 1 and 32; --quick: 1 and 4)"
        add("--batch", type=POSITIVE, nargs="+", help=batch)
        # Batch norm needs two images.
        train_batch = "of saved and train (16, CIFAR 32; 4 with --quick)"
        add("--train-batch", type=number(2), help=train_batch)
        threads = number(1, machine.CORE_COUNT)
        add("--train-threads", type=threads, help="of train (default: all cores)")

    def check(self, arguments: argparse.Namespace) -> None:
        few = ["ghostnet-0.5", "yolo"] if arguments.quick else list(NETWORKS)
        arguments.networks = arguments.networks or few
        one_thread = arguments.clock == "cpu"  # CPU time is that of one thread
        cores = 1 if one_thread else machine.CORE_COUNT
        arguments.train_threads = arguments.train_threads or cores
        if one_thread and arguments.train_threads != 1:
            raise ValueError("clock: cpu time needs --train-threads 1")

    def tasks(self, run: Session) -> list[Task]:
        """The work of all modes; training last, since a larger thread pool stays."""
        measurer, given = Measurer(run), run.arguments
        chosen = [NETWORKS[key] for key in NETWORKS if key in given.networks]
        make = functools.cache(functools.partial(NetworkSubject, dtype=given.dtype))

        def measure(mode: str, network: Network, size: int, batch: int) -> None:
            threads = given.train_threads if mode == "train" else given.threads
            with measurer.on_threads(threads):
                getattr(measurer, mode)(make(network, size, batch))

        work: list[Task] = []
        for mode in ("saved", "eval", "train"):
            for network in chosen if mode in given.mode else ():
                size, batches, train_batch = sizes(network, given)
                for batch in batches if mode == "eval" else [train_batch]:
                    task = functools.partial(measure, mode, network, size, batch)
                    work.append((f"{mode} b{batch} {network.title}", task))
        return work

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Ours against eager and the best peer, bytes, then every time."""
        found = results.versus_each(rows, *CELL)
        pairs = ((f"{name(v.ours)}, {v.ours['threads']} thread(s)", v) for _, v in found)
        show = functools.partial(cell, scale=1e3, digits=2)
        found = [against_peers("Milliseconds, medians", pairs, show)]
        body = [
            (label, f"{eager / 2**20:.1f}", f"{ours / 2**20:.1f}", times(eager / ours))
            for label, eager, ours in results.eager_and_ours(rows, "saved_total")
        ]
        headings = ("network", "eager, MiB", "ours, MiB", "eager / ours")
        found.append(Table("Saved for backward", headings, body))
        body = []
        for row in results.timed(rows):
            numbers = [cell(row, key, 1e3, 2) for key in results.QUANTILES]
            last = cell(row, "floors", 1), f"{row['error']:.0e}"
            body.append((f"{name(row)}, {row['provider']}", *numbers, *last))
        headings = ("every time", "ms", "p20", "p80", "floors", "error")
        return [*found, Table("Every time", headings, body), untimed(rows)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        """By mode and batch, the networks for CIFAR apart."""
        for _, v in results.versus_each(rows, *CELL):
            kind = "CIFAR networks" if v.ours.get("group") == CIFAR else "networks"
            mean = f"{kind}, {v.ours['mode']}, batch {v.ours['batch']}"
            yield from results.speedups(mean, v, f"{v.ours['shape']} ({v.best['provider']})")
