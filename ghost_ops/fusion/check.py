"""Compares the outputs of the fused ops and of a module's own forward, on a float64 copy.

``read`` and the match prove that a module computes the formula; this comparison is a second,
independent check. ``fuse`` runs it once for each module: with random parameters and statistics, in
eval mode at three sizes, and in training mode at one. The model itself is neither run nor changed,
and PyTorch's global random generator is not used.
"""

from __future__ import annotations

import threading
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..sync import NORMS
from .fused import Fused, backends_of
from .guards import Record, Refusal, plain_kind, watchable
from .state import Form, Parts

_TOLERANCE = 1e-9
_SIZES = ((2, 9, 7), (2, 1, 1), (1, 14, 20))  # images, height, width

_LARGE = (1, 66, 70)  # for networks that halve their maps too often for the sizes above

_one_at_a_time = threading.Lock()  # the number of threads is a setting of the process


def compare(kind: type[Fused], module: nn.Module, form: Form, record: Record) -> None:
    """Raise ``Refusal`` if the form and the forward of a module have different outputs.

    Args:
        kind: the fused class for the module.
        form, record: of reading the module.
    """
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the maps are small: threads would wait for each other
        try:
            with torch.device("cpu"):  # the user may have set another default device
                _compare_modes(kind, module, form, record)
        finally:
            torch.set_num_threads(threads)


def _compare_modes(kind: type[Fused], module: nn.Module, form: Form, record: Record) -> None:
    gen = torch.Generator().manual_seed(0)
    copy = _clone(module, gen, {})
    parts = form.bind(copy)
    # The form of a forward that reads ``training`` is valid in eval mode only.
    one_mode = any(name == "training" for one in record.modules for name, _ in one.own)
    errors: list[Exception] = []
    ran = 0
    for training in (False,) if one_mode else (False, True):
        copy.train(training)
        for n, *size in _SIZES[:1] if training else (*_SIZES, _LARGE):
            if size == list(_LARGE[1:]) and ran:
                continue
            shape = (n, parts.first.in_channels, *size)
            x = torch.randn(shape, generator=gen, dtype=torch.float64)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                try:
                    want = copy(x.clone())
                except Exception as error:  # x may be too small for the module's kernels
                    errors.append(error)
                    continue
                with backends.use_backend("auto"), _refused():
                    got = _run(parts, x, () if training else backends_of(kind))
            ran += 1
            if not isinstance(got, str):
                _compare(got, want, "training" if training else "eval")
    if not ran:
        raise Refusal(f"its forward raises {type(errors[0]).__name__}: {errors[0]}")


@contextmanager
def _refused() -> Iterator[None]:
    """Turns an error of the fused ops into a ``Refusal``."""
    try:
        yield
    except Exception as error:
        raise Refusal(f"the fused ops raise {type(error).__name__}: {error}") from error


def _run(parts: Parts, x: Tensor, allowed: tuple[str, ...]) -> Tensor | str:
    """The output by the packed operator of an allowed backend, else by ``parts.run``."""
    backend = "native" if parts.dw_size <= 7 and backends.native.load() else "eager"
    if backend not in allowed:
        return parts.run(x.clone())
    if not watchable(parts.layers) or parts.why_not_packed():
        return parts.run(x.clone())
    operator, arguments = parts.pack(backend)
    return operator(x.clone(), *arguments)


def _compare(got: Tensor, want: Any, mode: str) -> None:
    if not isinstance(want, Tensor):
        raise Refusal(f"its forward gives a {type(want).__name__}, not a tensor")
    if got.shape != want.shape:
        raise Refusal(
            f"its forward gives {list(want.shape)} where the formula gives {list(got.shape)}"
        )
    error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-3)
    if not error <= _TOLERANCE:
        raise Refusal(
            f"its forward computes something else in {mode} mode: it differs from the formula by "
            f"{error:.1e} of the largest value, for random parameters in float64"
        )


def _clone(module: nn.Module, gen: torch.Generator, memo: dict[int, Any]) -> Any:
    """A copy on the CPU in float64, unfused, with random parameters and buffers, and no hooks."""
    if id(module) in memo:
        return memo[id(module)]
    kind = plain_kind(module)
    if kind in NORMS:  # not a subclass, which may compute something else
        kind = nn.BatchNorm2d  # SyncBatchNorm would wait for processes that do not run this check
    copy = memo[id(module)] = object.__new__(kind)
    copy.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            copy.__dict__[name] = types.MethodType(value.__func__, copy)
        elif isinstance(value, Tensor):
            copy.__dict__[name] = _random(value, True, gen, memo)
        elif name.endswith("_hooks") or "_hooks_" in name:
            copy.__dict__[name] = OrderedDict()
    for group in ("_parameters", "_buffers"):
        copy.__dict__[group] = {
            name: _random(t, group == "_buffers", gen, memo)
            for name, t in module.__dict__[group].items()
        }
    copy.__dict__["_modules"] = {
        name: child if child is None else _clone(child, gen, memo)
        for name, child in module._modules.items()
    }
    return copy


def _random(t: Tensor | None, positive: bool, gen: torch.Generator, memo: dict[int, Any]) -> Any:
    if t is None or id(t) in memo:
        return None if t is None else memo[id(t)]
    if not t.is_floating_point():
        made = torch.zeros(t.shape, dtype=t.dtype)
    elif t.dim() < 2 or positive:
        made = torch.rand(t.shape, generator=gen, dtype=torch.float64) + 0.5
    else:
        scale = max(t.numel() // max(t.size(0), 1), 1) ** -0.5
        made = torch.randn(t.shape, generator=gen, dtype=torch.float64) * scale
    memo[id(t)] = made
    return made
