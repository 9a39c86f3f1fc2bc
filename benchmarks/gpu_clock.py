"""The clock of ``gpu_report``: what a call takes on a GPU, and what a copy does.

Device time: CUDA events around calls that were queued while the device was kept waiting, so that it
runs them back to back and the host's share does not count. The calls take turns over sets of
tensors that together exceed the L2 cache, and a result lives until its set's next turn: x comes
from memory and out goes there, as in a network. Candidates run in interleaved rounds; the median
counts. Beside it stands the wall time of a call as Python sees it, launches included.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness

Call = Callable[[], Any]
DEVICE = "cuda"
COPY_SIZES = tuple(1 << k for k in range(20, 32))  # bytes read and written together
GEMM_SIZE = 8192
ROUNDS = 7
SAMPLE_SECONDS = 1e-3  # of device time in a sample
QUEUE_SECONDS = 6e-3  # for queuing a sample, at most
MOST_CALLS = 20  # in a sample: the queue of the device holds about 1000 launches
MOST_SETS = 32  # small batches fit into the cache anyway, in a network too
L2_BYTES = 50 << 20  # where torch does not tell
LONGEST_WAIT = 0.05  # seconds that the device is kept waiting, at most
CYCLES_PER_SECOND = 2e9  # of torch.cuda._sleep; no GPU's clock is much faster


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's garbage collector, which takes time, and frees memory of other calls."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Rotation:
    """Calls on several sets of tensors, in turn. A result is kept until its set's next turn."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.results: list[Any] = [None] * len(calls)
        self.turn = 0

    def __call__(self) -> Any:
        index, self.turn = self.turn, (self.turn + 1) % len(self.calls)
        self.results[index] = result = self.calls[index]()
        return result


def set_count(nbytes: int) -> int:
    """Sets of tensors, ``nbytes`` of traffic each, that exceed the L2 cache four times."""
    cache = getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 0) or L2_BYTES
    return max(1, min(MOST_SETS, math.ceil(4 * cache / nbytes)))


class Sampler:
    """Times one call: on the device alone, and as its caller sees it."""

    def __init__(self, call: Call, warmup: int) -> None:
        self.call = call
        self.on_device: list[float] = []
        self.as_called: list[float] = []
        self.queued_ahead = True
        for _ in range(warmup):  # allocates what later calls take from torch's cache
            call()
        self.count = 3
        self.queue_and_wait()  # the first is slower
        self.host, _ = self.queue_and_wait()
        device = self.device_seconds()
        fit = math.ceil(SAMPLE_SECONDS / max(device, 1e-9))
        self.count = max(2, min(MOST_CALLS, fit, int(QUEUE_SECONDS / max(self.host, 1e-9))))

    def queue_and_wait(self) -> tuple[float, float]:
        """Seconds a call: until it is queued, and until it is done."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.count):
            self.call()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        return (queued - start) / self.count, (time.perf_counter() - start) / self.count

    def device_seconds(self) -> float:
        """Seconds a call on a device that finds all calls queued."""
        wait = 1.5 * self.host * self.count + 2e-4
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
            start.record()
            for _ in range(self.count):
                self.call()
            ahead = not start.query()  # still waiting
            end.record()
            end.synchronize()
            if ahead or not self.queued_ahead:
                break
            self.queued_ahead = wait < LONGEST_WAIT
            wait *= 2
        return start.elapsed_time(end) * 1e-3 / self.count

    def sample(self) -> None:
        self.on_device.append(self.device_seconds())
        if len(self.as_called) < 3:
            self.as_called.append(self.queue_and_wait()[1])


@dataclass(frozen=True)
class Timed:
    """Device time in seconds, and the median wall time of a call.

    Args:
        queued_ahead: whether the device always had the next call waiting; if not, the device time
            holds some of the host's.
    """

    device: harness.Timing
    call: float
    queued_ahead: bool


def time_calls(
    calls: Mapping[str, Call], *, rounds: int = ROUNDS, each: int = 1, warmup: int = 2
) -> dict[str, Timed]:
    """Times calls in interleaved rounds, so that a change of clocks hits all of them.

    Args:
        each: what one call does that often; times are given for one.
        warmup: calls before anything is timed.
    """
    with no_collection():
        samplers = {name: Sampler(call, warmup) for name, call in calls.items()}
        for _ in range(rounds):
            for sampler in samplers.values():
                sampler.sample()
    return {name: result(sampler, each) for name, sampler in samplers.items()}


def result(sampler: Sampler, each: int) -> Timed:
    samples = torch.tensor(sampler.on_device, dtype=torch.float64) / each
    wanted = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = samples.quantile(wanted).tolist()
    timing = harness.Timing(median, p20, p80, len(samples), sampler.count * each)
    return Timed(timing, statistics.median(sampler.as_called) / each, sampler.queued_ahead)


# ---------------------------------------------------------------- the copy


def measure_copy() -> dict[str, Any]:
    """Bytes per second, read and written, of device-to-device copies of several sizes, and the
    FLOP/s of a float16 matrix product."""
    rates = []
    for nbytes in COPY_SIZES:
        sets = []
        for _ in range(set_count(nbytes)):
            source = torch.randint(256, (nbytes // 2,), dtype=torch.uint8, device=DEVICE)
            sets.append(functools.partial(torch.empty_like(source).copy_, source))
        timed = time_calls({"copy": Rotation(sets)}, warmup=len(sets))
        rates.append(nbytes / timed["copy"].device.median)
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=torch.float16, device=DEVICE)
    product = time_calls({"product": functools.partial(torch.mm, left, right)}, warmup=20)
    return {
        "bytes": list(COPY_SIZES),
        "bytes_per_s": rates,
        "float16_flops": 2 * GEMM_SIZE**3 / product["product"].device.median,
    }


def copy_rate(known: Mapping[str, Any], nbytes: int) -> float:
    """Bytes per second of a copy of ``nbytes``: linear in log2, flat beyond the ends."""
    sizes, rates = known["bytes"], known["bytes_per_s"]
    right = bisect.bisect_left(sizes, nbytes)
    if right == 0 or right == len(sizes):
        return rates[min(right, len(sizes) - 1)]
    low, high = math.log2(sizes[right - 1]), math.log2(sizes[right])
    share = (math.log2(nbytes) - low) / (high - low)
    return rates[right - 1] * (1 - share) + rates[right] * share
