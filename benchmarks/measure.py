"""Time Ghost modules under several providers: built, checked against float64, timed in turn."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import engines, floor, harness, providers
from benchmarks.providers import Provider
from benchmarks.session import Session, compile_modes
from benchmarks.shapes import Shape

Call = Callable[[], Sequence[Tensor]]
_PROBE = ("floor", "matrix product")


def error_floors(shape: Shape, dtype: torch.dtype, count: int) -> list[float]:
    """Relative error allowed on top of eager's: of the output, then of ``count - 1`` gradients.

    ReLU's gradient jumps: about eps of all pre-activations round to the other side of 0, and each
    moves its gradient by its full size, which is sqrt(eps) of the whole in the L2 norm.
    """
    eps = torch.finfo(dtype).eps
    jump = (32 * eps) ** 0.5 if shape.activation == "relu" else 64 * eps
    return [64 * eps] + [jump] * (count - 1)


def random_input(shape: Shape, batch: int, dtype: torch.dtype) -> Tensor:
    """x [batch, C, size, size], the same values every time."""
    x = torch.randn(
        batch, shape.inp, shape.size, shape.size, generator=torch.Generator().manual_seed(1)
    )
    return x.to(dtype)


def step(module: Any, x: Tensor, grad: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Forward + backward: the output, then the gradients of ``inputs``."""
    out = module(x)
    return (out, *torch.autograd.grad(out, inputs, grad))


@contextlib.contextmanager
def no_compile_leftovers() -> Iterator[None]:
    """Forget compiled modules afterwards, so that no shape meets another's recompile limit."""
    try:
        yield
    finally:
        torch._dynamo.reset()


@dataclass
class Entry:
    """A provider that passed its check, and what of it is to be timed."""

    row: dict[str, Any]
    call: Callable[[], object]
    check: harness.Check


class Measurer:
    """Measures modules and adds their rows to a session.

    Args:
        session: gets the rows; its roofline gives the floor.
        chosen: the providers to measure; eager NCHW must be among them.
        compile_modes: modes (``eval``, ``train``) in which torch.compile takes part.
        compile_seconds: once compiling has taken as long, torch.compile is left out, with a note.
    """

    def __init__(
        self,
        session: Session,
        chosen: Sequence[Provider],
        compile_modes: Sequence[str] = (),
        compile_seconds: float = math.inf,
    ) -> None:
        if session.roofline is None:
            raise ValueError("session: expected one with measured limits, got none")
        self.session = session
        self.chosen = list(chosen)
        self.compile_modes = tuple(compile_modes)
        self.compile_seconds = compile_seconds
        self.dtype: torch.dtype = session.arguments.dtype
        self.use_limits(session.roofline)

    @classmethod
    def of(cls, run: Session) -> Measurer:
        """As the command line of a script with engines and torch.compile asks; says who is
        missing."""
        engines.print_missing(run.console)
        arguments = run.arguments
        return cls(
            run, arguments.providers, compile_modes(arguments), 60 * arguments.compile_minutes
        )

    def use_limits(self, roofline: floor.Roofline) -> None:
        """Take the floor from these limits from now on (another number of threads)."""
        self.roofline = roofline
        n = roofline.gemm_size
        left, right = torch.randn(2, n, n).to(self.dtype)
        self._product = functools.partial(torch.mm, left, right, out=torch.empty_like(left))

    def providers_for(self, mode: str) -> list[Provider]:
        """Those of the chosen providers that take part in ``mode``."""
        return [
            p
            for p in self.chosen
            if (mode != "train" or p.trains)
            and (mode in self.compile_modes or not p.family.startswith("compile"))
        ]

    def row(
        self, mode: str, shape: Shape, batch: int, provider: Provider, **fields: Any
    ) -> dict[str, Any]:
        """A row of one module, without time, added to the session."""
        training = mode == "train"
        count_bytes = floor.training_bytes if training else floor.forward_bytes
        count_flops = floor.training_flops if training else floor.forward_flops
        return self.blank(
            mode,
            provider,
            count_bytes(shape, batch, self.dtype.itemsize),
            count_flops(shape, batch),
            batch,
            shape=shape.name,
            group=shape.group,
            count=shape.count,
            **fields,
        )

    def blank(
        self, mode: str, provider: Provider, nbytes: int, flops: int, batch: int, **fields: Any
    ) -> dict[str, Any]:
        """A row of anything that moves so many bytes and computes so many FLOPs at least."""
        row = {
            "mode": mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": provider.layout,
            "batch": batch,
            "threads": torch.get_num_threads(),
            "provider": provider.name,
            "bytes": nbytes,
            "flops": flops,
            "floor_s": self.roofline.floor(nbytes, flops),
            "bound": self.roofline.bound(nbytes, flops),
            "median_s": None,
            **fields,
        }
        return self.session.add(row)

    def time(self, calls: Any, rounds: int) -> dict[Any, harness.Timing]:
        """Interleaved rounds on the session's clock."""
        arguments = self.session.arguments
        # Samples of several calls each: a module finds its input and weights as warm as the cache
        # keeps them, which is also what the floor's bandwidth is measured with.
        return harness.time_interleaved(
            calls,
            rounds=rounds,
            clock=harness.CLOCKS[arguments.clock],
            min_sample=4e-3 if arguments.quick else 8e-3,
        )

    @staticmethod
    def fill(row: dict[str, Any], check: harness.Check, timing: harness.Timing) -> None:
        """Write times, rates and errors into ``row``."""
        row.update(
            harness.timed_fields(timing, check, row["bytes"]),
            floors=timing.median / row["floor_s"],
            gflops=row["flops"] / timing.median / 1e9,
        )

    def checked(
        self,
        mode: str,
        make: Callable[[Provider], Call | tuple[Call, Callable[[], object]]],
        exact: Sequence[Tensor],
        floors: Sequence[float],
        row_of: Callable[[Provider], dict[str, Any]],
    ) -> list[Entry]:
        """Build and check every provider; those that failed keep a note in their row.

        What is allowed: twice the error of eager NCHW plus a floor for ours; twice the larger error
        of the eager layouts for the others.

        Args:
            mode: ``eval`` or ``train``, which decides who takes part.
            make: builds a provider's call; or two, the first to be checked and the other timed.
            exact: what the calls must return, in float64.
            floors: relative error allowed on top of eager's, for each.
            row_of: adds the provider's row.
        """
        entries = []
        eager: list[float] = []
        peers: list[float] = []
        for provider in self.providers_for(mode):
            row = row_of(provider)
            compiles = provider.family.startswith("compile")
            reason = engines.unavailable(provider, self.dtype)
            if compiles and self.compile_seconds <= 0:
                reason = "the time for compiling (--compile-minutes) is used up"
            if reason:
                row["note"] = f"skipped: {reason}"
                continue
            started = time.monotonic()
            try:
                # The first call compiles, the second is checked: caches must not change the result.
                with harness.unpinned() if compiles else contextlib.nullcontext():
                    made = make(provider)
                    call, timed = made if isinstance(made, tuple) else (made, made)
                    call()
                if compiles:
                    self.compile_seconds -= time.monotonic() - started
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
            entries.append(Entry(row, timed, check))
        return entries

    def time_entries(self, entries: Sequence[Entry]) -> None:
        """Time what passed its check, in interleaved rounds, and fill in the rows."""
        calls: dict[Any, Callable[[], object]] = {
            (e.row["shape"], e.row["provider"]): e.call for e in entries
        }
        # The product that the peak was measured with takes part in the rounds: where other users of
        # the machine slow everything down, floor and module are slowed down alike.
        timings = self.time({**calls, _PROBE: self._product}, self.session.arguments.rounds)
        now = self.roofline.at_peak(2 * self.roofline.gemm_size**3 / timings[_PROBE].median)
        for entry in entries:
            row = entry.row
            row["floor_s"] = now.floor(row["bytes"], row["flops"])
            row["bound"] = now.bound(row["bytes"], row["flops"])
            row["gemm_peak"] = now.gemm_peak
            self.fill(row, entry.check, timings[row["shape"], row["provider"]])

    @contextlib.contextmanager
    def on_threads(self, threads: int) -> Iterator[None]:
        """Another number of threads for a while, with its own peak and bandwidth for the floor."""
        arguments, limits = self.session.arguments, self.roofline
        if threads == limits.threads:
            yield
            return
        harness.set_threads(threads, pin=not arguments.no_pin)
        self.use_limits(floor.measure_roofline(arguments.dtype, **floor.QUICK_LIMITS))
        try:
            yield
        finally:
            self.use_limits(limits)
            harness.set_threads(arguments.threads, pin=not arguments.no_pin)

    def eval(self, shapes: Shape | Sequence[Shape], batch: int, **fields: Any) -> None:
        """Forward in eval mode under inference_mode; several shapes share their rounds."""
        entries: list[Entry] = []
        with torch.inference_mode(), no_compile_leftovers():
            for shape in [shapes] if isinstance(shapes, Shape) else shapes:
                reference = providers.reference_module(shape, dtype=self.dtype).eval()
                x = random_input(shape, batch, self.dtype)
                exact = [copy.deepcopy(reference).double()(x.double())]

                def make(
                    provider: Provider, reference: nn.Module = reference, x: Tensor = x
                ) -> Call:
                    own = provider.input(x)
                    if provider.engine:
                        compiled = engines.build(provider, providers.folded_module(reference), own)
                        return lambda: (compiled(),)
                    run = providers.build(provider, reference, training=False)
                    return lambda: (run(own),)

                row_of = functools.partial(self.row, "eval", shape, batch, **fields)
                floors = error_floors(shape, self.dtype, 1)
                entries += self.checked("eval", make, exact, floors, row_of)
            self.time_entries(entries)

    def train(self, shape: Shape, batch: int, **fields: Any) -> None:
        """Forward + backward in training mode, and the bytes saved between them."""
        reference = providers.reference_module(shape, dtype=self.dtype)
        x = random_input(shape, batch, self.dtype)
        out_shape = (batch, shape.oup, shape.out_size, shape.out_size)
        grad_out = torch.randn(out_shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
        exact_module = copy.deepcopy(reference).double().train()
        exact_x = x.double().requires_grad_()
        inputs = [exact_x, *exact_module.parameters()]
        exact = [t.detach() for t in step(exact_module, exact_x, grad_out.double(), inputs)]

        def make(provider: Provider) -> Call:
            module = providers.build(provider, reference, training=True)
            own, grad = provider.input(x).clone().requires_grad_(), provider.input(grad_out)
            if provider.family != "compile":
                self._saved(shape, batch, provider, module, own, fields)
            return functools.partial(step, module, own, grad, [own, *module.parameters()])

        row_of = functools.partial(self.row, "train", shape, batch, **fields)
        floors = error_floors(shape, self.dtype, len(exact))
        with no_compile_leftovers():
            self.time_entries(self.checked("train", make, exact, floors, row_of))

    def _saved(
        self,
        shape: Shape,
        batch: int,
        provider: Provider,
        module: Any,
        x: Tensor,
        fields: dict[str, Any],
    ) -> None:
        """The memory contract: x, and u if a quarter of x or less, besides channel statistics."""
        saved = harness.saved_bytes(lambda: module(x), module)
        x_bytes = x.numel() * x.element_size()
        allowed = x_bytes if shape.oup > shape.inp else x_bytes * 5 // 4
        row = self.row("saved", shape, batch, provider, **fields)
        row.update(
            x_bytes=x_bytes,
            saved_maps=saved["maps"],
            saved_stats=saved["stats"],
            saved_total=saved["total"],
            allowed_maps=allowed,
            contract_ok=saved["maps"] <= allowed,
        )


def failures(rows: Sequence[Any]) -> list[str]:
    """What must not happen: ours failing, giving wrong results, or breaking the memory contract."""
    found = []
    for row in rows:
        if not row["provider"].startswith("fused_"):
            continue
        where = f"{row['mode']} batch {row['batch']} {row['shape']} {row['provider']}"
        if row["mode"] == "saved" and not row.get("contract_ok", True):
            found.append(f"{where}: saves {row['saved_maps']} bytes, allowed {row['allowed_maps']}")
        elif row["mode"] != "saved" and row.get("note"):
            found.append(f"{where}: {row['note']}")
    return found
