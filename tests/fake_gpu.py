"""A GPU that is not there: what the GPU report asks of torch.cuda, over CPU tensors.

``install`` puts it into this process. As a program it is the worker of the report on that GPU:

    python tests/fake_gpu.py

FAKE_GPU_LOSE=CANDIDATE lets a candidate lose the device.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
# Before whatever PYTHONPATH has first: a test's own checkout may stand there.
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

NAME = "Fake GPU 3000"
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, multi_processor_count=4, total_memory=8 << 30,
    L2_cache_size=1 << 14,
)  # fmt: skip


class Event:
    """A moment of the device's time, which here is the host's."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.moment: float | None = None
        self.late = False

    def record(self) -> None:
        self.moment = time.perf_counter()

    def query(self) -> bool:
        """Whether the device has come by: not while it sleeps."""
        return Device.behind

    def synchronize(self) -> None:
        assert self.moment is not None

    def elapsed_time(self, end: Event) -> float:
        assert self.moment is not None and end.moment is not None
        return 1e3 * (end.moment - self.moment)


class Device:
    """Its state; there is one."""

    behind = False  # the host does not keep up
    lost = False
    slept: ClassVar[list[int]] = []
    replays = 0
    capturing = False
    allocated = 1000


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class CUDAGraph:
    captured = False

    def replay(self) -> None:
        assert self.captured and not Device.capturing
        Device.replays += 1


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph) -> Iterator[None]:
    Device.capturing = True
    yield
    Device.capturing, cuda_graph.captured = False, True


def sleep(cycles: int) -> None:
    assert type(cycles) is int and cycles > 0
    Device.slept.append(cycles)


def synchronize() -> None:
    assert not Device.capturing, "synchronised while a graph was captured"
    if Device.lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def memory_allocated() -> int:
    Device.allocated += 5000
    return Device.allocated


FUNCTIONS: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES,
    "synchronize": synchronize,
    "_sleep": sleep,
    "Event": Event,
    "Stream": Stream,
    "stream": lambda stream: contextlib.nullcontext(stream),
    "current_stream": lambda device=None: Stream(),
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "empty_cache": lambda: print("what libraries print", flush=True),
    "memory_reserved": lambda: 5 << 30,
    "memory_allocated": memory_allocated,
    "max_memory_allocated": lambda: Device.allocated + 900,
    "reset_peak_memory_stats": lambda: None,
}


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Puts the device in place of torch.cuda's, by ``put(object, name, value)``."""
    from benchmarks import gpu_clock, gpu_timing

    for name, function in FUNCTIONS.items():
        put(torch.cuda, name, function)
    put(torch.version, "cuda", "13.0")
    for module in (gpu_clock, gpu_timing):
        put(module, "DEVICE", "cpu")
    put(gpu_clock, "COPY_SIZES", (1 << 16, 1 << 20))
    put(gpu_clock, "GEMM_SIZE", 64)
    put(gpu_clock, "SAMPLE_SECONDS", 1e-5)
    put(gpu_clock, "QUEUE_SECONDS", 1e-5)
    Device.behind = Device.lost = False
    Device.slept, Device.replays = [], 0


def lose(name: str) -> None:
    """Has one candidate lose the device."""
    from benchmarks import gpu_timing

    build = gpu_timing.build

    def faulty(candidate: gpu_timing.Candidate, *rest: Any) -> Any:
        if candidate.name == name:
            Device.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return build(candidate, *rest)

    gpu_timing.build = faulty


def main() -> int:
    from benchmarks import gpu_worker

    torch.set_num_threads(1)
    install()
    torch.compile = lambda module, **how: module  # a compiler asks the GPU for much more
    if name := os.environ.get("FAKE_GPU_LOSE"):
        lose(name)
    return gpu_worker.main()


if __name__ == "__main__":
    raise SystemExit(main())
