"""The networks that ``benchmarks.network`` and ``benchmarks.memory`` run, as plain PyTorch modules.

GhostNet comes from ``ghost_ops.models``, unfused. The YOLO stack is the backbone of Ultralytics'
Ghost models (YOLOv8s-ghost: GhostConv with SiLU, a 5 x 5 cheap operation and eps 1e-3, C3 blocks of
Ghost bottlenecks) with a linear classifier in the place of the detection head. Ghost-ResNet is the
form for CIFAR: Ghost modules in the place of convolutions, without norms of their own, and the
batch norm of the ResNet behind each. Every network maps images [N, 3, size, size] to logits
[N, classes].
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import providers
from benchmarks.providers import Forward, Provider

CLASSES = 1000
CIFAR = "cifar"  # group of networks for images of 32 x 32


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


def yolo_stack(width: float = 0.5) -> nn.Sequential:
    """Stem, four stages of a strided GhostConv and a C3Ghost, pooling and classifier."""
    channels = [int(width * c) for c in (64, 128, 256, 512, 1024)]
    layers: list[nn.Module] = [Conv(3, channels[0], 3, 2)]
    for inp, oup, depth in zip(channels, channels[1:], (1, 2, 2, 1), strict=False):
        layers += [GhostConv(inp, oup, 3, 2), C3Ghost(oup, depth)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], CLASSES))
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


def small_modules() -> dict[str, nn.Module]:
    """Modules of 8 input channels that ``fuse`` knows, by form."""
    from ghost_ops.reference import GhostBottleneck, GhostModule

    # A class of its own, as the authors' is: not the reference that FusedGhostModule stands for.
    authors = type("AuthorsGhostModule", (GhostModule,), {})
    return {
        "authors' form": authors(8, 16),
        "Ultralytics' form": GhostConv(8, 16),
        "bottleneck": GhostBottleneck(8, 16, 8),
    }


def _ghostnet(width: float) -> nn.Module:
    import ghost_ops
    from ghost_ops import models

    network = models.ghostnet(width, CLASSES, dropout=0.0)
    ghost_ops.unfuse(network)
    return network


@dataclass(frozen=True)
class Network:
    """A network by name.

    Args:
        key: how command lines name it.
        title: how tables name it.
        make: gives the plain network.
        classes: length of its logits.
        size: height and width of its images.
        batches, train_batch: what it is run on in inference and in training.
        group: of its rows; means are taken within one.
    """

    key: str
    title: str
    make: Callable[[], nn.Module]
    classes: int = CLASSES
    size: int = 224
    batches: tuple[int, ...] = (1, 16)
    train_batch: int = 16
    group: str = "network"

    def name(self, size: int) -> str:
        """Title and size of the images: the ``shape`` of its rows."""
        return f"{self.title} at {size}"

    def plain(self, size: int) -> nn.Module:
        """The network in training mode, with the batch-norm statistics of random images."""
        torch.manual_seed(0)
        network = self.make()
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        with torch.no_grad():
            for norm in norms:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.2)
                norm.momentum = 1.0
            network(torch.randn(8, 3, size, size))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return network


def ghostnet(width: float) -> Network:
    """GhostNet of some width."""
    return Network(f"ghostnet-{width}", f"GhostNet {width}x", functools.partial(_ghostnet, width))


def _cifar(depth: int) -> Network:
    make = functools.partial(ghost_resnet, depth)
    name = f"Ghost-ResNet-{depth}"
    return Network(name.lower(), name, make, 10, 32, (1, 32), 32, CIFAR)


NETWORKS: dict[str, Network] = {
    network.key: network
    for network in (
        ghostnet(1.0),
        Network("yolo", "Ghost YOLO stack", yolo_stack),
        ghostnet(0.5),
        ghostnet(1.3),
        _cifar(56),
        _cifar(20),
    )
}


def folded(network: nn.Module) -> nn.Module:
    """A copy in eval mode with each batch norm folded into its convolution.

    A norm of a concatenation stays: it scales the intrinsic maps after the cheap operation has read
    them, and zero padding keeps its shift out of the convolutions before.
    """
    from torch.fx.experimental import optimization

    return optimization.fuse(copy.deepcopy(network).eval())


@torch.inference_mode(False)
def build(provider: Provider, network: nn.Module, *, training: bool) -> nn.Module | Forward:
    """The provider's own copy of the plain network, to be called with images.

    Parameters are made outside inference mode, as a user's are, whatever the caller's mode.
    """
    import ghost_ops

    network = copy.deepcopy(network).train(training)
    if provider.family == "fused":
        ghost_ops.fuse(network, inference=True)
        return network
    if provider.family == "folded":
        network = folded(network)
    return providers.arrange(provider, network)


def least_bytes(
    network: nn.Module,
    batch: int,
    size: int,
    itemsize: int,
    training: bool,
    classes: int = CLASSES,
) -> int:
    """Traffic that no implementation avoids: images and parameters read, logits written.

    In training both are read twice, forward and backward, and a gradient of each parameter is
    written; maps between layers count as if they stayed in caches.
    """
    images, logits = 3 * batch * size * size, batch * classes
    parameters = sum(p.numel() for p in network.parameters())
    count = 2 * images + logits + 3 * parameters if training else images + logits + parameters
    return count * itemsize


def flops(network: nn.Module, size: int) -> int:
    """FLOPs for one image of all convolutions and linear layers (a multiply-add counts two)."""
    from ghost_ops.models import count_macs

    return 2 * count_macs(network, (1, 3, size, size))
