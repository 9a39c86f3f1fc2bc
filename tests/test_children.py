"""Promise: a fused module follows every change of its children (values, layers, computed weights,
hooks) at the next call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import Case, Params, close, make_input, make_module, reference_like
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import ghost_ops
from ghost_ops import FusedGhostModule

CASE = Case(act2="silu")

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
    """Another module with the same children and its own packed weights."""
    twin = FusedGhostModule.from_reference(module).train()
    twin(make_input(CASE, 11) * 3)
    twin.eval()


def train_through_the_function(module: nn.Module) -> None:
    """A batch norm that updates its statistics and not the count of batches."""
    p = Params.of(module)
    ghost_ops.ghost_module(
        make_input(CASE, 11) * 3,
        p.w1,
        p.w2,
        training=True,
        primary_running_mean=p.bn1.mean,
        primary_running_var=p.bn1.var,
        cheap_running_mean=p.bn2.mean,
        cheap_running_var=p.bn2.var,
    )


def train_the_norms_alone(module: nn.Module) -> None:
    """Some recipes set single batch norms to training: these use batch statistics from then on."""
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
    sgd_step,
    foreach_adam_step,
    load_other_state,
    assign_other_state,
    train_one_step,
    train_a_twin,
    train_through_the_function,
    train_the_norms_alone,
    forget_the_running_statistics,
    train_one_step_unfused,
    edit_through_data,
    new_parameter,
    new_eps,
    new_activation,
    new_batch_norm,
    other_convolution,
    replaced_branch,
    reset_statistics,
    edit("primary_conv.0", "weight"),
    edit("primary_conv.1", "weight"),
    edit("primary_conv.1", "bias"),
    edit("primary_conv.1", "running_mean"),
    edit("primary_conv.1", "running_var"),
    edit("cheap_operation.0", "weight"),
    edit("cheap_operation.1", "weight"),
    edit("cheap_operation.1", "bias"),
    edit("cheap_operation.1", "running_mean"),
    edit("cheap_operation.1", "running_var"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "grad"])
def test_changes_are_noticed(backend: str, mode: str, change: Callable[[nn.Module], None]) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    guard = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "grad": torch.enable_grad,
    }[mode]
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
    # In float64: behind a batch norm the gradient of a weight's length cancels to zero.
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
    module(x).sum().backward()  # a call that caches whatever it can
    with torch.no_grad():
        module(x)
    other = copy.deepcopy(module)
    sub = module.get_submodule(child)
    calls = []

    def hook(*args: object) -> None:
        calls.append(args)

    register = {
        "forward": sub.register_forward_hook,
        "pre": sub.register_forward_pre_hook,
        "full backward": sub.register_full_backward_hook,
    }[kind]
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


@pytest.mark.usefixtures("unsaid")
def test_hooks_are_announced_once(native: str) -> None:
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
        warnings.simplefilter("error")  # a fallback would warn
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
    """Weight standardisation in an overridden ``_conv_forward``."""

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
    """torchvision's detection models do this."""
    module.primary_conv[1] = nn.Sequential(module.primary_conv[1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change",
    [
        unknown_activation,
        standardized_convolution,
        subclassed_convolution,
        instance_norm,
        convolution_with_bias,
        cheap_convolution_with_bias,
        reflecting_padding,
        dilated,
        other_padding,
        full_cheap_convolution,
        four_children,
        rectangular,
        frozen_batch_norm,
    ],
    ids=lambda f: f.__name__,
)
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
