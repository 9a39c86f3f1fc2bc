"""Promise: ``graphed`` gives the model's numbers, whatever happens to the model in between.

Here a stand-in takes the place of ``torch.cuda``: its graphs replay a copy of the model as it was
at capture, so that a change that goes unnoticed gives a wrong number. Real CUDA graphs are in
``test_cuda_graphed``.
"""

from __future__ import annotations

import collections
import copy
import importlib
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from ghost_forms import Sliced, randomize
from helpers import LAYOUTS, with_layout
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
    report = ghost_ops.fuse(model, inference=True)
    assert len(report.swapped) == 4, report
    return model


def ghost() -> nn.Module:
    model = Sliced(8, 8)
    ghost_ops.fuse(model)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net, "bottleneck": bottleneck, "converted": converted, "ghost": ghost,
}  # fmt: skip


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
        assert calls == [1] * 3  # by the stand-in
    finally:
        type(model).forward = forward
    for got, i in results:  # a later call has not overwritten them
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


class Outputs(nn.Module):
    def __init__(self, make_output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make_output = make_output

    def forward(self, x: Tensor) -> Any:
        return self.make_output(x)


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
    assert CpuDevice.all[-1].waits == 2  # before memory is freed


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


@pytest.mark.parametrize(("name", "change"), [
    # A graph reads the parameters of PyTorch's layers where they are; the stand-in has copies.
    (name, change) for name in MODELS for change in GENERAL
    if (name, change) != ("net", data_then_eval)
])  # fmt: skip
def test_changes(name: str, change: Callable[[nn.Module], None]) -> None:
    fast, x = ghost_ops.graphed(make(name), image()), image(seed=2)
    check(fast, x)
    before = fast(x)
    change(fast.module)
    check(fast, x)
    check(fast, image(seed=3))
    assert (fast(x) - before).abs().max() > 1e-6
    assert len(captured()) == 2
    assert CpuDevice.all[-1].alive == [0, 0]  # the old graph is freed before the new one is made


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
    [set_scale, set_table, set_stride, set_slope, set_buffer, set_child, set_forward,
     set_forward_inside, add_child],
)  # fmt: skip
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
    """``eval()`` drops packed weights, which only the graph then reads."""
    model = make("bottleneck")
    fast = ghost_ops.graphed(model, image())
    (graph,) = fast._graphs.values()
    packed = model._ghost_ops.packed.arguments[0]
    # Two Ghost modules, a depthwise convolution, a gate; the shortcut's two convolutions.
    assert len(packed) == 2 + 3 + 4 + (3 + 1)
    for tensor in packed:
        assert tensor.data_ptr() in graph._reads.storages


def test_a_table_in_a_list_outlives_the_call() -> None:
    """A list is not watched: each graph keeps the table that it was captured with."""

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
    """An epoch, some calls, an epoch: that is no change from call to call."""
    fast = ghost_ops.graphed(make("bottleneck"), image())
    for _ in range(5):
        trained(fast.module)
        for seed in range(3):
            check(fast, image(seed=seed))
    assert len(captured()) == 6


# --- the model itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["net", "bottleneck"])
def test_hooks_run(name: str, inside: bool) -> None:
    fast, x, calls = ghost_ops.graphed(make(name), image()), image(), []
    target = next(fast.module.children()) if inside else fast.module
    handle = target.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="has hooks"):
        check(fast, x)
    check(fast, x)
    assert len(calls) == 4 and len(captured()) == 1
    handle.remove()
    check(fast, x)
    check(fast, x)
    assert len(captured()) == 2


def test_global_hooks_run() -> None:
    fast, calls = ghost_ops.graphed(make(), image()), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.warns(UserWarning, match="hooks on all modules"):
            fast(image())
    finally:
        handle.remove()
    assert calls


def test_training_mode() -> None:
    model = make()
    model.drop.train()
    with pytest.raises(ValueError, match=r"'drop' of model is in training mode.*eval\(\)"):
        ghost_ops.graphed(model, image())
    with pytest.raises(ValueError, match=r"^model is in training mode"):
        ghost_ops.graphed(model.train(), image())
    fast = ghost_ops.graphed(model.eval(), image())
    model.drop.train()
    with pytest.warns(UserWarning, match="a Dropout inside it is in training mode"):
        first = fast(image())
    assert not torch.equal(first, fast(image()))
    model.eval()
    check(fast, image())


def test_capture_that_fails() -> None:
    class Synchronising(Net):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), MODULE._Reads):
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return super().forward(x)

    model = randomize(Synchronising()).double().eval()
    with pytest.warns(UserWarning, match="Synchronising runs without .* capturing. .Said once"):
        fast = ghost_ops.graphed(model, image())
    for _ in range(3):
        check(fast, image())
        check(fast, image(1))
    assert len(captured()) == 2


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda x: (x + 1, object()), "its output has a object"),
        (lambda x: x.to("meta"), "its output has a tensor on meta"),
        (lambda x: x.add_(1), "its forward writes its input"),
    ],
)
def test_outputs_that_no_graph_has(output: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        fast = ghost_ops.graphed(Outputs(output).eval(), image())
    x = image()
    assert type(fast(x)) is type(output(image()))
    assert reason != "its forward writes its input" or torch.equal(x, image() + 1)


@pytest.mark.parametrize("change", [nn.Conv2d(8, 6, 1), "spectral", "subclass", "script"])
def test_parameters_that_cannot_be_watched(change: Any) -> None:
    model = make()
    if change == "spectral":
        torch.nn.utils.parametrizations.spectral_norm(model.conv).eval()
    elif change == "subclass":
        model.conv.weight = nn.Parameter(torch.Tensor._make_subclass(Odd, model.conv.weight.data))
    elif change == "script":
        model.act = torch.jit.script(model.act)
    else:
        with torch.inference_mode():
            model.conv.weight = nn.Parameter(model.conv.weight * 1)
    with pytest.warns(UserWarning, match="change unnoticed|TorchScript"):
        fast = ghost_ops.graphed(model, image())
    check(fast, image())
    assert not captured()


class Odd(Tensor):
    pass


def test_inputs_that_no_graph_takes() -> None:
    fast = ghost_ops.graphed(make(), image())
    assert fast(image(0)).shape == (0, 6, 9, 10)
    assert type(fast(image().as_subclass(Odd))) is Odd
    torch.testing.assert_close(
        torch.func.vmap(fast)(image()[None]), fast.module(image())[None], rtol=1e-12, atol=1e-12
    )
    torch.func.jvp(fast, (image(),), (image(),))
    torch.func.grad(lambda x: fast(x).sum())(image())
    fast.module.requires_grad_(False)
    traced = torch.jit.trace(lambda x: fast(x), image(), check_trace=False)
    torch.testing.assert_close(traced(image(seed=2)), fast.module(image(seed=2)))
    assert len(captured()) == 1
    for x in (image().float(), image()[:, :5], image().to("meta"), None):
        with pytest.raises(Exception) as own:
            fast.module(x)
        with pytest.raises(own.type) as raised:
            fast(x)
        assert str(raised.value) == str(own.value)
    assert len(captured()) == 1
    check(fast, image())


def test_inside_compile() -> None:
    fast = ghost_ops.graphed(make(), image())
    compiled = torch.compile(lambda x: fast(x) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image(1)), fast.module(image(1)) + 1)
    assert len(captured()) == 1


def test_autograd_is_refused() -> None:
    fast = ghost_ops.graphed(make(), image())
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match=r"torch.no_grad\(\) or torch.inference_mode\(\)"):
            fast(image())
        fast.module.requires_grad_(False)
        check(fast, image())
        with pytest.raises(RuntimeError, match="computes no gradients"):
            fast(image().requires_grad_())
        assert not fast(image()).requires_grad


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


def test_wrong_arguments() -> None:
    model, x = make(), image()
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got function"):
        ghost_ops.graphed(lambda x: x, x)
    with pytest.raises(TypeError, match="example must be a Tensor, got list"):
        ghost_ops.graphed(model, [x])
    for number in (0, -1, 2.0, True, "8"):
        with pytest.raises(ValueError, match="max_graphs must be an int of at least 1"):
            ghost_ops.graphed(model, x, max_graphs=number)
        with pytest.raises(ValueError, match="num_warmup_iters must be an int of at least 1"):
            ghost_ops.graphed(model, x, num_warmup_iters=number)
    with pytest.raises(ValueError, match="example is on meta, but model is on cpu"):
        ghost_ops.graphed(model, x.to("meta"))
    model.bn.to("meta")
    with pytest.raises(ValueError, match="on cpu and meta"):
        ghost_ops.graphed(model, x)


def test_the_models_own_error_at_construction() -> None:
    model, x = make(), image()[:, :5]
    with pytest.raises(RuntimeError) as own:
        model(x)
    with pytest.raises(RuntimeError) as raised:
        ghost_ops.graphed(model, x)
    assert str(raised.value) == str(own.value)


def test_copies_are_refused() -> None:
    fast = ghost_ops.graphed(make(), image())
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            function(fast)
    check(fast, image())


def test_on_the_cpu_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "type", "cuda")
    model = make()
    assert ghost_ops.graphed(model, image()) is model


def test_threads() -> None:
    """Replays never overlap, and each thread gets the output of its own input."""
    fast = ghost_ops.graphed(make("bottleneck"), image())
    xs = [image(1 + i % 3, seed=i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: torch.no_grad()(fast)(x), xs * 2))
    for x, got in zip(xs * 2, results, strict=True):
        torch.testing.assert_close(got, fast.module(x), rtol=1e-12, atol=1e-12)
    assert len(captured()) == 3
