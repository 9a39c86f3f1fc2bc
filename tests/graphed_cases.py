"""A stand-in for ``torch.cuda``, and models, for the tests of ``graphed``.

The graphs of the stand-in replay a copy of the model as it was at capture, so an unnoticed change
gives a wrong number. Real CUDA graphs are in ``test_cuda_graphed``.
"""

from __future__ import annotations

import copy
import importlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ghost_forms import Sliced, randomize
from helpers import with_layout
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import ghost_ops
from ghost_ops import FusedGhostBottleneck
from ghost_ops.reference import GhostBottleneck

MODULE = importlib.import_module("ghost_ops.fusion.graphed")


class FrozenGraph:
    """Replays a copy of the model that shares nothing with it. Outputs are NaN until then."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.out = tree_map(
            lambda t: t * float("nan") if isinstance(t, Tensor) else t, model(x)
        )  # kernels do not run in a capture
        self.frozen, self.x = copy.deepcopy(model), x

    def pool(self) -> int:
        return id(self)

    def replay(self) -> None:
        for static, new in zip(
            tree_leaves(self.out), tree_leaves(self.frozen(self.x)), strict=True
        ):
            if isinstance(static, Tensor):
                with torch.inference_mode():
                    static.copy_(new)


class CpuDevice(MODULE._Device):
    """Stands for a CUDA device, on the CPU."""

    type = "cpu"
    all: list[CpuDevice] = []  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        self.captured: list[tuple[int, ...]] = []
        self.pools: list[Any] = []
        self.graphs: weakref.WeakSet[FrozenGraph] = weakref.WeakSet()
        self.alive: list[int] = []  # graphs at each capture
        self.busy, self.waits = 0, 0
        self.all.append(self)

    @staticmethod
    def is_capturing() -> bool:
        return False

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def capture(self, model: nn.Module, x: Tensor, pool_of: Any) -> tuple[Any, Any]:
        self.captured.append(tuple(x.shape))
        self.pools.append(pool_of)
        self.alive.append(len(self.graphs))
        graph = FrozenGraph(model, x)
        self.graphs.add(graph)
        return graph, graph.out

    @contextmanager
    def in_order(self) -> Iterator[None]:
        self.busy += 1
        assert self.busy == 1, "two replays at a time"
        yield
        self.busy -= 1

    def finish(self) -> None:
        self.waits += 1


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("ghost_ops.announce._said", set())
    CpuDevice.all.clear()
    monkeypatch.setattr(MODULE, "_Device", CpuDevice)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* runs without a CUDA graph")
        yield CpuDevice
    CpuDevice.all.clear()


def captured() -> list[tuple[int, ...]]:
    return CpuDevice.all[-1].captured


class Net(nn.Module):
    """Layers of PyTorch, a setting and a table in plain attributes, any output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.act = nn.Dropout(0.5), nn.LeakyReLU(0.1)
        self.scale, self.table = 2.0, torch.ones(6, 1, 1)
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.bn(self.conv(x))))
        return x * self.scale * self.table.to(x) + self.offset


def bottleneck() -> nn.Module:
    return FusedGhostBottleneck(8, 20, 12, 5, 2, se_ratio=0.25)


def converted() -> nn.Module:
    """Modules that ``fuse`` has changed the class of: a Ghost module and a bottleneck."""
    block = type("Block", (GhostBottleneck,), {})(8, 20, 8)
    block.ghost1 = Sliced(8, 20)
    block.ghost2 = Sliced(20, 8, act1=nn.Identity(), act2=nn.Identity())
    # A class of its own, whose forward a test replaces; a Sequential's is also inside the modules.
    kind = type("Model", (nn.Sequential,), {})
    model = kind(Sliced(8, 8), randomize(block), nn.Flatten(1))
    report = ghost_ops.report(ghost_ops.fuse(model, inference=True))
    assert len(report.in_state("fused")) == 4, report
    return model


def ghost() -> nn.Module:
    model = Sliced(8, 8)
    ghost_ops.fuse(model)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "bottleneck": bottleneck,
    "converted": converted,
    "ghost": ghost,
}


def make(name: str = "net") -> nn.Module:
    return randomize(MODELS[name]()).double().eval()


def image(n: int = 2, size: int = 9, seed: int = 1, layout: str = "nchw") -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return with_layout(
        torch.randn(n, 8, size, size + 1, generator=gen, dtype=torch.float64), layout
    )


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def check(fast: Any, x: Tensor) -> None:
    torch.testing.assert_close(fast(x), fast.module(x), rtol=1e-12, atol=1e-12)


class Outputs(nn.Module):
    def __init__(self, make_output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make_output = make_output

    def forward(self, x: Tensor) -> Any:
        return self.make_output(x)
