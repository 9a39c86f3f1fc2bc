"""How much memory does a training step take at its peak, eager against fused?

    python -m benchmarks.memory
    python -m benchmarks.memory --quick

Peak: by how much the resident memory of the process grows during forward + backward, beyond model,
input and grad_out, which exist before; from the kernel's high-water mark (Linux), so that scratch
of any library counts. The step before it has set up thread pools and workspaces, and freed heap
memory is given back first. Saved: bytes that autograd keeps between forward and backward. GhostNet
is run whole, the modules one by one.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, measure, networks, providers, report, session, shapes
from benchmarks.providers import Provider
from benchmarks.session import Session, Task
from benchmarks.shapes import Shape

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")


def unavailable() -> str | None:
    """Why peaks cannot be measured here, or None."""
    try:
        CLEAR.write_text("5")
        _kilobytes("VmHWM")
    except OSError as error:
        return f"peak memory is read from {STATUS.parent}, which does not work here: {error}"
    return None


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory rises at most during the second of two calls."""
    call()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # resets the high-water mark
    before = _kilobytes("VmRSS")
    call()
    return 1024 * max(0, _kilobytes("VmHWM") - before)


class MemoryBenchmark:
    """Measures steps and adds their rows to the session."""

    def __init__(self, run: Session) -> None:
        self.run = run

    def _row(self, subject: str, provider: Provider, batch: int, **fields: Any) -> None:
        self.run.add(
            {
                "mode": "peak",
                "shape": subject,
                "dtype": str(self.run.arguments.dtype).removeprefix("torch."),
                "layout": provider.layout,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "provider": provider.name,
                **fields,
            }
        )

    def module(self, shape: Shape, batch: int) -> None:
        """One Ghost module."""
        dtype = self.run.arguments.dtype
        reference = providers.reference_module(shape, dtype=dtype)
        x = measure.random_input(shape, batch, dtype)
        out = (batch, shape.oup, shape.out_size, shape.out_size)
        grad_out = torch.ones(out, dtype=dtype)
        for provider in self.run.arguments.providers:
            module = providers.build(provider, reference, training=True)
            own, grad = provider.input(x).clone().requires_grad_(), provider.input(grad_out)
            inputs = [own, *module.parameters()]
            saved = harness.saved_bytes(functools.partial(module, own), module)["total"]
            peak = peak_growth(functools.partial(measure.step, module, own, grad, inputs))
            x_bytes = x.numel() * x.element_size()
            self._row(
                shape.name, provider, batch, peak_bytes=peak, saved_total=saved, x_bytes=x_bytes,
                group=shape.group, count=shape.count,
            )  # fmt: skip

    def network(self, width: float, size: int, batch: int) -> None:
        """GhostNet, with cross entropy as the loss."""
        network = networks.ghostnet(width)
        plain = network.plain(size).to(self.run.arguments.dtype)
        x = torch.randn(batch, 3, size, size).to(self.run.arguments.dtype)
        y = torch.arange(batch) % 1000
        for provider in self.run.arguments.providers:
            module = networks.build(provider, plain, training=True)
            own = provider.input(x)
            step = functools.partial(_gradients, module, own, y)
            saved = harness.saved_bytes(functools.partial(module, own), module)["total"]
            peak = peak_growth(step)
            name = network.name(size)
            self._row(name, provider, batch, peak_bytes=peak, saved_total=saved, group="network")


def _gradients(module: nn.Module, x: Tensor, y: Tensor) -> Sequence[Tensor]:
    loss = nn.functional.cross_entropy(module(x), y)
    return torch.autograd.grad(loss, list(module.parameters()))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = session.make_parser("memory", __doc__.partition("\n\n")[0])
    parser.add_argument("--batch", type=int, help="images (16, or 4 with --quick)")
    parser.add_argument("--width", type=float, help="of GhostNet (1.0, or 0.5 with --quick)")
    parser.add_argument("--size", type=int, help="of its images (224, or 96 with --quick)")
    parser.add_argument(
        "--shapes", nargs="+", help="all, ghostnet, yolo, quick, names or globs (default: all)"
    )
    parser.add_argument("--providers", nargs="+", default=["eager", "fused"], help="names or globs")

    def check(arguments: argparse.Namespace) -> None:
        quick = arguments.quick
        full, less = (16, 1.0, 224), (4, 0.5, 96)
        for name, value in zip(("batch", "width", "size"), less if quick else full, strict=True):
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)
            if getattr(arguments, name) <= 0:
                got = getattr(arguments, name)
                raise ValueError(f"{name}: expected a positive number, got {got}")
        arguments.shapes = shapes.select(arguments.shapes or ["quick" if quick else "all"])
        chosen = providers.select(arguments.providers)
        # What torch.compile allocates passes no hook, and folded modules do not train.
        arguments.providers = [p for p in chosen if p.family in ("eager", "fused")]

    return session.parse(parser, argv, check)


def summarize(rows: Sequence[report.Row]) -> list[dict[str, Any]]:
    """One line per subject: bytes of eager and of ours (the better layout), and their ratios."""
    cells: dict[str, dict[str, report.Row]] = {}
    for row in rows:
        if row["mode"] == "peak":
            cells.setdefault(row["shape"], {})[row["provider"]] = row
    lines = []
    for subject, cell in cells.items():
        ours = [row for name, row in cell.items() if report.family(name) == "ours"]
        eager = cell.get(providers.BASELINE)
        if eager is None or not ours:
            continue
        line: dict[str, Any] = {"shape": subject, "batch": eager["batch"]}
        for key in ("peak_bytes", "saved_total"):
            least = min(row[key] for row in ours)
            line |= {f"eager_{key}": eager[key], f"ours_{key}": least}
            line[f"{key}_ratio"] = eager[key] / max(least, 1)
        lines.append(line)
    return lines


def print_report(console: Any, lines: Sequence[dict[str, Any]]) -> None:
    """The lines of :func:`summarize`, the network first."""
    headings = (
        "shape", "batch", "peak, MiB: eager", "ours", "eager / ours", "saved, MiB: eager", "ours",
        "eager / ours",
    )  # fmt: skip
    table = report.plain_table("Memory of a training step", headings)
    for line in lines:
        cells = [line["shape"], str(line["batch"])]
        for key in ("peak_bytes", "saved_total"):
            cells += [f"{line[f'{who}_{key}'] / 2**20:.2f}" for who in ("eager", "ours")]
            cells.append(report.flag(line[f"{key}_ratio"]))
        table.add_row(*cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    reason = unavailable()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    run = session.start(
        "memory", argv, arguments, settings=harness.LEAN_MALLOC, measure_limits=False
    )
    if run is None:
        return 2
    benchmark = MemoryBenchmark(run)
    whole = functools.partial(benchmark.network, arguments.width, arguments.size, arguments.batch)
    work: list[Task] = [(f"GhostNet {arguments.width}x", whole)]
    work += [
        (s.name, functools.partial(benchmark.module, s, arguments.batch)) for s in arguments.shapes
    ]
    status = run.run(work)
    lines = summarize(run.rows)
    print_report(run.console, lines)
    return session.finish(run, status, lines)


if __name__ == "__main__":
    raise SystemExit(main())
