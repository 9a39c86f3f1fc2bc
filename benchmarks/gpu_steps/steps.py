"""The steps of ``benchmarks/gpu.py``. Each step runs in a separate process.

Every row is appended to the results file as it is measured. A candidate is checked against float64
before its time counts; one that fails or is wrong gets a row with a ``note`` and no time.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ghost_ops
from benchmarks.gpu_steps import clock, fit
from benchmarks.gpu_steps.clock import DEVICE, Call
from benchmarks.gpu_steps.sheet import Sheet, read_rows, write_row
from benchmarks.harness import floor, machine, providers, shapes, subjects, timing
from benchmarks.harness.machine import ROOT
from benchmarks.harness.shapes import Shape
from ghost_ops import backends
from ghost_ops.backends import cuda, native

CL, NCHW = providers.CHANNELS_LAST, providers.NCHW
BATCH = 256
NETWORK = "GhostNet 1.0x"
COPY_BYTES = 1 << 30  # read and written together
NCU_METRICS = {
    "ncu_us": "gpu__time_duration.sum",
    "dram_share": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_share": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier branch_resolve lg_throttle long_scoreboard math_pipe_throttle mio_throttle "
    "no_instruction not_selected short_scoreboard wait"
).split()
NCU_EVAL = ("16-48@112-relu", "40-240@28-relu", "112-672@14-relu", "960-160@7-linear")
NCU_CASES = {**dict.fromkeys(NCU_EVAL, False), "40-120@28-relu": True}  # whether it is trained


@dataclass(frozen=True)
class Candidate:
    """Who runs the module."""

    family: str  # eager, ours (native CUDA kernels) or triton (our Triton kernels)
    layout: str = CL  # of x and of grad_out
    autocast: bool = False  # float32 parameters; autocast chooses the dtype of the products
    graph: bool = False  # the call is replayed from a CUDA graph

    def fields(self, dtype: torch.dtype) -> dict[str, Any]:
        """Provider, layout and dtype of its rows."""
        return {
            "provider": self.family + ("+graph" if self.graph else ""),
            "layout": self.layout,
            "dtype": str(dtype).removeprefix("torch.") + (" autocast" if self.autocast else ""),
        }

    @contextlib.contextmanager
    def active(self, dtype: torch.dtype) -> Iterator[None]:
        """The backend and the autocast mode of this candidate."""
        backend = {"ours": "native", "triton": "triton"}.get(self.family, "auto")
        with ghost_ops.use_backend(backend), torch.autocast(DEVICE, dtype, enabled=self.autocast):
            yield

    def prepare(
        self, reference: nn.Module, x: Tensor, grad: Tensor | None, dtype: torch.dtype, sets: int
    ) -> tuple[Call, Sequence[Tensor]]:
        """A call over ``sets`` sets of tensors, forward and backward if there is a ``grad``; and
        its results: the output, then the gradients. The first call compiles and packs."""
        family = "eager" if self.family == "eager" else "fused"
        provider = providers.Provider(family, self.layout)
        module: Any = providers.build(provider, reference, training=grad is not None)

        def call(x: Tensor, grad: Tensor | None) -> Sequence[Tensor]:
            with self.active(dtype), torch.inference_mode(grad is None):
                out = module(x)
            if grad is None:
                return (out,)
            return (out, *torch.autograd.grad(out, [x, *module.parameters()], grad))

        operands = []
        for _ in range(sets):
            own = torch.empty_like(provider.input(x)).copy_(x).requires_grad_(grad is not None)
            operands.append((own, None if grad is None else provider.input(grad).clone()))
        result = call(*operands[0])
        if self.family != "eager":
            result = call(*operands[0])
        return clock.rotation([functools.partial(call, *pair) for pair in operands]), result


EAGER, EAGER_NCHW, OURS = Candidate("eager"), Candidate("eager", NCHW), Candidate("ours")


def refused(error: Exception) -> str:
    """The note of a row whose candidate raised. A lost device ends this process."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    try:
        torch.cuda.synchronize()
    except Exception:
        raise SystemExit(f"the device is lost: {text}") from error
    return f"failed: {text}"


def random(batch: int, channels: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[batch, channels, size, size] on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    full = (batch, channels, size, size)
    return torch.randn(full, generator=generator, device=DEVICE).to(dtype)


def measure(
    sheet: Sheet,
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    mode: str,
    candidates: Sequence[Candidate],
    **fields: Any,
) -> None:
    """Check and time one module: eval (forward) or train (forward and backward)."""
    where = {"case": shape.name, "batch": batch, "mode": mode, **fields}
    if not any(sheet.wants({**where, **c.fields(dtype)}) for c in candidates):
        return
    training, autocast = mode == "train", candidates[0].autocast
    reference = providers.reference_module(shape, dtype=torch.float32 if autocast else dtype)
    reference = reference.to(DEVICE)
    count = floor.training_bytes if training else floor.forward_bytes
    nbytes = count(shape, batch, dtype.itemsize)
    x = random(batch, shape.inp, shape.size, dtype, 1)
    grad = random(batch, shape.oup, shape.out_size, dtype, 2) if training else None
    # In eval mode an image does not depend on the others: three of them are checked.
    some = slice(None) if training else [0, batch // 2, batch - 1]
    plain = Candidate("eager", NCHW)
    wide = None if grad is None else grad.double()
    exact = plain.prepare(copy.deepcopy(reference).double(), x[some].double(), wide, dtype, 1)[1]
    floors, eager = subjects.error_floors(shape, dtype, len(exact)), None
    calls: dict[Any, Call] = {}
    rows: dict[int, dict[str, Any]] = {}
    sets, each = clock.set_count(nbytes), 20 if candidates[0].graph else 1
    for number, candidate in enumerate(candidates):
        row = {**where, **candidate.fields(dtype), "bytes": nbytes}
        try:
            call, result = candidate.prepare(reference, x, grad, dtype, sets)
            errors = timing.relative_errors([result[0][some], *result[1:]], exact)
            if candidate.graph:
                call = clock.in_graph(call, each)
        except Exception as error:  # a candidate that cannot run this shape is a finding
            sheet.add({**row, "note": refused(error)})
            continue
        if candidate.family == "eager":  # the larger error of its layouts is the measure
            eager = [max(pair) for pair in zip(errors, eager or errors, strict=True)]
        check = timing.check_errors(errors, eager or errors, floors)
        row |= {"error": check.error, "allowed": check.allowed}
        if check.ok:
            rows[number], calls[number] = row, call
        else:
            sheet.add({**row, "note": "wrong result", "errors": errors, "eager_errors": eager})
    for number, timed in clock.time_calls(calls, each=each, warmup=sets + 1).items():
        row = {**rows[number], "gbytes_per_s": nbytes / timed["us"] / 1e3}
        predicted = sheet.predicted.get(f"{mode} {dtype} {batch} {shape.name}")
        if row["provider"] == "ours" and row["layout"] == CL and predicted:
            row["predicted_us"] = predicted
        sheet.add(row, timed)


def correct(sheet: Sheet) -> None:
    """Three shapes, eval and train, against float64; the launches block."""
    for name, dtype, layout in (
        ("16-48@112-relu", torch.float16, CL),
        ("80-184@14-relu", torch.float32, NCHW),
        ("960-160@7-linear", torch.bfloat16, CL),
    ):
        pair = (Candidate("eager", layout), Candidate("ours", layout))
        for mode in ("eval", "train"):
            measure(sheet, shapes.select([name])[0], 8, dtype, mode, pair)


def evaluate(sheet: Sheet) -> None:
    """The copy ceiling; every GhostNet 1.0x shape in float16, batch 256."""
    if sheet.wants({"case": "copy"}):
        source = torch.randint(256, (COPY_BYTES // 2,), dtype=torch.uint8, device=DEVICE)
        copied = functools.partial(torch.empty_like(source).copy_, source)
        timed = clock.time_calls({"copy": copied})["copy"]
        sheet.add({"case": "copy", "copy_bytes_per_s": COPY_BYTES / timed["us"] * 1e6}, timed)
    for shape in shapes.GHOSTNET:
        measure(sheet, shape, BATCH, torch.float16, "eval", (EAGER, EAGER_NCHW, OURS))


def plans(sheet: Sheet) -> None:
    """Every GhostNet 1.0x shape with the plan that GHOST_OPS_CUDA_PLAN names: rows for --fit."""
    major, minor = torch.cuda.get_device_capability()
    sm, properties = 10 * major + minor, torch.cuda.get_device_properties(DEVICE)
    modelled = backends.native.library().cuda_arch(sm)["multiprocessors"]
    if (count := properties.multi_processor_count) != modelled:
        note = f"skipped: {count} multiprocessors, planner.explain plans for {modelled}"
        sheet.add({"case": "plans", "note": note})
        return
    for shape in shapes.GHOSTNET:
        plan = {**fit.planned(shape, sm), "device": properties.name}
        measure(sheet, shape, BATCH, torch.float16, "eval", (OURS,), plan=plan)


def more(sheet: Sheet) -> None:
    """Batch 1 and 32, Triton, YOLO-style shapes, NCHW, float32 (TF32), bfloat16."""
    half, quick = torch.float16, [s for s in shapes.QUICK if s.group == "ghostnet"]
    triton, pair = Candidate("triton"), (EAGER, EAGER_NCHW, OURS)
    graphs = (Candidate("eager", graph=True), Candidate("ours", graph=True))
    nchw = (EAGER_NCHW, Candidate("ours", NCHW))
    runs: Any = (
        (shapes.GHOSTNET, 1, half, "eval", graphs),
        (quick, BATCH, half, "eval", (EAGER, OURS, triton)),
        (shapes.YOLO, 32, half, "eval", pair),
        (quick, BATCH, half, "eval", nchw),
        (quick, BATCH, torch.float32, "eval", pair),
        (quick, BATCH, torch.float32, "eval", nchw),
        (quick, 32, half, "train", (EAGER, OURS, triton)),
        (shapes.GHOSTNET, BATCH, torch.bfloat16, "eval", pair),
        (shapes.GHOSTNET, 32, half, "eval", pair),
    )
    for chosen, batch, dtype, mode, candidates in runs:
        for shape in chosen:
            measure(sheet, shape, batch, dtype, mode, candidates)


# ---- networks


def plain_network(dtype: torch.dtype) -> nn.Module:
    """GhostNet 1.0x on the device, channels_last."""
    network = subjects.NETWORKS["ghostnet-1.0"].plain(224)
    return network.to(DEVICE, dtype).to(memory_format=torch.channels_last)


def images(batch: int, dtype: torch.dtype) -> Tensor:
    return random(batch, 3, 224, dtype, 3).contiguous(memory_format=torch.channels_last)


def fused(network: nn.Module, inference: bool = True) -> nn.Module:
    network = copy.deepcopy(network)
    ghost_ops.fuse(network, inference=inference)
    return network


def launches(call: Call) -> dict[str, Any]:
    """Peak memory and launches of one call; launches and microseconds of the kernels that take most
    of its time, all instances of one of ours together."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    found: dict[str, list[float]] = {}
    for name, (count, us) in clock.kernels(call).items():
        ours = re.search(r"ghost_\w+_kernel", name)
        short = re.sub(r"\b\w+::|\(anonymous namespace\)::", "", name)[:100]
        entry = found.setdefault(ours.group() if ours else short, [0, 0.0])
        entry[0] += count
        entry[1] = round(entry[1] + us, 1)
    top = dict(sorted(found.items(), key=lambda item: -item[1][1])[:14])
    total = int(sum(count for count, _ in found.values()))
    return {"peak_mib": peak / 2**20, "launches": total, "kernels": top}


def time_model(
    sheet: Sheet,
    case: str,
    provider: str,
    batch: int,
    make: Callable[[], Any],
    check: tuple[Tensor, float] | None = None,
) -> None:
    """Check and time the network that ``make`` gives, in float16 and channels_last, alone and
    inside a CUDA graph. Other people's networks are not checked."""
    row: dict[str, Any] = {"case": case, "batch": batch, "mode": "eval", "provider": provider}
    row |= {"layout": CL, "dtype": "float16"}
    if not sheet.wants(row):
        return
    x = images(batch, torch.float16)
    calls: dict[str, Call] = {}
    try:
        model = make()

        @torch.inference_mode()
        def call() -> Tensor:
            return model(x)

        row |= launches(call)
        if check is not None:
            exact, row["allowed"] = check
            row["error"] = timing.relative_error(call()[: len(exact)], exact, norm="max")
            if not row["error"] <= row["allowed"]:
                sheet.add({**row, "note": "wrong result"})
                return
        calls[provider] = call
        calls[f"{provider}+graph"] = clock.in_graph(call)
    except Exception as error:
        failed = f"{provider}+graph" if calls else provider
        sheet.add({**row, "provider": failed, "note": refused(error)})
    for name, timed in clock.time_calls(calls, rounds=5).items():
        rate = {"provider": name, "images_per_s": batch / timed["wall_us"] * 1e6}
        predicted = sheet.predicted.get(f"eval {torch.float16} {batch} {case}")
        if name == "ours+graph" and predicted:
            rate["predicted_us"] = predicted
        sheet.add({**row, **rate}, timed)


def exact_logits(plain: nn.Module, batch: int) -> tuple[Tensor, float]:
    """Logits of the first eight images in float64; the relative error allowed, twice eager's."""
    x = images(batch, torch.float16)[:8]
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        eager = timing.relative_error(plain(x), exact, norm="max")
    return exact, 2 * eager + torch.finfo(torch.float16).eps


def network(sheet: Sheet) -> None:
    """GhostNet 1.0x, batch 256 and 1: eager and fused, each also inside a CUDA graph."""
    plain = plain_network(torch.float16).eval()
    for batch in (BATCH, 1):
        check = exact_logits(plain, batch)
        time_model(sheet, NETWORK, "eager", batch, lambda: plain, check)
        time_model(sheet, NETWORK, "ours", batch, lambda: fused(plain), check)


def compiled(sheet: Sheet) -> None:
    """torch.compile of the network, plain and fused; networks that users compare with."""
    torch._dynamo.config.cache_size_limit = 64
    plain = plain_network(torch.float16).eval()
    for batch in (BATCH, 1):
        check = exact_logits(plain, batch)
        time_model(sheet, NETWORK, "compile", batch, lambda: torch.compile(plain), check)
    make, check = lambda: torch.compile(fused(plain)), exact_logits(plain, BATCH)
    time_model(sheet, NETWORK, "ours+compile", BATCH, make, check)
    if find_spec("torchvision") is None:
        sheet.add({"case": "resnet18", "note": "skipped: torchvision is not installed"})
        return
    import torchvision

    for name in ("resnet18", "mobilenet_v3_large"):
        other = getattr(torchvision.models, name)().eval().to(DEVICE, torch.float16)
        other = other.to(memory_format=torch.channels_last)
        time_model(sheet, name, "eager", BATCH, lambda other=other: other)
        time_model(sheet, name, "compile", BATCH, lambda other=other: torch.compile(other))


def train(sheet: Sheet) -> None:
    """Forward and backward of the network, then of every shape: float16 autocast, bfloat16."""
    for dtype, autocast in ((torch.float16, True), (torch.bfloat16, False)):
        pair = (Candidate("eager", CL, autocast), Candidate("ours", CL, autocast))
        parameters = torch.float32 if autocast else dtype
        plain, x = plain_network(parameters).train(), images(BATCH, parameters)
        for candidate in pair:
            train_network(sheet, candidate, dtype, plain, x)
        for shape in shapes.GHOSTNET:
            measure(sheet, shape, BATCH, dtype, "train", pair)


def train_network(
    sheet: Sheet, candidate: Candidate, dtype: torch.dtype, plain: nn.Module, x: Tensor
) -> None:
    """Forward, loss and backward of GhostNet 1.0x; memory kept for backward."""
    row = {"case": NETWORK, "batch": BATCH, "mode": "train", **candidate.fields(dtype)}
    if not sheet.wants(row):
        return
    labels = torch.arange(BATCH, device=DEVICE) % subjects.CLASSES

    def forward() -> Tensor:
        model.zero_grad(set_to_none=True)
        with candidate.active(dtype):
            return nn.functional.cross_entropy(model(x).float(), labels)

    def once() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    try:
        model = copy.deepcopy(plain) if candidate.family == "eager" else fused(plain, False)
        row["loss"] = once().item()
        row |= launches(once)
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        loss = forward()
        row["kept_mib"] = (torch.cuda.memory_allocated() - before) / 2**20
        del loss
        (timed,) = clock.time_calls({"step": once}, rounds=5, warmup=1).values()
    except Exception as error:
        sheet.add({**row, "note": refused(error)})
        return
    sheet.add({**row, "images_per_s": BATCH / timed["wall_us"] * 1e6}, timed)


# ---- other programs


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from CUDA_HOME, the PATH or the usual place."""
    homes = [os.environ.get(key) for key in ("CUDA_HOME", "CUDA_PATH")]
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def run_tool(command: Sequence[Any], log: Path, **environment: str) -> tuple[int, str]:
    """Run a program into a log file; its exit status and output."""
    code = machine.start(command, log, ROOT, {**os.environ, **environment}).wait()
    return code, log.read_text(errors="replace")


def ncu_target(sheet: Sheet) -> None:
    """The program that ``ncu`` profiles: each case of ``NCU_CASES`` once."""
    runs = []
    for name, training in NCU_CASES.items():
        (shape,) = shapes.select([name])
        reference = providers.reference_module(shape, dtype=torch.float16).to(DEVICE)
        x = random(BATCH, shape.inp, shape.size, torch.float16, 1)
        grad = random(BATCH, shape.oup, shape.size, torch.float16, 2) if training else None
        runs.append(OURS.prepare(reference, x, grad, torch.float16, 1)[0])
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for run in runs:
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def ncu(sheet: Sheet) -> None:
    """Hardware counters of the kernels of ``NCU_CASES``: one row a kernel."""
    if (program := find_tool("ncu")) is None:
        sheet.add({"case": "ncu", "note": "skipped: ncu is not installed (CUDA toolkit)"})
        return
    wanted = ",".join([*NCU_METRICS.values(), *map(STALL.format, STALLS)])
    out = sheet.path.parent
    command = [program, "--profile-from-start", "no", "--clock-control", "none", "--csv"]
    command += ["--page", "raw", "--metrics", wanted, "-k", "regex:ghost", sys.executable]
    target = [str(ROOT / "benchmarks" / "gpu.py"), "--child", "ncu-target", "--out", str(out)]
    code, text = run_tool([*command, *target], out / "ncu.csv")
    if code:
        note = f"skipped: ncu ended with {code}: {' '.join(text.split())[-300:]}"
        sheet.add({"case": "ncu", "note": note})
    for row in ncu_rows(text):
        sheet.add(row)


def ncu_rows(text: str) -> Iterator[dict[str, Any]]:
    """Rows of ncu's raw page as CSV, in which units stand in the second line."""
    for number, line in enumerate(csv.DictReader(io.StringIO(text[max(text.find('"ID"'), 0) :]))):
        if number == 0 or not line.get("Kernel Name"):
            continue

        def value(metric: str, line: Mapping[str, str] = line) -> float:
            return float((line.get(metric) or "nan").replace(",", ""))

        stalls = {name: value(STALL.format(name)) for name in STALLS}
        yield {
            "case": f"kernel {number}",
            "provider": "ours",
            "kernel": re.split(r"[<(]", line["Kernel Name"])[0].split(":")[-1],
            **{name: value(metric) for name, metric in NCU_METRICS.items()},
            "stalls": dict(sorted(stalls.items(), key=lambda kv: -kv[1])[:5]),
        }


def tests(sheet: Sheet) -> None:
    """The gpu-marked tests, the primitives first; memcheck and racecheck beside the others."""
    run_pytest(sheet, "primitives", "test_cuda_prims.py", 1)
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(run_pytest, sheet, "gpu-tests", "test_cuda_[!p]*.py", 10),
            pool.submit(sanitize, sheet, "memcheck", "--report-api-errors", "no"),
            pool.submit(sanitize, sheet, "racecheck"),
        ]
        for job in jobs:
            job.result()


def triton_tests(sheet: Sheet) -> None:
    """The tests of the Triton backend on the GPU."""
    run_pytest(sheet, "triton-tests", "test_triton_*.py", 16)


def run_pytest(sheet: Sheet, case: str, pattern: str, workers: int) -> None:
    """Run the gpu-marked tests of some files in at most so many processes."""
    workers = min(workers, max(1, (os.cpu_count() or 1) - 2))
    # -v: the log of a run that is cut short names the tests that failed until then.
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-p", "xdist", "-n", str(workers), "--dist", "worksteal"]
    files = sorted((ROOT / "tests").glob(pattern))
    log = sheet.path.parent / f"{case}.log"
    # Plugins of other packages have no part in this.
    code, text = run_tool([*command, *files], log, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    row: dict[str, Any] = {"case": case, "provider": "ours"}
    for word in ("passed", "failed", "skipped"):
        row[word] = int(found.group(1)) if (found := re.search(rf"(\d+) {word}", text)) else 0
    row["failures"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)[:40]
    if code or not row["passed"]:
        row["note"] = f"failed: pytest ended with {code}"
    sheet.add(row)


def sanitize(sheet: Sheet, tool: str, *options: str) -> None:
    """The small grid of the kernels' tests under compute-sanitizer.

    Failed API calls are no finding (memcheck): torch looks up driver functions that may be missing.
    """
    row: dict[str, Any] = {"case": tool, "provider": "ours"}
    if (program := find_tool("compute-sanitizer")) is None:
        sheet.add({**row, "note": "skipped: compute-sanitizer is not installed (CUDA toolkit)"})
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", *options, sys.executable]
    command += [str(ROOT / "tests" / "cuda_driver.py"), "--gpu", "--cases", "small"]
    log = sheet.path.parent / f"{tool}.log"
    # The caching allocator would hide accesses past the end of a tensor.
    code, text = run_tool(command, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
    right = re.search(r"\d+ right, \d+ wrong", text)
    row |= {"summary": found[-1] if found else "none", "right": right.group() if right else "none"}
    if code or not found:
        row["note"] = f"failed: {tool} ended with {code}"
    sheet.add(row)


STEPS: dict[str, Callable[[Sheet], None]] = {
    "correct": correct,
    "eval": evaluate,
    "network": network,
    "train": train,
    "ncu": ncu,
    "compile": compiled,
    "tests": tests,
    "more": more,
    "triton-tests": triton_tests,
    "ncu-target": ncu_target,
    **{f"plans-{rank}": plans for rank in "123"},
}


def main(name: str, path: Path, plans: Path, resume: bool, run: Mapping[str, Any]) -> int:
    """Run one step. Without a GPU, prints why and returns 3."""
    if torch.version.cuda is None:
        print(f"torch {torch.__version__} is a build without CUDA: install a CUDA build of PyTorch")
        return 3
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU: nvidia-smi tells whether there is a driver")
        return 3
    digest = hashlib.sha256(cuda.PATH.read_bytes() if cuda.PATH.exists() else b"")
    for source in sorted((ROOT / "ghost_ops").rglob("*.py")):
        digest.update(source.relative_to(ROOT).as_posix().encode() + source.read_bytes())
    common = {"digest": digest.hexdigest()[:12], "native_module": native.load()}
    common["run"] = run["run"]
    if not cuda.load():
        print(f"ours cannot run: {cuda.reason()}", flush=True)
    properties = torch.cuda.get_device_properties(DEVICE)
    known = any(row.get("run") == run["run"] and "device" in row for row in read_rows(path))
    if run["run"] and not known:
        device = {
            "device": properties.name,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "python": sys.version.split()[0],
            "cpu": machine.processor_name(),
            "cores": os.cpu_count(),
            "library": cuda.reason(),
            "forced": machine.forced(),
        }
        write_row(path, {"step": "meta", **run, **device})
    predicted = json.loads(plans.read_text()) if plans.exists() else {}
    here = (properties.name, str(torch.__version__))
    STEPS[name](Sheet(path, name, common, predicted, resume, here))
    return 0
