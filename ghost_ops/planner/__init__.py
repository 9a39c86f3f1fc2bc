"""Tile plans of the kernels, and the bytes that the kernels move through memory.

``csrc/core/plan.cpp`` (CPU) and ``csrc/core/cuda_plan.cpp`` (CUDA) compute the plans, both for the
kernels and for this package. ``explain`` takes the shape of a Ghost module's input;
``explain_module`` takes a module and the shape of its input::

    >>> print(ghost_ops.planner.explain((16, 40, 28, 28), out_channels=240))
    >>> print(ghost_ops.planner.explain((256, 40, 28, 28), 240, device="sm_90",
    ...                                 dtype=torch.float16, channels_last=True))

A CUDA plan needs no GPU: it follows from the architecture's name. For a whole model ``explain``
lists every operator of its fused form on a GPU, next to eager PyTorch's::

    >>> print(ghost_ops.planner.explain(ghost_ops.models.ghostnet(), (256, 3, 224, 224)))

``explain_saved`` lists the tensors that a training step saves for backward, and the work that
backward does again::

    >>> print(ghost_ops.planner.explain_saved(ghost_ops.models.ghostnet(), (16, 3, 224, 224)))

``module`` imports ``machine`` and ``plans``; ``network`` imports ``machine``, ``trace`` and
``costs``; ``saved`` imports no other file of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import nn

from .. import activations
from .machine import CUDA_DEVICES, CpuMachine, compute_capability, cpu_machine
from .module import explain_module, explain_shape
from .network import NetworkPlan, NetworkRow, explain_network
from .plans import CudaBackward, CudaPass, CudaPlan, Plan
from .saved import SavedPlan, SavedRow, explain_saved

__all__ = [
    "CUDA_DEVICES",
    "CpuMachine",
    "CudaBackward",
    "CudaPass",
    "CudaPlan",
    "NetworkPlan",
    "NetworkRow",
    "Plan",
    "SavedPlan",
    "SavedRow",
    "compute_capability",
    "cpu_machine",
    "explain",
    "explain_module",
    "explain_network",
    "explain_saved",
    "explain_shape",
]


@overload
def explain(
    shape: Sequence[int],
    out_channels: int,
    *,
    ratio: int = 2,
    dw_size: int = 3,
    stride: int = 1,
    activation: activations.ActivationSpec = "relu",
    cheap_activation: activations.ActivationSpec | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    residual: bool = False,
    threads: int | None = None,
    machine: CpuMachine | None = None,
    device: str = "cpu",
    training: bool = False,
    alternatives: int = 0,
) -> Plan | CudaPlan: ...


@overload
def explain(
    model: nn.Module,
    input_shape: Sequence[int],
    device: str = "sm_90",
    dtype: torch.dtype = torch.float16,
    *,
    channels_last: bool = True,
    training: bool = False,
) -> NetworkPlan: ...


def explain(*args: Any, **kwargs: Any) -> Plan | CudaPlan | NetworkPlan:
    """The plan of a Ghost module by its shape, or of a whole model.

    ``explain(shape, out_channels, *, ...)`` is :func:`explain_shape`: the tile plan of one Ghost
    module, for the CPU by default. ``explain(model, input_shape, device, dtype, *, ...)`` is
    :func:`ghost_ops.planner.network.explain_network`: every operator of the fused model on a GPU.

    Returns:
        A :class:`Plan` (CPU) or :class:`CudaPlan` (GPU) for a shape, a :class:`NetworkPlan` for a
        model.

    Raises:
        TypeError: an argument belongs to the other form, such as ``ratio`` for a model.
        ValueError, RuntimeError: as :func:`explain_shape` or :func:`explain_network`.
    """
    if isinstance(args[0] if args else kwargs.get("model"), nn.Module):
        return explain_network(*args, **kwargs)
    return explain_shape(*args, **kwargs)
