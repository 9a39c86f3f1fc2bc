"""Promise: a fused model runs the same operators whichever came first: its mode or ``fuse``."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import YoloBottleneck, randomize
from helpers import recorded
from torch import Tensor, nn
from twins import BOTTLENECKS, FORMS, REWRITTEN, network, unfused_copy

import ghost_ops
from examples.networks import C3Ghost, Conv, GhostConv, ghost_resnet
from ghost_ops import FusedGhostBottleneck, FusedGhostModule, models, reference


class AuthorsNet(reference.GhostNet):
    """As the authors write it: without dropout the forward does not read the mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv_head(self.global_pool(self.forward_features(x)))).flatten(1)
        if self.dropout > 0.0:
            x = F.dropout(x, self.dropout, self.training)
        return self.classifier(x)


class ModuleDropout(AuthorsNet):
    """Dropout as a module, whose mode the forward reads."""

    def __init__(self) -> None:
        super().__init__(0.25)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv_head(self.global_pool(self.forward_features(x)))).flatten(1)
        return self.classifier(self.drop(x))


def authors_net(dropout: float, kind: type[nn.Module] = AuthorsNet) -> nn.Module:
    net = ghost_ops.unfuse(network())
    net.__class__, net.dropout = kind, dropout
    if kind is ModuleDropout:
        net.drop = nn.Dropout(0.5)
    return net


def built_by_hand() -> nn.Module:
    """Our own fused modules, never seen by ``fuse``, as stem, bottleneck and last layer."""
    return nn.Sequential(
        FusedGhostModule(6, 8), FusedGhostBottleneck(8, 16, 8), FusedGhostModule(8, 8, 3, stride=2)
    )


def yolo() -> nn.Module:
    """The stages of Ultralytics' Ghost backbone."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(
        Conv(6, 8, 3, 2),
        GhostConv(8, 16, 3, 2),
        C3Ghost(16, 1),
        YoloBottleneck(16, 16, 3, 2),
        *head,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **FORMS,
    **REWRITTEN,
    **BOTTLENECKS,
    "reference": lambda: nn.Sequential(reference.GhostModule(6, 8), nn.ReLU()),
    "built by hand": built_by_hand,
    "network": lambda: ghost_ops.unfuse(network()),
    "network, built fused": lambda: models.FusedGhostNet(0.25, 5, 0.2, 6),
    "authors' network": lambda: authors_net(0.2),
    "authors' network, no dropout": lambda: authors_net(0.0),
    "network, dropout module": lambda: authors_net(0.0, ModuleDropout),
    "Ultralytics' stages": yolo,
    "Ghost-ResNet": lambda: nn.Sequential(nn.Conv2d(6, 3, 1), *ghost_resnet(8)),
}


def image() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, 16, 16, generator=generator, dtype=torch.float64)


def train(model: nn.Module) -> None:
    """A training step, which changes weights and running statistics."""
    model.train()
    torch.manual_seed(2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(image()).square().mean(), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, grads, strict=True):
            p -= 0.01 * g


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(image())


def call_in_training_mode(model: nn.Module) -> None:
    with torch.no_grad():
        model.train()(image())


def evaluate_with_gradients(model: nn.Module) -> None:
    model.eval()(image())


def in_training(model: nn.Module) -> None:
    model.train()


def in_eval(model: nn.Module) -> None:
    model.eval()


Step = Callable[[nn.Module], object]
# What happens to a model before its operators are counted. The first order is what the others are
# compared with: fused in eval mode, before any call.
ORDERS: dict[str, tuple[Step, ...]] = {
    "eval, fuse": (in_eval, ghost_ops.fuse),
    "training, fuse": (in_training, ghost_ops.fuse),
    "training, fuse, step": (in_training, ghost_ops.fuse, train),
    "training, fuse, no gradients": (in_training, ghost_ops.fuse, call_in_training_mode),
    "step, fuse": (train, ghost_ops.fuse),
    "eval, fuse, call, step": (in_eval, ghost_ops.fuse, evaluate, train),
    "eval, fuse, step, call, step": (in_eval, ghost_ops.fuse, train, evaluate, train),
    "eval, fuse, gradients, step": (in_eval, ghost_ops.fuse, evaluate_with_gradients, train),
    "training, fuse, copy": (in_training, ghost_ops.fuse, train, copy.deepcopy),
    "again": (in_training, ghost_ops.fuse, train, ghost_ops.unfuse, ghost_ops.fuse),
}


def operators(model: nn.Module, training: bool) -> Counter[str]:
    """The operators of the second call in a mode: a training step, or inference."""
    model.train(training)
    for _ in range(2):
        with torch.set_grad_enabled(training), recorded() as names:
            out = model(image())
            if training:
                out.square().mean().backward()
    return Counter(names)


@pytest.mark.parametrize("name", MODELS)
def test_operators(native: str, name: str) -> None:
    plain = randomize(MODELS[name]()).double()
    want = None
    for order, steps in ORDERS.items():
        model = copy.deepcopy(plain)
        for step in steps:
            made = step(model)
            model = made if isinstance(made, nn.Module) else model
        classes = [type(m) for m in model.modules()]
        seen = [operators(model, training) for training in (False, True, False)]
        assert any(op.startswith("ghost_ops") for op in seen[0]), order
        assert [type(m) for m in model.modules()] == classes
        got = classes, *seen, ghost_ops.report(model)
        want = got if want is None else want
        assert got == want, order
        with torch.no_grad():
            torch.testing.assert_close(model(image()), unfused_copy(model)(image()))
