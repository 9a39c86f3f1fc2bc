"""The CUDA kernels and launchers under the address and undefined-behaviour sanitizers.

Global memory is allocated by PyTorch: an access of a kernel outside a tensor, or outside its shared
memory, ends the process. On a GPU compute-sanitizer does this (benchmarks/gpu.py).
"""

from __future__ import annotations

import emulator
from cuda_driver import spawn

# The other sources are linked without the sanitizers: the templates differ in the type alone.
SANITIZED = ("cuda/forward.cu", "cuda/backward.cu", "cuda/instances/*_half*")
CASES = "eval nhwc,eval nchw,eval deep,eval bands,eval u,train nhwc,train nchw,train ratio".split(
    ","
)


def test_kernels_under_the_sanitizers() -> None:
    library = emulator.or_skip(
        lambda: emulator.build_variant("ops-sanitized", SANITIZED, flags=emulator.SANITIZE)
    )
    driver = emulator.HERE.parent / "cuda_driver.py"
    where = ["--library", str(library), "--device", "tiny sm_86", "--schedules", "greedy-eager"]
    done = spawn(str(driver), *where, "--cases", *CASES, **emulator.sanitizer_environment())
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert f"{len(CASES)} right, 0 wrong" in done.stdout
    assert "runtime error" not in report
