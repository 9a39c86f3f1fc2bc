"""Times fused modules against their plain forms, on the inputs that they have in a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .fused import Fused, attach, detach, plain_forward

_ROUNDS = 7
_SHORTEST = 3e-4  # least seconds of a round
_SLACK = 1.05  # largest allowed ratio of the fused time to the plain time


def slower(
    model: nn.Module, modules: Mapping[str, Fused], made: Sequence[Fused], example: Tensor
) -> dict[str, tuple[float, float]]:
    """Unfuse the modules whose fused form is slower than their plain form.

    The model runs once, unfused, in eval mode without gradients. Then each module is timed, inner
    modules before outer ones, so that an outer module is timed with the final form of its children.

    Args:
        modules: fused modules by name, outer ones before those inside of them.
        made: all modules of the model whose class ``fused_class`` made.
        example: the model's input, on its device.

    Returns:
        For each restored module, by name, the seconds of a fused and of a plain call.
    """
    restored = {}
    with _in_eval_mode(model), torch.no_grad():
        inputs = _inputs(model, modules, made, example)
        for name, module in reversed(list(modules.items())):
            x = inputs.get(name)
            if x is None:
                continue  # the model's forward does not call the module
            fused, plain = _compare(module, x)
            if fused > plain * _SLACK:
                detach(module)
                restored[name] = fused, plain
    return restored


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _inputs(
    model: nn.Module, modules: Mapping[str, Fused], made: Sequence[Fused], example: Tensor
) -> dict[str, Tensor]:
    """The argument of each module's first call with one tensor, in a run of the unfused model."""
    seen: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                seen.setdefault(name, args[0].detach())

        return hook

    classes = [(m, type(m)) for m in made]
    for m in made:
        detach(m)
    handles = [m.register_forward_pre_hook(recorder(name)) for name, m in modules.items()]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
        for m, kind in classes:
            m.__class__ = kind
            attach(m)
    return seen


def _compare(module: Fused, x: Tensor) -> tuple[float, float]:
    """Median seconds of a fused and of a plain call, measured in turn after two calls of each."""
    calls: tuple[Callable[..., Any], ...] = (module.forward, plain_forward(module))
    warm = [_seconds(call, x, 1) for call in (*calls, *calls)]
    count = max(1, round(_SHORTEST / max(*warm[2:], 1e-6)))
    rounds = [[_seconds(call, x, count) for call in calls] for _ in range(_ROUNDS)]
    first, second = (statistics.median(times) for times in zip(*rounds, strict=True))
    return first, second


def _seconds(call: Callable[..., Any], x: Tensor, count: int) -> float:
    _wait(x)
    start = time.perf_counter()
    for _ in range(count):
        call(x)
    _wait(x)
    return (time.perf_counter() - start) / count


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
