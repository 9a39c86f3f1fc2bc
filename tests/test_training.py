"""Promise: training gives the oracle's outputs, statistics and gradients, in every configuration.

So does fine-tuning with frozen batch norms.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import machine
from helpers import (
    ACTIVATIONS,
    DTYPES,
    GHOSTNET,
    KINKS,
    LAYOUTS,
    LOW,
    Case,
    Params,
    assert_close,
    covering,
    make_input,
    make_module,
    oracle,
    plain,
    reference_like,
    sound,
)
from module_checks import STRUCTURE, check_training, gradients


# The eager backend runs PyTorch's operators for most of these: every third is enough.
@pytest.mark.parametrize(
    ("backend", "case"),
    [("native", case) for case in STRUCTURE] + [("eager", case) for case in STRUCTURE[::3]],
    ids=str,
    indirect=["backend"],
)
def test_structure(backend: str, case: Case) -> None:
    check_training(case)


@pytest.mark.parametrize("case", STRUCTURE[1::5], ids=str)
def test_structure_with_frozen_batch_norms(backend: str, case: Case) -> None:
    check_training(case, training=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("act1", ACTIVATIONS)
@pytest.mark.parametrize("act2", ACTIVATIONS)
def test_every_pair_of_activations(every_isa: str, act1: str, act2: str, training: bool) -> None:
    check_training(Case(act1=act1, act2=act2, c=9, oup=7, h=5, w=19), training)


COVERING = [
    sound(Case(h=hw[0], w=hw[1], k=primary[0], stride=primary[1], **axes))
    for axes in covering(
        {
            "n": (2, 3),
            "c": (2, 6, 16, 34),
            "hw": (
                *((2, 2), (3, 5), (1, 9), (9, 1), (7, 7), (8, 8), (5, 16), (5, 17), (13, 31)),
                *((6, 33), (4, 63), (4, 65), (3, 112), (2, 113), (14, 14)),
            ),
            "oup": (1, 2, 7, 16, 23, 26, 33),
            "ratio": (1, 2, 3, 5),
            "d": (1, 3, 5, 7),
            "primary": ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1)),
            "act1": ACTIVATIONS,
            "act2": ACTIVATIONS,
            "layout": LAYOUTS,
            "dtype": DTYPES,
        }
    )
    for hw, primary in [(axes.pop("hw"), axes.pop("primary"))]
]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_covering(every_isa: str, case: Case) -> None:
    check_training(case)


@pytest.mark.parametrize("case", COVERING[::2], ids=str)
def test_covering_with_frozen_batch_norms(every_isa: str, case: Case) -> None:
    check_training(case, training=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "inp", "oup", "relu"), GHOSTNET)
def test_ghostnet_shapes(
    backend: str, size: int, inp: int, oup: int, relu: bool, layout: str
) -> None:
    act = "relu" if relu else "none"
    small = min(size, 29)
    check_training(Case(2, inp, small, size, oup, act1=act, act2=act, layout=layout), rms=relu)


# Bands of rows, joined images, long reductions. The activations have no kink, because the largest
# error is compared.
TILING = [
    Case(n, c, h, w, oup, r, d, act1="silu", act2="none", layout=layout)
    for (n, c, h, w, oup, r, d) in (
        (1, 16, 112, 112, 16, 2, 3),
        (2, 3, 56, 57, 20, 2, 5),
        (1, 7, 113, 41, 9, 2, 3),
        (1, 7, 41, 113, 9, 2, 7),
        (1, 4, 200, 17, 6, 3, 5),
        (1, 2, 9, 1030, 3, 2, 7),
        (5, 33, 7, 7, 26, 2, 3),
        (16, 40, 7, 7, 12, 2, 3),
        (33, 12, 1, 1, 24, 2, 3),
        (17, 5, 2, 3, 8, 4, 7),
        (3, 300, 14, 14, 60, 2, 3),
        (2, 513, 5, 5, 30, 3, 3),
        (3, 1, 14, 15, 1, 2, 3),
    )
    for layout in LAYOUTS
]


@pytest.mark.parametrize("case", TILING, ids=str)
def test_bands_and_joined_images(every_isa: str, case: Case) -> None:
    check_training(case)


@pytest.mark.parametrize("case", TILING[::3], ids=str)
def test_bands_and_joined_images_on_two_threads(native: str, case: Case) -> None:
    torch.set_num_threads(2)
    check_training(case)


# Maps that a small L2 cache cuts into bands of rows or groups of images in either layout; weight
# gradients whose wider operand is x or du, in whole and in partial blocks.
CACHED = [
    Case(n, c, h, w, oup, 2, d, act1="silu", act2="none", layout=layout)
    for (n, c, h, w, oup, d) in (
        (2, 12, 40, 31, 24, 1),
        (2, 12, 40, 31, 24, 3),
        (1, 12, 31, 40, 38, 5),
        (1, 5, 61, 33, 16, 7),
        (3, 9, 20, 20, 120, 3),
        (9, 20, 9, 16, 90, 3),
        (9, 70, 16, 9, 24, 3),
        (19, 40, 7, 7, 44, 3),
        (17, 37, 3, 5, 200, 3),
    )
    for layout in LAYOUTS
]


@pytest.mark.parametrize("case", CACHED, ids=str)
def test_bands_of_a_small_cache(every_isa: str, case: Case) -> None:
    if every_isa == "eager":
        return check_training(case)
    with machine(256 << 10):
        check_training(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_float32_batch_norms_around_half_precision(
    backend: str, dtype: torch.dtype, training: bool, ratio: int, layout: str
) -> None:
    case = Case(dtype=dtype, bn_dtype=torch.float32, ratio=ratio, layout=layout, h=9, w=18)
    check_training(case, training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("act", [*KINKS, "silu", "gelu", "gelu_tanh"])
def test_derivative_at_the_kinks(every_isa: str, act: str, dtype: torch.dtype) -> None:
    """Exactly at a kink the derivative is PyTorch's. The primary convolution is the identity."""
    case = Case(1, 1, 1, 21, 1, ratio=1, act1=act, dtype=dtype)
    module = make_module(case).eval()
    values = [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 5.0, 6.0, 7.0, 9.0]
    x = torch.tensor([*values, *values[::-1][:10]], dtype=dtype).view(1, 1, 1, 21)
    with torch.no_grad():
        module.primary_conv[0].weight.fill_(1.0)
        bn = module.primary_conv[1]
        bn.weight.fill_(1.0), bn.bias.zero_(), bn.running_mean.zero_(), bn.running_var.fill_(1.0)
        bn.eps = 0.0
    grads = []
    for f in (module, module.primary_conv[2]):
        leaf = x.clone().requires_grad_()
        f(leaf).backward(torch.full_like(x, 2.0))
        grads.append(leaf.grad)
    exact = act in ("relu", "relu6", "leaky_relu")
    eps = 0.0 if exact else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(grads[0], grads[1], rtol=eps, atol=eps)


# --- batch norm's options ---------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(backend: str, layout: str, bias: bool) -> None:
    case = Case(n=0, layout=layout)
    module, x = make_module(case), make_input(case).requires_grad_()
    if bias:
        for branch in (module.primary_conv, module.cheap_operation):
            branch[0].bias = torch.nn.Parameter(torch.ones(4))
    copied = copy.deepcopy(module)
    want = reference_like(copied)(make_input(case))
    out = module(x)
    assert out.shape == want.shape == (0, 8, 6, 7)
    out.sum().backward()
    assert x.grad.shape == x.shape
    for p in module.parameters():
        assert p.grad is None or not p.grad.any()
    for (name, b), other in zip(module.named_buffers(), copied.buffers(), strict=True):
        assert torch.equal(b, other), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_over_many_pixels_keep_their_digits(every_isa: str, layout: str) -> None:
    """A gradient with a mean: one float32 sum of its 200704 values has a relative error of 2e-6."""
    if every_isa == "eager" and layout == "nhwc":
        pytest.skip("PyTorch sums channels_last in one chain")
    case = Case(16, 4, 112, 112, 4, act1="none", act2="none", layout=layout)
    module, x = make_module(case), make_input(case).requires_grad_()
    grad = make_input(case, 3) * 0.1 + 1.0
    p = Params.of(module)
    _, want = gradients(p.to(torch.float64), x.double(), grad.double(), case, True, oracle)
    _, eager = gradients(p.to(), x.contiguous(), grad.contiguous(), case, True, plain)
    module(x).backward(grad)
    for name, t in p.tensors().items():
        largest = want[name].abs().max()
        error, allowed = ((g - want[name]).abs().max() for g in (t.grad, eager[name]))
        assert error <= 2 * allowed + 2e-7 * largest, (name, error / largest, allowed / largest)


@pytest.mark.parametrize("offset", [100.0, 3e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean_does_not_cancel(every_isa: str, layout: str, offset: float) -> None:
    """Batch statistics by E[u^2] - E[u]^2 would have no correct digit."""
    case = Case(4, 3, 33, 31, 8, act1="silu", act2="silu", layout=layout)
    module, x = make_module(case), make_input(case) + offset
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    with torch.no_grad():
        p = Params.of(module)
        want = oracle(p.to(torch.float64), x.double(), case, True).out
        assert_close(module(x), want, plain(p, x, case, True), slack=4)
