"""Whole networks: GhostNet in inference and in training, against PyTorch's own ways to run it.

    python -m benchmarks.network                 GhostNet 1.0x, 224 x 224, about four minutes
    python -m benchmarks.network --width 0.5 --batch 1 --rounds 5

Three questions, each answered with ratios inside one run (candidates take turns, medians):

- eval, one thread, batches 1 and 16: time of one call;
- training, all cores, batch 16: time of one step (forward, cross entropy, backward, SGD);
- training: bytes that autograd keeps from the forward for the backward.

Every candidate is checked first: logits, and in training the loss and all gradients, against the
plain network in float64, with PyTorch's own float32 error as the measure.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, providers, report
from benchmarks.extras import MissingExtra, require
from benchmarks.providers import BASELINE, Provider

RESULTS = Path("results/network.json")
CHECKED = 4  # images of a batch in eval mode that are compared with float64


def plain_network(width: float, size: int) -> nn.Module:
    """GhostNet of plain PyTorch modules, in training mode, with statistics of random images."""
    import ghost_ops
    from ghost_ops import models

    torch.manual_seed(0)
    network = models.ghostnet(width, dropout=0.0)
    ghost_ops.unfuse(network)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.momentum = 1.0
        network(torch.randn(8, 3, size, size))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    return network


def build(provider: Provider, network: nn.Module, *, training: bool) -> nn.Module | Callable:
    """The provider's own copy of the network, to be called with images."""
    import ghost_ops

    network = copy.deepcopy(network).train(training)
    if provider.family == "fused":
        ghost_ops.fuse(network, inference=True)
        return network
    if provider.family == "folded":
        from torch.fx.experimental import optimization

        network = optimization.fuse(network)
    if provider.layout == providers.CHANNELS_LAST:
        network = network.to(memory_format=torch.channels_last)
    if provider.family == "compile":
        return torch.compile(network, dynamic=False)
    if provider.family == "compile_frozen":
        return torch.compile(network, dynamic=False, options={"freezing": True})
    return network


def _errors(got: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [
        harness.relative_error(g.detach(), e, norm="l2") for g, e in zip(got, exact, strict=True)
    ]


def _candidates(arguments: argparse.Namespace, training: bool) -> list[Provider]:
    reason = providers.compile_unavailable()
    return [
        p
        for p in providers.select(arguments.providers)
        if (p.trains or not training) and not (reason and p.family.startswith("compile"))
    ]


class NetworkBenchmark:
    """Runs the parts and collects rows."""

    def __init__(self, arguments: argparse.Namespace, console: Any) -> None:
        self.arguments, self.console = arguments, console
        self.rows: list[dict[str, Any]] = []
        self.network = plain_network(arguments.width, arguments.size)

    def _images(self, batch: int) -> Tensor:
        size = self.arguments.size
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))

    def _finish(
        self, mode: str, batch: int, threads: int, calls: dict[str, Callable[[], object]],
        checks: dict[str, harness.Check],
    ) -> None:  # fmt: skip
        clock = harness.CLOCKS[self.arguments.clock if threads == 1 else "wall"]
        timings = harness.time_interleaved(
            calls, rounds=self.arguments.rounds, min_sample=0.05, warmup=0.2, clock=clock
        )
        base = timings[BASELINE].median
        for name, t in timings.items():
            row = {
                "mode": mode, "batch": batch, "threads": threads, "provider": name,
                "median_s": t.median, "p20_s": t.p20, "p80_s": t.p80, "rounds": t.rounds,
                "speedup": base / t.median, "error": checks[name].error,
                "allowed": checks[name].allowed, "ok": checks[name].ok,
            }  # fmt: skip
            self.rows.append(row)
            self.console.print(
                f"  {name:20} {t.median * 1e3:8.2f} ms  ({t.p20 * 1e3:.2f} to {t.p80 * 1e3:.2f})  "
                f"{row['speedup']:.2f}x  error {row['error']:.1e} of {row['allowed']:.1e}"
                + ("" if row["ok"] else "  [red]WRONG[/]")
            )

    @torch.no_grad()
    def eval(self, batch: int) -> None:
        """One call in eval mode, on one thread."""
        cores = harness.set_threads(1, pin=not self.arguments.no_pin)
        self.console.print(f"[bold]eval, batch {batch}, one thread[/] (cores {cores or 'any'})")
        x = self._images(batch)
        few = x[:CHECKED]
        exact = copy.deepcopy(self.network).double().eval()(few.double())
        calls, checks, eager = {}, {}, 0.0
        for provider in _candidates(self.arguments, False):
            with torch.enable_grad():
                module, own = build(provider, self.network, training=False), provider.input(x)
            error = _errors([module(own)[:CHECKED]], [exact])
            eager = error[0] if provider.name == BASELINE else eager
            floor = 64 * torch.finfo(x.dtype).eps
            checks[provider.name] = harness.check_errors(error, [eager], [floor])
            calls[provider.name] = lambda module=module, own=own: module(own)
        self._finish("eval", batch, 1, calls, checks)

    def train(self, batch: int, threads: int) -> None:
        """One step of SGD, on all cores; and what the forward saves."""
        harness.set_threads(threads, pin=False)
        self.console.print(f"[bold]training step, batch {batch}, {threads} thread(s)[/]")
        x, y = self._images(batch), torch.arange(batch) % 1000

        def gradients(module: Any, own: Tensor) -> list[Tensor]:
            parameters = list(module.parameters())
            loss = F.cross_entropy(module(own), y)
            return [loss, *torch.autograd.grad(loss, parameters)]

        exact = gradients(copy.deepcopy(self.network).double().train(), x.double())
        whole = torch.cat([g.detach().flatten() for g in exact[1:]])
        calls, checks, eager = {}, {}, [0.0, 0.0]
        for provider in _candidates(self.arguments, True):
            module, own = build(provider, self.network, training=True), provider.input(x)
            got = gradients(module, own)
            flat = torch.cat([g.flatten() for g in got[1:]])
            errors = _errors([got[0], flat], [exact[0].detach(), whole])
            eager = errors if provider.name == BASELINE else eager
            # A ReLU's gradient jumps where its input rounds to the other side of 0, in every one of
            # some fifty layers; eager in the other memory format differs by that much as well.
            eps = torch.finfo(x.dtype).eps
            checks[provider.name] = harness.check_errors(
                errors, eager, [64 * eps, (1024 * eps) ** 0.5]
            )
            calls[provider.name] = self._step(module, own, y)
        self._finish("train", batch, threads, calls, checks)

    @staticmethod
    def _step(module: Any, x: Tensor, y: Tensor) -> Callable[[], object]:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(module(x), y).backward()
            optimizer.step()

        return step

    def saved(self, batch: int) -> None:
        """Bytes kept for backward, parameters aside."""
        self.console.print(f"[bold]saved for backward, batch {batch}[/]")
        x = self._images(batch)
        base = None
        for provider in _candidates(self.arguments, True):
            if provider.family not in ("eager", "fused"):
                continue  # a compiled graph's saved tensors do not pass the hooks
            module = build(provider, self.network, training=True)
            nbytes = harness.saved_bytes(lambda m=module, p=provider: m(p.input(x)), module)[
                "total"
            ]
            base = base or nbytes
            self.rows.append(
                {"mode": "saved", "batch": batch, "provider": provider.name, "bytes": nbytes,
                 "share": nbytes / base, "ok": True}
            )  # fmt: skip
            self.console.print(
                f"  {provider.name:20} {nbytes / 1e6:8.1f} MB  {nbytes / base:.0%} of {BASELINE}"
            )


def claims(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(what, measured ratio, goal) of the network's goals that the rows can answer."""

    def fastest(mode: str, batch: int, families: tuple[str, ...]) -> float | None:
        found = [
            r["median_s"]
            for r in rows
            if r["mode"] == mode and r["batch"] == batch and r["provider"].startswith(families)
        ]
        return min(found, default=None)

    found = []
    for batch, goal in ((1, 2.2), (16, 2.5)):
        ours = fastest("eval", batch, ("fused",))
        for families, name, least in (
            (("eager_nchw",), "eager NCHW", goal),
            (("compile",), "the best of torch.compile", 1.0),
        ):
            theirs = fastest("eval", batch, families)
            if ours and theirs:
                found.append((f"eval b{batch}: times faster than {name}", theirs / ours, least))
    ours, theirs = fastest("train", 16, ("fused",)), fastest("train", 16, ("eager_cl",))
    if ours and theirs:
        found.append(("training b16: times faster than eager channels_last", theirs / ours, 1.8))
    shares = [r["share"] for r in rows if r["mode"] == "saved" and "fused" in r["provider"]]
    if shares:
        found.append(("saved activations: eager's over ours", 1 / max(shares), 1 / 0.6))
    return found


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.network", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=float, default=1.0, help="of GhostNet (default 1.0)")
    parser.add_argument("--size", type=int, default=224, help="of the images (default 224)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="of eval")
    parser.add_argument("--train-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11, help="samples a candidate (default 11)")
    parser.add_argument("--threads", type=int, default=None, help="of training (default: all)")
    parser.add_argument(
        "--mode", nargs="+", default=["eval", "saved", "train"], choices=["eval", "saved", "train"]
    )
    parser.add_argument("--providers", nargs="+", default=["all"], help="names or families")
    parser.add_argument("--clock", choices=list(harness.CLOCKS), default="wall",
                        help="cpu leaves out what other processes take, on one thread")  # fmt: skip
    parser.add_argument("--no-pin", action="store_true", help="leave threads on any core")
    parser.add_argument("--malloc", choices=["tuned", "default"], default="tuned")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if min(arguments.batch) < 1 or arguments.train_batch < 2 or arguments.rounds < 1:
        parser.error("batches and rounds must be positive, and training needs a batch of 2 or more")
    try:
        providers.select(arguments.providers)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a candidate of ours computes something wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    try:
        console = report.console_for_tables()
        require("numpy", "quantiles")
        out = harness.prepare_output(arguments.out)
    except (MissingExtra, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    allocation = "default allocator, untouched (--malloc default)"
    if arguments.malloc == "tuned":
        allocation = harness.use_tuned_malloc("benchmarks.network", argv)
    warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
    everything = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    threads = arguments.threads or len(everything) or os.cpu_count() or 1
    meta = harness.metadata(threads=threads, cores=[], allocation=allocation)
    harness.print_header(console, meta)
    benchmark = NetworkBenchmark(arguments, console)
    if "saved" in arguments.mode:
        benchmark.saved(arguments.train_batch)
    if "train" in arguments.mode:
        benchmark.train(arguments.train_batch, threads)
    for batch in arguments.batch if "eval" in arguments.mode else ():
        benchmark.eval(batch)
        if everything:
            os.sched_setaffinity(0, everything)
    reached = claims(benchmark.rows)
    for what, ratio, goal in reached:
        console.print(f"{'[green]yes[/]' if ratio >= goal else '[red]no[/] '} {what}: "
                      f"{ratio:.2f} (goal {goal:.2f})")  # fmt: skip
    harness.write_json(
        out, {"meta": meta, "rows": benchmark.rows, "goals": [list(claim) for claim in reached]}
    )
    console.print(f"Rows written to {out}")
    wrong = [r for r in benchmark.rows if not r["ok"] and r["provider"].startswith("fused")]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
