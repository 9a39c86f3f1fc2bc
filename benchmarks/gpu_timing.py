"""What ``gpu_report`` measures on a GPU: module times, CUDA graphs, memory, and the copy they are
held against.

Times are wall-clock with the device synchronised before and after a sample of back-to-back calls:
what a caller sees, kernel launches included. Every output is checked against the reference in
float64 first; a candidate that fails its check is not timed.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import floor, harness, providers
from benchmarks.module import error_floors
from benchmarks.shapes import Shape

Row = dict[str, Any]
DEVICE = "cuda"
COPY_SIZES = tuple(1 << k for k in range(20, 33))  # bytes read and written together
GEMM_SIZE = 8192
# float64 copies of the largest batches would take longer to check than everything else.
TRAIN_CHECK_BATCH = 32


@dataclass(frozen=True)
class Candidate:
    """Who is timed.

    Args:
        family: eager, compile, native (the CUDA kernels) or triton (the Triton kernels).
        layout: nchw or channels_last, of x and of grad_out.
    """

    family: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.family}_{'cl' if self.layout == providers.CHANNELS_LAST else 'nchw'}"

    @property
    def ours(self) -> bool:
        return self.family in ("native", "triton")

    @property
    def provider(self) -> providers.Provider:
        """The same as one of ``providers``."""
        return providers.Provider("fused" if self.ours else self.family, self.layout)


EAGER_CL = Candidate("eager", providers.CHANNELS_LAST)
EAGER_NCHW = Candidate("eager", providers.NCHW)
COMPILE = Candidate("compile", providers.CHANNELS_LAST)
CANDIDATES = (
    EAGER_NCHW,
    EAGER_CL,
    Candidate("native", providers.NCHW),
    Candidate("native", providers.CHANNELS_LAST),
    Candidate("triton", providers.CHANNELS_LAST),
)


def backend_missing(candidate: Candidate, dtype: torch.dtype) -> str | None:
    """Why one of our backends cannot run here; None if it can, and for PyTorch's own."""
    if not candidate.ours:
        return None
    from ghost_ops import backends

    backend = backends.BACKENDS.get(candidate.family)
    if backend is None:
        return f"ghost_ops has no backend {candidate.family!r}"
    ok, reason = backend.can_run(DEVICE, dtype)
    return None if ok else reason


def measure_roofline() -> floor.Roofline:
    """Device-to-device copy bandwidth by size, and the float16 matrix product's FLOP/s."""
    rates = []
    for nbytes in COPY_SIZES:
        source = torch.empty(nbytes // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        rates.append(nbytes / device_time(functools.partial(target.copy_, source)))
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=torch.float16, device=DEVICE)
    product = device_time(functools.partial(torch.mm, left, right))
    return floor.Roofline(
        gemm_peak=2 * GEMM_SIZE**3 / product,
        gemm_size=GEMM_SIZE,
        copy_bytes=COPY_SIZES,
        bandwidth=tuple(rates),
        methods=("torch copy_",) * len(rates),
        threads=0,
        dtype="float16",
    )


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds, read when the device has done all its work: also between warm-up calls, so that they
    do not pile up."""
    synchronize()
    return time.perf_counter()


def device_time(call: Callable[[], object], samples: int = 7, seconds: float = 5e-3) -> float:
    """Median seconds of one of many back-to-back calls."""
    timing = harness.time_interleaved(
        {"call": call}, rounds=samples, min_sample=seconds, clock=clock
    )
    return timing["call"].median


@dataclass
class Problem:
    """One shape in one dtype and batch, with the reference's results in float64."""

    shape: Shape
    batch: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.reference = providers.reference_module(self.shape, dtype=self.dtype).to(DEVICE)
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.shape.inp, self.shape.size, self.shape.size)
        self.x = torch.randn(size, generator=generator).to(DEVICE).to(self.dtype)

    @functools.cached_property
    def grad_out(self) -> Tensor:
        size = (self.batch, self.shape.oup, self.shape.out_size, self.shape.out_size)
        return (
            torch.randn(size, generator=torch.Generator().manual_seed(2)).to(DEVICE).to(self.dtype)
        )

    def run(self, candidate: Candidate, mode: str, compile_mode: str) -> Callable[[], Any]:
        """A call that gives (output,) in eval mode, (output, gradients ...) in training."""
        training = mode == "train"
        module = build(candidate, self.reference, training, compile_mode)
        provider = candidate.provider
        x = provider.input(self.x)
        if not training:
            return as_backend(candidate, torch.inference_mode()(lambda: (module(x),)))
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        inputs, grad = [x, *module.parameters()], provider.input(self.grad_out)

        def step() -> tuple[Tensor, ...]:
            out = module(x)
            return (out, *torch.autograd.grad(out, inputs, grad))

        return as_backend(candidate, step)

    def exact(self, mode: str) -> list[Tensor]:
        """The reference's results in float64."""
        module = copy.deepcopy(self.reference).double().train(mode == "train")
        x = self.x.double()
        if mode != "train":
            with torch.inference_mode():
                return [module(x)]
        if self.batch > TRAIN_CHECK_BATCH:
            with torch.no_grad():
                return [module(x)]
        x.requires_grad_()
        out = module(x)
        grads = torch.autograd.grad(out, [x, *module.parameters()], self.grad_out.double())
        return [out.detach(), *grads]


def build(
    candidate: Candidate, reference: nn.Module, training: bool, compile_mode: str
) -> nn.Module:
    if candidate.family != "compile":
        return providers.build(candidate.provider, reference, training=training)
    module = copy.deepcopy(reference).train(training).to(memory_format=torch.channels_last)
    mode = None if compile_mode == "default" else compile_mode
    return torch.compile(module, dynamic=False, mode=mode)


def as_backend(candidate: Candidate, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call under the request for one of our backends."""
    if not candidate.ours:
        return call
    from ghost_ops import use_backend

    def requested() -> Any:
        with use_backend(candidate.family):
            return call()

    return requested


def errors_of(results: Iterable[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative errors, as far as there is something exact to compare with."""
    return [
        harness.relative_error(got.detach(), want, norm="l2" if index else "max")
        for index, (got, want) in enumerate(zip(results, exact, strict=False))
    ]


def new_row(mode: str, problem: Problem, candidate: Candidate) -> Row:
    shape = problem.shape
    nbytes = floor.training_bytes if mode == "train" else floor.forward_bytes
    return {
        "question": "gpu",
        "mode": mode,
        "shape": shape.name,
        "group": shape.group,
        "count": shape.count,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "layout": candidate.layout,
        "batch": problem.batch,
        "provider": candidate.name,
        "bytes": nbytes(shape, problem.batch, problem.dtype.itemsize),
        "median_s": None,
    }


def finish_row(
    row: Row, check: harness.Check, timing: harness.Timing, roofline: floor.Roofline
) -> None:
    copy_rate = roofline.bandwidth_at(row["bytes"])
    row.update(
        harness.timed_fields(timing, check, row["bytes"]),
        copy_gbytes_per_s=copy_rate / 1e9,
        share_of_copy=row["bytes"] / timing.median / copy_rate,
    )


def clean() -> None:
    """Gives back what the last shape held."""
    gc.collect()
    torch.cuda.empty_cache()


def time_shape(
    mode: str,
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    roofline: floor.Roofline,
    *,
    rounds: int = 7,
    compile_mode: str = "default",
    wrap: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
) -> list[Row]:
    """Rows of one shape: checked, then timed in interleaved rounds.

    Args:
        mode: eval, train, or graph (eval, replayed from a CUDA graph).
        wrap: turns a checked call into what is timed.
    """
    problem = Problem(shape, batch, dtype)
    compute = "train" if mode == "train" else "eval"
    exact = problem.exact(compute)
    floors = error_floors(shape, dtype, len(exact))
    rows: dict[str, tuple[Row, harness.Check]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    found: list[Row] = []
    eager: list[float] = []
    for candidate in candidates:
        row = new_row(mode, problem, candidate)
        found.append(row)
        if candidate.family == "compile":
            row["compile_mode"] = compile_mode
        if missing := backend_missing(candidate, dtype):
            row["note"] = f"skipped: {missing}"
            continue
        try:
            call = problem.run(candidate, compute, compile_mode)
            call()  # compiles, packs
            errors = errors_of(call(), exact)
            timed = wrap(call) if wrap else call
        except Exception as error:  # a candidate that cannot run this shape is a finding
            row["note"] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
            continue
        # The larger error of eager's two layouts is what all are held against.
        if candidate.family == "eager":
            eager = [max(pair) for pair in zip(errors, eager or errors, strict=True)]
        check = harness.check_errors(errors, eager or errors, floors)
        if not check.ok:
            row["note"] = f"wrong result: error {check.error:.2e}, allowed {check.allowed:.2e}"
            continue
        rows[candidate.name], calls[candidate.name] = (row, check), timed
    del exact
    timings = harness.time_interleaved(
        calls, rounds=rounds, min_sample=2e-3, warmup=3e-3, clock=clock
    )
    for name, timing in timings.items():
        finish_row(*rows[name], timing, roofline)
    calls.clear()
    clean()
    return found


def in_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call captured into a CUDA graph: its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def memory_shape(
    shape: Shape, batch: int, dtype: torch.dtype, candidates: Sequence[Candidate]
) -> list[Row]:
    """Bytes of device memory in training, x and parameters aside.

    ``kept``: still allocated after the forward, the output excepted: what waits for the backward.
    ``peak``: the most over forward and backward, outputs and gradients included.
    """
    problem = Problem(shape, batch, dtype)
    found = []
    for candidate in candidates:
        row = new_row("memory", problem, candidate)
        found.append(row)
        if missing := backend_missing(candidate, dtype):
            row["note"] = f"skipped: {missing}"
            continue
        try:
            row.update(training_memory(problem, candidate))
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
        clean()
    return found


def training_memory(problem: Problem, candidate: Candidate) -> dict[str, int]:
    """The numbers of one row. A function of its own: what it allocates goes with it."""
    module = build(candidate, problem.reference, True, "default")
    x = candidate.provider.input(problem.x).clone(memory_format=torch.preserve_format)
    x.requires_grad_()
    grad = candidate.provider.input(problem.grad_out)
    forward = as_backend(candidate, functools.partial(module, x))
    inputs = [x, *module.parameters()]
    for _ in range(2):  # workspaces and caches are there afterwards
        torch.autograd.grad(forward(), inputs, grad)
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.itemsize
    torch.autograd.grad(out, inputs, grad)
    peak = torch.cuda.max_memory_allocated() - before
    return {"kept": kept, "peak": peak, "x_bytes": x.numel() * x.itemsize}
