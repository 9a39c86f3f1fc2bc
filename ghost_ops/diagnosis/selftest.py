"""Short checks of every backend of this machine against the float64 reference.

Rule of a number: |got - want| <= 2 |plain - want| + floor, in the largest element. ``want`` is the
reference in float64, ``plain`` the reference in the dtype of the check, the floor some ulp of the
largest value. Rule of determinism: the same input gives the same bits, in a second run and on one
thread.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..conventions import memory_format
from ..nn import FusedGhostBottleneck, FusedGhostModule
from ..reference import GhostBottleneck, GhostModule

FLOOR_ULPS = {torch.float32: 32.0, torch.bfloat16: 2.0, torch.float16: 2.0}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Numbers = dict[str, Tensor]


@dataclass
class Check:
    """One line of the self-test. ``status`` is ok, FAILED or skipped; ``detail`` says why."""

    engine: str
    what: str
    status: str
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Engine:
    """A backend on a device, under an instruction set of the CPU."""

    backend: str
    device: str
    isa: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.backend, self.device, self.isa)))

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        on_cpu = self.device == "cpu" and self.backend != "triton"
        return torch.float32, torch.bfloat16 if on_cpu else torch.float16

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


def run() -> list[dict[str, Any]]:
    """The checks of all backends, as data for JSON."""
    found: list[Check] = []
    for backend in ("eager", "native", "triton"):
        for device in ("cpu", "cuda"):
            if (reason := _why_not(backend, device)) is not None:
                found.append(Check(f"{backend} {device}", "all checks", "skipped", reason))
                continue
            is_native_cpu = (backend, device) == ("native", "cpu")
            isas = backends.native.library().available_isas() if is_native_cpu else [""]
            for isa in isas:
                found += checks(Engine(backend, device, isa))
    return [asdict(check) for check in found]


def _why_not(backend: str, device: str) -> str | None:
    """Why a backend cannot run on a device of this machine; None if it can."""
    try:
        if device == "cuda" and not torch.cuda.is_available():
            return "torch sees no GPU"
        ok, reason = backends.BACKENDS[backend].can_run(device, torch.float32)
        return None if ok else reason
    except (Exception, SystemExit) as error:  # of a broken CUDA or Triton
        return f"{type(error).__name__}: {error}"


def checks(engine: Engine) -> Iterator[Check]:
    """The checks of one backend."""
    yield _checked(engine, "inference", inference)
    yield _checked(engine, "training", training)
    if engine.backend != "eager":  # PyTorch does not promise it
        threads = max(2, torch.get_num_threads())
        yield _checked(engine, "same bits", lambda engine: same_bits(engine, threads))


def _checked(engine: Engine, what: str, check: Callable[[Engine], str]) -> Check:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), engine.running():
            # ghost_ops warns where it does not run what was requested.
            warnings.filterwarnings("error", message=".*(ghost_ops|unfused)", category=UserWarning)
            status, detail = "ok", check(engine)
    except Exception as error:
        status, detail = "FAILED", f"{type(error).__name__}: {error}"
    return Check(str(engine), what, status, detail, round(time.perf_counter() - start, 3))


# --- the checks -------------------------------------------------------------------------------


def inference(engine: Engine) -> str:
    """A Ghost module and a Ghost bottleneck in eval mode."""
    worst = 0.0
    for dtype in engine.dtypes:
        for layout in LAYOUTS:
            for make in (ghost_module, ghost_bottleneck):
                plain = make(dtype)
                x = image(plain, dtype, layout)
                share = compare(engine, plain, x, evaluate, f"{make.__name__}, {layout}")
                worst = max(worst, share)
    return summary(engine, worst)


def training(engine: Engine) -> str:
    """Output, gradients and running statistics of a Ghost module in training mode."""
    worst = 0.0
    for dtype in engine.dtypes:
        for layout in LAYOUTS:
            # Without kinks: next to a kink of ReLU a rounding error changes a gradient.
            plain = ghost_module(dtype, nn.SiLU)
            worst = max(worst, compare(engine, plain, image(plain, dtype, layout), train, layout))
    return summary(engine, worst)


def same_bits(engine: Engine, threads: int) -> str:
    """The same input twice; on a CPU also on one thread and on several."""
    counts = (threads, threads, 1) if engine.device == "cpu" else (threads, threads)
    for dtype, layout in zip(engine.dtypes, LAYOUTS, strict=True):
        model = ghost_module(dtype, nn.SiLU)
        x = image(model, dtype, layout).to(engine.device)
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(
                {
                    **evaluate(fused(model).to(engine.device), x),
                    **{
                        f"training {k}": t
                        for k, t in train(fused(model).to(engine.device), x).items()
                    },
                }
            )
        for count, result in zip(counts, results, strict=True):
            for name, tensor in result.items():
                if not torch.equal(bits(tensor), bits(results[0][name])):
                    raise AssertionError(
                        f"{name} in {dtype}, {layout}: other bits with {count} threads than "
                        f"in the first run with {threads}"
                    )
    if engine.device == "cpu":
        return f"two runs with {threads} threads and one with 1 agree"
    return "two runs agree"


def summary(engine: Engine, worst: float) -> str:
    """The detail of a check that passed."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in engine.dtypes)
    return f"{dtypes}, {len(LAYOUTS)} layouts; error {worst:.2f} of the allowed"


def compare(
    engine: Engine, plain: nn.Module, x: Tensor, measure: Callable[..., Numbers], what: str
) -> float:
    """The largest error of the fused form of ``plain``, as a share of the allowed error.

    Raises:
        AssertionError: an error is larger than allowed, the output has another dtype or layout than
            x, or no operator of the backend ran.
    """
    wanted = measure(copy.deepcopy(plain).double(), x.double())
    device = torch.device(engine.device)
    expected = measure(copy.deepcopy(plain).to(device), x.to(device))
    with Operators() as seen:
        got = measure(fused(plain).to(device), x.to(device))
    own = {"native": "ghost_ops::", "triton": "ghost_ops_triton::"}.get(engine.backend, "")
    if not any(name.startswith(own) for name in seen.names):
        raise AssertionError(f"{what} in {x.dtype}: no operator of the backend ran")
    if got["output"].dtype != x.dtype or memory_format(got["output"]) != memory_format(x):
        raise AssertionError(f"{what} in {x.dtype}: the output has another dtype or layout")
    shares = {}
    for name, want in wanted.items():
        if not want.is_floating_point():
            continue
        a, b = (t.detach().cpu().double() for t in (got[name], expected[name]))
        shares[name] = share_of_allowed(a, want.detach(), b, x.dtype)
    name = max(shares, key=lambda name: shares[name])
    if not shares[name] <= 1:
        raise AssertionError(
            f"{name} of {what} in {x.dtype}: {shares[name]:.3g} times the allowed error"
        )
    return shares[name]


def share_of_allowed(got: Tensor, want: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """The error of ``got`` divided by the allowed error; infinite if a value is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    floor = FLOOR_ULPS[dtype] * torch.finfo(dtype).eps * want.abs().max().item()
    allowed = 2 * (plain - want).abs().max().item() + floor
    return (got - want).abs().max().item() / allowed


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


# --- modules and what is measured of them -----------------------------------------------------


def ghost_module(dtype: torch.dtype, activation: type[nn.Module] | None = None) -> GhostModule:
    """A seeded Ghost module with a surplus ghost map; ReLU, or another activation."""
    module = filled(GhostModule(20, 25, dw_size=3))
    if activation is not None:
        module.primary_conv[2], module.cheap_operation[2] = activation(), activation()
    return module.to(dtype)


def ghost_bottleneck(dtype: torch.dtype) -> GhostBottleneck:
    """A seeded Ghost bottleneck with a stride and squeeze-and-excitation."""
    return filled(GhostBottleneck(20, 40, 24, 5, 2, se_ratio=0.25)).to(dtype)


def filled(module: Any) -> Any:
    """The module with seeded weights and batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.dim() > 1:
                t.normal_(0, t[0].numel() ** -0.5, generator=generator)
            elif name.endswith(("running_var", ".weight")):
                t.uniform_(0.5, 1.5, generator=generator)
            elif t.is_floating_point():
                t.normal_(0, 0.3, generator=generator)
    return module


def image(module: nn.Module, dtype: torch.dtype, layout: str) -> Tensor:
    """A seeded x [2, 20, 15, 14]."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 20, 15, 14, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def fused(plain: nn.Module) -> nn.Module:
    """A fused copy of a plain module."""
    copied = copy.deepcopy(plain)
    if isinstance(copied, GhostModule):
        return FusedGhostModule.from_reference(copied)
    module = FusedGhostBottleneck(20, 40, 24, 5, 2, se_ratio=0.25)
    module.load_state_dict(copied.state_dict())
    return module.to(next(copied.parameters()).dtype)


def evaluate(module: nn.Module, x: Tensor) -> Numbers:
    """The output in eval mode."""
    with torch.no_grad():
        return {"output": module.eval()(x)}


def train(module: nn.Module, x: Tensor) -> Numbers:
    """Output, gradients and running statistics of one step in training mode."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module.train()(x)
    generator = torch.Generator().manual_seed(13)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(grad.to(out.device, out.dtype))
    found = {"output": out.detach(), "gradient of x": x.grad, **dict(module.named_buffers())}
    return found | {f"gradient of {name}": p.grad for name, p in module.named_parameters()}


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor, in a fixed order."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
