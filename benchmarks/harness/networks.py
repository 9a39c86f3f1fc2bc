"""The networks that are measured, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ghost_ops
from examples.networks import GhostConv, ghost_resnet, yolo_stack
from ghost_ops import models, reference

CLASSES = 1000
CIFAR = "cifar"  # group of networks for images of 32 x 32


def small_modules() -> dict[str, nn.Module]:
    """Modules of 8 input channels that ``fuse`` takes, by form."""
    # A subclass: ``fuse`` then treats it as the authors' class, not as the reference module.
    authors = type("AuthorsGhostModule", (reference.GhostModule,), {})
    return {
        "authors' form": authors(8, 16),
        "Ultralytics' form": GhostConv(8, 16),
        "bottleneck": reference.GhostBottleneck(8, 16, 8),
    }


@dataclass(frozen=True)
class Network:
    """A network by name; geometric means are taken over the networks of one ``group``."""

    key: str  # in command lines
    title: str  # in tables
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
        ghost_ops.unfuse(network)
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
    make = functools.partial(models.ghostnet, width, CLASSES, dropout=0.0)
    return Network(f"ghostnet-{width}", f"GhostNet {width}x", make)


def _cifar(depth: int) -> Network:
    make, name = functools.partial(ghost_resnet, depth), f"Ghost-ResNet-{depth}"
    return Network(name.lower(), name, make, 10, 32, (1, 32), 32, CIFAR)


_YOLO = Network("yolo", "Ghost YOLO stack", yolo_stack)
_EVERY = (ghostnet(1.0), _YOLO, ghostnet(0.5), ghostnet(1.3), _cifar(56), _cifar(20))
NETWORKS: dict[str, Network] = {network.key: network for network in _EVERY}


def least_bytes(network: nn.Module, x: Tensor, training: bool, classes: int = CLASSES) -> int:
    """Traffic that no implementation avoids: images and parameters read, logits written.

    In training both are read twice, forward and backward, and a gradient of each parameter is
    written; maps between layers count as if they stayed in caches.
    """
    images, logits = x.numel(), len(x) * classes
    parameters = sum(p.numel() for p in network.parameters())
    count = 2 * images + logits + 3 * parameters if training else images + logits + parameters
    return count * x.element_size()


def flops(network: nn.Module, size: int) -> int:
    """FLOPs for one image of all convolutions and linear layers (a multiply-add counts two)."""
    return 2 * models.count_macs(network, (1, 3, size, size))
