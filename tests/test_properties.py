"""Promise: random configurations give the oracle's numbers and obey general laws."""

from __future__ import annotations

import pytest
import torch
from conftest import EVERY_ISA, running
from helpers import (
    ACTIVATIONS,
    LAYOUTS,
    Case,
    Params,
    assert_close,
    make_input,
    make_module,
    make_smooth,
    oracle,
    plain,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from module_checks import check_training

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SMOOTH = ("none", "silu", "gelu", "gelu_tanh")


@st.composite
def cases(draw: st.DrawFn, acts: tuple[str, ...] = ACTIVATIONS) -> Case:
    return Case(
        n=draw(st.integers(1, 5)),
        c=draw(st.integers(1, 70)),
        h=draw(st.integers(1, 40)),
        w=draw(st.integers(1, 40)),
        oup=draw(st.integers(1, 70)),
        ratio=draw(st.integers(1, 6)),
        d=draw(st.sampled_from((1, 3, 5, 7))),
        stride=draw(st.integers(1, 2)),
        act1=draw(st.sampled_from(acts)),
        act2=draw(st.sampled_from(acts)),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64))),
        seed=draw(st.integers(0, 9)),
    )


@pytest.mark.parametrize("which", EVERY_ISA)
@SETTINGS
@given(case=cases())
def test_forward(which: str, case: Case) -> None:
    with running(which), torch.no_grad():
        module, x = make_module(case).eval(), make_input(case)
        p = Params.of(module)
        want = oracle(p.to(torch.float64), x.double(), case, False).out
        assert_close(module(x), want, plain(p, x, case, False))


@pytest.mark.parametrize("which", EVERY_ISA)
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@SETTINGS
@given(case=cases(SMOOTH))
def test_backward(which: str, training: bool, case: Case) -> None:
    values = case.n * -(-case.h // case.stride) * -(-case.w // case.stride)
    assume(not training or values > 3)  # with two values the gradient is zero
    with running(which):
        check_training(case, training)


@pytest.mark.parametrize("which", ["eager", "native"])
@SETTINGS
@given(case=cases())
def test_images_do_not_see_each_other(which: str, case: Case) -> None:
    """In evaluation, a batch gives the outputs of its images one by one."""
    case = case.replace(dtype=torch.float32)
    with running(which), torch.no_grad():
        module, x = make_module(case).eval(), make_input(case)
        whole = module(x)
        one_by_one = torch.cat([module(image[None]) for image in x])
        torch.testing.assert_close(whole, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["eager", "native"])
@SETTINGS
@given(case=cases())
def test_layouts_agree(which: str, case: Case) -> None:
    case = case.replace(dtype=torch.float32)
    with running(which), torch.no_grad():
        module, x = make_module(case).eval(), make_input(case.replace(layout="nchw"))
        other = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(module(x), module(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["eager", "native"])
@SETTINGS
@given(case=cases(SMOOTH))
def test_backward_is_linear(which: str, case: Case) -> None:
    case = case.replace(dtype=torch.float64)
    assume(case.n * -(-case.h // case.stride) * -(-case.w // case.stride) > 3)
    with running(which):
        _, module, x = make_smooth(case, True)
        x.requires_grad_()
        out = module(x)
        inputs = [x, *(p for p in module.parameters() if p.numel())]
        g1, g2 = torch.randn_like(out), torch.randn_like(out)

        def vjp(g: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, inputs, g, retain_graph=True)

        for a, b, both in zip(vjp(g1), vjp(g2), vjp(2 * g1 - g2), strict=True):
            scale = 1 + max(a.abs().max().item(), b.abs().max().item())
            torch.testing.assert_close(both, 2 * a - b, rtol=1e-9, atol=1e-10 * scale)
