"""Time modules and networks under several providers: built, checked, timed in turn."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import engines, floor, machine, providers, timing
from benchmarks.harness.providers import Provider
from benchmarks.harness.rows import BASELINE
from benchmarks.harness.runner import Session
from benchmarks.harness.shapes import Shape
from benchmarks.harness.subjects import Call, Subject

_PROBE = ("floor", "matrix product")
Wrap = Callable[[Any, Tensor], Callable[[], object]]
# A provider that passed its check: its row, the call to be timed, the check.
Entry = tuple[dict[str, Any], Callable[[], object], timing.Check]


def common(mode: str, subject: Subject, provider: Provider) -> dict[str, Any]:
    """The fields of every row."""
    return {
        "mode": mode,
        "dtype": str(subject.x.dtype).removeprefix("torch."),
        "layout": provider.layout,
        "batch": len(subject.x),
        "threads": torch.get_num_threads(),
        "provider": provider.name,
        **subject.fields,
    }


class Measurer:
    """Measures modules and adds their rows to a session.

    torch.compile takes part in the modes that ``--compile`` names, until compiling has taken
    ``--compile-minutes``; from there on its rows are notes.

    ``chosen`` are the providers to measure, eager NCHW among them; by default ``--providers``.
    """

    def __init__(self, session: Session, chosen: Sequence[Provider] | None = None) -> None:
        self.session = session
        arguments = session.arguments
        self.chosen = list(arguments.providers if chosen is None else chosen)
        named = getattr(arguments, "compile", "none")
        self.compile_modes = {"none": (), "eval": ("eval",), "all": ("eval", "train")}[named]
        self.compile_seconds = 60 * getattr(arguments, "compile_minutes", math.inf)
        self.dtype: torch.dtype = arguments.dtype
        self.use_limits(session.roofline)

    def use_limits(self, roofline: floor.Roofline) -> None:
        """Take the floor from these limits from now on (another number of threads)."""
        self.roofline = roofline
        n = roofline.gemm_size
        left, right = torch.randn(2, n, n).to(self.dtype)
        self._product = functools.partial(torch.mm, left, right, out=torch.empty_like(left))

    def row(self, mode: str, subject: Subject, provider: Provider, **fields: Any) -> dict[str, Any]:
        """A row of one subject, without time, added to the session."""
        training = mode in ("train", "saved")
        nbytes, flops = subject.training_work if training else subject.work
        row = common(mode, subject, provider) | {"bytes": nbytes, "flops": flops, "median_s": None}
        row["floor_s"] = self.roofline.floor(nbytes, flops)
        row["bound"] = self.roofline.bound(nbytes, flops)
        return self.session.add({**row, **fields})

    def time(self, calls: Any, rounds: int) -> dict[Any, timing.Timing]:
        """Interleaved rounds on the session's clock."""
        arguments = self.session.arguments
        # Samples of several calls each: a module finds its input and weights as warm as the cache
        # keeps them, which is also what the floor's bandwidth is measured with.
        least, clock = 4e-3 if arguments.quick else 8e-3, timing.CLOCKS[arguments.clock]
        return timing.time_interleaved(calls, rounds=rounds, clock=clock, min_sample=least)

    def overhead(
        self, training: bool, wrap: Wrap, plain: nn.Module | None = None, **fields: Any
    ) -> None:
        """Call time on x [1, 8, 4, 4], next to no arithmetic: of an 8 -> 16 Ghost module, or of
        ``plain``. ``wrap`` binds a module and x to the call that is timed."""
        subject = Subject(Shape(8, 16, 4), 1, self.dtype)
        families = ["eager", "fused", *([] if training or plain else ["folded"])]
        chosen = {p.name: p for p in self.chosen if p.family in families}
        build = functools.partial(providers.build, plain=plain or subject.plain, training=training)
        calls = {n: wrap(build(p), p.input(subject.x).clone()) for n, p in chosen.items()}
        # Microsecond calls need more samples than long ones and cost little.
        for name, timed in self.time(calls, 2 * self.session.arguments.rounds + 1).items():
            self.fill(self.row("overhead", subject, chosen[name], **fields), timed, timing.Check())

    @staticmethod
    def fill(row: dict[str, Any], time: timing.Timing, check: timing.Check) -> None:
        """Write times, rates and errors into ``row``."""
        row |= {"median_s": time.median, "p20_s": time.p20, "p80_s": time.p80}
        row |= {"rounds": time.rounds, "repeats": time.repeats}
        row |= {"error": check.error, "eager_error": check.eager_error, "allowed": check.allowed}
        row["floors"] = time.median / row["floor_s"]
        row["gbytes_per_s"] = row["bytes"] / time.median / 1e9
        row["gflops"] = row["flops"] / time.median / 1e9

    def checked(
        self,
        mode: str,
        subject: Subject,
        make: Callable[[Provider], tuple[Call, Callable[[], object]]],
        exact: Sequence[Tensor],
        **fields: Any,
    ) -> list[Entry]:
        """Build and check every provider of ``mode``; those that failed keep a note in their row.

        Allowed error: twice the error of eager NCHW plus a floor for ours; twice the larger error
        of the eager layouts for the others.

        ``make`` builds a provider's calls: the first, which must return ``exact``, is checked, and
        the second timed. ``fields`` are added to the rows.
        """
        floors = subject.allowed(len(exact))
        entries = []
        eager: list[float] = []
        peers: list[float] = []
        for provider in self.chosen:
            compiles = provider.family.startswith("compile")
            if mode == "train" and not provider.trains:
                continue
            if compiles and mode not in self.compile_modes:
                continue
            row = self.row(mode, subject, provider, **fields)
            reason = engines.unavailable(provider, self.dtype)
            if compiles and self.compile_seconds <= 0:
                reason = "the time for compiling (--compile-minutes) is used up"
            if reason:
                row["note"] = f"skipped: {reason}"
                continue
            started = time.monotonic()
            try:
                # The first call compiles, the second is checked: caches must not change the result.
                with machine.unpinned() if compiles else contextlib.nullcontext():
                    call, timed = make(provider)
                    call()
                if compiles:
                    self.compile_seconds -= time.monotonic() - started
                results = call()
            except Exception as error:  # a peer that cannot run this shape is a finding
                if provider.name == BASELINE:
                    raise
                row["note"] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
                continue
            errors = timing.relative_errors(results, exact)
            eager = eager or errors
            if provider.family == "eager":
                peers = [max(pair) for pair in zip(errors, peers or errors, strict=True)]
            base = eager if provider.family == "fused" else peers
            check = timing.check_errors(errors, base, floors)
            if not check.ok:
                row["note"] = f"wrong result: error {check.error:.2e}, allowed {check.allowed:.2e}"
                continue
            entries.append((row, timed, check))
        return entries

    def time_entries(self, entries: Sequence[Entry]) -> None:
        """Time what passed its check, in interleaved rounds, and fill in the rows."""
        calls: dict[Any, Any] = dict(enumerate(call for _, call, _ in entries))
        # The product that the peak was measured with takes part in the rounds: where other users of
        # the machine slow everything down, floor and module are slowed down alike.
        timings = self.time({**calls, _PROBE: self._product}, self.session.arguments.rounds)
        peak = 2 * self.roofline.gemm_size**3 / timings[_PROBE].median
        now = dataclasses.replace(self.roofline, gemm_peak=peak)
        for number, (row, _, check) in enumerate(entries):
            row["floor_s"] = now.floor(row["bytes"], row["flops"])
            row["bound"] = now.bound(row["bytes"], row["flops"])
            row["gemm_peak"] = now.gemm_peak
            self.fill(row, timings[number], check)
        torch._dynamo.reset()  # forgets compiled modules: else shapes share one recompile limit

    @contextlib.contextmanager
    def on_threads(self, threads: int) -> Iterator[None]:
        """Another number of threads for a while, with its own peak and bandwidth for the floor."""
        arguments, limits = self.session.arguments, self.roofline
        if threads == limits.threads:
            yield
            return
        machine.set_threads(threads, pin=not arguments.no_pin)
        self.use_limits(floor.measure_roofline(arguments.dtype, **floor.QUICK_LIMITS))
        try:
            yield
        finally:
            self.use_limits(limits)
            machine.set_threads(arguments.threads, pin=not arguments.no_pin)

    def eval(self, subjects: Subject | Sequence[Subject], **fields: Any) -> None:
        """Forward in eval mode under inference_mode; several subjects share their rounds."""
        entries: list[Entry] = []
        with torch.inference_mode():
            for subject in [subjects] if isinstance(subjects, Subject) else subjects:

                def make(provider: Provider, given: Subject = subject) -> tuple[Call, Call]:
                    own, images = provider.input(given.x), given.images
                    if provider.engine:
                        run = engines.build(provider, providers.folded(given.plain), own)
                        return (lambda: (run()[images],)), run
                    module = providers.build(provider, given.plain, training=False)
                    call = functools.partial(module, own)
                    return (lambda: (call()[images],)), call

                plain = copy.deepcopy(subject.plain).double().eval()
                exact = [plain(subject.x[subject.images].double())]
                entries += self.checked("eval", subject, make, exact, **fields)
            self.time_entries(entries)

    def train(self, subject: Subject) -> None:
        """A training call: forward and backward of a module, a step of SGD of a network."""

        def make(provider: Provider) -> tuple[Call, Callable[[], object]]:
            module = providers.build(provider, subject.plain, training=True)
            bound = subject.bind(module, provider.input)
            return bound.compared, bound.step

        wide = subject.bind(copy.deepcopy(subject.plain).double(), torch.Tensor.double)
        exact = [result.detach() for result in wide.compared()]
        self.time_entries(self.checked("train", subject, make, exact))

    def saved(self, subject: Subject) -> None:
        """Bytes kept for backward, parameters aside.

        The memory contract of a module: x, and u if a quarter of x or less, besides channel
        statistics.
        """
        for provider in self.chosen:
            # A compiled graph's saved tensors do not pass the hooks, and folded ones do not train.
            if provider.family in ("eager", "fused"):
                module = providers.build(provider, subject.plain, training=True)
                x = subject.bind(module, provider.input).x
                found = timing.saved_bytes(functools.partial(module, x), module)
                row = self.row("saved", subject, provider, x_bytes=x.nbytes)
                row |= {f"saved_{what}": size for what, size in found.items()}
                if (most := subject.most_saved) is not None:
                    row |= {"allowed_maps": most, "contract_ok": found["maps"] <= most}


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
