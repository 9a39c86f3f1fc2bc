"""The emulator reports faulty kernels. If it did not, a green test on it would prove nothing."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
import pytest
import torch
from cuda_driver import spawn

BLOCK = 64


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.or_skip(emulator.prims)


def run(library: emulator.Library, name: str, shared_bytes: int = 4 * BLOCK) -> torch.Tensor:
    """The output of the kernel of this name for the numbers 0 to 127."""
    data = torch.arange(2 * BLOCK, dtype=torch.int32)
    out = torch.full((2 * BLOCK,), -1, dtype=torch.int32)
    library.call("ghost_faulty_run", name, data.data_ptr(), out.data_ptr(), shared_bytes)
    return out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no wait", "ends without waiting for its copies"),
        ("misaligned copy", r"cp_async at faulty_kernels.cu:\d+: address misaligned for 16 bytes"),
        ("misaligned load", "load at .*: address misaligned for 16 bytes"),
        ("copy out of range", "address outside the 256 bytes of shared memory"),
        ("ldmatrix out of range", "ldmatrix_x4 at .* outside the 256 bytes"),
        ("write past the end", "wrote past the 256 bytes of its shared memory"),
        ("deadlock", "deadlock|divergent"),
        ("divergent barrier", "divergent barrier, other threads wait in sync_threads at"),
        ("divergent warp", r"divergent warp, other lanes wait in shuffle_(xor|down) at"),
        ("returned lane", "needs 32 lanes, 31 are there"),
        ("bulk, no init", "the mbarrier is not initialised"),
        ("bulk, no fence after init", "initialised without a fence_async after it"),
        ("bulk, no fence before the store", "wrote to the shared memory of a bulk copy, without"),
        ("bulk, wrong parity", "deadlock, |more arrivals than the phase has"),
        ("bulk, no last wait", "ends while its bulk stores read"),
        ("bulk, too many bytes expected", "deadlock, .* in phase 0 misses 0 arrivals and 16 bytes"),
        ("bulk, too few bytes expected", "deadlock, .* in phase 0 misses 0 arrivals and -16 bytes"),
        ("bulk, odd size", "bulk_load at .*: 120 bytes are no multiple of 16"),
        ("bulk, misaligned", "bulk_load at .*: address misaligned for 16 bytes"),
        ("bulk, out of range", "bulk_load at .*: address outside the 256 bytes"),
        ("bulk, barrier overwritten", "the mbarrier was overwritten"),
        ("early load", "load at .*: global memory before the wait for the last kernel"),
        ("early copy", "cp_async at .*: global memory before the wait for the last kernel"),
        ("never waiting", "a thread ends without waiting for the last kernel"),
    ],
)
@pytest.mark.parametrize("schedule", emulator.SCHEDULES)
def test_faults(library: emulator.Library, name: str, message: str, schedule: str) -> None:
    if name == "returned lane" and emulator.SCHEDULES[schedule] & emulator.REVERSE_LANES == 0:
        message = "deadlock"  # the other lanes already wait when the last one returns
    with (
        library.scheduled(emulator.SCHEDULES[schedule]),
        pytest.raises(RuntimeError, match=message) as error,
    ):
        run(library, name)
    assert "kernel" in str(error.value)
    assert "block (" in str(error.value)
    with library.scheduled(emulator.SCHEDULES[schedule]):  # a fault leaves nothing behind
        exchanged, early = run(library, "nothing wrong"), run(library, "early")
    assert exchanged[:BLOCK].tolist() == list(range(BLOCK))[::-1]
    assert early[:BLOCK].tolist() == list(range(BLOCK))


LAZY = {name for name, bits in emulator.SCHEDULES.items() if not bits & emulator.EAGER_COPIES}
REVERSED = {name for name, bits in emulator.SCHEDULES.items() if bits & emulator.REVERSE_WARPS}


@pytest.mark.parametrize(
    ("name", "want", "schedules"),
    [
        ("no barrier", list(range(BLOCK))[::-1], set(emulator.SCHEDULES)),
        ("no warp barrier", [i ^ 31 for i in range(BLOCK)], set(emulator.SCHEDULES)),
        ("early read", list(range(BLOCK)), LAZY),
        ("early overwrite", list(range(BLOCK))[::-1], set(emulator.SCHEDULES) - LAZY),
        ("between blocks", list(range(BLOCK)) * 2, REVERSED),
        ("bulk", list(range(1, BLOCK + 1)), set()),
        ("bulk, no wait for the load", list(range(1, BLOCK + 1)), LAZY),
        ("bulk, no wait for the read", list(range(1, BLOCK + 1)), LAZY),
    ],
)
def test_races_show_in_these_schedules(
    library: emulator.Library, name: str, want: list[int], schedules: set[str]
) -> None:
    red = set()
    for schedule, bits in emulator.SCHEDULES.items():
        with library.scheduled(bits):
            if run(library, name)[: len(want)].tolist() != want:
                red.add(schedule)
    assert red == schedules


def test_too_much_shared_memory_is_refused(library: emulator.Library) -> None:
    with pytest.raises(RuntimeError, match="invalid argument"):
        run(library, "nothing wrong", 228 * 1024)


# Devices that no other test uses: no kernel's limit is set on them yet.
FRESH = [emulator.Device(9, 0, n, 200 << 10, 201 << 10, 50 << 20) for n in (7, 11)]


def test_the_shared_memory_limit_is_set_once(library: emulator.Library) -> None:
    """Once for each kernel and device, to the most that a block may have."""
    before = library.limits_set()
    for device in FRESH:
        with library.as_device(device):
            run(library, "nothing wrong", 48 << 10)
            assert library.limits_set() == before
            for kib in (64, 200, 49, 64):
                run(library, "nothing wrong", kib << 10)
                assert library.limits_set() == before + 1
            run(library, "between blocks", 64 << 10)
            assert library.limits_set() == before + 2
            with pytest.raises(RuntimeError, match="invalid argument"):
                run(library, "nothing wrong", (200 << 10) + 1)
        before += 2


@pytest.mark.parametrize(
    ("limit", "kib", "message"),
    [
        ("never", (48, 64), "invalid argument"),
        ("each launch", (100, 64), "lowered from 102400 to 65536 bytes"),
    ],
)
def test_wrong_shared_memory_limits(
    library: emulator.Library, limit: str, kib: tuple[int, int], message: str
) -> None:
    """With launchers that set no limit, or the bytes of each launch, the second launch fails."""
    with library.as_device(emulator.Device(9, 0, 3, 150 << 10, 151 << 10, 50 << 20)):
        library.call("ghost_faulty_limit", limit, 0, 0, kib[0] << 10)
        with pytest.raises(RuntimeError, match=message):
            library.call("ghost_faulty_limit", limit, 0, 0, kib[1] << 10)


@pytest.mark.parametrize(
    ("grid", "runs"),
    [
        ("1 65535 1", True),
        ("1 1 65535", True),
        ("70000 1 1", True),
        ("0 1 1", False),
        ("1 0 1", False),
        ("1 1 0", False),
        ("1 65536 1", False),
        ("1 1 65536", False),
        ("2147483648 1 1", False),
    ],
)
def test_grids_that_the_driver_refuses(library: emulator.Library, grid: str, runs: bool) -> None:
    if runs:
        library.call("ghost_faulty_grid", grid, 0, 0, 0)
    else:
        with pytest.raises(RuntimeError, match="invalid configuration"):
            library.call("ghost_faulty_grid", grid, 0, 0, 0)


def test_host_threads_launch_the_same_kernel(library: emulator.Library) -> None:
    """With more and with less shared memory, at the same time."""
    names = ("nothing wrong", "no barrier")
    with library.as_device(emulator.Device(9, 0, 5, 100 << 10, 101 << 10, 50 << 20)):
        ready, before = threading.Barrier(8), library.limits_set()

        def launch(turn: int) -> None:
            ready.wait()
            for i in range(60):
                kib = (1, 49, 64, 100)[(turn + i) % 4]
                run(library, names[i % 2], kib << 10)

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(launch, turn) for turn in range(8)]:
                done.result()
        # Threads that come first may each set the limit, to the same value.
        assert 2 <= library.limits_set() - before <= 16


def test_threads_share_the_blocks(library: emulator.Library) -> None:
    before = library.launches()
    for threads in (1, 2, 3):
        with library.scheduled(0, threads=threads):
            assert run(library, "nothing wrong")[:BLOCK].tolist() == list(range(BLOCK))[::-1]
    assert library.launches() == before + 3
    with library.scheduled(0, threads=2), pytest.raises(RuntimeError, match="misaligned"):
        run(library, "misaligned copy")


def faulty_kernels(name: str, flags: list[str]) -> Path:
    """A library of the faulty kernels, compiled with more flags."""
    sources = [emulator.HERE / "faulty_kernels.cu", *emulator.runtime_sources()]
    return emulator.or_skip(lambda: emulator.build(name, sources, flags))


def test_fibers_of_other_processors() -> None:
    """The same scheduler over ucontext, which is used where there is no fast switch."""
    path = faulty_kernels("prims-ucontext", ["-DGHOST_EMU_UCONTEXT"])
    library = emulator.Library(path)
    assert isinstance(library.c, ctypes.CDLL)
    for bits in emulator.SCHEDULES.values():
        with library.scheduled(bits):
            assert run(library, "nothing wrong")[:BLOCK].tolist() == list(range(BLOCK))[::-1]
            with pytest.raises(RuntimeError, match="misaligned"):
                run(library, "misaligned copy")


SANITIZED = """
import sys, torch, emulator
library = emulator.Library({path!r})
data = torch.arange(128, dtype=torch.int32)
for name in {names!r}:
    out = torch.full((128,), -1, dtype=torch.int32)
    try:
        library.call("ghost_faulty_run", name, data.data_ptr(), out.data_ptr(), 256)
    except RuntimeError as error:
        print("fault:", error)
    print("went on", out[:3].tolist())
"""


def test_the_address_sanitizer_works_with_the_fibers() -> None:
    path = faulty_kernels("prims-sanitized", emulator.SANITIZE)
    environment = emulator.sanitizer_environment()

    def sanitized(*names: str) -> subprocess.CompletedProcess[str]:
        return spawn("-c", SANITIZED.format(path=str(path), names=names), **environment)

    good = sanitized("misaligned copy", "nothing wrong")
    assert good.returncode == 0, good.stderr
    assert "fault: emulated kernel" in good.stdout
    assert "went on [63, 62, 61]" in good.stdout
    assert "ERROR" not in good.stderr + good.stdout
    bad = sanitized("write past the end")
    assert bad.returncode != 0
    assert "heap-buffer-overflow" in bad.stderr
