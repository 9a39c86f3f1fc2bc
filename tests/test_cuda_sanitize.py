"""The CUDA kernels and launchers under the address and undefined-behaviour sanitizers.

Global memory is PyTorch's own there: what a kernel reads or writes beside a tensor, or beside its
shared memory, ends the process. On a GPU compute-sanitizer does this (benchmarks/gpu.py).
"""

from __future__ import annotations

import subprocess
import sys

import emulator
import pytest
from test_cuda_emulator import sanitizer_environment

# The rest is linked without: templates differ in the type alone.
SANITIZED = ("cuda/forward.cu", "cuda/backward.cu", "cuda/instances/*_half*")
CASES = (
    "eval nhwc", "eval nchw", "eval deep", "eval bands", "eval u", "train nhwc", "train nchw",
    "train ratio",
)  # fmt: skip


def test_kernels_under_the_sanitizers() -> None:
    try:
        library = emulator.build_variant("ops-sanitized", SANITIZED, flags=emulator.SANITIZE)
    except emulator.Unavailable as reason:
        pytest.skip(str(reason))
    driver = emulator.HERE.parent / "cuda_driver.py"
    done = subprocess.run(
        [sys.executable, str(driver), "--library", str(library), "--device", "tiny sm_86",
         "--schedules", "greedy-eager", "--cases", *CASES],
        env=sanitizer_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert f"{len(CASES)} right, 0 wrong" in done.stdout
    assert "runtime error" not in report
