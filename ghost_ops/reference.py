"""Plain PyTorch: the Ghost module, the bottleneck and the networks, without a fused operator.

The networks are built by the functions of ``models`` too, with fused modules, under the same names,
with the same arguments, state_dict keys and initial values for a given seed: ``reference.ghostnet``
is the oracle and the baseline of ``models.ghostnet``.

Source: Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, section 3.1 (Ghost
module), 3.2 (Ghost bottleneck), 3.3 and 4.1 (networks); squeeze-and-excitation from Hu et al., CVPR
2018 (arXiv:1709.01507). Constructor arguments, defaults and state_dict keys are those of the
authors' published PyTorch code, so that their checkpoints load.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations, arguments
from .activations import hard_sigmoid
from .conventions import ghosts_per_map

__all__ = [
    "GhostBasicBlock",
    "GhostBottleneck",
    "GhostModule",
    "GhostNet",
    "GhostResNet",
    "SqueezeExcite",
    "ghost_resnet",
    "ghost_vgg16",
    "ghostnet",
]


def checked_arguments(
    inp: Any, oup: Any, kernel_size: Any, ratio: Any, dw_size: Any, stride: Any
) -> tuple[int, int, int, int, int, int]:
    """The numbers of ``GhostModule.__init__`` as ints, checked.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is less than 1, or dw_size is even.
    """
    given = {"inp": inp, "oup": oup, "kernel_size": kernel_size, "ratio": ratio}
    given |= {"dw_size": dw_size, "stride": stride}
    inp, oup, kernel_size, ratio, dw_size, stride = (
        arguments.integer(name, value) for name, value in given.items()
    )
    if dw_size % 2 == 0:
        raise ValueError(
            f"dw_size must be odd, got {dw_size}: with padding dw_size // 2 an even depthwise "
            "kernel gives ghost maps of another size than the intrinsic ones"
        )
    return inp, oup, kernel_size, ratio, dw_size, stride


def relu_or_none(relu: Any) -> str:
    """The name of the activation for the argument ``relu`` of ``GhostModule``.

    Raises:
        TypeError: relu is not a bool.
    """
    if not isinstance(relu, int):
        raise TypeError(f"relu must be a bool, got {type(relu).__name__}: {relu!r}")
    return "relu" if relu else "none"


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

    With m = ceil(oup / ratio) intrinsic maps and g = m * (ratio - 1) ghost maps::

        y   = act(bn1(conv(x)))                  [N, m, Ho, Wo]
        z   = act(bn2(depthwise(y)))             [N, g, Ho, Wo]; ghost map i * (ratio - 1) + j is
                                                 computed from intrinsic map i
        out = concat(y, z)[:, :oup]              [N, oup, Ho, Wo]

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
        TypeError: a number is not an int, or relu not a bool.
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
        name = relu_or_none(relu)
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


def _se_ratio(value: Any) -> float:
    ratio = arguments.number("se_ratio", value)
    if not 0.0 <= ratio < math.inf:
        raise ValueError(f"se_ratio must be finite and not negative, got {ratio}")
    return ratio


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

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number of channels or divisor is less than 1, or se_ratio is negative.

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
    ) -> None:
        super().__init__()
        in_chs = arguments.integer("in_chs", in_chs)
        base = in_chs
        if reduced_base_chs is not None:
            base = arguments.integer("reduced_base_chs", reduced_base_chs)
        for name, function in (("act_layer", act_layer), ("gate_fn", gate_fn)):
            if not callable(function):
                kind = type(function).__name__
                raise TypeError(f"{name} must be callable, got {kind}: {function!r}")
        self.gate_fn = gate_fn
        reduced = base * _se_ratio(se_ratio)
        reduced_chs = make_divisible(reduced, arguments.integer("divisor", divisor))
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

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range, or dw_kernel_size is even for a shortcut of stride 1.

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
        given = {"in_chs": in_chs, "mid_chs": mid_chs, "out_chs": out_chs}
        given |= {"dw_kernel_size": dw_kernel_size, "stride": stride}
        in_chs, mid_chs, out_chs, dw_kernel_size, stride = (
            arguments.integer(name, value) for name, value in given.items()
        )
        se_ratio = 0.0 if se_ratio is None else _se_ratio(se_ratio)
        if stride == 1 and in_chs != out_chs and dw_kernel_size % 2 == 0:
            raise ValueError(
                f"dw_kernel_size must be odd for stride 1, got {dw_kernel_size}: an even kernel "
                "gives a shortcut of another size than the sum needs"
            )
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
        self.se = SqueezeExcite(mid_chs, se_ratio=se_ratio) if se_ratio else None
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


# --- networks ----------------------------------------------------------------------------------

# Stages of (dw kernel, expanded channels, output channels, squeeze-excite ratio, stride): table 1
# of the paper.
_STAGES: tuple[tuple[tuple[int, int, int, float, int], ...], ...] = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    (
        (3, 200, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 480, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
    ),
    ((5, 672, 160, 0.25, 2),),
    (
        (5, 960, 160, 0, 1),
        (5, 960, 160, 0.25, 1),
        (5, 960, 160, 0, 1),
        (5, 960, 160, 0.25, 1),
    ),
)


class _ConvBnAct(nn.Module):
    """1x1 convolution, batch norm, ReLU; keys ``conv`` and ``bn1``."""

    def __init__(self, inp: int, oup: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, oup, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(oup)
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv(x)))


class GhostNet(nn.Module):
    """GhostNet: stem, sixteen Ghost bottlenecks, head.

    [N, in_chans, H, W] -> logits [N, num_classes]. Children and state_dict keys are those of the
    authors' and timm's checkpoints (``conv_stem``, ``bn1``, ``blocks.S.B.ghost1.primary_conv.0``
    ..., ``conv_head``, ``classifier``).

    Args:
        width, num_classes, dropout, in_chans: as in ``models.ghostnet``.
        bottleneck: class of the bottlenecks, called as ``GhostBottleneck``.

    Raises:
        TypeError, ValueError: as ``models.ghostnet``.

    Source: GhostNet, CVPR 2020, table 1.
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        dropout: float = 0.2,
        in_chans: int = 3,
        *,
        bottleneck: Callable[..., nn.Module] = GhostBottleneck,
    ) -> None:
        super().__init__()
        width, dropout = arguments.number("width", width), arguments.number("dropout", dropout)
        if not 0.0 < width < math.inf:
            raise ValueError(f"width must be positive and finite, got {width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
        num_classes = arguments.integer("num_classes", num_classes)
        in_chans = arguments.integer("in_chans", in_chans)
        self.dropout = dropout
        channels = make_divisible(16 * width, 4)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        expanded = channels
        for stage in _STAGES:
            blocks = []
            for kernel, expand, out, se_ratio, stride in stage:
                expanded = make_divisible(expand * width, 4)
                out = make_divisible(out * width, 4)
                blocks.append(
                    bottleneck(channels, expanded, out, kernel, stride, se_ratio=se_ratio)
                )
                channels = out
            stages.append(nn.Sequential(*blocks))
        stages.append(nn.Sequential(_ConvBnAct(channels, expanded)))
        self.blocks = nn.Sequential(*stages)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(expanded, 1280, 1, bias=True)
        self.act2 = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(1280, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, C, H / 32, W / 32], before pooling."""
        return self.blocks(self.act1(self.bn1(self.conv_stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]."""
        x = self.global_pool(self.forward_features(x))
        x = self.act2(self.conv_head(x)).flatten(1)
        return self.classifier(F.dropout(x, self.dropout, self.training))


def ghostnet(
    width: float = 1.0, num_classes: int = 1000, dropout: float = 0.2, in_chans: int = 3
) -> GhostNet:
    """GhostNet in plain PyTorch: the oracle and the baseline of ``models.ghostnet``.

    Args:
        width, num_classes, dropout, in_chans: as in ``models.ghostnet``.

    Returns:
        The network in training mode: [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        TypeError, ValueError: as ``models.ghostnet``.

    Source: GhostNet, CVPR 2020, table 1 and section 3.3.
    """
    return GhostNet(width, num_classes, dropout, in_chans)


class GhostBasicBlock(nn.Module):
    """relu(conv2(conv1(x)) + shortcut), with two 3x3 Ghost modules, of which conv2 is linear.

    [N, inp, H, W] -> [N, oup, Ho, Wo]. The shortcut has no parameters: x, or every ``stride``-th
    pixel of x with zeros for the new channels.

    Args:
        inp, oup: channels of the input and of the output, which has at least as many.
        stride: of conv1.
        ratio, dw_size: of the Ghost modules.
        ghost: class of the Ghost modules, called as ``GhostModule``.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of range.

    Source: He et al., CVPR 2016, section 4.2.
    """

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        ghost: Callable[..., nn.Module] = GhostModule,
    ) -> None:
        super().__init__()
        inp, oup = arguments.integer("inp", inp), arguments.integer("oup", oup)
        if oup < inp:
            raise ValueError(f"oup must be at least inp, {inp}, got {oup}")
        self.conv1 = ghost(inp, oup, 3, ratio, dw_size, stride)
        self.conv2 = ghost(oup, oup, 3, ratio, dw_size, relu=False)
        self.pad = oup - inp
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inp, H, W] -> [N, oup, Ho, Wo]."""
        shortcut = x
        if self.stride > 1 or self.pad:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        return F.relu(self.conv2(self.conv1(x)) + shortcut)


class GhostResNet(nn.Module):
    """A CIFAR ResNet whose 3x3 convolutions are Ghost modules.

    Args:
        depth, ratio, dw_size, num_classes, in_chans: as in ``models.ghost_resnet``.
        ghost: class of the Ghost modules, called as ``GhostModule``.

    Raises:
        TypeError, ValueError: as ``models.ghost_resnet``.

    Source: GhostNet, CVPR 2020, section 4.1; He et al., CVPR 2016, section 4.2.
    """

    def __init__(
        self,
        depth: int = 56,
        ratio: int = 2,
        dw_size: int = 3,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        ghost: Callable[..., nn.Module] = GhostModule,
    ) -> None:
        super().__init__()
        depth = arguments.integer("depth", depth)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, got {depth}")
        num_classes = arguments.integer("num_classes", num_classes)
        in_chans = arguments.integer("in_chans", in_chans)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        channels = 16
        for out in (16, 32, 64):
            for index in range((depth - 2) // 6):
                stride = 2 if out > 16 and index == 0 else 1
                blocks.append(GhostBasicBlock(channels, out, stride, ratio, dw_size, ghost))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def ghost_resnet(
    depth: int = 56,
    ratio: int = 2,
    dw_size: int = 3,
    num_classes: int = 10,
    in_chans: int = 3,
) -> GhostResNet:
    """Ghost-ResNet for CIFAR in plain PyTorch: the baseline of ``models.ghost_resnet``.

    Args:
        depth, ratio, dw_size, num_classes, in_chans: as in ``models.ghost_resnet``.

    Returns:
        The network in training mode: [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        TypeError, ValueError: as ``models.ghost_resnet``.

    Source: GhostNet, CVPR 2020, section 4.1; He et al., CVPR 2016, section 4.2.
    """
    return GhostResNet(depth, ratio, dw_size, num_classes, in_chans)


_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def ghost_vgg16(
    ratio: int = 2,
    dw_size: int = 3,
    num_classes: int = 10,
    in_chans: int = 3,
    *,
    ghost: Callable[..., nn.Module] = GhostModule,
) -> nn.Sequential:
    """Ghost-VGG-16 for CIFAR in plain PyTorch: the baseline of ``models.ghost_vgg16``.

    Args:
        ratio, dw_size, num_classes, in_chans: as in ``models.ghost_vgg16``.
        ghost: class of the Ghost modules, called as ``GhostModule``.

    Returns:
        The network in training mode: [N, in_chans, 32 k, 32 k] -> logits [N, num_classes].

    Raises:
        TypeError, ValueError: as ``models.ghost_vgg16``.

    Source: GhostNet, CVPR 2020, section 4.1, tables 3 to 5.
    """
    num_classes = arguments.integer("num_classes", num_classes)
    channels = arguments.integer("in_chans", in_chans)
    layers: list[nn.Module] = []
    for entry in _VGG16:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers.append(ghost(channels, int(entry), 3, ratio, dw_size))
            channels = int(entry)
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 512),
        nn.ReLU(inplace=True),
        nn.Linear(512, num_classes),
    )
