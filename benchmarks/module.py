"""How fast is one Ghost module, how much does it keep for backward, what does a call cost?

    python -m benchmarks.module                          everything, 25 shapes, batch 1 and 16
    python -m benchmarks.module --mode eval --quick      a few shapes, without torch.compile
    python -m benchmarks.module --mode train --batch 16 --shapes ghostnet --compile all

Providers: eager PyTorch in both layouts, batch norm folded into the convolutions in both layouts,
torch.compile (default and frozen, channels_last), and ghost_ops given x in each layout. Everything
in eval mode runs under ``torch.inference_mode``. Every output and gradient is checked against the
reference in float64 before its time counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import floor, harness, providers, report, shapes
from benchmarks.extras import MissingExtra, require
from benchmarks.shapes import Shape

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
MODES = ("eval", "train", "overhead")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.module",
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--mode", choices=(*MODES, "all"), default="all")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], help="batch sizes (train: the largest)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--shapes", nargs="+", help="all, ghostnet, yolo, quick, names or globs (default: all)"
    )
    parser.add_argument("--providers", nargs="+", default=["all"], help="names, families or globs")
    parser.add_argument(
        "--compile",
        choices=("none", "eval", "all"),
        help="modes in which torch.compile runs too (default: eval, none with --quick)",
    )
    parser.add_argument(
        "--rounds", type=int, help="samples per provider (default: 15, 7 with --quick)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few shapes and rounds, no torch.compile"
    )
    parser.add_argument(
        "--malloc", choices=("tuned", "default"), default="tuned", help="allocator, for all"
    )
    parser.add_argument("--no-pin", action="store_true", help="do not pin the threads to cores")
    parser.add_argument(
        "--clock",
        choices=tuple(harness.CLOCKS),
        default="wall",
        help="cpu: CPU time, for a machine that others use too (one thread only)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/module.json"), help="JSON rows go here"
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.shapes = shapes.select(
            arguments.shapes or ["quick" if arguments.quick else "all"]
        )
        arguments.providers = providers.select(arguments.providers)
        if any(batch < 1 for batch in arguments.batch):
            raise ValueError(f"batch: expected positive integers, got {arguments.batch}")
        if arguments.rounds is not None and arguments.rounds < 1:
            raise ValueError(f"rounds: expected a positive integer, got {arguments.rounds}")
        if arguments.threads < 1:
            raise ValueError(f"threads: expected a positive integer, got {arguments.threads}")
        if arguments.clock == "cpu" and arguments.threads != 1:
            raise ValueError(f"clock: cpu time needs --threads 1, got {arguments.threads}")
    except ValueError as error:
        parser.error(str(error))
    arguments.rounds = arguments.rounds or (7 if arguments.quick else 15)
    arguments.compile = arguments.compile or ("none" if arguments.quick else "eval")
    arguments.dtype = DTYPES[arguments.dtype]
    arguments.batch = sorted(set(arguments.batch))
    return arguments


@contextlib.contextmanager
def _no_compile_leftovers() -> Iterator[None]:
    """Forget compiled modules afterwards, so that no shape meets another's recompile limit."""
    try:
        yield
    finally:
        torch._dynamo.reset()


_PROBE = "floor: matrix product"


class ModuleBenchmark:
    """Runs the modes and collects rows.

    Args:
        arguments: the parsed command line.
        roofline: limits measured in this run.
        save: called with all rows after each shape, so that an interrupted run keeps what it has.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        roofline: floor.Roofline,
        save: Callable[[list[Any]], None],
    ):
        self.arguments = arguments
        self.roofline = roofline
        self.save = save
        self.rows: list[dict[str, Any]] = []
        self.no_compile = providers.compile_unavailable()
        left, right = torch.randn(2, roofline.gemm_size, roofline.gemm_size, dtype=arguments.dtype)
        self._product = functools.partial(torch.mm, left, right, out=torch.empty_like(left))

    def _chosen(self, mode: str) -> list[providers.Provider]:
        with_compile = self.arguments.compile == "all" or self.arguments.compile == mode
        return [
            p
            for p in self.arguments.providers
            if (mode != "train" or p.trains)
            and (with_compile or not p.family.startswith("compile"))
        ]

    def _row(
        self, mode: str, shape: Shape, batch: int, provider: providers.Provider
    ) -> dict[str, Any]:
        itemsize = self.arguments.dtype.itemsize
        counts = (
            (floor.training_bytes, floor.training_flops)
            if mode == "train"
            else (floor.forward_bytes, floor.forward_flops)
        )
        nbytes, flops = counts[0](shape, batch, itemsize), counts[1](shape, batch)
        row = {
            "question": "module",
            "mode": mode,
            "shape": shape.name,
            "group": shape.group,
            "count": shape.count,
            "dtype": str(self.arguments.dtype).removeprefix("torch."),
            "layout": provider.layout,
            "batch": batch,
            "threads": self.arguments.threads,
            "provider": provider.name,
            "bytes": nbytes,
            "flops": flops,
            "floor_s": self.roofline.floor(nbytes, flops),
            "bound": self.roofline.bound(nbytes, flops),
            "median_s": None,
        }
        self.rows.append(row)
        return row

    def _time(self, calls: Any, rounds: int) -> dict[str, harness.Timing]:
        clock = harness.CLOCKS[self.arguments.clock]
        # Samples of several calls each: a module finds its input and weights as warm as the cache
        # keeps them, which is also what the floor's bandwidth is measured with.
        return harness.time_interleaved(calls, rounds=rounds, clock=clock, min_sample=8e-3)

    def _finish(self, row: dict[str, Any], check: harness.Check, timing: harness.Timing) -> None:
        row.update(
            median_s=timing.median,
            p20_s=timing.p20,
            p80_s=timing.p80,
            rounds=timing.rounds,
            repeats=timing.repeats,
            floors=timing.median / row["floor_s"],
            gbytes_per_s=row["bytes"] / timing.median / 1e9,
            gflops=row["flops"] / timing.median / 1e9,
            error=check.error,
            eager_error=check.eager_error,
            allowed=check.allowed,
        )

    def _measure(
        self,
        mode: str,
        shape: Shape,
        batch: int,
        make: Callable[[providers.Provider], Callable[[], Sequence[Tensor]]],
        exact: Sequence[Tensor],
    ) -> None:
        """Build, check and time every provider.

        ``make`` returns a call that gives the output and then the gradients, if any; ``exact`` has
        the same in float64. What is allowed: twice the error of eager NCHW plus a floor for ours;
        twice the larger error of the eager layouts for PyTorch's other options.
        """
        calls: dict[str, Callable[[], Sequence[Tensor]]] = {}
        rows: dict[str, tuple[dict[str, Any], harness.Check]] = {}
        floors = error_floors(shape, self.arguments.dtype, len(exact))
        eager: list[float] = []
        peers: list[float] = []
        for provider in self._chosen(mode):
            row = self._row(mode, shape, batch, provider)
            if provider.family.startswith("compile") and self.no_compile:
                row["note"] = f"skipped: {self.no_compile}"
                continue
            try:
                call = make(provider)
                # The first call compiles, the second is checked: caches must not change the result.
                call()
                results = [t.detach() for t in call()]
            except Exception as error:  # a peer that cannot run this shape is a finding
                if provider.name == providers.BASELINE:
                    raise
                row["note"] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
                continue
            errors = [
                harness.relative_error(got, want, norm="l2" if index else "max")
                for index, (got, want) in enumerate(zip(results, exact, strict=True))
            ]
            eager = eager or errors
            if provider.family == "eager":
                peers = [max(pair) for pair in zip(errors, peers or errors, strict=True)]
            check = harness.check_errors(errors, eager if provider.ours else peers, floors)
            if not check.ok:
                row["note"] = f"wrong result: error {check.error:.2e}, allowed {check.allowed:.2e}"
                continue
            calls[provider.name] = call
            rows[provider.name] = (row, check)
        # The product that the peak was measured with takes part in the rounds: where other users of
        # the machine slow everything down, floor and module are slowed down alike.
        timings = self._time({**calls, _PROBE: self._product}, self.arguments.rounds)
        now = self.roofline.at_peak(2 * self.roofline.gemm_size**3 / timings.pop(_PROBE).median)
        for name, timing in timings.items():
            row, check = rows[name]
            row["floor_s"] = now.floor(row["bytes"], row["flops"])
            row["bound"] = now.bound(row["bytes"], row["flops"])
            row["gemm_peak"] = now.gemm_peak
            self._finish(row, check, timing)
        self.save(self.rows)

    def eval(self, shape: Shape, batch: int) -> None:
        """Forward in eval mode under inference_mode."""
        reference = providers.reference_module(shape, dtype=self.arguments.dtype).eval()
        x = _random(shape, batch, self.arguments.dtype)
        with torch.inference_mode(), _no_compile_leftovers():
            exact = [copy.deepcopy(reference).double()(x.double())]

            def make(provider: providers.Provider) -> Callable[[], Sequence[Tensor]]:
                run, own = providers.build(provider, reference, training=False), provider.input(x)
                return lambda: (run(own),)

            self._measure("eval", shape, batch, make, exact)

    def train(self, shape: Shape, batch: int) -> None:
        """Forward + backward in training mode, and the bytes saved between them."""
        reference = providers.reference_module(shape, dtype=self.arguments.dtype)
        x = _random(shape, batch, self.arguments.dtype)
        out_shape = (batch, shape.oup, shape.out_size, shape.out_size)
        grad_out = torch.randn(out_shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)

        def step(module: Any, own: Tensor, grad: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
            out = module(own)
            return (out, *torch.autograd.grad(out, inputs, grad))

        exact_module = copy.deepcopy(reference).double().train()
        exact_x = x.double().requires_grad_()
        inputs = [exact_x, *exact_module.parameters()]
        exact = [t.detach() for t in step(exact_module, exact_x, grad_out.double(), inputs)]

        def make(provider: providers.Provider) -> Callable[[], Sequence[Tensor]]:
            module = providers.build(provider, reference, training=True)
            own, grad = provider.input(x).clone().requires_grad_(), provider.input(grad_out)
            if provider.family != "compile":
                self._saved(shape, batch, provider, module, own)
            return functools.partial(step, module, own, grad, [own, *module.parameters()])

        with _no_compile_leftovers():
            self._measure("train", shape, batch, make, exact)

    def _saved(
        self, shape: Shape, batch: int, provider: providers.Provider, module: nn.Module, x: Tensor
    ) -> None:
        """The memory contract: x, and u if a quarter of x or less, besides channel statistics."""
        saved = harness.saved_bytes(lambda: module(x), module)
        x_bytes = x.numel() * x.element_size()
        widens = shape.oup > shape.inp
        allowed = x_bytes if widens else x_bytes * 5 // 4
        self.rows.append(
            {
                "question": "module",
                "mode": "saved",
                "shape": shape.name,
                "group": shape.group,
                "count": shape.count,
                "dtype": str(x.dtype).removeprefix("torch."),
                "layout": provider.layout,
                "batch": batch,
                "provider": provider.name,
                "x_bytes": x_bytes,
                "saved_maps": saved["maps"],
                "saved_stats": saved["stats"],
                "saved_total": saved["total"],
                "allowed_maps": allowed,
                "contract_ok": saved["maps"] <= allowed,
            }
        )

    def overhead(self) -> None:
        """Call time of an 8 -> 16 module on x [1, 8, 4, 4]: next to no arithmetic."""
        shape = Shape(8, 16, 4)
        reference = providers.reference_module(shape, dtype=self.arguments.dtype)
        x = _random(shape, 1, self.arguments.dtype)
        names = [p for p in self.arguments.providers if p.family in ("eager", "folded", "fused")]

        def run(
            what: str, training: bool, wrap: Callable[[Any, Tensor], Callable[[], object]]
        ) -> None:
            calls, chosen = {}, {}
            for provider in names:
                if training and not provider.trains:
                    continue
                module = providers.build(provider, reference, training=training)
                calls[provider.name] = wrap(module, provider.input(x).clone())
                chosen[provider.name] = provider
            # Microsecond calls need more samples than long ones and cost little.
            timings = self._time(calls, 2 * self.arguments.rounds + 1)
            for name, timing in timings.items():
                row = self._row("overhead", shape, 1, chosen[name])
                self._finish(row, harness.Check(0.0, 0.0, 0.0), timing)
                row["what"] = what

        def step(module: nn.Module, own: Tensor) -> Callable[[], object]:
            inputs = [own.requires_grad_(), *module.parameters()]
            grad = torch.ones_like(module(own))
            return lambda: torch.autograd.grad(module(own), inputs, grad)

        with torch.inference_mode():
            run("eval, inference_mode", False, lambda m, own: functools.partial(m, own))
        with torch.no_grad():
            run("eval, no_grad", False, lambda m, own: functools.partial(m, own))
        run("train, forward", True, lambda m, own: functools.partial(m, own.requires_grad_()))
        run("train, forward + backward", True, step)
        self.save(self.rows)

    def run(self, console: Any) -> None:
        """All modes asked for, with a progress bar."""
        progress = require("rich.progress", "the progress bar")
        modes = MODES if self.arguments.mode == "all" else (self.arguments.mode,)
        work: list[tuple[str, Callable[[], None]]] = []
        if "overhead" in modes:
            work.append(("overhead", self.overhead))
        for batch in self.arguments.batch if "eval" in modes else ():
            work += [
                (f"eval b{batch} {s.name}", functools.partial(self.eval, s, batch))
                for s in self.arguments.shapes
            ]
        if "train" in modes:
            batch = self.arguments.batch[-1]
            work += [
                (f"train b{batch} {s.name}", functools.partial(self.train, s, batch))
                for s in self.arguments.shapes
            ]
        columns = (*progress.Progress.get_default_columns(), progress.TimeElapsedColumn())
        with progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=len(work))
            for title, item in work:
                bar.update(task, description=title)
                item()
                bar.advance(task)


def error_floors(shape: Shape, dtype: torch.dtype, count: int) -> list[float]:
    """Relative error allowed on top of eager's: of the output, then of ``count - 1`` gradients.

    ReLU's gradient jumps: about eps of all pre-activations round to the other side of 0, and each
    moves its gradient by its full size, which is sqrt(eps) of the whole in the L2 norm.
    """
    eps = torch.finfo(dtype).eps
    jump = (32 * eps) ** 0.5 if shape.activation == "relu" else 64 * eps
    return [64 * eps] + [jump] * (count - 1)


def _random(shape: Shape, batch: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(
        batch, shape.inp, shape.size, shape.size, generator=torch.Generator().manual_seed(1)
    )
    return x.to(dtype)


def print_report(console: Any, rows: Sequence[report.Row]) -> dict[str, Any]:
    """Tables of every mode in ``rows``; returns the summaries by title."""
    summaries: dict[str, Any] = {}
    tables = [r for r in rows if r["mode"] in ("eval", "train")]
    grouped = report.groups(tables)
    for (mode, batch, group), part in grouped.items():
        summaries[f"{mode}, batch {batch}, {group}"] = report.summarize(part)
        report.print_shapes(console, f"{mode}, batch {batch}, {group}: one call", part)
    saved = [r for r in rows if r["mode"] == "saved"]
    if saved:
        report.print_saved(console, saved)
    overhead = [r for r in rows if r["mode"] == "overhead"]
    if overhead:
        report.print_overhead(console, overhead)
    for title, summary in summaries.items():
        report.print_summary(console, title, summary)
    return summaries


def failures(rows: Sequence[report.Row]) -> list[str]:
    """What must not happen: ours failing, giving wrong results, or breaking the memory contract."""
    found = []
    for row in rows:
        if not row["provider"].startswith("fused_"):
            continue
        where = f"{row['mode']} batch {row['batch']} {row['shape']} {row['provider']}"
        if row["mode"] == "saved" and not row["contract_ok"]:
            found.append(f"{where}: saves {row['saved_maps']} bytes, allowed {row['allowed_maps']}")
        elif row["mode"] != "saved" and row["median_s"] is None:
            found.append(f"{where}: {row['note']}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if ghost_ops failed a check, 130 if interrupted."""
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
        allocation = harness.use_tuned_malloc("benchmarks.module", argv)
    try:
        cores = harness.set_threads(arguments.threads, pin=not arguments.no_pin)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")

    meta = harness.metadata(
        threads=arguments.threads, cores=cores, allocation=allocation, clock=arguments.clock
    )
    harness.print_header(console, meta)
    console.print("Measuring GEMM peak and bandwidth ...")
    roofline = floor.measure_roofline(arguments.dtype)
    rates = zip(roofline.copy_bytes, roofline.bandwidth, strict=True)
    console.print(
        f"GEMM peak {roofline.gemm_peak / 1e9:.1f} GFLOP/s (n = {roofline.gemm_size}); copy GB/s: "
        + ", ".join(f"{nbytes >> 10} KiB {rate / 1e9:.0f}" for nbytes, rate in rates)
    )
    console.print(f"Copies: torch, memcpy and vector loops ({floor.native_copies()[1]})")

    def save(rows: list[Any], summaries: Any = None) -> None:
        document = {
            "meta": meta,
            "roofline": roofline.to_json(),
            "summary": summaries,
            "rows": rows,
        }
        harness.write_json(out, document)

    benchmark = ModuleBenchmark(arguments, roofline, save)
    status = 0
    try:
        benchmark.run(console)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted: the rows so far are kept[/]")
        status = 130
    summaries = print_report(console, benchmark.rows)
    save(benchmark.rows, summaries)
    for failure in failures(benchmark.rows):
        console.print(f"[red]FAILED[/] {failure}")
        status = status or 1
    console.print(f"Rows written to {out}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
