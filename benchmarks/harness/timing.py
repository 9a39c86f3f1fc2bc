"""Interleaved timing, checks of outputs, and the bytes that autograd saves.

The rules: a candidate is checked before its time counts; candidates run in interleaved rounds (A B
C, A B C, ...) so that a slow spell of the machine hits all of them; a sample repeats the call until
it is long against the clock's resolution; the result is the median with the 20th and 80th
percentile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.machine import require

Clock = Callable[[], float]
Errors = Sequence[float]  # relative, of the output and of each gradient
# CPU time leaves out the slices that other processes take of a shared machine; it means something
# only where this thread does all the work.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}
MOST_REPEATS = 10_000  # of a call in one sample


@dataclass(frozen=True)
class Timing:
    """Quantiles in seconds of one call, over ``rounds`` samples of ``repeats`` calls each."""

    median: float
    p20: float
    p80: float
    rounds: int
    repeats: int


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    min_sample: float = 2e-3,
    warmup: float = 5e-3,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time every call in interleaved rounds, one sample a round.

    A call runs ``warmup`` seconds (twice at least) before its number of repeats is fixed, with
    which a sample lasts about ``min_sample`` seconds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")

    def sample(call: Callable[[], object], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    repeats: dict[str, int] = {}
    for name, call in calls.items():
        sample(call, 1)
        start, count = clock(), 0
        while count == 0 or (clock() - start < warmup and count < MOST_REPEATS):
            call()
            count += 1
        per_call = max((clock() - start) / count, 1e-9)
        repeats[name] = min(max(1, round(min_sample / per_call)), MOST_REPEATS)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(sample(call, repeats[name]))
    numpy = require("numpy", "quantiles")
    quantiles = numpy.quantile(list(samples.values()), (0.5, 0.2, 0.8), axis=1).T.tolist()
    found = zip(samples, quantiles, strict=True)
    return {name: Timing(*three, rounds, repeats[name]) for name, three in found}


@dataclass(frozen=True)
class Check:
    """Relative errors against float64: the candidate's, eager PyTorch's, and what is allowed."""

    error: float = 0.0
    eager_error: float = 0.0
    allowed: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the candidate may be timed (NaN is never ok)."""
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        """Error over allowed error; infinite if the candidate may not be timed."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.allowed if self.ok and self.allowed else math.inf


def relative_error(candidate: Tensor, exact: Tensor, *, norm: str) -> float:
    """Error of ``candidate`` over the size of ``exact`` in float64, in the norm max or l2; NaN if
    either tensor holds a NaN, infinite if the shapes differ."""
    if candidate.shape != exact.shape:
        return math.inf
    if not exact.numel():
        return 0.0
    order = {"max": math.inf, "l2": 2}[norm]
    size = torch.linalg.vector_norm(exact.double(), order).item()
    error = torch.linalg.vector_norm(candidate.double() - exact.double(), order).item()
    return error / size if size else (0.0 if error == 0.0 else math.inf)


def relative_errors(candidate: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of the first tensor, the output, by its largest element; of the gradients in the L2 norm."""
    norms = ("max", *["l2"] * (len(exact) - 1))
    each = zip(candidate, exact, norms, strict=True)
    return [relative_error(got.detach(), want, norm=norm) for got, want, norm in each]


def check_errors(candidate: Errors, eager: Errors, floors: Errors) -> Check:
    """Check ``candidate <= 2 * eager + floor`` for the relative error of each tensor; returned is
    the check of the tensor that comes closest to its limit or passes it furthest."""
    checks = [
        Check(error, base, 2.0 * base + floor)
        for error, base, floor in zip(candidate, eager, floors, strict=True)
    ]
    return max(checks, key=lambda check: check.used)


def saved_bytes(call: Callable[[], Tensor], module: torch.nn.Module) -> dict[str, int]:
    """Bytes that autograd keeps for the backward of one forward, parameters and buffers aside.

    Every distinct storage counts once, at its full size (a saved view keeps all of it alive):
    ``maps``, ``stats`` (one-dimensional tensors, which are per-channel statistics), ``total``.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    # By address; the tensor is held, so that its storage is not freed and its address reused.
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            seen[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    del out
    found = {"maps": 0, "stats": 0}
    for tensor in seen.values():
        found["maps" if tensor.dim() > 1 else "stats"] += tensor.untyped_storage().nbytes()
    return {**found, "total": sum(found.values())}
