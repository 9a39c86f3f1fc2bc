"""``graphed`` with real CUDA graphs, and compiled fused networks, on a GPU."""

from __future__ import annotations

import copy
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import randomize
from torch import Tensor, nn

import ghost_ops

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(importlib.import_module("ghost_ops.announce"), "_said", set())
    with torch.no_grad():
        yield torch.device("cuda", torch.cuda.current_device())


def in_place(model: nn.Module) -> None:
    next(model.parameters()).mul_(1.5)


def data_then_eval(model: nn.Module) -> None:
    next(model.parameters()).data.mul_(1.5)
    model.eval()


def load(model: nn.Module) -> None:
    model.load_state_dict(randomize(copy.deepcopy(model), 9).state_dict())


def on_gpu(device: torch.device) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A fused GhostNet, and a function that returns seeded inputs."""
    torch.manual_seed(0)
    model = ghost_ops.models.ghostnet(0.5, 10, dropout=0.0)
    model = randomize(model).to(device, torch.float16).eval()
    ghost_ops.fuse(model, inference=True)

    def images(n: int = 2, seed: int = 1) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        return torch.randn(n, 3, 64, 64, generator=gen).to(device, torch.float16)

    return model, images


def near(got: Tensor, want: Tensor) -> bool:
    """Equal up to the order of sums, which libraries choose; other images differ more."""
    return bool((got.float() - want.float()).abs().max() <= 0.01 * want.float().abs().max())


def test_same_numbers(device: torch.device) -> None:
    model, images = on_gpu(device)
    fast = ghost_ops.graphed(model, images())
    got = [(fast(images(n, seed)), n, seed) for n in (2, 5, 1) for seed in (3, 4)]
    for out, n, seed in got:  # outputs are not overwritten, and graphs share a pool
        assert near(out, model(images(n, seed)))
    assert len(fast._graphs) == 3
    assert fast(images(0)).shape == (0, 10)


def test_launches_little(device: torch.device) -> None:
    model, images = on_gpu(device)
    fast, x = ghost_ops.graphed(model, images()), images()
    fast(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast(x)
    names = [event.name for event in profile.events()]
    assert not [name for name in names if "ghost_" in name], names


@pytest.mark.parametrize("change", [in_place, load, data_then_eval])
def test_changed_weights(device: torch.device, change: Callable[[nn.Module], None]) -> None:
    model, images = on_gpu(device)
    fast, x = ghost_ops.graphed(model, images()), images(seed=2)
    before = fast(x)
    for _ in range(2):
        change(model)
        filler = [torch.full((1 << 16,), float("nan"), device=device) for _ in range(64)]
        assert near(fast(x), model(x))
        del filler
    assert change is load or not near(fast(x), before)


def test_dropped_packed_weights(device: torch.device) -> None:
    """``eval()`` frees packed weights; a graph must not read their memory afterwards."""
    model, images = on_gpu(device)
    fast, x = ghost_ops.graphed(model, images()), images(seed=2)
    want = fast(x)
    model.eval()
    filler = [torch.full((n,), float("nan"), device=device) for n in (256, 4096, 65536) * 64]
    assert torch.equal(fast(x), want)
    del filler


def test_eviction(device: torch.device) -> None:
    model, images = on_gpu(device)
    fast = ghost_ops.graphed(model, images(1), max_graphs=1)
    for n in (2, 1, 3, 2):
        assert near(fast(images(n)), model(images(n)))
    assert len(fast._graphs) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_streams(device: torch.device, threads: int) -> None:
    """Work on two streams, queued from one thread or two, gives the outputs of its own inputs."""
    model, images = on_gpu(device)
    fast = ghost_ops.graphed(model, images())
    xs = [images(1 + i % 2, seed=i) for i in range(20)]
    want = [model(x) for x in xs]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize()
    results: list[Any] = [None] * len(xs)

    def queue(turn: int) -> None:
        with torch.no_grad(), torch.cuda.stream(streams[turn]):
            for i in range(turn, len(xs), 2):
                results[i] = fast(xs[i])

    if threads == 2:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(queue, range(2)))
    else:
        for turn in range(2):
            queue(turn)
    torch.cuda.synchronize()
    assert all(map(near, results, want))


def test_capture_while_another_thread_allocates(device: torch.device) -> None:
    model, images = on_gpu(device)
    stop = threading.Event()

    def allocate() -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            while not stop.is_set():
                torch.ones(1 << 20, device=device).sum().item()
                time.sleep(0.001)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(allocate)
        try:
            fast = ghost_ops.graphed(model, images())
            for n in (1, 3):
                assert near(fast(images(n)), model(images(n)))
        finally:
            stop.set()
        future.result()


def test_capture_that_fails(device: torch.device) -> None:
    """A model that synchronises runs without a graph; later captures of other models work."""

    class Synchronising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum().item() > 0 else F.relu(x)

    model, images = on_gpu(device)
    with pytest.warns(UserWarning, match="Synchronising runs without a CUDA graph: capture failed"):
        slow = ghost_ops.graphed(Synchronising().eval(), images())
    stream = torch.cuda.current_stream()
    assert torch.equal(slow(images()), slow.module(images()))
    fast = ghost_ops.graphed(model, images())
    assert near(fast(images(seed=2)), model(images(seed=2)))
    assert torch.cuda.current_stream() == stream


def test_autocast(device: torch.device) -> None:
    model, images = on_gpu(device)
    model.float()
    fast, x = ghost_ops.graphed(model, images().float()), images(seed=2).float()
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            got, want = fast(x), model(x)
        assert got.dtype == want.dtype
        assert near(got, want)
        assert near(fast(x), model(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(device: torch.device, mode: str) -> None:
    """Changed weights take effect, also if the compiler captures its own CUDA graphs."""
    model, images = on_gpu(device)
    torch.compiler.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for n in (2, 5):
        for _ in range(3):
            assert near(compiled(images(n)).clone(), model(images(n)))
    for change in (in_place, load):
        change(model)
        assert near(compiled(images(2)).clone(), model(images(2)))
