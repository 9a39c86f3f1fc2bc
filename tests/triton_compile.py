"""Compile the Triton kernels for a GPU without having it, and print their resources as JSON.

``python triton_compile.py TARGET DTYPE LAYOUT DW_SIZE`` runs every operator on meta tensors, with
launches that compile and stop there: the kernels, tiles and specialisations are those of a real run
on a large batch, which takes one pass, and on a large image, which does not.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from ghost_ops.backends.triton import backward, forward, plan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class NoDriver:
    """The part of a driver that the compiler uses."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any = None) -> int:
        return 0


def usage(name: str, kernel: Any) -> dict[str, Any]:
    """Shared memory, registers and bytes spilled to memory of a compiled kernel."""
    found = {"kernel": name, "shared": kernel.metadata.shared}
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        counts = {key: int(n) for key, n in re.findall(r"\.(vgpr\w+):\s+(\d+)", text)}
        registers, spilled = counts["vgpr_count"], counts["vgpr_spill_count"]
        return {**found, "registers": registers, "spilled": spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    found |= {"registers": int(registers), "spilled": int(stack) + int(local)}
    if name in ("fused_kernel", "fused_sums_kernel"):
        found["barrier"] = barrier_between_walks(kernel.asm["ptx"])
    return found


def barrier_between_walks(ptx: str) -> bool:
    """Whether a block barrier stands after the first walk's stores, before the next load."""
    events = re.findall(r"(st\.global|ld\.global|cp\.async\.c|bar\.sync|barrier\.sync)", ptx)
    first_store = events.index("st.global")
    loads = [i for i in range(first_store, len(events)) if events[i].startswith("ld")]
    return any("bar" in event for event in events[first_store : loads[0]])


def run_all(n: int, size: int, dtype: torch.dtype, nhwc: bool, d: int) -> None:
    """Every operator on a 80 -> 184 module."""
    c, m, oup = 80, 92, 184
    x = torch.empty(n, c, size, size, dtype=dtype, device="meta")
    if nhwc:
        x = x.contiguous(memory_format=torch.channels_last)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    w1, w2 = empty(m, c, 1, 1, dtype=dtype), empty(m, 1, d, d, dtype=dtype)
    v = empty(m)
    acts = (4, 0.0, 4, 0.0)
    packed = forward.ghost_pack(w1, v, v, v, v, 1e-5, w2, v, v, v, v, 1e-5)
    forward.ghost_apply(x, packed, None, None, m, oup, 2, d, 1, *acts, True)
    if n == 1:
        packed = forward.ghost_pack(w1, v, v, v, v, 1e-5, w2, v, v, v, v, 1e-5, v, v)
        residual, slopes = x.new_empty(n, oup, size, size), (8, 0.0, 8, 0.0)
        gate = empty(n, oup, size // 2, size // 2, dtype=dtype)
        forward.ghost_apply(x, packed, residual, gate, m, oup, 2, d, 1, *slopes, True)
    none, given = (None, None, 1e-5), (v, v, 1e-5)
    out, *_ = forward.ghost_train_forward(
        x, w1, v, v, *none, None, w2, v, v, *none, None, oup, 1, *acts, False
    )
    batches = empty(dtype=torch.int64)
    forward.ghost_update_running_(v, v, batches, v, v, 0.1, v, v, batches, v, v, None, 10)
    for slopes, numbers in ((None, acts), (v, (8, 0.0, 8, 0.0))):
        norm = v, v, *given, slopes, None
        backward.ghost_backward(out, x, None, w1, *norm, w2, *norm, 1, *numbers, True, True, 127)


def main(name: str, dtype: str, layout: str, d: str) -> None:
    """Compile, and print the resources of each kernel."""
    driver.set_active(NoDriver(TARGETS[name]))
    compiled: list[dict[str, Any]] = []
    seen = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled.append(usage(self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    device = plan.Device(name, 132, 50 * 2**20, hip=name.startswith("gfx"))
    forward.device_of = backward.device_of = lambda _: device
    for n, size in ((256, 14), (1, 56)):
        run_all(n, size, getattr(torch, dtype), layout == "nhwc", int(d))
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
