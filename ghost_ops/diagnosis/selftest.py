"""Short checks of every backend of this machine against the float64 reference.

Rule of a number: |got - want| <= 2 |plain - want| + floor, in the largest element. ``want`` is the
reference in float64, ``plain`` the reference in the dtype of the check, the floor some ulp of the
largest value. Rule of determinism: the same input gives the same bits, in a second run and on one
thread.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..conventions import memory_format
from ..convert import fuse
from ..reference import GhostBottleneck, GhostModule

FLOOR_ULPS = {torch.float32: 32.0, torch.bfloat16: 2.0, torch.float16: 2.0}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
OPERATORS = {"native": "ghost_ops::", "triton": "ghost_ops_triton::", "eager": ""}
Numbers = dict[str, Tensor]


class Engine(NamedTuple):
    """A backend on a device, under an instruction set of the CPU."""

    backend: str
    device: str
    isa: str = ""

    def line(self, what: str, status: str, detail: str, seconds: float = 0) -> dict[str, Any]:
        """The result of a check, as data for JSON. ``status`` is ok, FAILED or skipped."""
        line = {"engine": " ".join(filter(None, self)), "what": what, "status": status}
        return {**line, "detail": detail, "seconds": seconds}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the backend, whatever was requested; the request and the threads are restored."""
        library = backends.native.library() if self.isa else None
        before, threads = library and library.isa(), torch.get_num_threads()
        with backends.use_backend(self.backend), torch.random.fork_rng(devices=[]):
            try:
                if library:
                    library.set_isa(self.isa)
                torch.set_num_threads(1)  # faster for small tensors on a busy machine
                yield
            finally:
                torch.set_num_threads(threads)
                if library:
                    library.set_isa(before)


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


# --- modules and what is measured of them -----------------------------------------------------


def ghost_module() -> nn.Module:
    """A Ghost module with a surplus ghost map.

    Without kinks: next to a kink of ReLU a rounding error changes a gradient.
    """
    module = GhostModule(20, 25, dw_size=3)
    module.primary_conv[2], module.cheap_operation[2] = nn.SiLU(), nn.SiLU()
    return module


def ghost_bottleneck() -> nn.Module:
    """A Ghost bottleneck with a stride and squeeze-and-excitation."""
    return GhostBottleneck(20, 40, 24, 5, 2, se_ratio=0.25)


def evaluate(module: nn.Module, x: Tensor) -> Numbers:
    """The output in eval mode."""
    with torch.no_grad():
        return {"output": module.eval()(x)}


def train(module: nn.Module, x: Tensor) -> Numbers:
    """Output, gradients and running statistics of one step in training mode."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module.train()(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    out.backward(grad.to(out.device, out.dtype))
    found = {"output": out.detach(), "gradient of x": x.grad, **dict(module.named_buffers())}
    return found | {f"gradient of {name}": p.grad for name, p in module.named_parameters()}


def fused(plain: nn.Module, device: str) -> nn.Module:
    """A fused copy of a plain module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks of ``fuse`` run the automatic backend too
        return fuse(copy.deepcopy(plain).to(device))


CASES: dict[str, tuple[tuple[Callable[..., nn.Module], Callable[..., Numbers]], ...]] = {
    "inference": ((ghost_module, evaluate), (ghost_bottleneck, evaluate)),
    "training": ((ghost_module, train),),
    "same bits": ((ghost_module, evaluate), (ghost_module, train)),
}


# --- the checks -------------------------------------------------------------------------------


def run() -> list[dict[str, Any]]:
    """The checks of all backends, as data for JSON."""
    found = []
    for backend, device in itertools.product(OPERATORS, ("cpu", "cuda")):
        try:
            ok, reason = backends.BACKENDS[backend].can_run(device, torch.float32)
            if device == "cuda" and not torch.cuda.is_available():
                ok, reason = False, "torch sees no GPU"
        except (Exception, SystemExit) as error:  # of a broken CUDA or Triton
            ok, reason = False, f"{type(error).__name__}: {error}"
        if not ok:
            found.append(Engine(backend, device).line("all checks", "skipped", reason))
            continue
        is_native_cpu = (backend, device) == ("native", "cpu")
        isas = backends.native.library().available_isas() if is_native_cpu else [""]
        found += [line for isa in isas for line in checks(Engine(backend, device, isa))]
    return found


def checks(engine: Engine) -> Iterator[dict[str, Any]]:
    """The lines of one backend."""
    threads = max(2, torch.get_num_threads())
    for what in CASES:
        if what == "same bits" and engine.backend == "eager":
            continue  # PyTorch does not promise it
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), engine.running():
                # ghost_ops warns where it does not run what was requested.
                warnings.filterwarnings("error", ".*(ghost_ops|unfused)", UserWarning)
                status, detail = "ok", check(engine, what, threads)
        except Exception as error:
            status, detail = "FAILED", f"{type(error).__name__}: {error}"
        yield engine.line(what, status, detail, round(time.perf_counter() - start, 3))


def check(engine: Engine, what: str, threads: int) -> str:
    """One check in two dtypes and two layouts. Returns the detail; raises AssertionError."""
    on_cpu = engine.device == "cpu" and engine.backend != "triton"
    half = torch.bfloat16 if on_cpu else torch.float16
    worst = 0.0
    cases = itertools.product((torch.float32, half), LAYOUTS, CASES[what])
    for dtype, layout, (make, measure) in cases:
        torch.manual_seed(7)
        plain = make().to(dtype)
        for t in (*plain.parameters(), *plain.buffers()):
            if t.dim() == 1:  # batch norms that are not the identity
                nn.init.uniform_(t, 0.5, 1.5)
        x = torch.randn(2, 20, 15, 14).to(dtype).contiguous(memory_format=layout)
        try:
            if what == "same bits":
                same_bits(engine, plain, x, measure, threads)
            else:
                worst = max(worst, compare(engine, plain, x, measure))
        except AssertionError as error:
            raise AssertionError(f"{make.__name__}, {dtype}, {layout}: {error}") from None
    result = f"error {worst:.2f} of the allowed"
    if what == "same bits":
        result = f"two runs with {threads} threads and one with 1 agree"
    return f"float32, {half}; {result}".replace("torch.", "")


def same_bits(
    engine: Engine, plain: nn.Module, x: Tensor, measure: Callable[..., Numbers], threads: int
) -> None:
    """Raise AssertionError if the same input gives other bits."""
    first: Numbers = {}
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        found = measure(fused(plain, engine.device), x.to(engine.device))
        first = first or found
        for name, tensor in found.items():
            a, b = (t.cpu().contiguous().view(-1).view(torch.uint8) for t in (tensor, first[name]))
            if not torch.equal(a, b):
                raise AssertionError(f"{name}: other bits in a run with {count} threads")


def compare(engine: Engine, plain: nn.Module, x: Tensor, measure: Callable[..., Numbers]) -> float:
    """The largest error of the fused form of ``plain``, as a share of the allowed error.

    Raises:
        AssertionError: an error is larger than allowed, the output has another dtype or layout than
            x, or no operator of the backend ran.
    """
    wanted = measure(copy.deepcopy(plain).double(), x.double())
    expected = measure(copy.deepcopy(plain).to(engine.device), x.to(engine.device))
    module = fused(plain, engine.device)
    with Operators() as seen:
        got = measure(module, x.to(engine.device))
    if not any(name.startswith(OPERATORS[engine.backend]) for name in seen.names):
        raise AssertionError("no operator of the backend ran")
    out, like = got["output"], expected["output"]
    if (out.shape, out.dtype, memory_format(out)) != (like.shape, x.dtype, memory_format(x)):
        raise AssertionError("the output has another shape, dtype or layout")
    worst = 0.0
    for name in [name for name, want in wanted.items() if want.is_floating_point()]:
        a, want, b = (t[name].detach().cpu().double() for t in (got, wanted, expected))
        floor = FLOOR_ULPS[x.dtype] * torch.finfo(x.dtype).eps * want.abs().max()
        share = ((a - want).abs().max() / (2 * (b - want).abs().max() + floor)).item()
        if not share <= 1:  # or not a number
            raise AssertionError(f"{name}: {share:.3g} times the allowed error")
        worst = max(worst, share)
    return worst
