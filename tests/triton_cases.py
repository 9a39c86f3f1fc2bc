"""Where the Triton kernels run in tests: on a GPU, or without one in Triton's interpreter.

The same tests run in both places. conftest.py sets TRITON_INTERPRET=1 where there is no GPU; then
one program after the other is executed with NumPy, on CPU tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import ghost_ops
from ghost_ops.backends import triton
from ghost_ops.backends.triton import plan, tuning

INTERPRETER = "interpreter"


@contextlib.contextmanager
def running_triton(where: str) -> Iterator[str]:
    """Force the backend, and give the device of tensors; skips where it cannot run."""
    if where == INTERPRETER and torch.cuda.is_available():
        pytest.skip("there is a GPU: the kernels are compiled, and run there")
    device = "cpu" if where == INTERPRETER else "cuda"
    ok, reason = triton.can_run(device, torch.float32)
    if not ok:
        pytest.skip(reason)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # the rule of errors is float32's
    try:
        with ghost_ops.use_backend("triton"), quickened(where == INTERPRETER):
            yield device
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def quickened(interpreting: bool) -> Iterator[None]:
    """Halve the interpreter's time.

    It checks each integer sum for overflow, by three more operations; and it patches
    triton.language again at each call of a helper function.
    """
    if not interpreting:
        yield
        return
    from triton.runtime import interpreter

    kind = interpreter.InterpretedFunction
    patched_call = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("ghost_ops."):
            return self.rewrite()(*args, **kwargs)
        return patched_call(self, *args, **kwargs)

    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    with mock.patch.object(kind, "__call__", call), mock.patch.object(builder, "options", options):
        yield


@contextlib.contextmanager
def planned(
    *, tile: plan.Tile | None = None, one_pass: bool | None = None, wide: bool = False
) -> Iterator[None]:
    """Run with a given tile, with one pass or two launches, with 64-bit offsets."""
    from ghost_ops.backends.triton import backward, forward

    def passes(p: plan.Problem, *args: Any, **kwargs: Any) -> Any:
        found = plan.passes(p, *args, **kwargs)
        possible = p.g > 0 and not kwargs.get("epilogue", False)
        return mock.Mock(one_pass=found.one_pass if one_pass is None else one_pass and possible)

    tuning.forget()
    with contextlib.ExitStack() as stack:
        if tile is not None:
            stack.enter_context(mock.patch.object(plan, "default_tile", lambda *_: tile))
        for module in (forward, backward):
            stack.enter_context(mock.patch.object(module, "passes", passes))
        if wide:
            stack.enter_context(mock.patch.object(plan.Problem, "wide", True))
        try:
            yield
        finally:
            tuning.forget()


# Many programs, channel blocks, tiles in a program and steps of the product, on a small shape.
SMALL_TILE = plan.Tile(pixels=16, channels=16, depth=16, warps=4, stages=2)


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside, in their order."""
    from triton.runtime import interpreter, jit

    names: list[str] = []
    executor, compiled = interpreter.GridExecutor, jit.JITFunction
    interpret, run = executor.__call__, compiled.run

    def interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return interpret(self, *args, **kwargs)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup", False):
            names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with (
        mock.patch.object(executor, "__call__", interpreted),
        mock.patch.object(compiled, "run", counted),
    ):
        yield names


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """In the interpreter: the programs of a launch run in another order."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    @functools.cache
    def order(count: int) -> list[int]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed + count)).tolist()

    def shuffled(x: int, y: int, z: int) -> None:
        set_grid_idx(order(builder.grid_dim[0])[x], y, z)

    with mock.patch.object(builder, "set_grid_idx", shuffled):
        yield
