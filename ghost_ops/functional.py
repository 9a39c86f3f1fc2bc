"""The Ghost module as a function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import activations, arguments
from .activations import ActivationSpec
from .autograd.forward import RunningUpdate
from .autograd.ghost import run
from .conventions import DTYPES, compute_dtype
from .formula import BATCH, FROZEN, Norms, Settings, Slopes, Statistics
from .modes import autocast_dtype

__all__ = ["ghost_module"]

_WIDE = {dtype: compute_dtype(dtype) for dtype in DTYPES}

IntPair = int | tuple[int, int]
FloatPair = float | tuple[float, float]


def ghost_module(
    x: Tensor,
    primary_weight: Tensor | None,
    cheap_weight: Tensor,
    *,
    primary_bn_weight: Tensor | None = None,
    primary_bn_bias: Tensor | None = None,
    primary_running_mean: Tensor | None = None,
    primary_running_var: Tensor | None = None,
    cheap_bn_weight: Tensor | None = None,
    cheap_bn_bias: Tensor | None = None,
    cheap_running_mean: Tensor | None = None,
    cheap_running_var: Tensor | None = None,
    out_channels: int | None = None,
    training: bool = False,
    momentum: FloatPair = 0.1,
    eps: FloatPair = 1e-5,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: ActivationSpec = "relu",
    cheap_activation: ActivationSpec | None = None,
    activation_weight: Tensor | None = None,
    cheap_activation_weight: Tensor | None = None,
) -> Tensor:
    """The Ghost module on given tensors; updates running statistics in place as ``F.batch_norm``.

    ::

        u   = conv(x, primary_weight)         C -> m channels
        y   = activation(bn1(u))
        v   = depthwise(y, cheap_weight)      groups m, zero padding d // 2; ghost channel
                                              i * (ratio - 1) + j reads intrinsic map i
        z   = cheap_activation(bn2(v))
        out = concat(y, z)[:, :out_channels]

    The result is differentiable twice in x, both weights, the weights and biases of both batch
    norms, and the slopes of a PReLU. Under torch.func transforms and forward-mode differentiation
    the function runs unfused, with a warning. It saves for backward x, the parameters and the
    statistics per channel; and u, if u has at most a quarter of the elements of x.

    A primary convolution other than 1x1 with groups 1 and padding 0 runs through PyTorch's
    convolution; the operations after it are fused.

    Args:
        x: [N, C, H, W], in float32, float64, bfloat16 or float16. Dense NCHW and channels_last
            tensors are read without a copy, and the result has the layout of x (see
            ``conventions.memory_format`` for an x that is both). Any other x (sliced, expanded) is
            first copied to the nearer of the two layouts.
        primary_weight: [m, C / groups, k, k], or None: x already is u, and C = m.
        cheap_weight: [g, 1, d, d] with d odd and g a multiple of m; ratio = g / m + 1.
        primary_bn_weight, primary_bn_bias: [m], or None for 1 and 0.
        primary_running_mean, primary_running_var: [m]; may both be None in training.
        cheap_bn_weight, cheap_bn_bias, cheap_running_mean, cheap_running_var: [g]; None as for
            the primary batch norm.
        out_channels: channels of the result, from m to m + g; m + g if None.
        training: True: normalise with the statistics of the batch, and update the running
            statistics. False: normalise with the running statistics.
        momentum: share of the batch's statistics in the updated running statistics; one number, or
            one for each batch norm.
        eps: added to the variance; one number, or one for each batch norm.
        stride, padding, dilation, groups: of the primary convolution.
        activation, cheap_activation: a name of ``ghost_ops.activations`` or a module;
            cheap_activation None: the same as activation.
        activation_weight, cheap_activation_weight: slopes of ``"prelu"``, [1] or [m] and [1] or
            [g], as the weight of ``F.prelu``. If cheap_activation and cheap_activation_weight are
            both None, cheap_activation_weight is activation_weight.

    Both weights must have the dtype of x; under autocast x and both weights are cast as the
    operands of a convolution. The tensors of the batch norms have that dtype or float32 (float64 if
    x is float64).

    Returns:
        [N, out_channels, Ho, Wo], in the dtype of x (under autocast, in autocast's dtype). For an
        empty batch the result is empty, and the running statistics do not change.

    Raises:
        RuntimeError: ranks, sizes, dtypes or devices that do not fit; a sparse or nested tensor; no
            running statistics and not training; a stride that is not positive.
        ValueError: x is 3-D; an even d; an unknown activation; training with one value per channel,
            or with eps that is not positive.
        TypeError: an argument of the wrong type.
        No running statistic changes if the function raises.

    Source: GhostNet, CVPR 2020, section 3.1.
    """
    if cheap_activation is None:
        cheap_activation = activation
        if cheap_activation_weight is None:
            cheap_activation_weight = activation_weight
    act1, slope1 = _activation(activation, activation_weight, "activation")
    act2, slope2 = _activation(cheap_activation, cheap_activation_weight, "cheap_activation")
    eps1, eps2 = _float_pair("eps", eps)
    momentum1, momentum2 = _float_pair("momentum", momentum)
    _check_types(
        x=x,
        primary_weight=primary_weight,
        cheap_weight=cheap_weight,
        primary_bn_weight=primary_bn_weight,
        primary_bn_bias=primary_bn_bias,
        primary_running_mean=primary_running_mean,
        primary_running_var=primary_running_var,
        cheap_bn_weight=cheap_bn_weight,
        cheap_bn_bias=cheap_bn_bias,
        cheap_running_mean=cheap_running_mean,
        cheap_running_var=cheap_running_var,
        activation_weight=activation_weight,
        cheap_activation_weight=cheap_activation_weight,
    )
    for name, number in (("groups", groups), ("out_channels", out_channels)):
        if not _is_int(number) and (number is not None or name == "groups"):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}: {number!r}")
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {type(training).__name__}: {training!r}")
    if out_channels is None:
        first = x.shape[1:2] if primary_weight is None else primary_weight.shape[:1]
        out_channels = sum(first) + sum(cheap_weight.shape[:1])
    settings = Settings(
        out_channels,
        _int_pair("stride", stride),
        _int_pair("padding", padding),
        _int_pair("dilation", dilation),
        groups,
        eps1,
        eps2,
        act1,
        slope1,
        act2,
        slope2,
    )
    norms = Norms(
        primary_bn_weight,
        primary_bn_bias,
        primary_running_mean,
        primary_running_var,
        cheap_bn_weight,
        cheap_bn_bias,
        cheap_running_mean,
        cheap_running_var,
    )
    stats = BATCH if training else FROZEN
    check(x, primary_weight, cheap_weight, norms, settings, stats)
    m = x.size(1) if primary_weight is None else primary_weight.size(0)
    slopes = Slopes(
        _slopes(x, activation_weight, m, "activation_weight"),
        _slopes(x, cheap_activation_weight, cheap_weight.size(0), "cheap_activation_weight"),
    )
    updates = RunningUpdate(momentum1), RunningUpdate(momentum2)
    return run(x, primary_weight, cheap_weight, norms, settings, stats, *updates, slopes)


def _activation(activation: ActivationSpec, weight: Tensor | None, name: str) -> tuple[int, float]:
    """The code and slope of an activation; "prelu" requires slopes, and no other allows them."""
    if (activation == "prelu") != (weight is not None):
        raise ValueError(f"{name}_weight must be given for {name}='prelu', and only for it")
    if activation == "prelu":
        return activations.PRELU, activations.DEFAULT_SLOPE
    return activations.resolve(activation, name)


def _slopes(x: Tensor, weight: Tensor | None, channels: int, name: str) -> Tensor | None:
    """The slopes [channels] from the weight of a PReLU."""
    if weight is None:
        return None
    if weight.shape not in ((1,), (channels,)):
        raise RuntimeError(f"{name} must be of shape [1] or [{channels}], got {list(weight.shape)}")
    if weight.device != x.device or weight.dtype not in DTYPES:
        raise RuntimeError(
            f"{name} must be floating-point and on {x.device}, where x is, got {weight.dtype} on "
            f"{weight.device}"
        )
    return weight.expand(channels)


def _check_types(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor) and (t is not None or name in ("x", "cheap_weight")):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if t is not None:
            arguments.dense(name, t)


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _int_pair(name: str, value: IntPair) -> tuple[int, int]:
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(map(_is_int, pair)):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    return pair[0], pair[1]


def _float_pair(name: str, value: FloatPair) -> tuple[float, float]:
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, (int, float)) for v in pair):
        raise TypeError(f"{name} must be a number or a pair of numbers, got {value!r}")
    return float(pair[0]), float(pair[1])


def check(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
) -> None:
    """Raise the documented errors of ``ghost_module``, with the argument and its value."""
    if not _plainly_fits(x, w1, w2, norms, settings, stats):
        _check_each(x, w1, w2, norms, settings, stats)


def _counts_alone(stats: Statistics) -> bool:
    """Whether a norm needs two values per channel: it uses the statistics of this process alone."""
    first, second = stats.group1 is None, stats.group2 is None
    return (stats.batch1 and first) or (stats.batch2 and second)


def _eps_not_positive(settings: Settings, stats: Statistics, ghosts: int) -> bool:
    """Whether ``F.batch_norm`` refuses the eps of a norm with the statistics of this process."""
    first = settings.eps1 <= 0.0 and stats.batch1 and stats.group1 is None
    return first or (settings.eps2 <= 0.0 and stats.batch2 and stats.group2 is None and ghosts > 0)


def _plainly_fits(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
) -> bool:
    """Whether the arguments are valid and the usual case; fast, because it runs at every call.

    The usual case is a 1x1 primary convolution with all batch norm tensors. For False,
    ``_check_each`` decides.
    """
    if not isinstance(x, Tensor) or w1 is None or x.dim() != 4:
        return False
    dtype, device = x.dtype, x.device
    wide = _WIDE.get(dtype)
    if wide is None or w1.dtype is not dtype or w2.dtype is not dtype:
        return False
    if w1.dim() != 4 or w2.dim() != 4:
        return False
    (n, c, h, w), (m, c1, k, k1), (g, one, d, d1) = x.shape, w1.shape, w2.shape
    s = settings
    if not (c == c1 and k == k1 == one == s.groups == 1 and 0 < m <= s.out_channels <= m + g):
        return False
    if not (d == d1 and d % 2 and g % m == 0 and s.padding == (0, 0) and s.dilation == (1, 1)):
        return False
    if not (s.stride[0] > 0 and s.stride[1] > 0 and h > 0 and w > 0):
        return False
    if w1.device != device or w2.device != device:
        return False
    if _eps_not_positive(s, stats, g):
        return False
    alone = _counts_alone(stats)
    if alone and n * ((h - 1) // s.stride[0] + 1) * ((w - 1) // s.stride[1] + 1) == 1:
        return False
    shape = (m,)
    for index, t in enumerate(norms):
        if index == 4:
            shape = (g,)
        if t is None or t.shape != shape or t.device != device:
            return False
        if t.dtype is not dtype and t.dtype is not wide:
            return False
    return True


def _check_each(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
) -> None:
    s = settings
    check_input(x, x if w1 is None else w1, s.groups if w1 is not None else 1, w1 is None)
    m, g = (x.size(1) if w1 is None else w1.size(0)), w2.size(0)
    device = x.device
    if w2.dim() != 4 or w2.size(1) != 1 or w2.size(2) != w2.size(3) or m < 1 or g % m:
        raise RuntimeError(
            f"cheap weight must be [g, 1, d, d] with g a multiple of the {m} intrinsic maps, got "
            f"shape {list(w2.shape)}"
        )
    if w2.size(2) % 2 == 0:
        raise ValueError(f"dw_size (the cheap weight's d) must be odd, got {w2.size(2)}")
    _check_weight("cheap weight", w2, x)
    if not m <= s.out_channels <= m + g:
        raise RuntimeError(
            f"out_channels must be from {m} (intrinsic maps) to {m + g} (with their ghosts), got "
            f"{s.out_channels}"
        )
    if _eps_not_positive(s, stats, g):
        raise ValueError(
            f"batch_norm eps must be positive during training, but got {s.eps1} (primary) and "
            f"{s.eps2} (cheap)"
        )
    ho, wo = output_size(x, w1, s)
    if _counts_alone(stats) and x.size(0) * ho * wo == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{torch.Size((x.size(0), m, ho, wo))} for batch norm (input of the module: "
            f"{list(x.shape)})"
        )
    dtype = _dtype_in_use(x)
    wide = compute_dtype(dtype)
    for index, (name, t) in enumerate(zip(Norms._fields, norms, strict=True)):
        size = m if index < 4 else g
        if t is None:
            if index % 4 > 1 and not (stats.batch1 if index < 4 else stats.batch2):
                raise RuntimeError(
                    f"{_NORM_NAMES[name]} must be defined in evaluation mode (or give batch "
                    "statistics with training=True)"
                )
            continue
        if t.dim() != 1 or t.size(0) != size:
            raise RuntimeError(f"{_NORM_NAMES[name]} must have shape [{size}], got {list(t.shape)}")
        if t.dtype is not dtype and t.dtype is not wide:
            raise RuntimeError(
                f"{_NORM_NAMES[name]} must be {dtype} or {wide} for x in {dtype}, got {t.dtype}"
            )
        if t.device != device:
            raise RuntimeError(f"{_NORM_NAMES[name]} is on {t.device}, but x is on {device}")
    if (norms.mean1 is None) != (norms.var1 is None) or (norms.mean2 is None) != (
        norms.var2 is None
    ):
        raise RuntimeError("running mean and running var must both be given, or both be None")


_NORM_NAMES = {
    "gamma1": "primary batch norm's weight",
    "beta1": "primary batch norm's bias",
    "mean1": "primary running_mean",
    "var1": "primary running_var",
    "gamma2": "cheap batch norm's weight",
    "beta2": "cheap batch norm's bias",
    "mean2": "cheap running_mean",
    "var2": "cheap running_var",
}


def check_input(x: Tensor, w1: Tensor, groups: int, is_u: bool = False) -> None:
    """Raise the errors of ``ghost_module`` for x [N, C, H, W] and w1 [m, C / groups, k, k].

    is_u: there is no primary weight; w1 is not checked.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        # PyTorch's convolution accepts a 3-D input, and its batch norm raises ValueError.
        kind = ValueError if x.dim() == 3 else RuntimeError
        raise kind(
            f"expected 4D input [N, C, H, W] (got {x.dim()}D input of shape {list(x.shape)})"
        )
    if x.dtype not in DTYPES:
        raise RuntimeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if is_u:
        return
    if w1.dim() != 4:
        raise RuntimeError(
            f"primary weight must be [m, C / groups, k, k], got shape {list(w1.shape)}"
        )
    if groups < 1 or x.size(1) != w1.size(1) * groups or w1.size(0) % groups:
        raise RuntimeError(
            f"x must have {w1.size(1) * groups} channels for a primary weight of shape "
            f"{list(w1.shape)} and groups={groups}, got {x.size(1)} (shape {list(x.shape)})"
        )
    _check_weight("primary weight", w1, x)


def _dtype_in_use(t: Tensor) -> torch.dtype:
    """The dtype in which a convolution uses t: autocast's if it applies."""
    device_type = t.device.type
    return t.dtype if t.dtype is torch.float64 else autocast_dtype(device_type) or t.dtype


def _check_weight(name: str, w: Tensor, x: Tensor) -> None:
    if w.device != x.device:
        raise RuntimeError(f"{name} is on {w.device}, but x is on {x.device}")
    if w.dtype is not x.dtype and (
        w.dtype not in DTYPES or _dtype_in_use(w) is not _dtype_in_use(x)
    ):
        raise RuntimeError(f"x and {name} must have one dtype, got {x.dtype} and {w.dtype}")


def output_size(x: Tensor, w1: Tensor | None, settings: Settings) -> tuple[int, int]:
    """(Ho, Wo) of the primary convolution, checked to be at least 1 each."""
    s = settings
    if w1 is None and (s.stride, s.padding) != ((1, 1), (0, 0)):
        raise RuntimeError(
            f"without a primary weight stride must be 1 and padding 0, got {s.stride}, {s.padding}"
        )
    kernel = (1, 1) if w1 is None else (w1.size(2), w1.size(3))
    size = []
    for i in (0, 1):
        if s.stride[i] < 1 or s.dilation[i] < 1 or s.padding[i] < 0:
            raise RuntimeError(
                "the primary convolution needs stride and dilation of at least 1 and padding of "
                f"at least 0, got stride={s.stride}, dilation={s.dilation}, padding={s.padding}"
            )
        reach = s.dilation[i] * (kernel[i] - 1) + 1
        if x.size(2 + i) == 0 or x.size(2 + i) + 2 * s.padding[i] < reach:
            raise RuntimeError(
                f"x of shape {list(x.shape)} is too small: H and W must be at least 1, and at "
                f"least {reach} with padding={s.padding}"
            )
        size.append((x.size(2 + i) + 2 * s.padding[i] - reach) // s.stride[i] + 1)
    return size[0], size[1]
