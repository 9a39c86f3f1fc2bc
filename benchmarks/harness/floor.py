"""The floor of a Ghost module: its least time on this machine as bytes and FLOPs have it.

    floor = max(bytes / bandwidth(bytes), FLOPs / GEMM peak)

Forward: x is read once and out written once; FLOPs are those of the two convolutions, 2 P (C k^2 m
+ d^2 g) with P output pixels, m intrinsic and g ghost maps. Forward + backward: x is read by each,
out and dx are written, grad_out is read; the gradients for x and for the weights cost one forward
each, hence three times its FLOPs. Weights and statistics are not counted. Peak and bandwidth are
measured in the same run, on the same threads.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import require
from benchmarks.harness.shapes import Shape

GEMM_SIZES = (256, 384, 512, 1024, 2048)
# 64 KiB to 64 MiB, read and written bytes together.
COPY_SIZES = tuple(1 << k for k in range(16, 27))
# Fewer and smaller, for --quick: a fifth of the time.
QUICK_LIMITS: dict[str, Any] = {"gemm_sizes": (256, 512, 1024), "copy_sizes": COPY_SIZES[::2]}
QUICK_LIMITS["samples"] = 3


def tensors(shape: Shape, batch: int, itemsize: int) -> tuple[int, int]:
    """Bytes of x [batch, C, size, size] and of out [batch, out channels, out size, out size]."""
    each = batch * itemsize
    return each * shape.inp * shape.size**2, each * shape.oup * shape.out_size**2


def forward_bytes(shape: Shape, batch: int, itemsize: int = 4) -> int:
    """Least main-memory traffic of the forward: x read once, out written once."""
    return sum(tensors(shape, batch, itemsize))


def forward_flops(shape: Shape, batch: int) -> int:
    """FLOPs of both convolutions (a multiply-add counts two)."""
    primary = shape.inp * shape.kernel_size**2 * shape.intrinsic
    return 2 * batch * shape.out_size**2 * (primary + shape.dw_size**2 * shape.ghosts)


def training_bytes(shape: Shape, batch: int, itemsize: int = 4) -> int:
    """Least traffic of forward + backward: x twice, out, grad_out and dx once."""
    x, out = tensors(shape, batch, itemsize)
    return 3 * x + 2 * out


def training_flops(shape: Shape, batch: int) -> int:
    """FLOPs of forward + backward without any recomputation."""
    return 3 * forward_flops(shape, batch)


@dataclass(frozen=True)
class Roofline:
    """Measured limits: GEMM peak in FLOP/s, bandwidth in bytes/s over the working set in bytes."""

    gemm_peak: float
    gemm_size: int
    copy_bytes: tuple[int, ...]
    bandwidth: tuple[float, ...]
    methods: tuple[str, ...]
    threads: int
    dtype: str

    def bandwidth_at(self, nbytes: float) -> float:
        """Bandwidth for a working set: linear in log2(bytes), flat beyond the ends."""
        numpy = require("numpy", "the bandwidth curve")
        known = [math.log2(size) for size in self.copy_bytes]
        return float(numpy.interp(math.log2(nbytes), known, self.bandwidth))

    def floor(self, nbytes: float, flops: float) -> float:
        """max(bytes / bandwidth, FLOPs / peak) in seconds."""
        return max(nbytes / self.bandwidth_at(nbytes), flops / self.gemm_peak)

    def bound(self, nbytes: float, flops: float) -> str:
        """Which of the two binds: ``"memory"`` or ``"gemm"``."""
        return "memory" if nbytes / self.bandwidth_at(nbytes) >= flops / self.gemm_peak else "gemm"

    def __str__(self) -> str:
        rates = zip(self.copy_bytes, self.bandwidth, strict=True)
        copies = ", ".join(f"{size >> 10} KiB {rate / 1e9:.0f}" for size, rate in rates)
        peak = f"GEMM peak {self.gemm_peak / 1e9:.1f} GFLOP/s (n = {self.gemm_size})"
        return f"{peak}; copy GB/s: {copies}"


def _best(call: Callable[[], object], samples: int, min_sample: float = 3e-3) -> float:
    """Shortest wall time of one call: a limit is the minimum and not the median."""
    timer = timeit.Timer(call)
    timer.timeit(1)
    repeats = max(1, round(min_sample / max(timer.timeit(1), 1e-7)))
    return min(timer.repeat(samples, repeats)) / repeats


@functools.cache
def native_copies() -> tuple[dict[str, Any], str]:
    """Vector copies with ordinary and non-temporal stores, compiled here; or none, and why."""
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((c for c in candidates if c and shutil.which(c)), None)
    if compiler is None:
        return {}, "no C compiler: without non-temporal stores bandwidth may read low"
    source = Path(__file__).with_name("stream_copy.c")
    flags = "-O2 -march=native -fno-tree-loop-distribute-patterns -shared -fPIC".split()
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/stream_copy.so"
        command = [compiler, *flags, str(source), "-o", target]
        build = subprocess.run(command, capture_output=True, text=True)
        if build.returncode:
            return {}, f"{compiler} failed on {source.name}: {build.stderr.strip()[-200:]}"
        library = ctypes.CDLL(target)
    copies = {name: getattr(library, name) for name in ("copy_cached", "copy_streamed")}
    for function in copies.values():
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        function.restype = None
    return copies, f"compiled with {compiler}"


def measure_bandwidth(
    threads: int, *, sizes: Sequence[int] = COPY_SIZES, samples: int = 5
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Best bytes/s (read plus written) per working-set size, and which copy it was: torch's,
    memcpy, or vector loops with ordinary or non-temporal stores, on resident buffers."""
    raw = {"memcpy": ctypes.memmove, **native_copies()[0]}
    rates, methods = [], []
    with ThreadPoolExecutor(threads) as pool:
        for size in sizes:
            # Each thread copies one part, a multiple of the widest vector.
            part = size // 2 // threads // 64 * 64
            nbytes = part * threads
            source = torch.ones(nbytes // 4)
            room = torch.zeros(nbytes // 4 + 1024)
            # Half a page apart modulo the page: else loads wait for unrelated stores (4K aliasing).
            skip = (source.data_ptr() + 2048 - room.data_ptr()) % 4096 // 4
            target = room[skip : skip + nbytes // 4]
            calls: dict[str, Any] = {"torch": functools.partial(target.copy_, source)}
            to, of, starts = target.data_ptr(), source.data_ptr(), range(0, nbytes, part)
            for name, copy in raw.items():
                parts = [functools.partial(copy, to + i, of + i, part) for i in starts]

                def together(parts: Any = parts) -> None:
                    for future in [pool.submit(part) for part in parts]:
                        future.result()

                calls[name] = parts[0] if threads == 1 else together
            times = {name: _best(call, samples) for name, call in calls.items()}
            best = min(times, key=times.__getitem__)
            rates.append(2 * nbytes / times[best])
            methods.append(best)
    return tuple(rates), tuple(methods)


def measure_roofline(
    dtype: torch.dtype = torch.float32,
    *,
    gemm_sizes: Sequence[int] = GEMM_SIZES,
    copy_sizes: Sequence[int] = COPY_SIZES,
    samples: int = 5,
) -> Roofline:
    """Measure GEMM peak and bandwidth curve with the current number of threads."""
    threads = torch.get_num_threads()
    rates = {}
    for n in gemm_sizes:
        left, right = torch.rand(2, n, n).to(dtype)
        product = functools.partial(torch.mm, left, right, out=torch.empty_like(left))
        rates[n] = 2.0 * n**3 / _best(product, samples)
    size = max(rates, key=rates.__getitem__)
    bandwidth, methods = measure_bandwidth(threads, sizes=copy_sizes, samples=samples)
    name = str(dtype).removeprefix("torch.")
    return Roofline(rates[size], size, tuple(copy_sizes), bandwidth, methods, threads, name)
