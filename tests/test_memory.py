"""Promise: autograd saves x, parameters and per-channel statistics, and never the output.

Beyond that it saves at most u, and only if u has a quarter of the size of x or less.
"""

from __future__ import annotations

import pytest
import torch
from helpers import GHOSTNET, LAYOUTS, Case, make_input, make_module
from torch import Tensor

SHAPES = pytest.mark.parametrize(("size", "inp", "oup", "relu"), GHOSTNET)


def saved(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and the tensors that autograd saved: one per storage, without parameters."""
    ours = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    return out, list(kept.values())


def nbytes(t: Tensor) -> int:
    return t.untyped_storage().nbytes()


def per_channel_bytes(case: Case) -> int:
    """The mean and variance of both batch norms, twice, in float64."""
    return 8 * 4 * (case.m + case.g) + 256


@SHAPES
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_saved_bytes(
    backend: str, size: int, inp: int, oup: int, relu: bool, training: bool
) -> None:
    act = "relu" if relu else "none"
    case = Case(2, inp, min(size, 28), min(size, 28), oup, act1=act, act2=act)
    module, x = make_module(case).train(training), make_input(case).requires_grad_()
    _, kept = saved(module, x)
    total = sum(nbytes(t) for t in kept)
    budget = per_channel_bytes(case)
    assert total >= nbytes(x), "x is not among the saved tensors: the hooks do not see them"
    if oup >= inp:
        assert total <= nbytes(x) + budget
    else:
        assert total <= 1.25 * nbytes(x) + budget


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 8, 12, 12, 32, ratio=1),
        Case(2, 64, 12, 12, 16, ratio=4),
        Case(2, 64, 12, 12, 15, ratio=2),
        Case(2, 16, 12, 12, 64, d=7, act1="gelu", act2="silu"),
        Case(2, 16, 13, 12, 64, stride=2, act1="silu", act2="silu"),
    ],
    ids=str,
)
def test_saved_bytes_of_other_configurations(
    backend: str, case: Case, dtype: torch.dtype, layout: str
) -> None:
    case = case.replace(dtype=dtype, layout=layout)
    module, x = make_module(case), make_input(case).requires_grad_()
    _, kept = saved(module, x)
    assert sum(nbytes(t) for t in kept) <= 1.25 * nbytes(x) + per_channel_bytes(case)


def test_nothing_of_the_size_of_the_output_is_saved(backend: str) -> None:
    case = Case(2, 4, 16, 16, 64)
    module, x = make_module(case), make_input(case).requires_grad_()
    out, kept = saved(module, x)
    pointers = {t.untyped_storage().data_ptr() for t in kept}
    assert out.untyped_storage().data_ptr() not in pointers
    assert all(nbytes(t) < nbytes(out) / 4 for t in kept)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("k", [1, 3])
def test_nothing_is_kept_aside(backend: str, k: int, training: bool) -> None:
    """No tensor is an attribute of the autograd node, where saved-tensor hooks do not see it."""
    case = Case(c=64, k=k)
    module, x = make_module(case).train(training), make_input(case).requires_grad_()
    node = module(x).grad_fn
    assert node.name() == "GhostModuleFunctionBackward"
    aside = [v for v in vars(node).values() if isinstance(v, (Tensor, tuple, list, dict))]
    assert "Tensor" not in {type(v).__name__ for group in aside for v in flat(group)}


def flat(value: object) -> list[object]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def test_eager_pytorch_saves_more(backend: str) -> None:
    """The children one by one save more than three times as much."""
    case = Case(2, 16, 16, 16, 64)
    module, x = make_module(case), make_input(case).requires_grad_()
    _, fused = saved(module, x)
    _, unfused = saved(torch.nn.Sequential(module.primary_conv, module.cheap_operation), x)
    assert sum(map(nbytes, unfused)) > 3 * sum(map(nbytes, fused))


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("inp", [4, 64], ids=["widens", "narrows"])
def test_output_may_be_overwritten(backend: str, inp: int, k: int, training: bool) -> None:
    """``out += shortcut`` is legal and gives the gradients of ``out + shortcut``."""
    case = Case(c=inp, k=k, dtype=torch.float64)
    grads = []
    for inplace in (True, False):
        module, x = make_module(case).train(training), make_input(case).requires_grad_()
        shortcut = make_input(case.replace(c=8), extra_seed=4).requires_grad_()
        out = module(x)
        if inplace:
            out += shortcut
            out.relu_()
        else:
            out = torch.relu(out + shortcut)
        out.square().sum().backward()
        grads.append([x.grad, shortcut.grad, *(p.grad for p in module.parameters())])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_changing_the_input_before_backward_is_noticed(backend: str) -> None:
    case = Case()
    module, leaf = make_module(case), make_input(case).requires_grad_()
    x = leaf * 1
    out = module(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_kept_without_gradients(backend: str) -> None:
    module, x = make_module(Case()).eval(), make_input(Case())
    with torch.no_grad():
        assert saved(module, x)[1] == []
