"""Promise: a compiled inference graph has one operator per fused module and sees every change.

Training and other tracers are in ``test_tracing``, exporters in ``test_export``.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ghost_forms import Gated, GhostConv, Sliced, YoloBottleneck, randomize
from helpers import LAYOUTS, with_layout
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize
from twins import unfused_copy

import ghost_ops
from ghost_ops import FusedGhostBottleneck, FusedGhostModule
from ghost_ops.fusion import graph

OPERATOR = "ghost_ops.fused_inference.default"

pytestmark = pytest.mark.usefixtures("native", "fresh_compiler")


def modules() -> nn.Module:
    """Ghost modules, ours and other projects', in forms that change the size of the output."""
    return nn.Sequential(
        FusedGhostModule(8, 8, kernel_size=3, stride=2, activation="prelu"),
        GhostConv(8, 8, 3, 2),
        Sliced(8, 7),
        Gated(7, 8),
        FusedGhostModule(8, 6, ratio=3, relu=False),
    )


def bottlenecks() -> nn.Module:
    return nn.Sequential(
        FusedGhostBottleneck(8, 20, 12, 5, 2, se_ratio=0.25),
        FusedGhostBottleneck(12, 16, 12),
        YoloBottleneck(12, 16, 3, 2),
    )


def small() -> nn.Module:
    return nn.Sequential(
        FusedGhostBottleneck(8, 12, 8, 3, 2, se_ratio=0.25), GhostConv(8, 8), FusedGhostModule(8, 6)
    )


def fused(make: Callable[[], nn.Module]) -> nn.Module:
    net = randomize(make()).eval()
    ghost_ops.fuse(net)
    return net


def image(n: int = 3, h: int = 17, w: int = 14) -> Tensor:
    return torch.randn(n, 8, h, w, generator=torch.Generator().manual_seed(n))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def no_copy(*_: Any) -> None:
    raise AssertionError("the module's own packed weights are not used")


class Recorder:
    """A compiler backend that runs the graphs as they are and lists their operators."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []
        self.backend = aot_autograd(fw_compiler=self._record)

    def _record(self, graph: torch.fx.GraphModule, _: Any) -> Callable:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.graphs.append([str(node.target) for node in calls])
        return make_boxed_func(graph.forward)

    def compile(self, f: Any, **kwargs: Any) -> Any:
        return torch.compile(f, fullgraph=True, backend=self.backend, **kwargs)


# --- the operator in the graph ----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [modules, bottlenecks])
def test_one_operator_each(make: Callable, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_with_tensors", no_copy)
    net, recorder = fused(make), Recorder()
    f, x = recorder.compile(net), with_layout(image(), layout)
    with torch.no_grad():
        for _ in range(2):  # the first packs
            got, want = f(x), net(x)
            assert torch.equal(got, want)
            assert got.stride() == want.stride()
        close(got, unfused_copy(net)(x))
    assert recorder.graphs == [[OPERATOR] * len(net)]


@pytest.mark.parametrize("make", [modules, bottlenecks])
def test_one_graph_for_all_sizes(make: Callable) -> None:
    net, recorder = fused(make), Recorder()
    f = recorder.compile(net, dynamic=True)
    with torch.no_grad():
        for size in ((3, 17, 14), (5, 17, 14), (2, 31, 26)):
            assert torch.equal(f(image(*size)), net(image(*size)))
    assert len(recorder.graphs) == 1


def test_inductor() -> None:
    """The operator runs between code that the compiler generates."""
    net = fused(small)

    def f(x: Tensor) -> Tensor:
        return net(x.abs()).relu() * 2

    compiled_f = torch.compile(f, fullgraph=True)
    with torch.no_grad():
        close(compiled_f(image()), f(image()))
        net[0].conv_dw.weight.mul_(1.5)
        close(compiled_f(image()), unfused_copy(net)(image().abs()).relu() * 2)


def test_inference_mode_and_strided_input() -> None:
    net = fused(small)
    f = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = image(3, 34, 28)[:, :, ::2, ::2]
    with torch.inference_mode():
        assert torch.equal(f(x), net(x))


def test_opcheck() -> None:
    block = fused(small)[0]
    for layout in LAYOUTS:
        x = with_layout(image(), layout)
        tensors = [t.detach() for t in graph.tensors_of(graph.modules_in(block))]
        shape = block._ghost_state().form.shape(block)
        arguments = (x, tensors, block._ghost_handle.key, *shape)
        torch.library.opcheck(torch.ops.ghost_ops.fused_inference.default, arguments)
    assert torch.Tag.cudagraph_unsafe in torch.ops.ghost_ops.fused_inference.default.tags


# --- where the graph has the ordinary operators -----------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gradients(training: bool) -> None:
    net, recorder = fused(lambda: nn.Sequential(GhostConv(8, 8))).double(), Recorder()
    net.train(training)
    other, f, x = unfused_copy(net), recorder.compile(net), image().double()
    for _ in range(2):
        results = []
        for model, forward in ((net, f), (other, other)):
            out = forward(x)
            grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
            results.append([out, *grads, *(b.double() for b in model.buffers())])
            model[0].cv1.bn.eps = 0.5
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    assert not any(OPERATOR in graph for graph in recorder.graphs)
    with torch.no_grad():
        torch.testing.assert_close(f(x), other(x), rtol=1e-8, atol=1e-9)
    assert (OPERATOR in recorder.graphs[-1]) is not training


def test_autocast() -> None:
    net, recorder = fused(small)[1:2], Recorder()

    def off(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return net(x)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = recorder.compile(net)(image()), net(image())
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.1)
        assert OPERATOR not in recorder.graphs.pop()
        assert torch.equal(recorder.compile(off)(image()), off(image()))
        assert OPERATOR in recorder.graphs.pop()


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    net = fused(small)[:2]
    with torch.no_grad():
        program = torch.export.export(net, (image(),), strict=strict)
        close(program.module()(image()), net(image()))
    assert not any("fused_inference" in str(node.target) for node in program.graph.nodes)


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


def test_parametrised_weights_are_the_graphs() -> None:
    net, recorder = fused(lambda: nn.Sequential(GhostConv(8, 8), GhostConv(8, 8))), Recorder()
    parametrize.register_parametrization(net[1].cv2.conv, "weight", Double())
    net.eval()
    with torch.no_grad():
        close(recorder.compile(net)(image()), unfused_copy(net)(image()))
    assert recorder.graphs[0].count(OPERATOR) == 1


def test_eager_backend_is_traced() -> None:
    net, recorder = fused(small)[2:], Recorder()
    with torch.no_grad(), ghost_ops.use_backend("eager"):
        close(recorder.compile(net)(image()), net(image()))
    assert OPERATOR not in recorder.graphs[0]


# --- changes after compiling ------------------------------------------------------------------


def weight(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].ghost1.primary_conv[0].weight.mul_(1.7)
        net[1].cv1.conv.weight.mul_(1.7)
        net[2].cheap_operation[0].weight.mul_(1.7)


def statistics(net: nn.Module) -> None:
    net[0].bn_dw.running_var.add_(0.5)
    net[1].cv2.bn.running_mean.add_(0.5)


def new_parameter(net: nn.Module) -> None:
    for layer in (net[0].conv_dw, net[1].cv2.conv, net[2].primary_conv[0]):
        layer.weight = nn.Parameter(layer.weight.detach() * 1.7)


def loaded(net: nn.Module) -> None:
    net.load_state_dict(randomize(copy.deepcopy(net), 9).state_dict())


def assigned(net: nn.Module) -> None:
    net.load_state_dict(randomize(copy.deepcopy(net), 10).state_dict(), assign=True)


def epsilon(net: nn.Module) -> None:
    for bn in (net[0].ghost2.cheap_operation[1], net[1].cv1.bn, net[2].primary_conv[1]):
        bn.eps = 0.5


def child(net: nn.Module) -> None:
    net[0].shortcut[2] = randomize(nn.Sequential(nn.Conv2d(8, 8, 1, bias=False)), 4)[0]
    net[1].cv2 = randomize(copy.deepcopy(net[1].cv2), 4)


def no_gate(net: nn.Module) -> None:
    net[0].se = None


def activation(net: nn.Module) -> None:
    net[0].ghost1.primary_conv[2], net[1].cv1.act = nn.SiLU(), nn.ReLU()
    net[2].cheap_operation[2] = nn.Hardswish()


def hook(net: nn.Module) -> None:
    for inside in (net[0].bn_dw, net[1].cv1.bn, net[2].primary_conv[1]):
        inside.register_forward_hook(lambda _, args, out: out + 0.5)


def other_layer(net: nn.Module) -> None:
    net[1].cv1.bn, net[2].cheap_operation[1] = nn.GroupNorm(2, 4), nn.GroupNorm(3, 3)


def width(net: nn.Module) -> None:
    """Give the second module more output channels, and the third one as many input channels."""
    net[1].cv1 = randomize(copy.deepcopy(net[1].cv1), 5)
    net[1].cv1.conv = randomize(nn.Sequential(nn.Conv2d(8, 6, 1, bias=False)), 6)[0]
    net[1].cv1.bn, net[1].cv2.bn = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    net[1].cv2.conv = nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False)
    net[1].cv2.conv.weight.data.fill_(0.1)
    net.eval()
    net[2].primary_conv[0] = randomize(nn.Sequential(nn.Conv2d(12, 3, 1, bias=False)), 7)[0]


def stride(net: nn.Module) -> None:
    net[2].primary_conv[0].stride = (2, 2)


def batch_statistics(net: nn.Module) -> None:
    net[0].bn_dw.train()


SEEN_BY_THE_OPERATOR = [weight, statistics, new_parameter, loaded, assigned, epsilon, hook]
SEEN_BY_THE_COMPILER = [child, no_gate, activation, stride, batch_statistics]


@pytest.mark.filterwarnings("ignore:.*unfused:UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(SEEN_BY_THE_OPERATOR, id="operator"),
        pytest.param(SEEN_BY_THE_COMPILER, id="compiler"),
        pytest.param([other_layer], id="other_layer"),
        pytest.param([width], id="width"),
    ],
)
def test_changes_are_noticed(changes: list[Callable], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_with_tensors", no_copy)
    net, x, counter = fused(small), image(), CompileCounter()
    other = unfused_copy(net)
    # Compiled one by one, so that a module that does not change is not compiled again.
    f = nn.Sequential(*(torch.compile(m, fullgraph=True, backend=counter) for m in net))
    with torch.no_grad():
        f(x)
        for change in changes:
            before = f(x)
            for model in (net, other):
                change(model)
            for _ in range(2):
                got, want = f(x), other(x)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=change.__name__)
            same = got.shape == before.shape and (got - before).abs().max() < 1e-3
            assert not same, f"{change.__name__} changes nothing: it tests nothing"
    for a, b in zip(net.buffers(), other.buffers(), strict=True):
        close(a.double(), b.double())
    assert changes is not SEEN_BY_THE_OPERATOR or counter.frame_count == len(net)


@pytest.mark.filterwarnings("ignore:.*unfused:UserWarning")
def test_hooks_come_and_go() -> None:
    net, x, calls = fused(small), image(), []
    f = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        want = f(x)
        for inside in (net[0].bn_dw, net[1].cv1.bn, net[2].primary_conv[1]):
            handle = inside.register_forward_hook(lambda *_: calls.append(1))
            for _ in range(2):
                close(f(x), want)
            assert len(calls) == 2
            handle.remove()
            calls.clear()
            close(f(x), want)
            assert not calls


@pytest.mark.filterwarnings("ignore:.*unfused:UserWarning")
def test_a_change_of_shape_that_the_compiler_does_not_see() -> None:
    net = fused(small)
    f = torch.compile(net[2], fullgraph=True, backend="eager")
    with torch.no_grad():
        f(image())
        net[2].cheap_operation[2].register_forward_hook(lambda _, args, out: out[:, :2])
        with pytest.raises(RuntimeError, match="was changed after it was compiled"):
            f(image())


# --- changes inside the graph -----------------------------------------------------------------


def test_tensors_of_the_graph() -> None:
    """Parameters given by ``functional_call``, and changed before and after the call."""
    net, x = fused(small)[:2], image()
    state = {k: t * 1.1 for k, t in net.state_dict().items() if t.is_floating_point()}

    def given(net: nn.Module, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        first = functional_call(net, state, (x,))
        net[0].ghost1.primary_conv[0].weight.mul_(1.3)
        net[1].cv1.bn.running_var.add_(0.2)
        second = net(x)
        net[0].conv_dw.weight.mul_(1.3)
        net[1].cv1.bn.running_mean = net[1].cv1.bn.running_mean * 0.8
        return first, second, net(x)

    other, recorder = unfused_copy(net), Recorder()
    f = recorder.compile(given)
    with torch.no_grad():
        for _ in range(2):
            for got, want in zip(f(net, state, x), given(other, state, x), strict=True):
                close(got, want)
        close(net(x), other(x))
    assert recorder.graphs[0].count(OPERATOR) == 6


def test_modes_of_the_graph() -> None:
    """The graph itself switches the model from training to evaluation mode."""
    net, x = fused(small)[:2].train(), image()
    other, recorder = unfused_copy(net).eval(), Recorder()

    def evaluate(x: Tensor) -> Tensor:
        net.eval()
        return net(x)

    with torch.no_grad():
        close(recorder.compile(evaluate)(x), other(x))
    assert not net.training
    assert OPERATOR in recorder.graphs[0]
    for a, b in zip(net.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
def test_transforms() -> None:
    net, x = fused(small)[1:], image()
    with torch.no_grad():
        f = torch.compile(vmap(lambda i: net(i[None])[0]), fullgraph=True, backend="aot_eager")
        close(f(x), net(x))


# --- number of compilations -------------------------------------------------------------------


def test_cycles_of_training_and_evaluation() -> None:
    blocks = nn.Sequential(FusedGhostBottleneck(8, 12, 8), GhostConv(8, 8))
    net, counter = fused(lambda: blocks), CompileCounter()
    f = torch.compile(net, fullgraph=True, backend=counter)
    counts = []
    for _ in range(9):
        net.train()
        f(image()).sum().backward()
        net.eval()
        with torch.no_grad():
            assert torch.equal(f(image()), net(image()))
        net.to(torch.float32)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str) -> None:
    """A copy has its own weights and uses the compiled graph of the original."""
    net, x, counter = fused(small), image(), CompileCounter()
    with torch.no_grad():
        want = torch.compile(net, fullgraph=True, backend=counter)(x)
        other = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
        f = torch.compile(other, fullgraph=True, backend=counter)
        assert torch.equal(f(x), want)
        assert counter.frame_count == 1
        for model in (other, net):
            want = unfused_copy(net if model is other else other)(x)
            for layer in (model[0].conv_dw, model[1].cv1.conv, model[2].primary_conv[0]):
                layer.weight.mul_(1.5)
            close(f(x), unfused_copy(other)(x))
            close(net(x), unfused_copy(net)(x))
            close(net(x) if model is other else f(x), want)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_shallow_copy(index: int) -> None:
    module = fused(small)[index]
    other = copy.copy(module)
    assert other._ghost_handle.module() is other
    assert module._ghost_handle.module() is module


def test_from_reference_shares_the_children_alone() -> None:
    first = randomize(FusedGhostModule(8, 6)).eval()
    second = FusedGhostModule.from_reference(first)
    assert second._ghost_handle.module() is second
    with torch.no_grad():
        f = torch.compile(second, fullgraph=True, backend="eager")
        f(image())
        second.cheap_operation = randomize(copy.deepcopy(first.cheap_operation), 3)
        close(f(image()), unfused_copy(second)(image()))
        assert (f(image()) - first(image())).abs().max() > 1e-3


def test_unfuse() -> None:
    net, x = fused(small), image()
    f = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        want = f(x)
        ghost_ops.unfuse(net)
        assert not any("_ghost_handle" in m.__dict__ for m in net.modules())
        close(f(x), want)
        net[0].conv_dw.weight.mul_(1.5)
        close(f(x), net(x))
        ghost_ops.fuse(net)
        assert torch.equal(f(x), net(x))


# --- output and lifetime ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*unfused:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_of_unfused_modules(layout: str) -> None:
    """The operator copies an output that is a view in eager mode, in the layout of the graph."""
    net, x = fused(lambda: nn.Sequential(Sliced(8, 7))), with_layout(image(), layout)
    f = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = f(x)
        net[0].cheap_operation[0].register_forward_hook(lambda *_: None)
        assert net(x)._is_view()
        got = f(x)
        close(got, want)
        assert got.stride() == want.stride()
        assert not got._is_view()


def test_modules_are_collected() -> None:
    block = fused(small)[0]
    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend="eager")(image())
    key, shape = block._ghost_handle.key, block._ghost_state().form.shape(block)
    torch.compiler.reset()
    del block
    gc.collect()
    with pytest.raises(RuntimeError, match="does not exist any more"):
        torch.ops.ghost_ops.fused_inference(image(), [], key, *shape)
