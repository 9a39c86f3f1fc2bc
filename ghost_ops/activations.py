"""The activations that can follow each batch norm: codes, names, formulas, gradients.

The operators take the code of an activation and, for leaky ReLU, its slope. The modules take a name
or an ``nn.Module``, from which ``resolve`` derives code and slope.

====  ============  =============================================  ==========================
code  name          formula                                        module
====  ============  =============================================  ==========================
0     none          x                                              Identity, empty Sequential
1     relu          max(x, 0)                                      ReLU
2     relu6         min(max(x, 0), 6)                              ReLU6
3     leaky_relu    x if x > 0 else slope * x                      LeakyReLU
4     silu          x * sigmoid(x)                                 SiLU
5     hardswish     x * relu6(x + 3) / 6                           Hardswish
6     gelu          x * Phi(x)                                     GELU
7     gelu_tanh     GELU's tanh approximation                      GELU(approximate="tanh")
8     prelu         x if x > 0 else slope[channel] * x             PReLU
====  ============  =============================================  ==========================

The slopes of a PReLU are a parameter of its module: one per channel, or one for all channels. They
are packed with the weights in inference, and are an argument of the operators in training. Only
Ghost modules support PReLU; ``resolve`` covers the activations without parameters.

Every activation propagates NaN, as in PyTorch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CODES", "DEFAULT_SLOPE", "NAMES", "ActivationSpec", "apply", "hard_sigmoid", "resolve"]

NONE, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, GELU, GELU_TANH, PRELU = range(9)

NAMES = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh")
"""The names of the activations without parameters, in the order of their codes."""
CODES = {name: code for code, name in enumerate(NAMES)}
"""The code of each name in ``NAMES``."""
DEFAULT_SLOPE = 0.01
"""The slope of a leaky ReLU that is given by its name."""
ActivationSpec = str | nn.Module
"""An activation as an argument: a name, or a module of a type in the table."""

_aten = torch.ops.aten


def hard_sigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) / 6, elementwise: the function of a gate, not an activation of the table."""
    return F.relu6(x + 3.0) / 6.0


def resolve(
    activation: ActivationSpec, name: str = "activation", names: tuple[str, ...] = NAMES
) -> tuple[int, float]:
    """The code and slope of an activation given by name or as a module.

    Args:
        activation: one of ``NAMES``, or a module of one of the types in the table above.
        name: the argument's name, for the error message.
        names: the names that the error message lists.

    Returns:
        ``(code, slope)``; the slope is that of a ``LeakyReLU`` module, else ``DEFAULT_SLOPE``.

    Raises:
        ValueError: the table has no such name or type of module, or it is the PReLU.
        TypeError: activation is neither a string nor a module.
    """
    if isinstance(activation, str):
        code = CODES.get(activation)
        if code is None:
            raise ValueError(f"{name} must be one of {', '.join(names)}, got {activation!r}")
        return code, DEFAULT_SLOPE
    if not isinstance(activation, nn.Module):
        raise TypeError(
            f"{name} must be a str or an nn.Module, got {type(activation).__name__}: {activation!r}"
        )
    found = of_module(activation)
    if found is None:
        raise ValueError(
            f"{name} must be nn.Identity, an empty nn.Sequential, nn.ReLU, nn.ReLU6, nn.LeakyReLU, "
            f"nn.SiLU, nn.Hardswish or nn.GELU, got {activation!r}"
        )
    return found


def of_module(module: nn.Module) -> tuple[int, float] | None:
    """The code and slope of an activation module; None for a PReLU or a type not in the table.

    The type must match exactly, because a subclass may compute something else.
    """
    kind = type(module)
    if kind is nn.ReLU:
        return RELU, DEFAULT_SLOPE
    if kind is nn.Identity or (kind is nn.Sequential and len(module) == 0):  # type: ignore[arg-type]
        return NONE, DEFAULT_SLOPE
    if kind is nn.SiLU:
        return SILU, DEFAULT_SLOPE
    if kind is nn.ReLU6:
        return RELU6, DEFAULT_SLOPE
    if kind is nn.LeakyReLU:
        return LEAKY_RELU, float(module.negative_slope)  # type: ignore[arg-type]
    if kind is nn.Hardswish:
        return HARDSWISH, DEFAULT_SLOPE
    if kind is nn.GELU:
        return (GELU_TANH if module.approximate == "tanh" else GELU), DEFAULT_SLOPE
    return None


def slopes_of(module: nn.Module | None, channels: int) -> Tensor | None:
    """The slopes [channels] of a PReLU, a view of its parameter; None for any other module.

    Raises:
        RuntimeError: the PReLU has neither one slope nor one slope per channel.
    """
    if type(module) is not nn.PReLU:
        return None
    weight = module.weight
    if weight.dim() != 1 or weight.numel() not in (1, channels):
        raise RuntimeError(
            f"a PReLU behind {channels} channels must have a weight of shape [1] or [{channels}], "
            f"got {list(weight.shape)}"
        )
    return weight.expand(channels)


def make_module(
    activation: ActivationSpec,
    name: str = "activation",
    channels: int = 1,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A new module for an activation. A given module is copied, so that branches share no module.

    Args:
        activation: a name of the table above, or a module of one of its types.
        name: the argument's name, for error messages.
        channels: number of slopes of a new ``"prelu"``, each 0.25 as in PyTorch.
        device, dtype: of the slopes of a PReLU; None: PyTorch's defaults for a new PReLU, no change
            for a copy.

    Returns:
        The module; ReLU, ReLU6, LeakyReLU, SiLU and Hardswish made from a name work in place.

    Raises:
        ValueError, TypeError: as ``resolve``.
    """
    if activation == "prelu":
        return nn.PReLU(channels, device=device, dtype=dtype)
    if type(activation) is nn.PReLU:
        return copy.deepcopy(activation).to(device=device, dtype=dtype)
    code, _ = resolve(activation, name, (*NAMES, "prelu"))
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    if code == RELU:
        return nn.ReLU(inplace=True)
    if code == RELU6:
        return nn.ReLU6(inplace=True)
    if code == LEAKY_RELU:
        return nn.LeakyReLU(DEFAULT_SLOPE, inplace=True)
    if code == SILU:
        return nn.SiLU(inplace=True)
    if code == HARDSWISH:
        return nn.Hardswish(inplace=True)
    if code in (GELU, GELU_TANH):
        return nn.GELU("tanh" if code == GELU_TANH else "none")
    return nn.Sequential()


def apply(
    x: Tensor, code: int, slope: float, inplace: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """act(x), differentiable twice.

    Args:
        x: of any shape and floating-point dtype; for a PReLU, dimension 1 is the channels.
        code, slope: as ``resolve`` returns them.
        inplace: x may be overwritten.
        slopes: [x.size(1)], for a PReLU.

    Returns:
        A tensor like x.

    Raises:
        RuntimeError: a PReLU without slopes.
        ValueError: there is no such code.
    """
    if code == NONE:
        return x
    if code == PRELU:
        if slopes is None:
            raise RuntimeError("a PReLU needs its slopes")
        return F.prelu(x, slopes.to(x.dtype)) if slopes.numel() else x
    if code == RELU:
        return F.relu(x, inplace)
    if code == RELU6:
        return F.relu6(x, inplace)
    if code == LEAKY_RELU:
        return F.leaky_relu(x, slope, inplace)
    if code == SILU:
        return F.silu(x, inplace)
    if code == HARDSWISH:
        return F.hardswish(x, inplace)
    if code in (GELU, GELU_TANH):
        return F.gelu(x, approximate="tanh" if code == GELU_TANH else "none")
    raise ValueError(f"code must be from {NONE} to {PRELU}, as in the table, got {code!r}")


def backward(
    grad: Tensor, x: Tensor, code: int, slope: float, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of ``apply``; not differentiable.

    Args:
        grad: gradient at the output, of the shape of x.
        x: the input of the activation.
        code, slope, slopes: as in ``apply``.

    Returns:
        (grad * act'(x), slope values). For a PReLU the sum of the slope values of a channel is the
        gradient of its slope; for any other activation they are None.

    Raises:
        RuntimeError: a PReLU without slopes.
    """
    if code == NONE:
        return grad, None
    if code == PRELU:
        if slopes is None:
            raise RuntimeError("a PReLU needs its slopes")
        return _aten._prelu_kernel_backward.default(grad, x, slopes.to(x.dtype).view(-1, 1, 1))
    if code == RELU:
        return _aten.threshold_backward.default(grad, x, 0), None
    if code == RELU6:
        return _aten.hardtanh_backward.default(grad, x, 0.0, 6.0), None
    if code == LEAKY_RELU:
        return _aten.leaky_relu_backward.default(grad, x, slope, False), None
    if code == SILU:
        return _aten.silu_backward.default(grad, x), None
    if code == HARDSWISH:
        return _aten.hardswish_backward.default(grad, x), None
    approximate = "tanh" if code == GELU_TANH else "none"
    return _aten.gelu_backward.default(grad, x, approximate=approximate), None
