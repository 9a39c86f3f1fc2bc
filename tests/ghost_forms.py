"""Ghost modules as other projects write them, each reduced to a few lines.

``FORMS`` maps a name to a function that makes a module in training mode with 6 input channels.
``randomize`` gives any module non-trivial parameters and statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_act(inp: int, oup: int, k: int, s: int, groups: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, oup, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(oup), act
    )


class Sliced(nn.Module):
    """As in the authors' code and timm: two Sequentials, the output cut to ``out_chs``."""

    def __init__(
        self,
        inp: int,
        oup: int,
        k: int = 1,
        ratio: int = 2,
        d: int = 3,
        s: int = 1,
        act1: nn.Module | None = None,
        act2: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.out_chs = oup
        m = math.ceil(oup / ratio)
        self.primary_conv = conv_bn_act(inp, m, k, s, 1, act1 or nn.ReLU(inplace=True))
        self.cheap_operation = conv_bn_act(
            m, m * (ratio - 1), d, 1, m, act2 or nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        return torch.cat([y, self.cheap_operation(y)], dim=1)[:, : self.out_chs, :, :]


class Unsliced(Sliced):
    """As in NanoDet: the concatenation is not cut."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        return torch.cat([y, self.cheap_operation(y)], dim=1)


class Conv(nn.Module):
    """As Ultralytics' Conv; ``fold`` folds the batch norm into the convolution."""

    def __init__(self, inp: int, oup: int, k: int, s: int, g: int, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, oup, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(oup, eps=1e-3, momentum=0.03)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def fold(self) -> None:
        self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        del self.bn
        self.forward = self.forward_fuse  # type: ignore[method-assign]


class GhostConv(nn.Module):
    """As Ultralytics' GhostConv: m = c2 // 2, and a 5x5 cheap operation."""

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        half, act = c2 // 2, act or nn.SiLU()
        self.cv1 = Conv(c1, half, k, s, g, act)
        self.cv2 = Conv(half, half, 5, 1, half, act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class RawConvs(nn.Module):
    """A Ghost module without batch norms and activations."""

    def __init__(self, inp: int, m: int, bias: bool) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inp, m, 1, bias=bias)
        self.expand = nn.Conv2d(m, 2 * m, 3, padding=1, groups=m, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        return torch.cat([y, self.expand(y)], 1)


class Gated(Sliced):
    """As GhostModuleV2: the output times a gate made by depthwise convolutions at half the size."""

    def __init__(self, inp: int, oup: int) -> None:
        super().__init__(inp, oup)
        self.gate_fn = nn.Sigmoid()
        self.short_conv = nn.Sequential(
            nn.Conv2d(inp, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
            nn.Conv2d(oup, oup, (1, 5), padding=(0, 2), groups=oup, bias=False),
            nn.BatchNorm2d(oup),
            nn.Conv2d(oup, oup, (5, 1), padding=(2, 0), groups=oup, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_fn(self.short_conv(F.avg_pool2d(x, kernel_size=2, stride=2)))
        out = super().forward(x)
        return out * F.interpolate(gate, size=(out.shape[-2], out.shape[-1]), mode="nearest")


class Reparameterised(nn.Module):
    """As GhostNetV3's module after reparameterisation: biases, and no batch norms."""

    def __init__(self, inp: int, oup: int) -> None:
        super().__init__()
        m = math.ceil(oup / 2)
        self.infer_mode = True
        self.primary_conv = nn.Sequential(nn.Conv2d(inp, m, 1), nn.ReLU())
        self.cheap_operation = nn.Sequential(nn.Conv2d(m, m, 3, padding=1, groups=m), nn.ReLU())
        self.gate_fn = nn.Sigmoid()
        self.short_conv = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        return torch.cat([y, self.cheap_operation(y)], dim=1)


def folded_ghost_conv() -> nn.Module:
    module = randomize(GhostConv(6, 8))
    module.cv1.fold()
    module.cv2.fold()
    return module


FORMS: dict[str, Callable[[], nn.Module]] = {
    "authors": lambda: Sliced(6, 8),
    "authors, odd, ratio 3, 5x5": lambda: Sliced(6, 7, ratio=3, d=5),
    "authors, k=3 s=2": lambda: Sliced(6, 8, k=3, s=2),
    "timm, linear": lambda: Sliced(6, 8, act1=nn.Identity(), act2=nn.Identity()),
    "NanoDet": lambda: Unsliced(6, 7, act1=nn.LeakyReLU(0.1, True), act2=nn.LeakyReLU(0.1, True)),
    "an activation per branch": lambda: Sliced(6, 8, act1=nn.Hardswish(), act2=nn.Sequential()),
    "Ultralytics": lambda: GhostConv(6, 8),
    "Ultralytics, odd": lambda: GhostConv(6, 9),
    "Ultralytics, grouped": lambda: GhostConv(6, 8, g=2),
    "Ultralytics, k=3 s=2": lambda: GhostConv(6, 8, 3, 2),
    "Ultralytics, linear": lambda: GhostConv(6, 8, act=nn.Identity()),
    "Ultralytics, folded": folded_ghost_conv,
    "convolutions alone": lambda: RawConvs(6, 4, False),
    "convolutions with biases": lambda: RawConvs(6, 4, True),
    "GhostModuleV2": lambda: Gated(6, 8),
    "GhostNetV3, reparameterised": lambda: Reparameterised(6, 8),
}


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill parameters and running statistics so that every term of the formula has an effect."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.weight.copy_(torch.rand(child.weight.shape, generator=gen) + 0.5)
                child.bias.copy_(torch.randn(child.bias.shape, generator=gen) * 0.3)
                child.running_mean.copy_(torch.randn(child.bias.shape, generator=gen) * 0.3)
                child.running_var.copy_(torch.rand(child.bias.shape, generator=gen) + 0.5)
            elif isinstance(child, nn.Conv2d) and child.weight.numel():
                fan_in = child.weight[0].numel()
                weight = torch.randn(child.weight.shape, generator=gen) * fan_in**-0.5
                child.weight.copy_(weight)
                if child.bias is not None:
                    child.bias.copy_(torch.randn(child.bias.shape, generator=gen) * 0.3)
    return module


class YoloBottleneck(nn.Module):
    """As Ultralytics' GhostBottleneck; with stride 2 a depthwise convolution in the middle."""

    def __init__(self, c1: int, c2: int, k: int, s: int) -> None:
        super().__init__()
        half, none = c2 // 2, nn.Identity
        self.conv = nn.Sequential(
            GhostConv(c1, half),
            conv_bn_act(half, half, k, s, half, none()) if s == 2 else none(),
            GhostConv(half, c2, act=none()),
        )
        self.shortcut = none()
        if s == 2:
            self.shortcut = nn.Sequential(
                conv_bn_act(c1, c1, k, s, c1, none()), conv_bn_act(c1, c2, 1, 1, 1, none())
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)
