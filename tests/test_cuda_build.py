"""The compiled CUDA kernels: architectures, registers, spills, instructions.

Reads the library of the normal build, or builds it if it is missing or older than its sources.
Needs nvcc and cuobjdump, no GPU.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "ghost_ops" / "_cuda.so"
GATES = ROOT / "build" / "cuda-gates"
SOURCES = [
    path
    for folder in ("core", "cuda", "torch/cuda")
    for path in (ROOT / "csrc" / folder).rglob("*")
    if path.is_file()
]


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit, or of the same program in Triton's package."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next(
        (str(folder / name) for folder in folders if (folder / name).exists()), None
    )
    if found is None:
        pytest.skip(f"{name} was not found (install the CUDA toolkit, or set CUDA_HOME)")
    return found


@functools.cache
def library() -> Path:
    """A library that is not older than its sources."""
    tool("nvcc")
    newest = max(path.stat().st_mtime for path in SOURCES)
    if BUILT.exists() and BUILT.stat().st_mtime >= newest:
        return BUILT
    GATES.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "GHOST_OPS_BUILD_CPU": "0", "GHOST_OPS_BUILD_CUDA": "1"}
    with open(GATES / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes build once
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(GATES)]
        how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, **how, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return GATES / "ghost_ops" / "_cuda.so"


@functools.cache
def cuobjdump(*options: str) -> str:
    return subprocess.run(
        [tool("cuobjdump"), *options, str(library())], capture_output=True, text=True, check=True
    ).stdout


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture: registers, and bytes of memory."""

    arch: str
    symbol: str
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def name(self) -> str:
        """The kernel's name, without namespace and template arguments."""
        return kernel_name(self.symbol)


def kernel_name(symbol: str) -> str:
    found = re.findall(r"\d+((?:ghost|update|combine)_\w*?_kernel)", symbol)
    assert found, symbol
    return found[-1]


@functools.cache
def usages() -> list[Usage]:
    found, arch, symbol = [], "", ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.search(r"\barch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function ([\w$.]+):", line):
            symbol = match[1]
        elif "REG:" in line:
            numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            used = [numbers[name] for name in ("REG", "STACK", "LOCAL", "SHARED")]
            found.append(Usage(arch, symbol, *used))
    assert found
    return found


def test_architectures() -> None:
    """Machine code for each architecture asked for, and PTX where that is asked for."""
    from ghost_ops import environment

    default = environment.CUDA_ARCHS.default
    assert all(f"{major}.0" in default for major in (8, 9)), default
    assert "+PTX" in default, "later architectures need PTX"
    elf = set(re.findall(r"sm_\w+", cuobjdump("-lelf")))
    ptx = set(re.findall(r"sm_\w+", cuobjdump("-lptx")))
    for entry in environment.CUDA_ARCHS.get().replace(";", " ").replace(",", " ").split():
        name = "sm_" + entry.removesuffix("+PTX").replace(".", "")
        assert name in elf, f"{entry}: only {sorted(elf)}"
        # Intermediate code serves its own architecture and all later ones.
        served = [code for code in ptx if int(code.strip("sm_af")) <= int(name.strip("sm_af"))]
        assert not entry.endswith("+PTX") or served, f"{entry}: PTX only for {sorted(ptx)}"


KERNELS = """
ghost_apply ghost_primary_stats ghost_cheap_stats ghost_pack update_running
ghost_depthwise_conv ghost_squeeze_excite_gate ghost_conv_stem
ghost_backward_sums ghost_backward_grads ghost_backward_du ghost_backward_primary
ghost_backward_finish
"""


def test_every_architecture_has_every_kernel() -> None:
    by_arch = collections.defaultdict(set)
    for usage in usages():
        by_arch[usage.arch].add(usage.symbol)
    first, *others = by_arch.values()
    assert all(symbols == first for symbols in others)
    names = {usage.name for usage in usages()}
    assert {f"{name}_kernel" for name in KERNELS.split()} <= names


def test_nothing_spills() -> None:
    wrong = [u for u in usages() if u.stack or u.local]
    assert not wrong, "\n".join(f"{u.arch} {u.symbol}: {u.stack} B stack" for u in wrong)


def test_register_budgets() -> None:
    """128 registers per thread allow two blocks of 256 threads on a multiprocessor. float64, which
    is meant for gradcheck, may use all 255."""
    wrong = [u for u in usages() if u.registers > 128 and storage_type(u.symbol) != "float64"]
    assert not wrong, "\n".join(f"{u.arch} {u.symbol}: {u.registers} registers" for u in wrong)


def test_static_shared_memory() -> None:
    """All shared memory is dynamic, which the plan counts; sm_90 reserves 1 KiB for the system."""
    wrong = [u for u in usages() if u.shared > 1024]
    assert not wrong, "\n".join(f"{u.arch} {u.symbol}: {u.shared} B shared" for u in wrong)


@functools.cache
def instructions() -> dict[tuple[str, str], collections.Counter[str]]:
    """(kernel name, storage type) -> SASS instructions of its instances on sm_80, by frequency.

    Disassembled once for each library, which takes half a minute, and kept beside the build.
    """
    state = library().stat()
    GATES.mkdir(parents=True, exist_ok=True)
    kept = GATES / f"sass-{state.st_size}-{state.st_mtime_ns}.json"
    with open(GATES / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            for old in GATES.glob("sass-*.json"):
                old.unlink()
            kept.write_text(json.dumps([[*key, value] for key, value in disassemble().items()]))
    rows = json.loads(kept.read_text())
    return {(name, dtype): collections.Counter(found) for name, dtype, found in rows}


def disassemble() -> dict[tuple[str, str], collections.Counter[str]]:
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    counter: collections.Counter[str] = collections.Counter()
    for line in cuobjdump("-sass", "-arch", "sm_80").splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            counter = counts.setdefault(
                (kernel_name(match[1]), storage_type(match[1])), collections.Counter()
            )
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            counter[match[1]] += 1
    return counts


def storage_type(symbol: str) -> str:
    if "6__half" in symbol:
        return "float16"
    if "13__nv_bfloat16" in symbol:
        return "bfloat16"
    if re.search(r"PolicyIdL|IdE|Id[SvfE]", symbol):
        return "float64"
    return "tf32" if "PolicyIfLb1" in symbol else "float32"


FORWARD = ["ghost_apply_kernel", "ghost_cheap_stats_kernel", "ghost_primary_stats_kernel"]
PRODUCTS = [*FORWARD, "ghost_backward_sums_kernel", "ghost_backward_primary_kernel"]
HALF_PRODUCTS = [*PRODUCTS, "ghost_backward_du_kernel"]


@pytest.mark.parametrize(("dtype", "suffix"), [("float16", "F32"), ("bfloat16", "F32.BF16")])
@pytest.mark.parametrize("kernel", HALF_PRODUCTS)
def test_half_kernels_use_tensor_cores(kernel: str, dtype: str, suffix: str) -> None:
    found = instructions()[kernel, dtype]
    assert found[f"HMMA.16816.{suffix}"] > 0, found.most_common(30)


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_tf32_kernels_use_tensor_cores(kernel: str) -> None:
    assert instructions()[kernel, "tf32"]["HMMA.1688.F32.TF32"] > 0
    assert not any(name.startswith("HMMA") for name in instructions()[kernel, "float32"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kernel", HALF_PRODUCTS)
def test_memory_instructions_are_wide(kernel: str, dtype: str) -> None:
    """x is read by 16-byte asynchronous copies, or in NHWC by 16-byte loads to registers; kernels
    that write maps store 16 bytes at once."""
    found = instructions()[kernel, dtype]
    assert any(n.startswith("LDGSTS.E.") and n.endswith(".128") for n in found), found
    if kernel in FORWARD:
        assert found["LDG.E.128.CONSTANT"] > 0, found
    stores = ("ghost_apply_kernel", "ghost_backward_primary_kernel", "ghost_backward_du_kernel")
    if kernel in stores:
        assert any(n.startswith("STG.E") and n.endswith(".128") for n in found), found
    assert any(n.startswith(("LDSM.16.M88.4", "LDSM.16.MT88.4")) for n in found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layer_kernels_load_wide(dtype: str) -> None:
    """Vectors of eight channels, at the border of the image too."""
    found = instructions()["ghost_depthwise_conv_kernel", dtype]
    assert found["LDG.E.128"] > 0, found
    assert any(n.startswith("STG.E") and n.endswith(".128") for n in found), found
    assert instructions()["ghost_squeeze_excite_gate_kernel", dtype]["LDG.E.128"] > 0


def test_the_pipelined_kernel_copies_in_bulk() -> None:
    """Its code for sm_90 does; its code for sm_80 is only a trap."""
    symbols = {u.symbol for u in usages() if u.name == "ghost_apply_pipelined_kernel"}
    # Two dtypes, two sizes of the depthwise kernel, any activation or only ReLU and none.
    assert len(symbols) == 8
    for symbol in symbols:
        code = cuobjdump("-sass", "-arch", "sm_90", "-fun", symbol)
        for instruction in ("UBLKCP.S.G", "UBLKCP.G.S", "SYNCS.PHASECHK", "HMMA.16816.F32"):
            assert instruction in code, symbol
        assert "LDG.E.128" not in code
    assert all(u.registers < 16 for u in usages() if u.arch == "sm_80" and u.symbol in symbols)


def test_float64_and_reductions_use_no_atomics() -> None:
    for key, found in instructions().items():
        atomics = [n for n in found if n.startswith(("ATOM", "RED."))]
        assert not atomics, (key, atomics)
