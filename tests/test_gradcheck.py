"""First and second derivatives against finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, make_input, make_module
from torch import Tensor
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
    # No running statistics to update: finite differences call the function many times.
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
    from helpers import make_smooth

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
    """The use that double backward exists for, against the children run one by one."""
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
