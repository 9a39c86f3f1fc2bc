"""The module among PyTorch's other tools: compile, autocast, functional_call, copying, hooks,
parametrisations, caches that must notice changes, threads."""

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
from helpers import LAYOUTS, Case, Params, make_input, make_module, oracle, plain, same_bits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

import ghost_ops
from ghost_ops import FusedGhostModule
from ghost_ops.reference import GhostBottleneck, GhostModule

CASE = Case(act2="silu")


def reference_like(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The children of a module, one after the other, with its present parameters."""

    def forward(x: Tensor) -> Tensor:
        y = module.primary_conv(x)
        return torch.cat([y, module.cheap_operation(y)], 1)[:, : module.oup]

    return forward


def close(a: Tensor, b: Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m: f"{what}: {m}")


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


# --- caches notice every change ---------------------------------------------------------------


def sgd_step(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.05).step()
    module.zero_grad()


def foreach_adam_step(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(module.parameters(), lr=0.05, foreach=True).step()
    module.zero_grad()


def load_other_state(module: nn.Module) -> None:
    module.load_state_dict(make_module(CASE.replace(seed=7)).state_dict())


def assign_other_state(module: nn.Module) -> None:
    module.load_state_dict(make_module(CASE.replace(seed=7)).state_dict(), assign=True)


def train_one_step(module: nn.Module) -> None:
    module.train()
    module(make_input(CASE, 11) * 3)
    module.eval()


def train_a_twin(module: nn.Module) -> None:
    """Another module over the same children, whose cache is another one."""
    twin = FusedGhostModule.from_reference(module).train()
    twin(make_input(CASE, 11) * 3)
    twin.eval()


def train_through_the_function(module: nn.Module) -> None:
    """Which updates the statistics but not the count of batches."""
    p = Params.of(module)
    ghost_ops.ghost_module(
        make_input(CASE, 11) * 3, p.w1, p.w2, training=True,
        primary_running_mean=p.bn1.mean, primary_running_var=p.bn1.var,
        cheap_running_mean=p.bn2.mean, cheap_running_var=p.bn2.var,
    )  # fmt: skip


def train_the_norms_alone(module: nn.Module) -> None:
    """Batch norms set to training one by one, as some recipes do: batch statistics from now on."""
    module.primary_conv[1].train()
    module.cheap_operation[1].train()


def forget_the_running_statistics(module: nn.Module) -> None:
    for bn in (module.primary_conv[1], module.cheap_operation[1]):
        bn.track_running_stats = False
        bn.running_mean = bn.running_var = None


def train_one_step_unfused(module: nn.Module) -> None:
    module.train()
    reference_like(module)(make_input(CASE, 11) * 3)
    module.eval()


def edit(path: str, name: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        with torch.no_grad():
            getattr(module.get_submodule(path), name).mul_(1.7).add_(0.1)

    change.__name__ = f"edit_{path}.{name}"
    return change


def edit_through_data(module: nn.Module) -> None:
    module.primary_conv[0].weight.data = module.primary_conv[0].weight.data * 2


def new_parameter(module: nn.Module) -> None:
    module.cheap_operation[0].weight = nn.Parameter(torch.randn(4, 1, 3, 3))


def new_eps(module: nn.Module) -> None:
    module.primary_conv[1].eps = 0.7


def new_activation(module: nn.Module) -> None:
    module.primary_conv[2] = nn.Hardswish()


def new_batch_norm(module: nn.Module) -> None:
    module.cheap_operation[1] = nn.BatchNorm2d(4).eval()


def other_convolution(module: nn.Module) -> None:
    module.primary_conv[0] = nn.Conv2d(5, 4, 3, 1, 1, bias=False)


def replaced_branch(module: nn.Module) -> None:
    other = make_module(CASE.replace(seed=7)).eval()
    module.cheap_operation = other.cheap_operation


def reset_statistics(module: nn.Module) -> None:
    module.primary_conv[1].reset_running_stats()


CHANGES = [
    sgd_step, foreach_adam_step, load_other_state, assign_other_state, train_one_step,
    train_a_twin, train_through_the_function, train_the_norms_alone, forget_the_running_statistics,
    train_one_step_unfused, edit_through_data, new_parameter, new_eps, new_activation,
    new_batch_norm, other_convolution, replaced_branch, reset_statistics,
    edit("primary_conv.0", "weight"), edit("primary_conv.1", "weight"),
    edit("primary_conv.1", "bias"), edit("primary_conv.1", "running_mean"),
    edit("primary_conv.1", "running_var"), edit("cheap_operation.0", "weight"),
    edit("cheap_operation.1", "weight"), edit("cheap_operation.1", "bias"),
    edit("cheap_operation.1", "running_mean"), edit("cheap_operation.1", "running_var"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "grad"])
def test_changes_are_noticed(backend: str, mode: str, change: Callable[[nn.Module], None]) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
             "grad": torch.enable_grad}[mode]  # fmt: skip
    with guard():
        before = module(x)
        module(x)
    change(module)
    with guard():
        got, want = module(x), reference_like(module)(x)
    close(got, want)
    assert (got - before).abs().max() > 1e-3, "the change changes nothing: it tests nothing"


def test_two_modules_share_weights_but_not_statistics(backend: str) -> None:
    a, x = make_module(CASE).eval(), make_input(CASE)
    b = make_module(CASE.replace(seed=7)).eval()
    b.primary_conv[0].weight = a.primary_conv[0].weight
    b.cheap_operation[0].weight = a.cheap_operation[0].weight
    with torch.no_grad():
        for _ in range(2):
            close(a(x), reference_like(a)(x))
            close(b(x), reference_like(b)(x))


# --- parametrised weights ---------------------------------------------------------------------


def test_weight_norm(backend: str) -> None:
    # In float64, because behind a batch norm the gradient of a weight's length cancels to nothing.
    case = CASE.replace(dtype=torch.float64)
    module, x = make_module(case), make_input(case)
    torch.nn.utils.parametrizations.weight_norm(module.primary_conv[0])
    torch.nn.utils.parametrizations.weight_norm(module.cheap_operation[0])
    grads = []
    for f in (module, reference_like(module)):
        module.zero_grad()
        f(x).square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    assert len(grads[0]) == 8
    for a, b in zip(*grads, strict=True):
        close(a, b)
    module.eval()
    with torch.no_grad():
        close(module(x), reference_like(module)(x))
        module.primary_conv[0].parametrizations.weight.original0.mul_(2)
        close(module(x), reference_like(module)(x), "after a change of the original")


def test_parametrize(backend: str) -> None:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return (w + w.transpose(-1, -2)) / 2

    module, x = make_module(CASE).eval(), make_input(CASE)
    parametrize.register_parametrization(module.cheap_operation[0], "weight", Symmetric())
    with torch.no_grad():
        for _ in range(2):
            close(module(x), reference_like(module)(x))
            module.cheap_operation[0].parametrizations.weight.original.add_(0.3)
    with parametrize.cached(), torch.no_grad():
        close(module(x), reference_like(module)(x))


def test_pruning(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    prune.random_unstructured(module.primary_conv[0], "weight", 0.5)
    prune.l1_unstructured(module.cheap_operation[0], "weight", 0.3)
    with torch.no_grad(), warnings.catch_warnings():
        # Pruning recomputes the weight in a forward pre-hook, so the children run one by one.
        warnings.simplefilter("ignore")
        close(module(x), reference_like(module)(x))
        module.primary_conv[0].weight_orig.mul_(2)
        close(module(x), reference_like(module)(x), "after a change of the original")
    prune.remove(module.primary_conv[0], "weight")
    prune.remove(module.cheap_operation[0], "weight")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        close(module(x), reference_like(module)(x), "after the masks became permanent")
    assert (module.primary_conv[0].weight == 0).sum() == 10


# --- hooks ------------------------------------------------------------------------------------

BRANCHES = ("primary_conv", "cheap_operation")
CHILDREN = [*BRANCHES, *(f"{branch}.{i}" for branch in BRANCHES for i in range(3))]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("kind", ["forward", "pre", "full backward"])
def test_hooks_of_children_fire(backend: str, kind: str, child: str, training: bool) -> None:
    module, x = make_module(CASE).train(training), make_input(CASE).requires_grad_()
    module(x).sum().backward()  # as it is called before, whatever is remembered of it
    with torch.no_grad():
        module(x)
    other = copy.deepcopy(module)
    sub = module.get_submodule(child)
    calls = []

    def hook(*args: object) -> None:
        calls.append(args)

    register = {"forward": sub.register_forward_hook, "pre": sub.register_forward_pre_hook,
                "full backward": sub.register_full_backward_hook}[kind]  # fmt: skip
    handle = register(hook)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = module(x)
        out.sum().backward()
    assert len(calls) == 1
    close(out, reference_like(other)(x))
    handle.remove()
    module(x).sum().backward()
    assert len(calls) == 1


def test_a_hook_can_change_the_result(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    with torch.no_grad():
        assert module(x)[:, :4].any()
    module.primary_conv.register_forward_hook(lambda _m, _i, out: out * 0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not module(x)[:, :4].any()


def test_hooks_are_announced_once(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost_ops.nn, "_announced", set())  # other tests had their turn
    module, x = make_module(CASE).eval(), make_input(CASE)
    module.primary_conv[0].register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            module(x)
    ours = [w for w in caught if "hook" in str(w.message)]
    assert len(ours) == 1
    assert issubclass(ours[0].category, UserWarning)


def test_hooks_of_the_module_itself(backend: str) -> None:
    module, x = make_module(CASE), make_input(CASE)
    seen = []
    module.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback for these
        out = module(x)
    assert len(seen) == 1
    assert seen[0] is out


def test_global_hooks_fire(backend: str) -> None:
    module, x = make_module(CASE), make_input(CASE)
    module(x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, _i, _o: seen.append(m))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(x)
    finally:
        handle.remove()
    assert module.primary_conv[0] in seen
    assert module.cheap_operation[1] in seen
    assert module in seen


# --- children the kernels do not know ---------------------------------------------------------


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    """Weight standardisation, in the method that such layers override."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight, bias)


def standardized_convolution(module: nn.Module) -> None:
    module.primary_conv[0] = Standardized(5, 4, 1, bias=False)


def unknown_activation(module: nn.Module) -> None:
    module.primary_conv[2] = nn.Tanh()


def subclassed_convolution(module: nn.Module) -> None:
    conv = Doubled(5, 4, 1, bias=False)
    module.primary_conv[0] = conv


def instance_norm(module: nn.Module) -> None:
    module.cheap_operation[1] = nn.InstanceNorm2d(4)


def convolution_with_bias(module: nn.Module) -> None:
    module.primary_conv[0] = nn.Conv2d(5, 4, 1)


def cheap_convolution_with_bias(module: nn.Module) -> None:
    module.cheap_operation[0] = nn.Conv2d(4, 4, 3, 1, 1, groups=4)


def reflecting_padding(module: nn.Module) -> None:
    module.cheap_operation[0] = nn.Conv2d(
        4, 4, 3, 1, 1, groups=4, bias=False, padding_mode="reflect"
    )


def dilated(module: nn.Module) -> None:
    module.cheap_operation[0] = nn.Conv2d(4, 4, 3, 1, 2, dilation=2, groups=4, bias=False)


def other_padding(module: nn.Module) -> None:
    module.primary_conv[0] = nn.Conv2d(5, 4, 1, padding=1, bias=False)


def full_cheap_convolution(module: nn.Module) -> None:
    module.cheap_operation[0] = nn.Conv2d(4, 4, 3, 1, 1, bias=False)


def four_children(module: nn.Module) -> None:
    module.primary_conv.append(nn.Dropout(0.0))


def rectangular(module: nn.Module) -> None:
    module.cheap_operation[0] = nn.Conv2d(4, 4, (3, 5), 1, (1, 2), groups=4, bias=False)


def frozen_batch_norm(module: nn.Module) -> None:
    """As torchvision's detection models do."""
    module.primary_conv[1] = nn.Sequential(module.primary_conv[1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change",
    [unknown_activation, standardized_convolution, subclassed_convolution, instance_norm,
     convolution_with_bias,
     cheap_convolution_with_bias, reflecting_padding, dilated, other_padding,
     full_cheap_convolution, four_children, rectangular, frozen_batch_norm],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_unusual_children_compute_what_they_say(
    backend: str, change: Callable[[nn.Module], None], training: bool
) -> None:
    torch.manual_seed(1)
    module, x = make_module(CASE), make_input(CASE)
    change(module)
    module.train(training)
    other = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(module(x), reference_like(other)(x))
    for (name, a), b in zip(module.named_buffers(), other.buffers(), strict=True):
        close(a, b, name)


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
