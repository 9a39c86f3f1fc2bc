"""Subjects of measurement: Ghost modules and networks, with input, least work, training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import floor, providers
from benchmarks.harness.shapes import Shape
from examples.networks import GhostConv, ghost_resnet, yolo_stack
from ghost_ops import models, reference

CLASSES = 1000
CIFAR = "cifar"  # group of networks for images of 32 x 32
Call = Callable[[], Sequence[Tensor]]


def error_floors(shape: Shape, dtype: torch.dtype, count: int) -> list[float]:
    """Relative error allowed on top of eager's: of the output, then of ``count - 1`` gradients.

    ReLU's gradient jumps: about eps of all pre-activations round to the other side of 0, and each
    moves its gradient by its full size, which is sqrt(eps) of the whole in the L2 norm.
    """
    eps = torch.finfo(dtype).eps
    jump = (32 * eps) ** 0.5 if shape.activation == "relu" else 64 * eps
    return [64 * eps] + [jump] * (count - 1)


def random(*size: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """A normal tensor, the same values every time."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Bound(NamedTuple):
    """A module in training, bound to its own input."""

    x: Tensor
    backward: Call  # forward and backward: the output or the loss, then all gradients
    compared: Call  # forward and backward: the results that are compared with float64
    step: Callable[[], object]  # what is timed


class Subject:
    """One Ghost module on x [batch, C, size, size], in NCHW.

    ``plain`` is the module in PyTorch, in training mode; ``fields`` shape, group and count of its
    rows; ``images`` those whose output is compared in eval mode; ``work`` the bytes that a forward
    moves and the FLOPs that it computes, at least, ``training_work`` those of a training step;
    ``most_saved`` the bytes of maps that a fused one may keep for backward, if that is promised.
    """

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        self.shape, self.images = shape, slice(None)
        self.plain: nn.Module = providers.reference_module(shape, dtype=dtype)
        self.x = random(batch, shape.inp, shape.size, shape.size, dtype=dtype)
        self.fields = {"shape": shape.name, "group": shape.group, "count": shape.count}
        self.most_saved: int | None = self.x.nbytes * (4 if shape.oup > shape.inp else 5) // 4
        out = (batch, shape.oup, shape.out_size, shape.out_size)
        self.grad_out = random(*out, dtype=dtype, seed=2)
        sizes = (shape, batch, dtype.itemsize)
        self.work = floor.forward_bytes(*sizes), floor.forward_flops(shape, batch)
        self.training_work = floor.training_bytes(*sizes), floor.training_flops(shape, batch)

    def allowed(self, count: int) -> list[float]:
        """Relative error of ``count`` results that is allowed on top of eager's."""
        return error_floors(self.shape, self.x.dtype, count)

    def bind(self, module: Any, arrange: Callable[[Tensor], Tensor]) -> Bound:
        """Bind a module in training to its own copy of the tensors, as ``arrange`` gives them."""
        own, grad = arrange(self.x).clone().requires_grad_(), arrange(self.grad_out)
        inputs = [own, *module.parameters()]

        def backward() -> Sequence[Tensor]:
            out = module(own)
            return (out, *torch.autograd.grad(out, inputs, grad))

        return Bound(own, backward, backward, backward)


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
    make = functools.partial(reference.ghostnet, width, CLASSES, dropout=0.0)
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


class NetworkSubject(Subject):
    """A network on images [batch, 3, size, size], with cross entropy as its loss."""

    def __init__(self, network: Network, size: int, batch: int, dtype: torch.dtype) -> None:
        self.images, self.most_saved = slice(4), None
        self.plain = network.plain(size).to(dtype)
        self.x = random(batch, 3, size, size, dtype=dtype)
        self.labels = torch.arange(batch) % network.classes
        self.fields = {"shape": network.name(size), "group": network.group, "count": 1}
        total = batch * flops(self.plain, size)
        least = functools.partial(least_bytes, self.plain, self.x)
        self.work = least(False, network.classes), total
        self.training_work = least(True, network.classes), 3 * total

    def allowed(self, count: int) -> list[float]:
        # A ReLU's gradient jumps where its input rounds to the other side of 0, in every one of
        # some fifty layers; eager in the other memory format differs by that much as well.
        eps = torch.finfo(self.x.dtype).eps
        return [64 * eps, (1024 * eps) ** 0.5][:count]

    def bind(self, module: Any, arrange: Callable[[Tensor], Tensor]) -> Bound:
        own, parameters = arrange(self.x), list(module.parameters())
        # So small a rate that the network stays the one that was checked.
        optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

        def loss() -> Tensor:
            return F.cross_entropy(module(own), self.labels)

        def backward() -> Sequence[Tensor]:
            value = loss()
            return (value.detach(), *torch.autograd.grad(value, parameters))

        def compared() -> Sequence[Tensor]:
            value, *gradients = backward()
            return value, torch.cat([gradient.flatten() for gradient in gradients])

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        return Bound(own, backward, compared, step)
