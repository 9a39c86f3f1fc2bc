"""Modes of PyTorch that decide which path runs, and double differentiation under them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` traces the caller; then it runs PyTorch's operators only."""
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return False
    return torch.onnx.is_in_onnx_export()


# Dynamo replaces ``is_in_onnx_export()`` by False, in the exporter's strict mode too.
in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast runs convolutions on a device type; None if autocast is off."""
    # torch.is_autocast_enabled raises for the meta device.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager:
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def differentiate(
    formula: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_out: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of a formula, which can be differentiated again; autocast is off.

    Args:
        formula: a function of ``tensors`` in differentiable operators.
        tensors: the arguments of formula.
        needs: for each tensor, whether its gradient is needed. Surplus entries are ignored.
        grad_out: the gradient at the result of formula, in its shape and dtype.

    Returns:
        One gradient for each tensor; None for a gradient that is not needed.
    """
    needs = needs[: len(tensors)]
    # Views as inputs: if one tensor was computed from another, the gradient stops at the view.
    tensors = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
    with _without_autocast(grad_out.device.type):
        out = formula(*tensors)
        inputs = [t for t, need in zip(tensors, needs, strict=True) if need]
        grads = torch.autograd.grad(out, inputs, grad_out, create_graph=True, allow_unused=True)
    found = iter(grads)
    return tuple(next(found) if need else None for need in needs)
