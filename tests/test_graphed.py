"""Promise: ``graphed`` gives the model's numbers, also after any change of the model."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ghost_forms import randomize
from graphed_cases import (  # noqa: F401
    MODELS,
    MODULE,
    CpuDevice,
    Net,
    Outputs,
    captured,
    check,
    device,
    image,
    make,
    no_grad,
)
from helpers import LAYOUTS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ghost_ops

# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_without_the_model(name: str, layout: str) -> None:
    model, calls = make(name), []
    fast = ghost_ops.graphed(model, image(layout=layout))
    assert captured() == [(2, 8, 9, 10)]
    forward = type(model).forward
    type(model).forward = lambda *args: calls.append(1) or forward(*args)
    try:
        results = [(fast(image(seed=i, layout=layout)), i) for i in range(3)]
        assert calls == [1] * 3  # the stand-in runs the copies
    finally:
        type(model).forward = forward
    for got, i in results:  # later calls do not overwrite outputs
        want = model(image(seed=i, layout=layout))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert got.stride() == want.stride()
    assert len(captured()) == 1


def test_one_graph_a_shape_and_layout() -> None:
    fast = ghost_ops.graphed(make("bottleneck"), image())
    for _ in range(2):
        for x in (image(1), image(size=7), image(layout="nhwc"), image(3)[1:], image()):
            check(fast, x)
    assert len(captured()) == 4  # image(3)[1:] has the shape and the strides of image()
    pools = CpuDevice.all[-1].pools
    assert pools[0] is None and all(pool is not None for pool in pools[1:])


def test_odd_strides() -> None:
    fast = ghost_ops.graphed(make(), image())
    wide = torch.cat([image(layout="nhwc")] * 2, 1)
    for x in (wide[:, 4:12], image()[:, :, ::2], image()[:1].expand(4, -1, -1, -1)):
        for _ in range(2):
            check(fast, x)
            assert fast(x).stride() == fast.module(x).stride()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("at_capture", [torch.no_grad, torch.inference_mode])
def test_grad_modes(at_capture: Any, mode: Any) -> None:
    model = make()
    with at_capture():
        fast = ghost_ops.graphed(model, image())
    with torch.inference_mode():
        xs = [image(seed=3)]
    for x in (*xs, image(seed=4)):
        with mode():
            check(fast, x)
            assert fast(x).is_inference() == (mode is torch.inference_mode)
    assert len(captured()) == 1


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "output",
    [
        lambda x: (x + 1, [x * 2, None], {"a": x.sum(), "b": "name"}),
        lambda x: Pair(x, x),
        lambda x: [],
    ],
)
def test_nested_outputs(output: Callable[[Tensor], Any]) -> None:
    fast = ghost_ops.graphed(Outputs(output).eval(), image())
    got, later = fast(image()), fast(image(seed=2))
    for result, seed in ((got, 1), (later, 2)):
        want = output(image(seed=seed))
        assert type(result) is type(want)
        assert len(tree_leaves(result)) == len(tree_leaves(want))
        for a, b in zip(tree_leaves(result), tree_leaves(want), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_least_recently_used_is_dropped() -> None:
    fast = ghost_ops.graphed(make(), image(1), max_graphs=2)
    for n in (2, 1, 3, 1, 2):
        check(fast, image(n))
    assert [shape[0] for shape in captured()] == [1, 2, 3, 2]
    assert CpuDevice.all[-1].waits == 2  # one before each time that memory is freed


# --- changes ------------------------------------------------------------------------------------


def data_then_eval(model: nn.Module) -> None:
    next(model.parameters()).data.mul_(1.5)
    model.eval()


def load(model: nn.Module) -> None:
    model.load_state_dict(randomize(copy.deepcopy(model), 9).state_dict())


def new_parameter(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight * 1.5)
            return


def in_place(model: nn.Module) -> None:
    next(model.parameters()).mul_(1.5)


def running_mean(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(0.3)


def trained(model: nn.Module) -> None:
    model.train()
    model(image(seed=5) * 3)
    model.eval()


def half_and_back(model: nn.Module) -> None:
    model.bfloat16().double()


GENERAL = [data_then_eval, load, new_parameter, in_place, running_mean, trained, half_and_back]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # A real graph reads the parameters of PyTorch's layers; the stand-in has copies of them.
        (name, change)
        for name in MODELS
        for change in GENERAL
        if (name, change) != ("net", data_then_eval)
    ],
)
def test_changes(name: str, change: Callable[[nn.Module], None]) -> None:
    fast, x = ghost_ops.graphed(make(name), image()), image(seed=2)
    check(fast, x)
    before = fast(x)
    change(fast.module)
    check(fast, x)
    check(fast, image(seed=3))
    assert (fast(x) - before).abs().max() > 1e-6
    assert len(captured()) == 2
    assert CpuDevice.all[-1].alive == [0, 0]  # the old graph is freed before the new capture


def set_scale(net: nn.Module) -> None:
    net.scale = 3.0


def set_table(net: nn.Module) -> None:
    net.table = torch.full((6, 1, 1), 4.0)


def set_stride(net: nn.Module) -> None:
    net.conv.stride = (2, 2)


def set_slope(net: nn.Module) -> None:
    net.act.negative_slope = 0.7


def set_buffer(net: nn.Module) -> None:
    net.offset = torch.ones(1)


def set_child(net: nn.Module) -> None:
    net.act = nn.Sigmoid().eval()


def set_forward(net: nn.Module) -> None:
    net.forward = lambda x: x + 1


def set_forward_inside(net: nn.Module) -> None:
    net.act.forward = torch.tanh


def add_child(net: nn.Module) -> None:
    net.bn = nn.Sequential(net.bn, nn.Tanh()).eval()


@pytest.mark.parametrize(
    "change",
    [
        set_scale,
        set_table,
        set_stride,
        set_slope,
        set_buffer,
        set_child,
        set_forward,
        set_forward_inside,
        add_child,
    ],
)
def test_changed_attributes(change: Callable[[nn.Module], None]) -> None:
    fast, x = ghost_ops.graphed(make(), image()), image(seed=2)
    before = fast(x)
    change(fast.module)
    check(fast, x)
    assert fast(x).shape != before.shape or (fast(x) - before).abs().max() > 1e-3
    assert len(captured()) == 2


def test_requested_backend() -> None:
    with ghost_ops.use_backend("auto"):
        fast = ghost_ops.graphed(make("bottleneck"), image())
        for name in ("eager", "eager", "auto"):
            with ghost_ops.use_backend(name):
                check(fast, image())
    assert len(captured()) == 3


def test_dropped_packed_weights_outlive_their_graph(native: str) -> None:
    """After ``eval()`` drops the packed weights, only the graph refers to them."""
    model = make("bottleneck")
    fast = ghost_ops.graphed(model, image())
    (graph,) = fast._graphs.values()
    packed = model._ghost_ops.packed.arguments[0]
    # Two Ghost modules, a depthwise convolution, a gate; the shortcut's two convolutions.
    assert len(packed) == 2 + 3 + 4 + (3 + 1)
    for tensor in packed:
        assert tensor.data_ptr() in graph._reads.storages


def test_a_table_in_a_list_outlives_the_call() -> None:
    """Lists are not watched: each graph keeps the table of its capture."""

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grids = nn.Conv2d(8, 4, 1), [torch.empty(0)]

        def forward(self, x: Tensor) -> Tensor:
            if self.grids[0].shape != x.shape[2:]:
                self.grids[0] = torch.rand(x.shape[2:], dtype=x.dtype)
            return self.conv(x).relu() + self.grids[0]

    fast = ghost_ops.graphed(Grid().double().eval(), image())
    table = fast.module.grids[0]
    fast(image(size=5))
    assert fast.module.grids[0] is not table
    first, second = fast._graphs.values()
    assert table.data_ptr() in first._reads.storages
    assert table.data_ptr() not in second._reads.storages
    tensors = (first._x, table, *fast.module.parameters())
    assert first._reads.storages.keys() == {t.data_ptr() for t in tensors}  # no activations


def test_changing_at_every_call_runs_the_model() -> None:
    fast, x = ghost_ops.graphed(make(), image()), image()
    for _ in range(2):
        in_place(fast.module)
        check(fast, x)
    in_place(fast.module)
    with pytest.warns(UserWarning, match="changes from call to call"):
        check(fast, x)
    for _ in range(3):
        in_place(fast.module)
        check(fast, x)
    assert len(captured()) == 3
    assert not fast._graphs


def test_a_use_between_changes_counts() -> None:
    fast, x = ghost_ops.graphed(make(), image()), image()
    for uses in (1, 2, 1, 2, 1, 2):
        in_place(fast.module)
        for _ in range(uses):
            check(fast, x)
    assert len(captured()) == 7


def test_a_forward_that_counts_runs_the_model() -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.calls

    fast = ghost_ops.graphed(randomize(Counting()).double().eval(), image())
    with pytest.warns(UserWarning, match="changes from call to call"):
        for _ in range(3):
            fast(image())
    before = fast.module.calls
    fast(image())
    assert fast.module.calls == before + 1


def test_training_between_calls_is_captured_again() -> None:
    """Training epochs with several calls between them do not count as a change at every call."""
    fast = ghost_ops.graphed(make("bottleneck"), image())
    for _ in range(5):
        trained(fast.module)
        for seed in range(3):
            check(fast, image(seed=seed))
    assert len(captured()) == 6


# --- settings and threads -----------------------------------------------------------------------


def test_settings_choose_the_graph() -> None:
    fast = ghost_ops.graphed(make().float(), image().float())
    x = image().float()
    for context in (torch.autocast("cpu", torch.bfloat16), nullcontext(), torch.autocast("cpu")):
        with context:
            got, want = fast(x), fast.module(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    assert len(captured()) == 2
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = not before
    try:
        fast(x)
        assert len(captured()) == 3
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_autocast_cache_is_off_in_captures() -> None:
    seen = []

    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_cache_enabled())
            return super().forward(x)

    with torch.autocast("cpu", torch.bfloat16):
        ghost_ops.graphed(Asking().eval(), image().float())
        assert not any(seen)
        assert torch.is_autocast_cache_enabled()


# --- errors -------------------------------------------------------------------------------------


def test_threads() -> None:
    """Replays never overlap, and each thread gets the output of its own input."""
    fast = ghost_ops.graphed(make("bottleneck"), image())
    xs = [image(1 + i % 3, seed=i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: torch.no_grad()(fast)(x), xs * 2))
    for x, got in zip(xs * 2, results, strict=True):
        torch.testing.assert_close(got, fast.module(x), rtol=1e-12, atol=1e-12)
    assert len(captured()) == 3
