"""Whole networks: how fast in inference and in training, and what do they keep for backward?

    python -m benchmarks.network            GhostNet 1.0x, 0.5x, 1.3x, a YOLO stack, Ghost-ResNets
    python -m benchmarks.network --networks ghostnet-1.0 --mode eval --batch 1
    python -m benchmarks.network --quick

Three questions, each answered with ratios inside one run (candidates take turns, medians):

- eval, on ``--threads``, batches 1 and 16 (1 and 32 for CIFAR networks): time of one call;
- train, on ``--train-threads`` (all cores by default): time of one step, that is forward, cross
  entropy, backward and SGD;
- saved: bytes that autograd keeps from the forward for the backward, parameters aside.

``ghost_ops`` stands for ``ghost_ops.fuse(network, inference=True)``. Every candidate is checked
first against the plain network in float64: logits, and in training the loss and all gradients, with
PyTorch's own float32 error as the measure. The floor of a network counts FLOPs at GEMM peak, and of
memory traffic images, parameters and logits only.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import engines, harness, networks, report, session
from benchmarks.measure import Call, Measurer, failures, no_compile_leftovers
from benchmarks.networks import NETWORKS, Network
from benchmarks.providers import BASELINE, Provider
from benchmarks.session import Session, Task

MODES = ("eval", "saved", "train")
PROVIDERS = ("eager", "folded_cl", "compile", "compile_frozen", "fused")
CHECKED = 4  # images of a batch in eval mode that are compared with float64


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = session.make_parser("network", __doc__.partition("\n\n")[0])
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=tuple(NETWORKS),
        help="(default: all, or ghostnet-0.5 and yolo with --quick)",
    )
    parser.add_argument(
        "--size", type=int, help="of the images (224, or 96 with --quick; CIFAR networks: 32)"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", help="of eval (1 and 16, CIFAR 1 and 32; --quick: 1 and 4)"
    )
    parser.add_argument(
        "--train-batch", type=int, help="of saved and train (16, CIFAR 32; 4 with --quick)"
    )
    parser.add_argument("--train-threads", type=int, help="of train (default: all cores)")
    parser.add_argument(
        "--providers",
        nargs="+",
        help="names, families or globs; all: PyTorch and ours (default: eager, folded_cl, compile, "
        "fused and the engines that are installed)",
    )
    session.add_compile_options(parser, "all")

    def check(arguments: argparse.Namespace) -> None:
        quick = arguments.quick
        if arguments.networks is None:
            arguments.networks = ["ghostnet-0.5", "yolo"] if quick else list(NETWORKS)
        one_thread = arguments.clock == "cpu"  # CPU time says nothing about more
        if arguments.train_threads is None:
            arguments.train_threads = 1 if one_thread else harness.core_count()
        # What is not given depends on the network, see ``sizes``.
        if arguments.size is not None and arguments.size < 32:
            raise ValueError(f"size: expected at least 32 pixels, got {arguments.size}")
        if arguments.batch is not None:
            if min(arguments.batch) < 1:
                raise ValueError(f"batch: expected positive integers, got {arguments.batch}")
            arguments.batch = sorted(set(arguments.batch))
        if arguments.train_batch is not None and arguments.train_batch < 2:
            got = arguments.train_batch
            raise ValueError(f"train-batch: expected 2 or more (batch norm), got {got}")
        if not 1 <= arguments.train_threads <= harness.core_count():
            raise ValueError(
                f"train-threads: expected 1 to {harness.core_count()}, got "
                f"{arguments.train_threads}"
            )
        if one_thread and arguments.train_threads != 1:
            raise ValueError("clock: cpu time needs --train-threads 1")
        arguments.providers = engines.choose(arguments.providers, PROVIDERS)
        session.check_compile_options(arguments, "all")

    return session.parse(parser, argv, check)


def sizes(network: Network, arguments: argparse.Namespace) -> tuple[int, list[int], int]:
    """Size of the images, batches of eval, batch of training: as given, or the network's own."""
    size, batches, train_batch = network.size, list(network.batches), network.train_batch
    if arguments.quick:
        size, batches, train_batch = min(size, 96), [1, 4], 4
    return arguments.size or size, arguments.batch or batches, arguments.train_batch or train_batch


class NetworkBenchmark:
    """Measures networks and adds their rows to the measurer's session."""

    def __init__(self, measurer: Measurer, arguments: argparse.Namespace) -> None:
        self.measurer, self.arguments = measurer, arguments
        self._made: dict[str, tuple[nn.Module, int]] = {}

    def _size(self, network: Network) -> int:
        return sizes(network, self.arguments)[0]

    def _plain(self, network: Network) -> tuple[nn.Module, int]:
        """The plain network and its FLOPs an image, made once."""
        if network.key not in self._made:
            size = self._size(network)
            plain = network.plain(size).to(self.measurer.dtype)
            self._made[network.key] = plain, networks.flops(plain, size)
        return self._made[network.key]

    def _images(self, network: Network, batch: int) -> Tensor:
        size, generator = self._size(network), torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, size, size, generator=generator).to(self.measurer.dtype)

    def _row(
        self, mode: str, network: Network, batch: int, provider: Provider, **fields: Any
    ) -> dict[str, Any]:
        (plain, flops), size = self._plain(network), self._size(network)
        training, itemsize = mode != "eval", self.measurer.dtype.itemsize
        return self.measurer.blank(
            mode,
            provider,
            networks.least_bytes(plain, batch, size, itemsize, training, network.classes),
            (3 if training else 1) * batch * flops,
            batch,
            shape=network.name(size),
            group=network.group,
            count=1,
            **fields,
        )

    def eval(self, network: Network, batch: int) -> None:
        """One call in eval mode under inference_mode."""
        (plain, _), x = self._plain(network), self._images(network, batch)
        eps = torch.finfo(x.dtype).eps

        def make(provider: Provider) -> Call:
            own = provider.input(x)
            with torch.inference_mode(False):
                if provider.engine:
                    compiled = engines.build(provider, networks.folded(plain), own)
                    return lambda: (compiled()[:CHECKED],)
                run = networks.build(provider, plain, training=False)
            return lambda: (run(own)[:CHECKED],)

        exact_network = copy.deepcopy(plain).double().eval()
        row_of = functools.partial(self._row, "eval", network, batch)
        with torch.inference_mode(), no_compile_leftovers():
            exact = [exact_network(x[:CHECKED].double())]
            entries = self.measurer.checked("eval", make, exact, [64 * eps], row_of)
            self.measurer.time_entries(entries)

    def train(self, network: Network, batch: int) -> None:
        """One step of SGD; checked are the loss and all gradients together."""
        with self.measurer.on_threads(self.arguments.train_threads), no_compile_leftovers():
            self._train(network, batch)

    def _train(self, network: Network, batch: int) -> None:
        (plain, _), x = self._plain(network), self._images(network, batch)
        y = torch.arange(batch) % network.classes

        def gradients(module: Any, own: Tensor) -> Sequence[Tensor]:
            loss = F.cross_entropy(module(own), y)
            found = torch.autograd.grad(loss, list(module.parameters()))
            return loss.detach(), torch.cat([g.flatten() for g in found])

        def make(provider: Provider) -> tuple[Call, Callable[[], object]]:
            module, own = networks.build(provider, plain, training=True), provider.input(x)
            return functools.partial(gradients, module, own), _step(module, own, y)

        exact = gradients(copy.deepcopy(plain).double().train(), x.double())
        # A ReLU's gradient jumps where its input rounds to the other side of 0, in every one of
        # some fifty layers; eager in the other memory format differs by that much as well.
        eps = torch.finfo(x.dtype).eps
        floors = [64 * eps, (1024 * eps) ** 0.5]
        row_of = functools.partial(self._row, "train", network, batch)
        self.measurer.time_entries(self.measurer.checked("train", make, exact, floors, row_of))

    def saved(self, network: Network, batch: int) -> None:
        """Bytes kept for backward, parameters aside."""
        (plain, _), x = self._plain(network), self._images(network, batch)
        for provider in self.measurer.chosen:
            # A compiled graph's saved tensors do not pass the hooks, and folded ones do not train.
            if provider.family in ("eager", "fused"):
                module = networks.build(provider, plain, training=True)
                run = functools.partial(module, provider.input(x))
                total = harness.saved_bytes(run, module)["total"]
                self._row("saved", network, batch, provider, saved_total=total)


def _step(module: Any, x: Tensor, y: Tensor) -> Callable[[], object]:
    # So small a rate that the network stays the one that was checked.
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(x), y).backward()
        optimizer.step()

    return step


def tasks(benchmark: NetworkBenchmark, arguments: argparse.Namespace) -> list[Task]:
    """The work of all modes asked for; training last, since a larger thread pool stays."""
    chosen = [NETWORKS[key] for key in NETWORKS if key in arguments.networks]
    work: list[Task] = []
    for mode in ("saved", "eval", "train"):
        run = getattr(benchmark, mode)
        for network in chosen if mode in arguments.mode else ():
            _, batches, train_batch = sizes(network, arguments)
            work += [
                (f"{mode} b{batch} {network.title}", functools.partial(run, network, batch))
                for batch in (batches if mode == "eval" else [train_batch])
            ]
    return work


def summarize(rows: Sequence[report.Row]) -> list[dict[str, Any]]:
    """One line per mode, batch and network: times of eager, the best peer and ours, ratios, bytes.

    Times in milliseconds, bytes in MiB; of ours and the peers the fastest (smallest) counts.
    """
    lines = []
    for (mode, batch, _), part in report.groups(rows).items():
        shapes: dict[str, dict[str, report.Row]] = {}
        for row in part:
            if mode == "saved" or row["median_s"] is not None:
                shapes.setdefault(row["shape"], {})[row["provider"]] = row
        for shape, cell in shapes.items():
            line: dict[str, Any] = {"mode": mode, "batch": batch, "shape": shape}
            eager = cell.get(BASELINE)
            if mode == "saved":
                ours = [r["saved_total"] for n, r in cell.items() if report.family(n) == "ours"]
                if eager is None or not ours:
                    continue
                line |= {"eager": eager["saved_total"] / 2**20, "ours": min(ours) / 2**20}
                line["over_eager"] = line["eager"] / line["ours"]
            else:
                best = report.fastest(cell, "pytorch", "engine")
                mine = report.fastest(cell, "ours")
                if eager is None or best is None or mine is None:
                    continue
                line |= {"threads": mine["threads"], "eager": 1e3 * eager["median_s"]}
                line |= {"best": 1e3 * best["median_s"], "by": best["provider"]}
                line |= {"ours": 1e3 * mine["median_s"], "with": mine["provider"]}
                line["over_eager"] = eager["median_s"] / mine["median_s"]
                line["over_best"] = best["median_s"] / mine["median_s"]
            lines.append(line)
    return lines


def print_report(console: Any, rows: Sequence[report.Row], lines: Sequence[dict[str, Any]]) -> None:
    """Every time with its spread, then the lines of :func:`summarize`."""
    headings = ("network", "what", "provider", "ms", "p20", "p80", "x eager_nchw", "error")
    table = report.plain_table("Networks", headings, text=("what", "provider"))
    cells = {(r["mode"], r["batch"], r["shape"], r["provider"]): r for r in report.timed(rows)}
    for (mode, batch, shape, name), row in cells.items():
        eager = cells.get((mode, batch, shape, BASELINE))
        table.add_row(
            shape,
            f"{mode} b{batch}, {row['threads']} thread(s)",
            name,
            *(f"{1e3 * row[key]:.2f}" for key in ("median_s", "p20_s", "p80_s")),
            f"{eager['median_s'] / row['median_s']:.2f}" if eager else "",
            f"{row['error']:.0e}",
        )
    console.print(table)
    for line in lines:
        what = f"{line['mode']}, batch {line['batch']}, {line['shape']}"
        if line["mode"] == "saved":
            console.print(
                f"{what}: {line['ours']:.0f} MiB, eager {line['eager']:.0f}: "
                f"{line['over_eager']:.2f}x less"
            )
        else:
            console.print(
                f"{what}: {report.flag(line['over_eager'])}x eager NCHW, "
                f"{report.flag(line['over_best'])}x the best peer ({line['by']})"
            )
    for row in rows:
        if row.get("note"):
            what = f"{row['mode']} {row['shape']} {row['provider']}: {report.escape(row['note'])}"
            console.print(f"  [yellow]{what}[/]")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if ghost_ops failed a check, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    run: Session | None = session.start("network", argv, arguments)
    if run is None:
        return 2
    measurer = Measurer.of(run)
    status = run.run(tasks(NetworkBenchmark(measurer, arguments), arguments))
    lines = summarize(run.rows)
    print_report(run.console, run.rows, lines)
    return session.finish(run, status, lines, failures(run.rows))


if __name__ == "__main__":
    raise SystemExit(main())
