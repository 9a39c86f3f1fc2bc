"""Promise: the same input gives the same bits, in every run and with any number of threads."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUTS, Case, make_input, make_module, same_bits
from torch import Tensor, nn

SHAPES = [
    Case(2, 16, 56, 57, 24, act2="silu"),
    Case(1, 16, 112, 112, 16),
    Case(9, 33, 7, 7, 26, act1="hardswish"),
    Case(4, 160, 7, 7, 200),
    Case(3, 5, 31, 30, 9, ratio=3, d=5, act1="silu", act2="gelu"),
    Case(2, 24, 29, 28, 40, stride=2),
    Case(2, 200, 14, 14, 80, act1="none", act2="none"),
    Case(1, 3, 9, 1030, 5),
]


def everything(case: Case, training: bool, prelu: bool = False) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a fresh module.

    prelu: with PReLUs, and the first batch norm frozen.
    """
    module, x = make_module(case).train(training), make_input(case).requires_grad_()
    if prelu:
        for branch, slopes in ((module.primary_conv, case.m), (module.cheap_operation, 1)):
            branch[2] = nn.PReLU(slopes, dtype=case.dtype)
        module.primary_conv[1].eval()
    out = module(x)
    out.backward(make_input(case.replace(c=case.oup, h=out.shape[2], w=out.shape[3]), 3))
    grads = {name: p.grad for name, p in module.named_parameters()}
    with torch.no_grad():
        fast = module.eval()(x)
    return {"out": out.detach(), "fast": fast, "x": x.grad, **grads, **dict(module.named_buffers())}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    for name in a:
        assert same_bits(a[name], b[name]), f"{name} differs {what}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_bits(native: str, case: Case, dtype: torch.dtype, layout: str, training: bool) -> None:
    case = case.replace(dtype=dtype, layout=layout)
    first = everything(case, training)
    assert_same(first, everything(case, training), "from run to run")
    torch.set_num_threads(2)
    assert_same(first, everything(case, training), "between one thread and two")
    torch.set_num_threads(3)
    assert_same(first, everything(case, training), "between one thread and three")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHAPES[:6], ids=str)
def test_bits_with_prelu_and_a_frozen_norm(
    native: str, case: Case, dtype: torch.dtype, layout: str
) -> None:
    case = case.replace(dtype=dtype, layout=layout)
    first = everything(case, True, prelu=True)
    assert_same(first, everything(case, True, prelu=True), "from run to run")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same(first, everything(case, True, prelu=True), f"with {threads} threads")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_bits_of_other_types(native: str, dtype: torch.dtype) -> None:
    case = SHAPES[4].replace(dtype=dtype)
    first = everything(case, True)
    torch.set_num_threads(2)
    for _ in range(3):
        assert_same(first, everything(case, True), "over threads or repeats")


def test_bits_of_the_library_convolution(native: str) -> None:
    """After a 3x3 primary convolution by the library, our operators give the same bits."""
    case = Case(3, 6, 33, 31, 20, k=3)
    u_module = make_module(case)
    first = everything(case, True)
    assert_same(first, everything(case, True), "from run to run")
    assert u_module.primary_conv[0].kernel_size == (3, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alignment_does_not_matter(native: str, layout: str) -> None:
    """The same numbers at another address give the same bits."""
    case = Case(2, 16, 30, 33, 24, layout=layout)
    module, x = make_module(case).eval(), make_input(case)
    with torch.no_grad():
        want = module(x)
        for shift in (1, 3, 5):
            storage = torch.empty(x.numel() + shift)
            moved = storage[shift:].as_strided(x.size(), x.stride())
            moved.copy_(x)
            assert same_bits(module(moved), want)
