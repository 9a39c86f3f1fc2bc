"""What ``gpu_report`` measures on a GPU: times of modules, CUDA graphs, memory.

Every output is checked against the reference in float64 first; what fails its check is not timed.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import floor, harness, providers
from benchmarks.gpu_clock import (
    DEVICE,
    ROUNDS,
    Call,
    Rotation,
    Timed,
    copy_rate,
    no_collection,
    set_count,
    time_calls,
)
from benchmarks.measure import error_floors
from benchmarks.shapes import Shape

Row = dict[str, Any]
# float64 copies of the largest batches would take longer to check than everything else.
TRAIN_CHECK_BATCH = 32
GRAPH_CALLS = 20  # in one CUDA graph, which is launched once


class DeviceLost(RuntimeError):
    """The device answers nothing any more: only a new process can use it."""


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


EAGER_NCHW = Candidate("eager", providers.NCHW)
EAGER_CL = Candidate("eager", providers.CHANNELS_LAST)
NATIVE_NCHW = Candidate("native", providers.NCHW)
NATIVE_CL = Candidate("native", providers.CHANNELS_LAST)
TRITON = Candidate("triton", providers.CHANNELS_LAST)
COMPILE = Candidate("compile", providers.CHANNELS_LAST)
CANDIDATES = (EAGER_NCHW, EAGER_CL, NATIVE_NCHW, NATIVE_CL)
NAMED = {c.name: c for c in (*CANDIDATES, TRITON, COMPILE)}


def backend_missing(candidate: Candidate, dtype: torch.dtype) -> str | None:
    """Why one of our backends cannot run here; None if it can, and for PyTorch's own."""
    if not candidate.ours:
        return None
    from ghost_ops import backends

    ok, reason = backends.BACKENDS[candidate.family].can_run(DEVICE, dtype)
    return None if ok else reason


# ---------------------------------------------------------------- one shape


@dataclass
class Problem:
    """One shape in one dtype, batch and mode (eval or train): its operands on the device."""

    shape: Shape
    batch: int
    dtype: torch.dtype
    mode: str
    _sets: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = providers.reference_module(self.shape, dtype=self.dtype).to(DEVICE)
        nbytes = floor.training_bytes if self.training else floor.forward_bytes
        self.bytes = nbytes(self.shape, self.batch, self.dtype.itemsize)
        self.sets = set_count(self.bytes)
        self.x = self.random(self.shape.inp, self.shape.size, 1)

    @property
    def training(self) -> bool:
        return self.mode == "train"

    def random(self, channels: int, size: int, seed: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        shape = (self.batch, channels, size, size)
        return torch.randn(shape, generator=generator, device=DEVICE).to(self.dtype)

    @functools.cached_property
    def grad_out(self) -> Tensor:
        return self.random(self.shape.oup, self.shape.out_size, 2)

    def copies(self, which: str, layout: str) -> list[Tensor]:
        """``x`` or ``grad_out`` in a layout, as often as there are sets; all candidates share
        them."""
        if (found := self._sets.get((which, layout))) is None:
            dense = providers.Provider("eager", layout).input(getattr(self, which))
            copied = (torch.empty_like(dense).copy_(dense) for _ in range(self.sets))
            found = [t.requires_grad_(self.training and which == "x") for t in copied]
            self._sets[which, layout] = found
        return found

    def run(self, candidate: Candidate, compile_mode: str = "default") -> Rotation:
        """A call that gives (output,) in eval mode, (output, gradients ...) in training."""
        module = build(candidate, self.reference, self.training, compile_mode)
        xs = self.copies("x", candidate.layout)
        if not self.training:
            calls = [functools.partial(forward, module, x) for x in xs]
        else:
            grads, parameters = self.copies("grad_out", candidate.layout), [*module.parameters()]
            calls = [
                functools.partial(step, module, x, grad, [x, *parameters])
                for x, grad in zip(xs, grads, strict=True)
            ]
        return Rotation([as_backend(candidate, call) for call in calls])

    def exact(self) -> list[Tensor]:
        """The reference's results in float64."""
        module = copy.deepcopy(self.reference).double().train(self.training)
        x = self.x.double()
        if not self.training or self.batch > TRAIN_CHECK_BATCH:
            with torch.no_grad():
                return [module(x)]
        x.requires_grad_()
        return list(step(module, x, self.grad_out.double(), [x, *module.parameters()]))


@torch.inference_mode()
def forward(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return (module(x),)


def step(module: nn.Module, x: Tensor, grad: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = module(x)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def build(
    candidate: Candidate, reference: nn.Module, training: bool, compile_mode: str
) -> nn.Module:
    """The candidate's own copy. torch.compile gets batch norms folded in eval mode: its best."""
    if candidate.family != "compile":
        return providers.build(candidate.provider, reference, training=training)
    folded = providers.folded_module(reference)
    module = copy.deepcopy(reference).train() if training else folded
    module = module.to(memory_format=torch.channels_last)
    mode = None if compile_mode == "default" else compile_mode
    return torch.compile(module, dynamic=False, mode=mode)


def as_backend(candidate: Candidate, call: Call) -> Call:
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
        "bytes": problem.bytes,
        "median_s": None,
    }


def finish_row(row: Row, check: harness.Check, timed: Timed, known: Mapping[str, Any]) -> None:
    rate = row["bytes"] / timed.device.median
    row.update(
        harness.timed_fields(timed.device, check, row["bytes"]),
        call_s=timed.call,
        queued_ahead=timed.queued_ahead,
        share_of_copy=rate / copy_rate(known, row["bytes"]),
        share_of_largest_copy=rate / known["bytes_per_s"][-1],
    )


def failure(error: Exception) -> str:
    """What a candidate's row says of its failure.

    Raises:
        DeviceLost: the failure has made the device unusable for this process.
    """
    text = f"{type(error).__name__}: {str(error).strip()[:300]}"
    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it is, it comes again with every call
        raise DeviceLost(text) from error
    return f"failed: {text}"


@dataclass(frozen=True)
class Options:
    """How shapes are measured.

    Args:
        copy: what ``measure_copy`` gave.
        compile_mode: of torch.compile.
        avoid: candidate -> why it is not to be run (it has brought a process down).
        tell: called with the name of the candidate that is at work, or "timing".
    """

    copy: Mapping[str, Any] = field(default_factory=dict)
    compile_mode: str = "default"
    avoid: Mapping[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda name: None


def excused(candidate: Candidate, dtype: torch.dtype, options: Options) -> str | None:
    """Why a candidate is not run, as its row says it."""
    if reason := options.avoid.get(candidate.name):
        return f"failed: {reason}"
    if missing := backend_missing(candidate, dtype):
        return f"skipped: {missing}"
    return None


def time_shape(
    mode: str,
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    options: Options,
    *,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Rows of one shape: checked, then timed in interleaved rounds.

    Args:
        mode: eval, train, or graph (eval, replayed from a CUDA graph).
    """
    problem = Problem(shape, batch, dtype, "train" if mode == "train" else "eval")
    exact = problem.exact()
    floors = error_floors(shape, dtype, len(exact))
    rows: dict[str, tuple[Row, harness.Check]] = {}
    calls: dict[str, Call] = {}
    found: list[Row] = []
    eager: list[float] = []
    if EAGER_CL not in candidates:  # the others' errors are held against eager's
        eager = errors_of(problem.run(EAGER_CL)(), exact)
    for candidate in candidates:
        row = new_row(mode, problem, candidate)
        found.append(row)
        if candidate.family == "compile":
            row["compile_mode"] = options.compile_mode
        if note := excused(candidate, dtype, options):
            row["note"] = note
            continue
        options.tell(candidate.name)
        try:
            call: Call = problem.run(candidate, options.compile_mode)
            call()  # compiles, packs
            errors = errors_of(call(), exact)
            if mode == "graph":
                call = in_graph(call)
        except Exception as error:  # a candidate that cannot run this shape is a finding
            row["note"] = failure(error)
            continue
        # The larger error of eager's two layouts is what all are held against.
        if candidate.family == "eager":
            eager = [max(pair) for pair in zip(errors, eager or errors, strict=True)]
        check = harness.check_errors(errors, eager or errors, floors)
        if not check.ok:
            row["note"] = f"wrong result: error {check.error:.2e}, allowed {check.allowed:.2e}"
            continue
        rows[candidate.name], calls[candidate.name] = (row, check), call
    del exact
    options.tell("timing")
    graph = mode == "graph"
    try:
        timings = time_calls(
            calls, rounds=rounds, each=GRAPH_CALLS if graph else 1,
            warmup=2 if graph else problem.sets + 1,
        )  # fmt: skip
    except Exception as error:
        note = failure(error)
        for row, _ in rows.values():
            row["note"] = note
        return found
    for name, timed in timings.items():
        finish_row(*rows[name], timed, options.copy)
    return found


def warm_shape(
    mode: str,
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    options: Options,
) -> list[Row]:
    """Has the compilers do their work, which they keep on disk. No rows."""
    problem = Problem(shape, batch, dtype, "train" if mode in ("train", "memory") else "eval")
    problem.sets = 1
    for candidate in candidates:
        if excused(candidate, dtype, options) is None:
            options.tell(candidate.name)
            problem.run(candidate, options.compile_mode)()
    return []


def in_graph(call: Call) -> Call:
    """``GRAPH_CALLS`` calls, captured into a CUDA graph: its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream current: the outer block does not.
    here = torch.cuda.stream(torch.cuda.current_stream())
    with no_collection(), here, torch.cuda.graph(graph):
        results = [call() for _ in range(GRAPH_CALLS)]

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def memory_shape(
    mode: str,
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    candidates: Sequence[Candidate],
    options: Options,
) -> list[Row]:
    """Bytes of device memory in training, x and parameters aside.

    ``kept``: still allocated after the forward, the output excepted: what waits for the backward.
    ``peak``: the most over forward and backward, outputs and gradients included.
    """
    problem = Problem(shape, batch, dtype, "train")
    gc.collect()
    found = []
    for candidate in candidates:
        row = new_row(mode, problem, candidate)
        found.append(row)
        if note := excused(candidate, dtype, options):
            row["note"] = note
            continue
        options.tell(candidate.name)
        try:
            with no_collection():
                row.update(training_memory(problem, candidate))
        except Exception as error:
            row["note"] = failure(error)
    return found


def training_memory(problem: Problem, candidate: Candidate) -> dict[str, int]:
    """The numbers of one row. A function of its own: what it allocates goes with it."""
    module = build(candidate, problem.reference, True, "default")
    x = problem.copies("x", candidate.layout)[0]
    grad = problem.copies("grad_out", candidate.layout)[0]
    run = as_backend(candidate, functools.partial(module, x))
    inputs = [x, *module.parameters()]
    for _ in range(2):  # workspaces and caches are there afterwards
        torch.autograd.grad(run(), inputs, grad)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.itemsize
    grads = torch.autograd.grad(out, inputs, grad)
    peak = torch.cuda.max_memory_allocated() - before
    del grads
    return {"kept": kept, "peak": peak, "x_bytes": x.numel() * x.itemsize}
