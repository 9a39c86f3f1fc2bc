"""The module among PyTorch's other tools: compile, export, autocast, torch.func, copying, state
dicts, threads, training."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import running
from helpers import (
    LAYOUTS,
    Case,
    Params,
    close,
    make_input,
    make_module,
    oracle,
    plain,
    reference_like,
    same_bits,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

import ghost_ops
from ghost_ops import FusedGhostModule
from ghost_ops.reference import GhostBottleneck, GhostModule

CASE = Case(act2="silu")


# --- torch.compile ----------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 3])
def test_compile_training(backend: str, k: int, layout: str) -> None:
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
def test_compile_evaluation(backend: str) -> None:
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
        close(compiled(x), make_like(module)(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("native", "modules"), ("native", "library primary"), ("native", "bottlenecks"),
        # Traced through, operator by operator: the bottlenecks' graph alone takes 40 s.
        ("eager", "modules"),
        pytest.param("eager", "library primary", marks=pytest.mark.slow),
        pytest.param("eager", "bottlenecks", marks=pytest.mark.slow),
    ],
    indirect=["backend"],
)  # fmt: skip
def test_compile_training_for_every_batch_size(backend: str, kind: str) -> None:
    """Several modules in one graph, which share floats such as eps; one graph for all batches."""
    torch.manual_seed(0)
    net = {
        "modules": lambda: [FusedGhostModule(3, 8), FusedGhostModule(8, 6, activation="silu")],
        "library primary": lambda: [
            FusedGhostModule(3, 8, kernel_size=3, stride=2), FusedGhostModule(8, 6, relu=False)
        ],
        "bottlenecks": lambda: [
            ghost_ops.FusedGhostBottleneck(3, 8, 6, stride=2, se_ratio=0.25),
            ghost_ops.FusedGhostBottleneck(6, 8, 6),
        ],
    }[kind]()  # fmt: skip
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
    assert len(compilations) == 1  # all of it at the first batch
    # A changed setting is noticed.
    changed = []
    for model, f in ((net, compiled), (other, other)):
        ghost = next(m for m in model.modules() if isinstance(m, FusedGhostModule))
        ghost.primary_conv[1].eps = 0.5
        changed.append(f(x.detach()))
    torch.testing.assert_close(*changed, rtol=1e-9, atol=1e-10)


def make_like(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    other.forward = reference_like(other)  # type: ignore[method-assign]
    return other


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("which", ["native", pytest.param("eager", marks=pytest.mark.slow)])
def test_compile_with_inductor(which: str) -> None:
    """The default compiler in a small network that trains; eager's graph is much the larger."""
    with running(which):
        check_inductor()


def check_inductor() -> None:
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(FusedGhostModule(3, 8), FusedGhostModule(8, 6, relu=False))
        f = torch.compile(net, fullgraph=True) if compile_it else net
        x = torch.randn(2, 3, 8, 9).requires_grad_()
        f(x).square().mean().backward()
        results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_export(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    program = torch.export.export(module, (x,))
    close(program.module()(x), module(x))


# --- autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
@pytest.mark.parametrize("k", [1, 3])
def test_autocast(backend: str, k: int, mode: str, dtype: torch.dtype) -> None:
    case = CASE.replace(k=k, act1="silu")
    module, x = make_module(case).train(mode == "train"), make_input(case)
    other = copy.deepcopy(module)
    if mode == "eval":
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            got, want = module(x), reference_like(other)(x)
        assert got.dtype == want.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
        return
    grads = []
    for m, f in ((module, module), (other, reference_like(other))):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = f(leaf)
        assert out.dtype == dtype
        out.float().square().mean().backward()
        grads.append([leaf.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * (0.1 + b.abs().max().item()))
    for a, b in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_autocast_switched_off_inside(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    with torch.no_grad():
        outside = [module(x), module(x)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = [module(x), module(x)]
            with torch.autocast("cpu", enabled=False):
                inside = module(x)
        again = module(x)
    assert {t.dtype for t in low} == {torch.bfloat16}
    # The kept weights of one dtype are not used for another.
    assert all(same_bits(t, outside[0]) for t in (outside[1], inside, again))


# --- functional calls, copies, state ----------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call(backend: str, training: bool) -> None:
    module = make_module(CASE).train(training)
    other, x = make_module(CASE.replace(seed=9)).train(training), make_input(CASE)
    before = copy.deepcopy(module.state_dict())
    state = {name: t.clone() for name, t in other.state_dict().items()}
    with torch.no_grad():
        close(functional_call(module, state, (x,)), other(x))
        close(functional_call(module, state, (x,)), other(x))
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_functional_gradients(backend: str) -> None:
    """torch.func.grad over functional_call gives what backward gives."""
    module, x = make_module(CASE).eval(), make_input(CASE)
    params = {name: p.detach() for name, p in module.named_parameters()}
    module(x).square().sum().backward()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    out = functional_call(module, leaves, (x,)).square().sum()
    for (name, p), g in zip(
        module.named_parameters(), torch.autograd.grad(out, list(leaves.values())), strict=True
    ):
        close(g, p.grad, name)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("transform", ["grad", "vmap", "per-sample grad", "jacrev"])
def test_function_transforms(backend: str, transform: str, k: int) -> None:
    """torch.func differentiates and batches the module as it does its children."""
    case = CASE.replace(n=3, h=4, w=5, k=k, act1="silu", dtype=torch.float64)
    module, x = make_module(case).eval(), make_input(case)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def run(forward: Callable[..., Tensor]) -> dict[str, Tensor]:
        def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
            return forward(p, image[None]).square().sum()

        if transform == "grad":
            return torch.func.grad(lambda p: forward(p, x).square().sum())(params)
        if transform == "per-sample grad":
            return torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
        one = functools.partial(forward, params)
        if transform == "jacrev":
            return {"x": torch.func.jacrev(one)(x[:1])}
        return {"x": torch.func.vmap(lambda image: one(image[None])[0])(x)}

    def unfused(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(Unfused(module), {f"m.{name}": t for name, t in p.items()}, (image,))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of operators without a batching rule
        got = run(lambda p, image: functional_call(module, p, (image,)))
    for name, want in run(unfused).items():
        close(got[name], want, name)


class Unfused(nn.Module):
    """The children of a module, as a module."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return reference_like(self.m)(x)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_copies(backend: str, training: bool, how: str) -> None:
    module, x = make_module(CASE).train(training), make_input(CASE)
    with torch.no_grad():
        module(x)  # fills whatever cache there is
        if how == "deepcopy":
            other = copy.deepcopy(module)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(module))
        else:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert other.training == training
        assert same_bits(other(x), module(x))
        other.primary_conv[0].weight.zero_()
        other.eval(), module.eval()
        close(module(x), reference_like(module)(x), "the copy shares something")
        close(other(x), reference_like(other)(x), "the copy kept a cache")


def test_pickle_carries_no_cache(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    before = len(pickle.dumps(module))
    with torch.no_grad():
        module(x)
    assert len(pickle.dumps(module)) <= before + 64
    assert list(module.state_dict()) == list(GhostModule(5, 8).state_dict())


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_state_dict_to_and_from_the_reference(backend: str, training: bool, ratio: int) -> None:
    case = CASE.replace(ratio=ratio, act1="relu", act2="relu")
    ours, x = make_module(case).train(training), make_input(case)
    reference = GhostModule(5, 8, ratio=ratio).train(training)
    reference.load_state_dict(ours.state_dict())
    with torch.no_grad():
        close(ours(x), reference(x))
        again = FusedGhostModule(5, 8, ratio=ratio).train(training)
        again.load_state_dict(reference.state_dict())
        close(again(x), reference(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_reference(backend: str, training: bool) -> None:
    reference = make_module(CASE, GhostModule).train(training)
    fused, x = FusedGhostModule.from_reference(reference), make_input(CASE)
    assert isinstance(fused, FusedGhostModule)
    assert fused.training == training
    assert fused.oup == reference.oup
    for name, p in reference.named_parameters():
        assert fused.get_parameter(name) is p
    for name, b in reference.named_buffers():
        assert fused.get_buffer(name) is b
    with torch.no_grad():
        other = copy.deepcopy(reference)
        close(fused(x), other(x))
        for name, b in other.named_buffers():
            close(reference.get_buffer(name), b, name)
        reference.primary_conv[0].weight.mul_(2)
        close(fused.eval()(x), reference.eval()(x), "shared weights")


def test_from_reference_that_is_none() -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        FusedGhostModule.from_reference(nn.Linear(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversion_to_another_dtype(backend: str, dtype: torch.dtype) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    with torch.no_grad():
        module(x)
        module.to(dtype)
        got = module(x.to(dtype))
        assert got.dtype == dtype
        tolerance = 16 * torch.finfo(dtype).eps
        want = reference_like(module)(x.to(dtype))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        module.float()
        close(module(x), reference_like(module)(x), "and back")


def test_created_in_dtype_and_on_device() -> None:
    module = FusedGhostModule(5, 8, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in module.parameters())
    module = FusedGhostModule(5, 8, device="meta")
    assert all(p.is_meta for p in module.parameters())
    out = module(torch.randn(2, 5, 6, 7, device="meta"))
    assert out.is_meta
    assert out.shape == (2, 8, 6, 7)


def test_channels_last_module(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE.replace(layout="nhwc"))
    with torch.no_grad():
        want = module(x)
        module.to(memory_format=torch.channels_last)
        close(module(x), want)


# --- threads, repr, training ------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_many_threads_use_one_module(backend: str, training: bool) -> None:
    case = Case(2, 8, 17, 19, 12)
    module = make_module(case).eval()
    inputs = [make_input(case, seed) for seed in range(16)]

    def work(x: Tensor) -> Tensor:
        if training:  # gradients of a frozen module: nothing shared is written
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(module(leaf).sum(), leaf)[0]
        with torch.no_grad():
            return module(x)

    want = [work(x) for x in inputs]
    fresh = copy.deepcopy(module)  # its cache is empty: the threads fill it
    module = fresh
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for got, expected in zip(pool.map(work, inputs), want, strict=True):
                assert same_bits(got, expected)


def test_repr_names_the_backend(backend: str) -> None:
    text = repr(make_module(CASE))
    assert text.startswith("FusedGhostModule(")
    assert backend in text
    assert "Conv2d" in text
    assert "BatchNorm2d" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_the_same_way(backend: str, layout: str) -> None:
    """A small network with bottlenecks, 12 steps of SGD: fused and reference stay together."""

    def network(fused: bool) -> nn.Module:
        torch.manual_seed(5)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            GhostBottleneck(8, 16, 8), GhostBottleneck(8, 24, 12, stride=2, se_ratio=0.25),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        ).double()  # fmt: skip
        if fused:
            for block in net:
                if isinstance(block, GhostBottleneck):
                    block.ghost1 = FusedGhostModule.from_reference(block.ghost1)
                    block.ghost2 = FusedGhostModule.from_reference(block.ghost2)
        return net

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 14, 14, generator=gen, dtype=torch.float64)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.arange(16) % 4
    curves = []
    for fused in (False, True):
        net = network(fused)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        losses = []
        for _ in range(12):
            loss = nn.functional.cross_entropy(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        net.eval()
        with torch.no_grad():
            losses += net(x).flatten().tolist()
        curves.append(torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-6, atol=1e-8)
    assert curves[0][11] < curves[0][0]


def test_gradient_checkpointing(backend: str) -> None:
    module, x = make_module(CASE).double(), make_input(CASE).double().requires_grad_()
    want = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_gives_what_the_module_gives(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    p = Params.of(module)
    with torch.no_grad():
        got = ghost_ops.functional.ghost_module(
            x, p.w1, p.w2,
            primary_bn_weight=p.bn1.gamma, primary_bn_bias=p.bn1.beta,
            primary_running_mean=p.bn1.mean, primary_running_var=p.bn1.var,
            cheap_bn_weight=p.bn2.gamma, cheap_bn_bias=p.bn2.beta,
            cheap_running_mean=p.bn2.mean, cheap_running_var=p.bn2.var,
            activation="relu", cheap_activation="silu",
        )  # fmt: skip
        close(got, plain(p, x, CASE, False))
        want = oracle(p.to(torch.float64), x.double(), CASE, False).out
        close(got.double(), want)
