"""Times of calls on a GPU.

Device time: CUDA events around calls that were queued while the device waited, so that it runs them
back to back and the host's share does not count. Wall time: what a caller in Python waits for one
call. Candidates run in interleaved rounds; the median counts.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
DEVICE = "cuda"
ROUNDS = 7
SAMPLE_SECONDS = 1e-3  # device time of a sample, at least
QUEUE_SECONDS = 6e-3  # host time to queue a sample, at most
MOST_CALLS = 20  # in a sample: the launch queue of a device holds about 1000
LONGEST_WAIT = 0.05  # seconds that the device waits for a sample to be queued
CYCLES_PER_SECOND = 2e9  # of torch.cuda._sleep; no GPU's clock is much faster


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Disable Python's garbage collector: it takes time and frees device memory of other calls."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def rotation(calls: Sequence[Call]) -> Call:
    """A call that runs ``calls`` in turn and keeps each result until the next turn of its call.

    Over tensors that together exceed the L2 cache, x comes from memory and the output goes there.
    """
    turns, results = itertools.cycle(range(len(calls))), [None] * len(calls)

    def call() -> Any:
        turn = next(turns)
        results[turn] = None
        results[turn] = result = calls[turn]()
        return result

    return call


def set_count(nbytes: int, most: int = 32) -> int:
    """How many sets of tensors, ``nbytes`` each, exceed the L2 cache four times."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size or 50 << 20
    return max(1, min(most, math.ceil(4 * cache / nbytes)))


def in_graph(call: Call, times: int = 1) -> Call:
    """Capture ``times`` calls into one CUDA graph and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream current; the outer block restores this one.
    with no_collection(), torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        results = [call() for _ in range(times)]

    def replay() -> Any:
        graph.replay()
        return results[0]

    return replay


class _Sampler:
    """Samples of one call."""

    def __init__(self, call: Call, warmup: int) -> None:
        self.call, self.count, self.ahead = call, 1, True
        self.device: list[float] = []
        self.wall: list[float] = []
        for _ in range(warmup):
            call()
        self.host = min(self.waited()[0] for _ in range(2))
        fit = math.ceil(SAMPLE_SECONDS / max(self.on_device(), 1e-9))
        self.count = max(1, min(MOST_CALLS, fit, int(QUEUE_SECONDS / max(self.host, 1e-9))))

    def waited(self) -> tuple[float, float]:
        """Seconds a call until it is queued, and until it is done."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.count):
            self.call()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        return (queued - start) / self.count, (time.perf_counter() - start) / self.count

    def on_device(self) -> float:
        """Seconds a call on a device that finds all calls queued."""
        wait = min(1.5 * self.host * self.count + 2e-4, LONGEST_WAIT)
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
            start.record()
            for _ in range(self.count):
                self.call()
            ahead = not start.query()  # the device still waits
            end.record()
            end.synchronize()
            if ahead or not self.ahead:
                return start.elapsed_time(end) * 1e-3 / self.count
            self.ahead = wait < LONGEST_WAIT
            wait *= 2


def time_calls(
    calls: Mapping[str, Call], *, rounds: int = ROUNDS, each: int = 1, warmup: int = 2
) -> dict[str, dict[str, Any]]:
    """Time calls in interleaved rounds, so that a change of clocks hits all of them.

    ``each`` is the number of timed operations in a call. By name the fields of a row: ``us``,
    ``p20_us``, ``p80_us`` (device time), ``wall_us``, and ``queued_ahead``, False if the device
    time holds some host time.
    """
    found = {}
    with no_collection():
        samplers = {name: _Sampler(call, warmup) for name, call in calls.items()}
        for number in range(rounds):
            for sampler in samplers.values():
                sampler.device.append(sampler.on_device())
                if number < 3:
                    sampler.wall.append(sampler.waited()[1])
    for name, sampler in samplers.items():
        samples = torch.tensor(sampler.device, dtype=torch.float64) * 1e6 / each
        us, p20, p80 = samples.quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()
        wall = statistics.median(sampler.wall) * 1e6 / each
        found[name] = {"us": us, "p20_us": p20, "p80_us": p80, "wall_us": wall}
        found[name]["queued_ahead"] = sampler.ahead
    return found


def kernels(call: Call) -> dict[str, list[float]]:
    """Launches and device microseconds of each kernel (and copy) of one call, by name."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += event.time_range.elapsed_us()
    return found
