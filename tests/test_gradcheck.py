"""Promise: first and second derivatives agree with finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, autograd_nodes, covering, make_input, make_module, make_smooth
from torch import Tensor, nn
from torch.func import functional_call

CASES = [
    Case(2, 3, 3, 4, 5, act1="silu", act2="gelu"),
    Case(2, 2, 3, 3, 4, ratio=3, d=5, act1="gelu_tanh", act2="silu", layout="nhwc"),
    Case(2, 3, 4, 3, 3, stride=2, act1="none", act2="none", d=1),
    Case(2, 2, 3, 3, 3, ratio=1, act1="silu"),
    Case(1, 2, 4, 3, 3, k=3, stride=2, act1="silu", act2="none"),
    Case(2, 4, 2, 3, 4, groups=2, act1="none", act2="silu"),
    Case(2, 2, 3, 3, 1, ratio=3, act1="silu", act2="silu"),
]
KINKED = [
    Case(2, 2, 3, 3, 4, act1="relu", act2="leaky_relu"),
    Case(2, 2, 3, 3, 4, act1="relu6", act2="hardswish"),
    Case(2, 2, 3, 3, 4, act1="hardswish", act2="relu", layout="nhwc"),
]
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])


def function(case: Case, training: bool) -> tuple[object, tuple[Tensor, ...]]:
    case = case.replace(dtype=torch.float64)
    module = make_module(case).train(training)
    # Finite differences call the function many times: running statistics must not move.
    if training:
        for branch in (module.primary_conv, module.cheap_operation):
            branch[1].momentum = 0.0
    params = dict(module.named_parameters())
    if case.ratio == 1:
        params = {name: p for name, p in params.items() if name.startswith("primary")}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(params, values, strict=True)), (x,))

    x = make_input(case).requires_grad_()
    return call, (x, *(p.detach().clone().requires_grad_() for p in params.values()))


def away_from_kinks(case: Case, training: bool) -> Case:
    return make_smooth(case.replace(dtype=torch.float64), training, margin=1e-3)[0]


@MODES
@pytest.mark.parametrize("case", [*CASES, *KINKED], ids=str)
def test_gradcheck(backend: str, case: Case, training: bool) -> None:
    call, inputs = function(away_from_kinks(case, training), training)
    assert torch.autograd.gradcheck(call, inputs, atol=1e-6, rtol=1e-4, nondet_tol=0.0)


@MODES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(backend: str, case: Case, training: bool) -> None:
    call, inputs = function(case, training)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-5, rtol=1e-3, fast_mode=True)


@MODES
def test_gradient_penalty(backend: str, training: bool) -> None:
    """A loss on the gradient of x, against the children run one by one."""
    case = Case(dtype=torch.float64, act1="silu", act2="silu")
    grads = []
    for fused in (True, False):
        module = make_module(case).train(training)
        x = make_input(case).requires_grad_()
        if fused:
            out = module(x)
        else:
            y = module.primary_conv(x)
            out = torch.cat([y, module.cheap_operation(y)], 1)[:, : module.oup]
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (dx.square().sum() + out.sum()).backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


# Small modules with every kind of norm in each branch, with and without parameters and PReLUs.
NORMS = ("batch", "frozen", "untracked", "missing")
COMBINATIONS = covering(
    {
        "norm1": NORMS,
        "norm2": NORMS,
        "act1": ("one", "many", "silu"),
        "act2": ("one", "many", "silu"),
        "affine": (True, False),
        "shape": ("plain", "sliced", "strided", "library"),
        "layout": ("nchw", "nhwc"),
    }
)
SHAPES = {
    "plain": Case(2, 2, 3, 3, 4),
    "sliced": Case(2, 2, 3, 3, 4, ratio=3),
    "strided": Case(2, 3, 4, 5, 4, stride=2),
    "library": Case(2, 2, 4, 4, 4, k=3),
}


def combined(row: dict[str, object], seed: int) -> tuple[Case, nn.Module, Tensor]:
    """The module and the input of a row."""
    case = SHAPES[str(row["shape"])].replace(
        dtype=torch.float64, act1="silu", act2="silu", seed=seed, layout=str(row["layout"])
    )
    module = make_module(case).train()
    for which, (branch, channels) in enumerate(
        ((module.primary_conv, case.m), (module.cheap_operation, case.g)), 1
    ):
        kind, act, old = row[f"norm{which}"], row[f"act{which}"], branch[1]
        if kind == "missing":
            branch[1] = nn.Identity()
        else:
            tracked = kind != "untracked"
            options = {"affine": row["affine"], "track_running_stats": tracked, "momentum": 0.0}
            bn = nn.BatchNorm2d(channels, **options, dtype=torch.float64)
            bn.load_state_dict({k: old.state_dict()[k] for k in bn.state_dict()})
            branch[1] = bn.train(kind != "frozen")
        if act != "silu":
            branch[2] = nn.PReLU(1 if act == "one" else channels, dtype=torch.float64)
            with torch.no_grad():
                branch[2].weight.uniform_(-0.7, 0.7)
    return case, module, make_input(case)


def off_zero(module: nn.Module, x: Tensor) -> float:
    """The smallest distance of the argument of a PReLU from 0."""
    found = [float("inf")]
    with torch.no_grad():
        y = x
        for branch in (module.primary_conv, module.cheap_operation):
            for layer in branch:
                if isinstance(layer, nn.PReLU):
                    found.append(y.abs().min().item())
                y = layer(y)
    return min(found)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda r: "-".join(map(str, r.values())))
def test_combinations(backend: str, row: dict[str, object], order: int) -> None:
    """First and second derivatives of combinations of norms and activations that run fused."""
    for seed in range(200):
        _, module, x = combined(row, seed)
        if off_zero(module, x) > 2e-3:
            break
    else:
        raise AssertionError("no draw stays away from the kinks")
    params = dict(module.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(params, values, strict=True)), (x,))

    inputs = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in params.values()))
    assert "GhostModuleFunctionBackward" in autograd_nodes(call(*inputs))
    if order == 1:
        assert torch.autograd.gradcheck(call, inputs, atol=1e-6, rtol=1e-4, nondet_tol=0.0)
    else:
        assert torch.autograd.gradgradcheck(call, inputs, atol=1e-5, rtol=1e-3, fast_mode=True)
