"""The plan of one Ghost module: checks the arguments and calls the planner of the library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .. import activations, arguments, backends, environment
from ..conventions import DTYPES
from ..ops.ghost import allow_tf32
from ..reference import GhostModule
from .machine import CpuMachine, compute_capability, cpu_machine
from .plans import CudaBackward, CudaPass, CudaPlan, Plan


def explain_shape(
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
) -> Plan | CudaPlan:
    """The plan for an input of ``shape`` [N, C, H, W] and a 1x1 primary convolution.

    Args:
        shape: N, C, H, W of x.
        out_channels: channels of the output.
        ratio, dw_size, stride: as in :class:`ghost_ops.FusedGhostModule`.
        activation, cheap_activation: of the primary and the cheap branch; cheap_activation None:
            the same as activation.
        dtype: of x: float32, float64, bfloat16 or float16.
        channels_last: memory format of x.
        residual: a residual is added to the output.
        threads: size of the CPU's thread pool; None: ``torch.get_num_threads()``.
        machine: the CPU to plan for; None: this machine, see :func:`cpu_machine`.
        device: ``"cpu"``; one of ``CUDA_DEVICES``; ``"cuda"``, the architecture of the current GPU.
            On a GPU torch's TF32 switch decides whether float32 products use TF32.
        training: plan a training forward and its backward instead of an evaluation pass. GPU only.
        alternatives: for each launch of a forward, list this number of best plans. GPU only. Plans
            whose times differ by less than a thousandth keep the order of the search.

    Returns:
        A :class:`Plan` for the CPU, a :class:`CudaPlan` for a GPU.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.
        RuntimeError: the native library is not loaded; the message says why.
    """
    dims = arguments.image_shape("shape", shape, least=0)
    out_channels = arguments.integer("out_channels", out_channels)
    ratio, stride = arguments.integer("ratio", ratio), arguments.integer("stride", stride)
    if arguments.integer("dw_size", dw_size) not in (1, 3, 5, 7):
        raise ValueError(f"dw_size must be 1, 3, 5 or 7, got {dw_size}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    sm = compute_capability(device)
    if arguments.integer("alternatives", alternatives, least=0) and sm is None:
        raise ValueError("alternatives: only plans for a GPU have any, device is 'cpu'")
    if training and sm is None:
        raise ValueError("training: only the passes on a GPU are planned, device is 'cpu'")
    if sm is not None and (min(dims) < 1):
        raise ValueError(f"shape must have no empty size for a GPU plan, got {dims}")
    if machine is not None and (threads is not None or sm is not None):
        raise ValueError("machine goes with device 'cpu' and without threads: it has its own cores")
    if not isinstance(machine, (CpuMachine, type(None))):
        raise TypeError(f"machine must be a CpuMachine, got {type(machine).__name__}: {machine!r}")
    library = backends.native.library()
    machine = cpu_machine(threads) if machine is None else machine
    act1, _ = activations.resolve(activation)
    cheap = activation if cheap_activation is None else cheap_activation
    act2, _ = activations.resolve(cheap, "cheap_activation")
    problem: dict[str, Any] = {
        "intrinsic": math.ceil(out_channels / ratio),
        "out_channels": out_channels,
        "ratio": ratio,
        "dw_size": dw_size,
        "stride": stride,
        "act1": act1,
        "act2": act2,
        "dtype": DTYPES.index(dtype),
        "channels_last": channels_last,
        "has_residual": residual,
    }
    fields = library.plan(*dims, **problem, **asdict(machine))
    if sm is None:
        return Plan(**fields, machine=machine)
    environment.CUDA_PLAN.get()  # raises if the value is not allowed; the library reads it again
    found = library.cuda_plan(
        *dims,
        **problem,
        sm=sm,
        allow_tf32=allow_tf32(),
        training=training,
        alternatives=alternatives,
    )
    return CudaPlan(
        f"sm_{sm}",
        tuple(_pass(one) for one in found["passes"]),
        found["writes_u"],
        fields["bytes_fused"],
        fields["bytes_eager"],
        fields["flops"],
        backward=_backward(found["backward"]),
    )


def _pass(found: dict[str, Any]) -> CudaPass:
    ranked = tuple(CudaPass(**one) for one in found.pop("alternatives"))
    return CudaPass(**found, alternatives=ranked)


def _backward(found: dict[str, Any] | None) -> CudaBackward | None:
    if found is None:
        return None
    sums = found.pop("sums")
    return CudaBackward(sums=None if sums is None else CudaPass(**sums), **found)


def explain_module(module: GhostModule, shape: Sequence[int], **kwargs: Any) -> Plan | CudaPlan:
    """The plan for a Ghost module on an input of ``shape``.

    Args:
        module: a fused or reference Ghost module.
        shape: N, C, H, W of x.
        kwargs: arguments of :func:`explain_shape` that the module does not determine.

    Returns:
        As :func:`explain_shape`.

    Raises:
        TypeError: module is no Ghost module; or as :func:`explain_shape`.
        ValueError: the primary convolution is not a plain 1x1; or as :func:`explain_shape`.
        RuntimeError: as :func:`explain_shape`.
    """
    if not isinstance(module, GhostModule):
        raise TypeError(f"module must be a GhostModule, got {type(module).__name__}")
    conv: Any = module.primary_conv[0]
    cheap: Any = module.cheap_operation[0]
    if conv.kernel_size != (1, 1) or conv.groups != 1:
        raise ValueError(f"module: only a plain 1x1 primary convolution is planned, got {conv}")
    kwargs.setdefault("dtype", conv.weight.dtype)
    return explain_shape(
        shape,
        module.oup,
        ratio=cheap.out_channels // conv.out_channels + 1,
        dw_size=cheap.kernel_size[0],
        stride=conv.stride[0],
        activation=module.primary_conv[2],
        cheap_activation=module.cheap_operation[2],
        **kwargs,
    )
