"""Networks of Ghost modules as other people write them, in plain PyTorch.

The YOLO stack is the backbone of Ultralytics' Ghost models (YOLOv8s-ghost: GhostConv with SiLU, a
5 x 5 cheap operation and eps 1e-3, C3 blocks of Ghost bottlenecks) with a linear classifier in the
place of the detection head. Ghost-ResNet is the form for CIFAR: Ghost modules in the place of
convolutions, without norms inside, and the batch norm of the ResNet behind each. Both map images
[N, 3, size, size] to logits [N, classes]. ``ghost_network`` is the small network that ``demo`` and
``half`` train on digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution, batch norm and SiLU (or none): the unit of all Ultralytics blocks."""

    def __init__(
        self, inp: int, oup: int, k: int = 1, s: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, oup, k, s, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(oup, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class GhostConv(nn.Module):
    """[N, inp, H, W] -> [N, oup, H / s, W / s]: half of the maps, and a 5 x 5 map of each."""

    def __init__(self, inp: int, oup: int, k: int = 1, s: int = 1, act: bool = True) -> None:
        super().__init__()
        self.cv1 = Conv(inp, oup // 2, k, s, act=act)
        self.cv2 = Conv(oup // 2, oup // 2, 5, groups=oup // 2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(nn.Module):
    """Two Ghost modules, the second linear, and a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            GhostConv(channels, channels // 2),
            nn.Identity(),
            GhostConv(channels // 2, channels, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class C3Ghost(nn.Module):
    """A cross-stage block: ``depth`` bottlenecks on one half of the channels."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1, self.cv2 = Conv(channels, half), Conv(channels, half)
        self.cv3 = Conv(channels, channels)
        self.m = nn.Sequential(*(GhostBottleneck(half) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


def yolo_stack(width: float = 0.5, classes: int = 1000) -> nn.Sequential:
    """Stem, four stages of a strided GhostConv and a C3Ghost, pooling and classifier."""
    channels = [int(width * c) for c in (64, 128, 256, 512, 1024)]
    layers: list[nn.Module] = [Conv(3, channels[0], 3, 2)]
    for inp, oup, depth in zip(channels, channels[1:], (1, 2, 2, 1), strict=False):
        layers += [GhostConv(inp, oup, 3, 2), C3Ghost(oup, depth)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))
    return nn.Sequential(*layers, *head)


class GhostUnit(nn.Module):
    """Two convolutions, and neither bias, norm nor activation: in the place of one convolution."""

    def __init__(self, inp: int, oup: int, k: int = 3, s: int = 1) -> None:
        super().__init__()
        half = oup // 2
        self.primary_conv = nn.Conv2d(inp, half, k, s, k // 2, bias=False)
        self.cheap_operation = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        return torch.cat([y, self.cheap_operation(y)], dim=1)


class BasicBlock(nn.Module):
    """A ResNet's block of two 3 x 3 units; where the shape changes, a 1 x 1 unit as shortcut."""

    def __init__(self, inp: int, oup: int, s: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = GhostUnit(inp, oup, 3, s), nn.BatchNorm2d(oup)
        self.conv2, self.bn2 = GhostUnit(oup, oup), nn.BatchNorm2d(oup)
        self.shortcut = nn.Sequential()
        if s > 1 or inp != oup:
            self.shortcut = nn.Sequential(GhostUnit(inp, oup, 1, s), nn.BatchNorm2d(oup))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def ghost_resnet(depth: int = 56) -> nn.Sequential:
    """Ghost-ResNet for CIFAR: a stem, three stages of (depth - 2) / 6 blocks, pooling, classifier.

    Args:
        depth: 6 n + 2; it has depth + 1 Ghost modules (the stem's, the blocks', two shortcuts').

    Raises:
        ValueError: depth is not 6 n + 2 with n at least 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth: expected 6 n + 2 with n at least 1, got {depth}")
    layers: list[nn.Module] = [GhostUnit(3, 16), nn.BatchNorm2d(16), nn.ReLU()]
    inp = 16
    for oup in (16, 32, 64):
        for index in range((depth - 2) // 6):
            layers.append(BasicBlock(inp, oup, 2 if oup > 16 and index == 0 else 1))
            inp = oup
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inp, 10))


class GhostBlock(nn.Module):
    """Ghost bottleneck (GhostNet section 3.2) over any Ghost module class.

    [N, inp, H, W] -> [N, oup, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self, ghost: Callable[..., nn.Module], inp: int, mid: int, oup: int, stride: int
    ) -> None:
        super().__init__()
        self.expand = ghost(inp, mid, relu=True)
        self.down = nn.Sequential()
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.down = _depthwise(mid, stride)
        if stride > 1 or inp != oup:
            pointwise = (nn.Conv2d(inp, oup, 1, bias=False), nn.BatchNorm2d(oup))
            self.shortcut = nn.Sequential(*_depthwise(inp, stride), *pointwise)
        self.project = ghost(mid, oup, relu=False)
        # Blocks that start close to their shortcut train smoothly and amplify rounding less.
        for branch in (self.project.primary_conv, self.project.cheap_operation):
            nn.init.constant_(branch[1].weight, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        """In-place on the projection's output, as the authors write it."""
        out = self.project(self.down(self.expand(x)))
        out += self.shortcut(x)
        return out


def _depthwise(channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def ghost_network(ghost: Callable[..., nn.Module], classes: int = 10) -> nn.Sequential:
    """A small Ghost CNN for [N, 1, 28, 28] digits; ``ghost`` is the Ghost module class to use."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        GhostBlock(ghost, 8, 24, 8, 1),
        GhostBlock(ghost, 8, 32, 16, 2),
        GhostBlock(ghost, 16, 48, 16, 1),
        GhostBlock(ghost, 16, 64, 32, 2),
        ghost(32, 96),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(96 * 9, classes),
    )
