"""The Ghost module in plain PyTorch: the oracle of tests, the baseline and the fallback.

Source: Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, section 3.1 (Ghost
module) and 3.2 (Ghost bottleneck); squeeze-and-excitation from Hu et al., CVPR 2018
(arXiv:1709.01507). Constructor arguments, defaults and state_dict keys are those of the authors'
published PyTorch code, so that their checkpoints load.

With m = ceil(oup / ratio) intrinsic maps and g = m * (ratio - 1) ghost maps::

    u   = conv(x, w1)                      primary conv, inp -> m channels, no bias
    y   = act1(bn1(u))                     m intrinsic maps
    v   = depthwise(y, w2)                 d x d, groups = m, zero padding d // 2; ghost channel
                                           i * (ratio - 1) + j reads intrinsic map i
    z   = act2(bn2(v))                     g ghost maps
    out = concat(y, z)[:, :oup]
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations, sync
from .activations import hard_sigmoid
from .conventions import ghosts_per_map


class Settings(NamedTuple):
    """The numbers of one Ghost module.

    Attributes:
        out_channels: channels of the output; the ghost maps beyond it are dropped.
        stride, padding, dilation, groups: of the primary convolution.
        eps1, eps2: added to the variances of the first and second batch norm.
        act1, act2: codes of ``activations``; slope1, slope2: their slopes, for leaky ReLU.
    """

    out_channels: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps1: float
    eps2: float
    act1: int
    slope1: float
    act2: int
    slope2: float


class Norms(NamedTuple):
    """The tensors of both batch norms: [m] for the first, [g] for the second.

    gamma and beta None stand for 1 and 0. mean and var are the running statistics; both are None
    for a norm without running statistics.
    """

    gamma1: Tensor | None
    beta1: Tensor | None
    mean1: Tensor | None
    var1: Tensor | None
    gamma2: Tensor | None
    beta2: Tensor | None
    mean2: Tensor | None
    var2: Tensor | None


class Slopes(NamedTuple):
    """The slopes of PReLUs: slopes1 [m] if act1 is a PReLU, slopes2 [g] if act2 is; else None."""

    slopes1: Tensor | None = None
    slopes2: Tensor | None = None


NO_SLOPES = Slopes()


class Statistics(NamedTuple):
    """The source of the statistics of both norms.

    Attributes:
        batch1, batch2: True: the norm uses the statistics of the batch. False: it uses the running
            statistics, as constants.
        group1, group2: the process group over whose batches a norm with batch True computes its
            statistics; None: over the batch of this process.
    """

    batch1: bool
    batch2: bool
    group1: Any = None
    group2: Any = None

    def use_batch(self) -> bool:
        return self.batch1 or self.batch2

    def cross_processes(self) -> bool:
        return self.group1 is not None or self.group2 is not None


FROZEN, BATCH = Statistics(False, False), Statistics(True, True)


def ghost_formula(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
    momentum1: float = 0.0,
    momentum2: float = 0.0,
    slopes: Slopes = NO_SLOPES,
) -> Tensor:
    """The formula of this file's docstring in plain PyTorch, differentiable any number of times.

    Args:
        x: [N, C, H, W], in a floating-point dtype, of any layout.
        w1: [m, C / groups, k, k] in the dtype of x, or None if x already is u.
        w2: [g, 1, d, d] in the dtype of x; g = 0 for ratio 1.
        norms, settings: the tensors of both batch norms, and the numbers of the module.
        stats: the source of each norm's statistics. A norm that uses the statistics of the batch of
            this process updates its running statistics, if norms has them; a norm over a process
            group does not.
        momentum1, momentum2: share of the batch in the updated running statistics.
        slopes: of the PReLUs among the activations.

    Returns:
        [N, out_channels, Ho, Wo] in the dtype of x.

    Source: GhostNet, CVPR 2020, section 3.1.
    """
    n, s = norms, settings
    inplace = not torch.is_grad_enabled()
    u = x if w1 is None else F.conv2d(x, w1, None, s.stride, s.padding, s.dilation, s.groups)
    norm1, norm2 = n[:4], n[4:]
    y = _batch_norm(u, *norm1, stats.batch1, stats.group1, momentum1, s.eps1)
    y = activations.apply(y, s.act1, s.slope1, inplace, slopes.slopes1)
    if w2.size(0) == 0:
        return y[:, : s.out_channels]
    v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
    z = _batch_norm(v, *norm2, stats.batch2, stats.group2, momentum2, s.eps2)
    z = activations.apply(z, s.act2, s.slope2, inplace, slopes.slopes2)
    return torch.cat([y, z], 1)[:, : s.out_channels]


def _batch_norm(
    u: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batch: bool,
    group: Any,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm``; with a group ``sync_formula``, which updates no running statistic."""
    if group is None:
        return F.batch_norm(u, mean, var, gamma, beta, batch, momentum, eps)
    return sync.sync_formula(u, gamma, beta, eps, group)


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got bool: {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} must be an int, got {kind}: {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def checked_arguments(
    inp: Any, oup: Any, kernel_size: Any, ratio: Any, dw_size: Any, stride: Any
) -> tuple[int, int, int, int, int, int]:
    """The numbers of ``GhostModule.__init__`` as ints, checked.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is less than 1, or dw_size is even.
    """
    inp, oup = _positive_int("inp", inp), _positive_int("oup", oup)
    kernel_size, ratio = _positive_int("kernel_size", kernel_size), _positive_int("ratio", ratio)
    dw_size, stride = _positive_int("dw_size", dw_size), _positive_int("stride", stride)
    if dw_size % 2 == 0:
        raise ValueError(
            f"dw_size must be odd, got {dw_size}: with padding dw_size // 2 an even depthwise "
            "kernel gives ghost maps of another size than the intrinsic ones"
        )
    return inp, oup, kernel_size, ratio, dw_size, stride


def build_children(
    module: GhostModule,
    inp: int,
    oup: int,
    kernel_size: int,
    ratio: int,
    dw_size: int,
    stride: int,
    act1: nn.Module,
    act2: nn.Module,
    device: Any = None,
    dtype: Any = None,
) -> None:
    """Set oup, primary_conv and cheap_operation of ``module``.

    The order of construction is that of the authors' code: the layers draw their initial weights
    from PyTorch's random generator in this order.
    """
    made = {"device": device, "dtype": dtype}
    m = math.ceil(oup / ratio)
    g = m * ghosts_per_map(ratio)
    module.oup = oup
    module.primary_conv = nn.Sequential(
        nn.Conv2d(inp, m, kernel_size, stride, kernel_size // 2, bias=False, **made),
        nn.BatchNorm2d(m, **made),
        act1,
    )
    with warnings.catch_warnings():
        # For ratio 1 the cheap weight is empty, and PyTorch warns about its initialisation.
        if g == 0:
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        cheap = nn.Conv2d(m, g, dw_size, 1, dw_size // 2, groups=m, bias=False, **made)
    module.cheap_operation = nn.Sequential(cheap, nn.BatchNorm2d(g, **made), act2)


class GhostModule(nn.Module):
    """Ghost module: ceil(oup / ratio) intrinsic maps and their cheap ghost maps, ``oup`` in all.

    The formula stands in this file's docstring. Input [N, inp, H, W], output [N, oup, Ho, Wo] with
    Ho = (H + 2 * (kernel_size // 2) - kernel_size) // stride + 1, and Wo alike. Dtype and layout
    are those that PyTorch's layers allow.

    Args:
        inp: channels of the input, C.
        oup: channels of the output. If ratio does not divide oup, the surplus ghost maps are
            computed (batch norm 2 has their statistics) and dropped.
        kernel_size: k of the primary conv; its padding is k // 2.
        ratio: the paper's s: each intrinsic map has ratio - 1 ghost maps; ratio 1 has none.
        dw_size: d of the depthwise kernel, odd.
        stride: of the primary conv.
        relu: True: ReLU follows both batch norms; False: no activation.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is less than 1, or dw_size is even.

    Source: GhostNet, CVPR 2020, section 3.1.
    """

    if TYPE_CHECKING:  # nn.Module declares every attribute as Tensor | Module
        oup: int
        primary_conv: nn.Sequential
        cheap_operation: nn.Sequential

    def __init__(
        self,
        inp: int,
        oup: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        numbers = checked_arguments(inp, oup, kernel_size, ratio, dw_size, stride)
        name = "relu" if relu else "none"
        act1, act2 = activations.make_module(name), activations.make_module(name)
        build_children(self, *numbers, act1, act2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inp, H, W] -> [N, oup, Ho, Wo]."""
        x1 = self.primary_conv(x)
        first = getattr(self.cheap_operation, "0", None)
        if getattr(first, "out_channels", None) == 0:  # ratio 1: PyTorch cannot run an empty conv
            return x1[:, : self.oup]
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.oup]


def make_divisible(v: float, divisor: int, min_value: int | None = None) -> int:
    """v rounded to a multiple of divisor, at least min_value, and not below nine tenths of v."""
    if min_value is None:
        min_value = divisor
    new_v = max(min_value, int(v + divisor / 2) // divisor * divisor)
    if new_v < 0.9 * v:
        new_v += divisor
    return new_v


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: x * gate(expand(act(reduce(mean of x over H and W)))).

    [N, in_chs, H, W] -> [N, in_chs, H, W]. The two 1x1 convs have biases.

    Args:
        in_chs: channels.
        se_ratio: the reduced channels are se_ratio * reduced_base_chs, rounded by
            ``make_divisible``.
        reduced_base_chs: the number of channels that se_ratio multiplies; in_chs if None.
        act_layer: activation type between the two convs, called with ``inplace=True``.
        gate_fn: function of the gate, elementwise.
        divisor: the number of reduced channels is a multiple of divisor.

    Source: Hu et al., arXiv:1709.01507; gate and rounding as in the GhostNet authors' code.
    """

    def __init__(
        self,
        in_chs: int,
        se_ratio: float = 0.25,
        reduced_base_chs: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        gate_fn: Callable[[Tensor], Tensor] = hard_sigmoid,
        divisor: int = 4,
        **_: Any,
    ) -> None:
        super().__init__()
        self.gate_fn = gate_fn
        reduced_chs = make_divisible((reduced_base_chs or in_chs) * se_ratio, divisor)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_reduce = nn.Conv2d(in_chs, reduced_chs, 1, bias=True)
        self.act1 = act_layer(inplace=True)
        self.conv_expand = nn.Conv2d(reduced_chs, in_chs, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chs, H, W] -> [N, in_chs, H, W]."""
        x_se = self.avg_pool(x)
        x_se = self.conv_reduce(x_se)
        x_se = self.act1(x_se)
        x_se = self.conv_expand(x_se)
        return x * self.gate_fn(x_se)


class GhostBottleneck(nn.Module):
    """Ghost bottleneck: expand, (stride and squeeze-excite), project, add the shortcut.

    ghost1 (in -> mid, ReLU); for stride > 1 a depthwise conv with batch norm; squeeze-excite if
    requested; ghost2 (mid -> out, linear); plus the shortcut. The shortcut is the input if
    in_chs == out_chs and stride is 1; else depthwise conv, batch norm, 1x1 conv, batch norm.
    [N, in_chs, H, W] -> [N, out_chs, ceil(H / stride), ceil(W / stride)] for odd kernels.

    Args:
        in_chs, mid_chs, out_chs: channels of the input, between the Ghost modules, of the output.
        dw_kernel_size: kernel size of the strided depthwise conv and of the shortcut's.
        stride: 1 or more.
        act_layer: unused; the authors' constructor has it too.
        se_ratio: squeeze-and-excitation with this ratio; none for None or 0.

    Source: GhostNet, CVPR 2020, section 3.2.
    """

    def __init__(
        self,
        in_chs: int,
        mid_chs: int,
        out_chs: int,
        dw_kernel_size: int = 3,
        stride: int = 1,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        se_ratio: float | None = 0.0,
    ) -> None:
        super().__init__()
        has_se = se_ratio is not None and se_ratio > 0.0
        self.stride = stride
        padding = (dw_kernel_size - 1) // 2

        self.ghost1 = GhostModule(in_chs, mid_chs, relu=True)
        # None instead of no attribute, so that torch.jit.script takes forward.
        self.conv_dw: nn.Conv2d | None = None
        self.bn_dw: nn.BatchNorm2d | None = None
        if self.stride > 1:
            self.conv_dw = nn.Conv2d(
                mid_chs, mid_chs, dw_kernel_size, stride, padding, groups=mid_chs, bias=False
            )
            self.bn_dw = nn.BatchNorm2d(mid_chs)
        self.se = SqueezeExcite(mid_chs, se_ratio=se_ratio or 0.0) if has_se else None
        self.ghost2 = GhostModule(mid_chs, out_chs, relu=False)

        if in_chs == out_chs and self.stride == 1:
            self.shortcut = nn.Sequential()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(
                    in_chs, in_chs, dw_kernel_size, stride, padding, groups=in_chs, bias=False
                ),
                nn.BatchNorm2d(in_chs),
                nn.Conv2d(in_chs, out_chs, 1, bias=False),
                nn.BatchNorm2d(out_chs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chs, H, W] -> [N, out_chs, Ho, Wo]."""
        residual = x
        x = self.ghost1(x)
        if self.conv_dw is not None and self.bn_dw is not None:
            x = self.bn_dw(self.conv_dw(x))
        if self.se is not None:
            x = self.se(x)
        x = self.ghost2(x)
        x += self.shortcut(residual)
        return x
