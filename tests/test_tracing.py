"""Promise: PyTorch's compilers and tracers give a fused model's numbers.

torch.compile in training and evaluation, CUDA graphs, torch.fx and TorchScript. The single operator
that a compiled inference graph contains is in ``test_compile``; exporters are in ``test_export``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import running
from helpers import LAYOUTS, Case, close, make_input, make_module, reference_like
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from twins import (
    FEW,
    REWRITTEN,
    TRAINING,
    agree,
    all_close,
    image,
    images,
    made,
    observe,
    same,
    setting,
    small_network,
    training_step,
    twins,
)

import ghost_ops
from ghost_ops import FusedGhostModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs its own forward"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CASE = Case(act2="silu")


# --- torch.compile ----------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 3])
def test_compile_training_of_a_module(backend: str, k: int, layout: str) -> None:
    """aot_eager traces forward and backward, fakes included, without generating code."""
    case = CASE.replace(k=k, layout=layout, dtype=torch.float64)
    results = []
    for compiled in (False, True):
        module, x = make_module(case), make_input(case).requires_grad_()
        f = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        for _ in range(2):
            out = f(x)
            out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_evaluation_of_a_module(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x), module(x))
        # A changed parameter is noticed by the compiled module as well.
        module.primary_conv[0].weight.mul_(1.5)
        close(compiled(x), module(x), "after a change")
        close(compiled(x), reference_like(module)(x), "after a change")
    x.requires_grad_()
    compiled(x).sum().backward()
    want = torch.autograd.grad(reference_like(module)(x).sum(), x)[0]
    close(x.grad, want, "frozen")


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_other_sizes(backend: str) -> None:
    module = make_module(CASE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for h, w in ((6, 7), (9, 4), (12, 12)):
        x = torch.randn(3, 5, h, w)
        close(compiled(x), reference_like(copy.deepcopy(module))(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("native", "modules"),
        ("native", "library primary"),
        ("native", "bottlenecks"),
        # The eager backend is traced operator by operator: the bottlenecks' graph takes 40 s.
        ("eager", "modules"),
        pytest.param("eager", "library primary", marks=pytest.mark.slow),
        pytest.param("eager", "bottlenecks", marks=pytest.mark.slow),
    ],
    indirect=["backend"],
)
def test_compile_training_for_every_batch_size(backend: str, kind: str) -> None:
    """Modules that share constants such as eps: one graph for all and for any batch size."""
    torch.manual_seed(0)
    net = {
        "modules": lambda: [FusedGhostModule(3, 8), FusedGhostModule(8, 6, activation="silu")],
        "library primary": lambda: [
            FusedGhostModule(3, 8, kernel_size=3, stride=2),
            FusedGhostModule(8, 6, relu=False),
        ],
        "bottlenecks": lambda: [
            ghost_ops.FusedGhostBottleneck(3, 8, 6, stride=2, se_ratio=0.25),
            ghost_ops.FusedGhostBottleneck(6, 8, 6),
        ],
    }[kind]()
    net = nn.Sequential(*net).double()
    other = copy.deepcopy(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    compilations = set()
    for n in (4, 7, 2):
        results = []
        for model, f in ((net, compiled), (other, other)):
            x = make_input(Case(n, 3, 8, 9, dtype=torch.float64)).requires_grad_()
            out = f(x)
            model.zero_grad()
            out.square().sum().backward()
            results.append([out, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # nothing is compiled after the first batch
    # A changed setting is noticed.
    changed = []
    for model, f in ((net, compiled), (other, other)):
        ghost = next(m for m in model.modules() if isinstance(m, FusedGhostModule))
        ghost.primary_conv[1].eps = 0.5
        changed.append(f(x.detach()))
    torch.testing.assert_close(*changed, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("which", ["native", pytest.param("eager", marks=pytest.mark.slow)])
def test_inductor_of_modules(which: str) -> None:
    """PyTorch's default compiler on two modules that train."""
    results = []
    with running(which):
        for compiled in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(FusedGhostModule(3, 8), FusedGhostModule(8, 6, relu=False))
            f = torch.compile(net, fullgraph=True) if compiled else net
            x = torch.randn(2, 3, 8, 9).requires_grad_()
            f(x).square().mean().backward()
            results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_training_of_a_network(native: str) -> None:
    """Fullgraph, with a batch that changes: compiled once for one, and once for all others."""
    model = small_network().double()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (3, 5, 7):
        x = images(n, torch.float64)
        all_close(training_step(compiled, x, model), training_step(other, x, other))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_evaluation_of_a_network(native: str) -> None:
    model = small_network().double().eval()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n in (3, 5, 7):
            x = images(n, torch.float64)
            all_close([compiled(x)], [other(x)])
        model[5].cv1.conv.weight.mul_(1.5)
        other[5].cv1.conv.weight.mul_(1.5)
        all_close([compiled(x)], [other(x)])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_of_a_network(native: str) -> None:
    model = small_network()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    all_close(training_step(compiled, images(), model), training_step(other, images(), other), 1e-4)


def double_a_hook(model: nn.Module) -> None:
    model.primary_conv[0].register_forward_hook(lambda _m, _i, out: out * 2)


BEFORE_OR_AFTER: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "hook": ("authors", double_a_hook),
    "activation": ("authors", setting("primary_conv.2", nn.SiLU)),
    "eps": ("authors", setting("primary_conv.1.eps", lambda: 0.5)),
    "forward": ("Ultralytics", setting("cv1.act.forward", lambda: torch.tanh)),
    "width": ("FusedGhostModule", setting("oup", lambda: 6)),
    "slope": ("functional activation", setting("slope", lambda: 0.4)),
    "rate": ("dropout after", setting("out.0.p", lambda: 0.5)),
    "norm": ("bottleneck, stride 2, gated", setting("bn_dw.eps", lambda: 0.5)),
    "no gate": ("bottleneck, stride 2, gated", setting("se", lambda: None)),
    "pooling": ("network", setting("global_pool", lambda: nn.AdaptiveMaxPool2d(1))),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", BEFORE_OR_AFTER)
@pytest.mark.parametrize("when", ["before", "after"])
@TRAINING
def test_compiled_before_or_after_a_change(name: str, when: str, training: bool) -> None:
    family, change = BEFORE_OR_AFTER[name]
    if name == "hook" and when == "after":
        pytest.skip("PyTorch's compiler does not look for hooks after its first call")
    backend = "aot_eager" if (when == "after") == training else "eager"
    fused, plain = twins(family, training)
    compiled = torch.compile(fused, backend=backend)

    def compare() -> None:
        got = observe(fused, image(), compiled, grad=training)
        same(got, observe(plain, image(), grad=training))

    if when == "after":
        compare()
    for model in (fused, plain):
        change(model)
    compare()


# --- CUDA graphs ------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_graph() -> None:
    model = small_network().cuda().eval()
    x = images().cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(images(3).cuda() * 2)
        graph.replay()
        torch.testing.assert_close(out, model(x))


# --- torch.fx and TorchScript -----------------------------------------------------------------


SCRIPTABLE = ("authors", "NanoDet", "timm, linear", "Ultralytics", "Ultralytics, k=3 s=2")
SCRIPTABLE += ("convolutions with biases", "flat")


@TRAINING
@pytest.mark.parametrize("family", [*FEW, *REWRITTEN, "bottleneck", "GhostModuleV2"])
def test_symbolic_trace(family: str, training: bool) -> None:
    fused, plain = twins(family, training)
    for _ in range(2):  # cold and warm
        traced = torch.fx.symbolic_trace(fused)
        for grad in (True, False):
            same(observe(fused, image(), traced, grad=grad), observe(plain, image(), grad=grad))
        agree(fused, plain)


@TRAINING
@pytest.mark.parametrize("family", SCRIPTABLE)
def test_script(family: str, training: bool) -> None:
    fused, plain = twins(family, training)
    for _ in range(2):
        scripted = torch.jit.script(fused)
        for grad in (True, False):
            same(observe(fused, image(), scripted, grad=grad), observe(plain, image(), grad=grad))
        agree(fused, plain)


@pytest.mark.parametrize("family", [*FEW, *REWRITTEN, "GhostModuleV2"])
def test_trace(family: str) -> None:
    fused, plain = twins(family)
    for _ in range(2):
        with torch.no_grad():
            traced = torch.jit.trace(fused, image())
        for x in (image(), image(2, 9, 10)):
            same(observe(fused, x, traced, grad=False), observe(plain, x, grad=False))
        agree(fused, plain)


@pytest.mark.parametrize("tool", ["script", "trace", "symbolic_trace"])
@pytest.mark.parametrize("family", ["authors", "Ultralytics", "flat"])
def test_traced_modules_are_not_fused(family: str, tool: str) -> None:
    plain, other = made(family), copy.deepcopy(made(family)).eval()
    tools = {
        "script": torch.jit.script,
        "trace": lambda m: torch.jit.trace(m, image()),
        "symbolic_trace": torch.fx.symbolic_trace,
    }
    made_by_tool = tools[tool](other)
    model = nn.Sequential(made_by_tool)
    with pytest.warns(UserWarning, match="fuse found no Ghost module"):
        ghost_ops.fuse(model)
    assert not ghost_ops.report(model).in_state("fused")
    assert model[0] is made_by_tool
    agree(model, nn.Sequential(copy.deepcopy(plain).eval()))
