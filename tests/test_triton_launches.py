"""The kernels that an operator launches, and the folding of partial results by the last program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Case, Params, make_input, make_module, oracle, same_bits
from torch import Tensor
from triton_cases import (
    INTERPRETER,
    SMALL_TILE,
    launches,
    planned,
    running_triton,
    shuffled_programs,
)

from ghost_ops import ops
from ghost_ops.backends.triton import launch

FORWARD = {
    "one pass": ["primary_kernel", "fused_kernel", "cheap_kernel"],
    "two launches": ["primary_kernel", "primary_kernel", "cheap_kernel", "cheap_kernel"],
    "ratio 1": ["primary_kernel", "primary_kernel"],
}
BACKWARD = {
    "one pass": ["fused_sums_kernel", "fused_gradient_kernel", "primary_gradient_kernel"],
    "two launches": [
        "primary_kernel",
        "cheap_sums_kernel",
        "cheap_gradient_kernel",
        "intrinsic_gradient_kernel",
        "primary_gradient_kernel",
    ],
    "ratio 1": ["primary_kernel", "intrinsic_gradient_kernel", "primary_gradient_kernel"],
}
APPLY = {
    "one pass": ["fused_kernel"],
    "two launches": ["primary_kernel", "cheap_kernel"],
    "ratio 1": ["primary_kernel"],
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("how", list(FORWARD))
def test_a_step(triton_device: str, how: str, training: bool) -> None:
    """Four launches at most where images fill the device, counting the running statistics'."""
    case = Case(ratio=1 if how == "ratio 1" else 3, oup=9, act1="silu")
    module = make_module(case).to(triton_device).train(training)
    x = make_input(case).to(triton_device).requires_grad_()
    with planned(one_pass=how == "one pass"):
        with launches() as forward:
            out = module(x)
        with launches() as backward:
            out.sum().backward()
    if training:
        assert forward == [*FORWARD[how], "update_running_kernel"]
        assert len(forward) <= (5 if how == "two launches" else 4)
    else:
        assert [name for name in forward if name != "pack_kernel"] == APPLY[how]
    assert backward == BACKWARD[how]


@pytest.mark.parametrize("how", list(APPLY))
def test_inference(triton_device: str, how: str) -> None:
    """Parameters are packed once, by one launch."""
    case = Case(ratio=1 if how == "ratio 1" else 2)
    module, x = make_module(case).to(triton_device).eval(), make_input(case).to(triton_device)
    with torch.no_grad(), planned(one_pass=how == "one pass"):
        with launches() as first:
            module(x)
        with launches() as second:
            module(x)
    assert first == ["pack_kernel", *APPLY[how]]
    assert second == APPLY[how]


@pytest.mark.parametrize(("need_x", "need_w1"), [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(triton_device: str, need_x: bool, need_w1: bool) -> None:
    case = Case()
    module = make_module(case).to(triton_device)
    module.primary_conv[0].weight.requires_grad_(need_w1)
    x = make_input(case).to(triton_device).requires_grad_(need_x)
    out = module(x)
    with launches() as backward:
        out.sum().backward()
    assert ("primary_gradient_kernel" in backward) == (need_x or need_w1)


# ---------------------------------------------------------------- folding

MANY = Case(9, 3, 2, 3, 4, act1="silu", act2="gelu")  # an image a row: more than one cluster
BOTH = pytest.mark.parametrize(
    ("layout", "one_pass"), [("nhwc", True), ("nchw", False)], ids=["one pass", "two launches"]
)


@BOTH
def test_statistics_of_many_groups(triton_device: str, layout: str, one_pass: bool) -> None:
    case = MANY.replace(layout=layout)
    module, x = make_module(case), make_input(case)
    want = oracle(Params.of(module).to(torch.float64), x.double(), case, True)
    p, moved = Params.of(module.to(triton_device)), x.to(triton_device)
    with planned(one_pass=one_pass, tile=SMALL_TILE):
        first = p.w1, p.bn1.gamma, p.bn1.beta, None, None, p.bn1.eps, None
        second = p.w2, p.bn2.gamma, p.bn2.beta, None, None, p.bn2.eps, None
        numbers = case.oup, 1, 4, 0.0, 6, 0.0, False
        found = ops.triton.ghost_train_forward(moved, *first, *second, *numbers)
    for name, got in zip(("out", "mean1", "var1", "mean2", "var2"), found, strict=False):
        torch.testing.assert_close(
            got.cpu().double(), getattr(want, name), rtol=1e-5, atol=1e-5, msg=name
        )


def step(case: Case) -> dict[str, Tensor]:
    """Output, statistics and gradients of a training step."""
    module, x = make_module(case), make_input(case).requires_grad_()
    out = module(x)
    out.backward(make_input(case.replace(c=case.oup), extra_seed=2))
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients, **dict(module.named_buffers())}


@BOTH
def test_the_same_bits_in_any_order_of_programs(
    monkeypatch: pytest.MonkeyPatch, layout: str, one_pass: bool
) -> None:
    handed_out: list[Tensor] = []
    original = launch._counters

    def counters(*args: Any) -> Tensor:
        handed_out.append(original(*args))
        return handed_out[-1]

    monkeypatch.setattr(launch, "_counters", counters)
    case = MANY.replace(layout=layout)
    with running_triton(INTERPRETER), planned(one_pass=one_pass, tile=SMALL_TILE):
        want = step(case)
        with shuffled_programs(seed=1):
            got = step(case)
    for name, found in got.items():
        assert same_bits(found, want[name]), name
    assert len(handed_out) >= 4
    assert not any(t.any() for t in handed_out), "the next kernel counts from zero"
