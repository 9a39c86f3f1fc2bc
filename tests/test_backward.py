"""Promise: backward takes a gradient of any strides and computes only the needed gradients."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import (
    LAYOUTS,
    Case,
    expanded,
    expanded_rows,
    make_input,
    make_module,
    other_format,
    same_bits,
    sliced_channels,
    sliced_columns,
    transposed,
    unaligned,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ghost_ops.conventions import NEEDS


def run(module: torch.nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor | None]:
    """Gradients of x and of the parameters; None for those that require none."""
    module.zero_grad()
    x.grad = None
    module(x).backward(grad)
    return {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


LEARNT = ("0.weight", "1.weight", "1.bias")
NAMES = ("x", *(f"primary_conv.{n}" for n in LEARNT), *(f"cheap_operation.{n}" for n in LEARNT))
SUBSETS = [*itertools.combinations(NAMES, 1), *itertools.combinations(NAMES, 2)]
SUBSETS += [NAMES[1:], NAMES[4:]]


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "wanted",
    SUBSETS,
    ids=lambda names: "+".join(names).replace("_conv", "").replace("_operation", ""),
)
def test_only_the_required_gradients(
    backend: str, wanted: tuple[str, ...], k: int, training: bool
) -> None:
    case = Case(k=k, dtype=torch.float64, act1="silu", act2="gelu")
    full = make_module(case).train(training)
    some = copy.deepcopy(full)
    x, grad = make_input(case), make_input(case.replace(c=8), extra_seed=3)
    want = run(full, x.clone().requires_grad_(), grad)
    for name, p in some.named_parameters():
        p.requires_grad_(name in wanted)
    got = run(some, x.clone().requires_grad_("x" in wanted), grad)
    for name in NAMES:
        if name in wanted:
            torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)
        else:
            assert got[name] is None


def test_nothing_to_differentiate(backend: str) -> None:
    module, x = make_module(Case()), make_input(Case())
    assert module(x).requires_grad
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        module(x)
        module.eval()(x)
        module.train()
    module.requires_grad_(False)
    assert not module(x).requires_grad


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form",
    [expanded, expanded_rows, other_format, sliced_channels, sliced_columns, transposed, unaligned],
    ids=lambda f: f.__name__,
)
def test_gradient_of_any_strides(
    backend: str, form: object, dtype: torch.dtype, layout: str, training: bool
) -> None:
    case = Case(dtype=dtype, layout=layout, w=19, act1="silu")
    module = make_module(case).train(training)
    x = make_input(case).requires_grad_()
    grad = form(make_input(case.replace(c=8, layout="nchw"), extra_seed=3))
    want = run(module, x, grad.clone(memory_format=torch.contiguous_format))
    got = run(module, x, grad)
    for name in NAMES:
        eps = torch.finfo(dtype).eps
        scale = want[name].abs().max().item()
        torch.testing.assert_close(
            got[name], want[name], rtol=4 * eps, atol=8 * eps * scale, msg=name
        )


def test_gradients_accumulate(backend: str) -> None:
    case = Case(dtype=torch.float64)
    module, x = make_module(case), make_input(case).requires_grad_()
    grad = make_input(case.replace(c=8), extra_seed=3)
    once = {name: g.clone() for name, g in run(module, x, grad).items()}
    module(x).backward(grad)
    for name, g in {"x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}.items():
        torch.testing.assert_close(g, 2 * once[name])


def test_backward_twice_over_one_graph(backend: str) -> None:
    case = Case()
    module, x = make_module(case), make_input(case).requires_grad_()
    out = module(x)
    grad = torch.ones_like(out)
    first = torch.autograd.grad(out, [x, *module.parameters()], grad, retain_graph=True)
    second = torch.autograd.grad(out, [x, *module.parameters()], grad)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


class Backwards(TorchDispatchMode):
    """The calls of ``ghost_backward``: their masks of needed gradients, and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[int] = []
        self.results: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.ghost_ops.ghost_backward.default:
            self.needs.append(args[-1])
            self.results.append(out)
        return out


# The names of frozen parameters (and "x"), and the mask that the operator then gets.
FREEZE = {
    "norms": (("primary_conv.1", "cheap_operation.1"), NEEDS.DX | NEEDS.DW1 | NEEDS.DW2),
    "all but the second norm": (("primary_conv", "cheap_operation.0", "x"), NEEDS.NORM2),
    "the first convolution": (("primary_conv.0", "x"), NEEDS.NORM1 | NEEDS.DW2 | NEEDS.NORM2),
    "the parameters": (("primary_conv", "cheap_operation"), NEEDS.DX),
    "nothing": ((), NEEDS.ALL & ~(NEEDS.PRELU1 | NEEDS.PRELU2)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen norms"])
@pytest.mark.parametrize("frozen", FREEZE)
def test_frozen_gradients_are_not_computed(native: str, frozen: str, training: bool) -> None:
    names, needs = FREEZE[frozen]
    module, x = make_module(Case()).train(training), make_input(Case())
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(names))
    x.requires_grad_("x" not in names)
    out = module(x)
    with Backwards() as seen:
        out.sum().backward()
    assert seen.needs == [needs]
    dx, dw1, dgamma1, dbeta1, _, dw2, dgamma2, dbeta2, _ = seen.results[0]
    first = ((dx, NEEDS.DX), (dw1, NEEDS.DW1), (dgamma1, NEEDS.NORM1), (dbeta1, NEEDS.NORM1))
    second = ((dw2, NEEDS.DW2), (dgamma2, NEEDS.NORM2), (dbeta2, NEEDS.NORM2))
    for grad, bit in (*first, *second):
        assert (grad.numel() > 0) == bool(needs & bit)
    for p in module.parameters():
        assert (p.grad is not None) == p.requires_grad
