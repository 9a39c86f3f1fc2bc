"""Descriptions of the planned machine: a CPU by its numbers, a GPU by its architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import arguments, backends

CUDA_DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
"""The architectures of GPUs that there are plans for."""


@dataclass(frozen=True)
class CpuMachine:
    """The properties of a CPU that a plan depends on.

    Attributes:
        lanes: float32 lanes of a vector register: 4, 8 or 16.
        registers: vector registers, 8 or more.
        l1_bytes, l2_bytes: bytes of the data caches of a core, at least 4 KiB and 64 KiB.
        cores: threads that share the work, 1 or more.
        amx: whether the CPU has AMX tiles for products in bfloat16.

    Raises:
        TypeError: a number is not an int.
        ValueError: a value is not allowed.
    """

    lanes: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    cores: int = 1
    amx: bool = False

    def __post_init__(self) -> None:
        if self.lanes not in (4, 8, 16):
            raise ValueError(f"lanes must be 4, 8 or 16, got {self.lanes}")
        least = {"registers": 8, "l1_bytes": 4 << 10, "l2_bytes": 64 << 10, "cores": 1}
        for name, low in least.items():
            arguments.integer(name, getattr(self, name), low)


def cpu_machine(threads: int | None = None) -> CpuMachine:
    """This machine with the instruction set in use; GHOST_OPS_CPU_MACHINE replaces its numbers.

    Args:
        threads: number of cores; None: ``torch.get_num_threads()``.

    Raises:
        TypeError, ValueError: threads is not an int of at least 1.
        RuntimeError: the native library is not loaded; the message says why.
    """
    threads = torch.get_num_threads() if threads is None else arguments.integer("threads", threads)
    return CpuMachine(**backends.native.library().machine(threads))


def compute_capability(device: str) -> int | None:
    """10 * major + minor of a device; None for the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the current GPU) or one of ``CUDA_DEVICES``.

    Raises:
        ValueError: device is another string.
        RuntimeError: ``"cuda"`` without a GPU.
    """
    if device == "cpu":
        return None
    if device == "cuda":
        if not torch.cuda.is_available():
            allowed = ", ".join(CUDA_DEVICES)
            raise RuntimeError(
                f"device 'cuda' asks for the plan of this machine's GPU, and torch sees none; name "
                f"an architecture instead: {allowed}"
            )
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    if device not in CUDA_DEVICES:
        allowed = ", ".join(map(repr, ("cpu", "cuda", *CUDA_DEVICES)))
        raise ValueError(f"device must be one of {allowed}, got {device!r}")
    return int(device.removeprefix("sm_"))
