"""Promise: NaN, infinity, zero padding, extreme values and inputs of any strides are PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    ACTIVATIONS,
    LAYOUTS,
    Case,
    Params,
    make_input,
    make_module,
    oracle,
    plain,
    sliced_channels,
    sliced_columns,
    transposed,
    unaligned,
)
from torch import Tensor

PLACES = pytest.mark.parametrize(
    "place", [(0, 0, 0, 0), (1, 2, 4, 9), (0, 4, 8, 16), (2, 1, 3, 15), (1, 0, 8, 0)], ids=str
)
BIG = Case(3, 5, 9, 17, 11)


def assert_same_specials(got: Tensor, want: Tensor) -> None:
    """NaN where PyTorch has NaN, the same infinities, and finite values in agreement."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@PLACES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 3, 5])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_in_one_pixel(
    every_isa: str, act: str, d: int, layout: str, place: tuple[int, ...]
) -> None:
    """NaN reaches exactly the pixels that depend on it, and no other image."""
    case = BIG.replace(act1=act, act2=act, d=d, layout=layout)
    module, x = make_module(case).eval(), make_input(case)
    x[place] = math.nan
    with torch.no_grad():
        got, want = module(x), plain(Params.of(module), x, case, False)
    n, _, i, j = place
    near = torch.zeros_like(want, dtype=torch.bool)
    r = d // 2
    near[n, : case.m, i, j] = True
    near[n, case.m :, max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1] = True
    assert torch.equal(got.isnan(), near)
    assert_same_specials(got, want)


@PLACES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "leaky_relu"])
def test_infinity_in_one_pixel(
    every_isa: str, act: str, value: float, layout: str, place: tuple[int, ...]
) -> None:
    case = BIG.replace(act1=act, act2=act, layout=layout)
    module, x = make_module(case).eval(), make_input(case)
    x[place] = value
    with torch.no_grad():
        assert_same_specials(module(x), plain(Params.of(module), x, case, False))


@pytest.mark.parametrize("act", ["silu", "hardswish"])
def test_infinity_and_smooth_activations(every_isa: str, act: str) -> None:
    case = BIG.replace(act1=act, act2="none", d=1, ratio=1)
    module, x = make_module(case).eval(), make_input(case)
    x[0, 0, 2, 3], x[1, 0, 2, 3] = math.inf, -math.inf
    with torch.no_grad():
        assert_same_specials(module(x), plain(Params.of(module), x, case, False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_other_types(every_isa: str, layout: str, dtype: torch.dtype) -> None:
    case = BIG.replace(layout=layout, dtype=dtype)
    module, x = make_module(case).eval(), make_input(case)
    x[1, 2, 4, 9] = math.nan
    with torch.no_grad():
        got, want = module(x), plain(Params.of(module), x, case, False)
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_training_on_nan_and_infinity(every_isa: str, value: float, layout: str) -> None:
    """Outputs, running statistics and gradients go to NaN as PyTorch's do."""
    # An even oup: PyTorch multiplies NaN by the zero gradient of a ghost map that is cut off; the
    # kernels do not.
    case = BIG.replace(layout=layout, oup=12)
    module, other = make_module(case), make_module(case)
    x = make_input(case)
    x[1, 2, 4, 9] = value
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    got = module(xs[0])
    y = other.primary_conv(xs[1])
    want = torch.cat([y, other.cheap_operation(y)], 1)[:, : case.oup]
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any()
    got.sum().backward()
    want.sum().backward()
    assert torch.equal(xs[0].grad.isnan(), xs[1].grad.isnan())
    for (name, b), c in zip(module.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(b.isnan(), c.isnan()), name
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad.isnan(), q.grad.isnan()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_gradient(backend: str, layout: str) -> None:
    """A NaN in the gradient reaches only the pixels of dx that depend on it, with frozen norms."""
    case = BIG.replace(layout=layout, act1="silu", act2="silu")
    module, x = make_module(case).eval(), make_input(case).requires_grad_()
    grad = make_input(case.replace(c=11), extra_seed=3)
    grad[1, 8, 4, 9] = math.nan
    module(x).backward(grad)
    want = torch.zeros_like(x, dtype=torch.bool)
    want[1, :, 3:6, 8:11] = True
    assert torch.equal(x.grad.isnan(), want)


def test_running_variance_of_nan_or_below_zero(backend: str) -> None:
    case = Case(act2="none")
    module, x = make_module(case).eval(), make_input(case)
    module.primary_conv[1].running_var[1] = math.nan
    module.cheap_operation[1].running_var[2] = -1.0
    with torch.no_grad():
        got, want = module(x), plain(Params.of(module), x, case, False)
    assert torch.equal(got.isnan(), want.isnan())
    assert want[:, 1].isnan().all()
    assert want[:, 6].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [3, 5, 7])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_padding_is_zero_after_the_activation(
    every_isa: str, act: str, d: int, layout: str
) -> None:
    """y is padded with zeros after the activation, not with act(shift)."""
    case = BIG.replace(act1=act, act2="none", d=d, layout=layout)
    module, x = make_module(case).eval(), make_input(case)
    with torch.no_grad():
        module.primary_conv[1].bias.fill_(3.0)
        module.primary_conv[0].weight.zero_()
        module.primary_conv[1].running_mean.zero_()
        module.cheap_operation[0].weight.fill_(1.0)
        p = Params.of(module)
        want = oracle(p.to(torch.float64), x.double(), case, False)
        torch.testing.assert_close(module(x).double(), want.out, rtol=1e-5, atol=1e-5)
        # A corner sums fewer taps than the middle: the padding has an effect.
        y = want.out[0, 0, 0, 0]
        assert y > 2
        assert abs((want.out[0, -1, 0, 0] - want.out[0, -1, 4, 8]).item()) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e10, 1e18])
def test_huge_and_tiny_values(every_isa: str, magnitude: float, layout: str) -> None:
    case = BIG.replace(layout=layout, act1="relu", act2="none")
    module, x = make_module(case).eval(), make_input(case) * magnitude
    with torch.no_grad():
        for branch in (module.primary_conv, module.cheap_operation):
            branch[1].bias.zero_()
            branch[1].running_mean.zero_()
        want = oracle(Params.of(module).to(torch.float64), x.double(), case, False).out
        got = module(x).double()
    torch.testing.assert_close(got / magnitude, want / magnitude, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "hardswish"])
def test_smooth_activations_far_out(every_isa: str, act: str) -> None:
    """Arguments up to +-2000, at which exp overflows."""
    case = Case(1, 1, 4, 500, 2, act1=act, act2=act, d=1)
    module = make_module(case).eval()
    x = torch.linspace(-2000, 2000, 2000).view(1, 1, 4, 500).requires_grad_()
    module(x).backward(torch.ones(1, 2, 4, 500))
    ref = x.detach().double().requires_grad_()
    want = oracle(Params.of(module).to(torch.float64), ref, case, False).out
    want.backward(torch.ones_like(want))
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), ref.grad, rtol=1e-4, atol=1e-4)


# --- inputs that lie oddly in memory ----------------------------------------------------------


def sliced_channels_last(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, h, w, c + 3), math.nan, dtype=x.dtype)
    wide[..., 1 : c + 1] = x.permute(0, 2, 3, 1)
    return wide[..., 1 : c + 1].permute(0, 3, 1, 2)


def cropped(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, c, h + 2, w + 3), math.nan, dtype=x.dtype)
    wide[:, :, 1:-1, 2:-1] = x
    return wide[:, :, 1:-1, 2:-1]


def every_second_image(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


def flipped_batch_order(x: Tensor) -> Tensor:
    return x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)


def expanded_batch(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def expanded_channels(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def expanded_pixels(x: Tensor) -> Tensor:
    return x[:, :, :1, :1].expand_as(x)


def overlapping_windows(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(-1).as_strided((n, c, h, w), (c * h, h, 2, 1))


SLICED = [sliced_channels, sliced_channels_last, sliced_columns, cropped, every_second_image]
PERMUTED = [transposed, flipped_batch_order, unaligned]
EXPANDED = [expanded_batch, expanded_channels, expanded_pixels, overlapping_windows]


@pytest.mark.parametrize("mode", ["eval", "train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [*SLICED, *PERMUTED, *EXPANDED], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stride", [1, 2])
def test_strided_input(
    backend: str, stride: int, form: object, dtype: torch.dtype, mode: str
) -> None:
    case = BIG.replace(dtype=dtype, stride=stride, act1="silu")
    x = form(make_input(case))
    assert x.shape == (3, 5, 9, 17)
    outs, grads = [], []
    for value in (x, x.clone(memory_format=torch.contiguous_format)):
        module = make_module(case).train(mode == "train")
        value = value.detach()
        if mode == "eval":
            with torch.no_grad():
                outs.append(module(value))
            continue
        value.requires_grad_()
        out = module(value)
        outs.append(out)
        out.backward(make_input(case.replace(c=11, h=out.shape[2], w=out.shape[3]), 3))
        grads.append([value.grad, *(p.grad for p in module.parameters())])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(outs[0], outs[1], rtol=4 * eps, atol=8 * eps)
    if grads:
        for got, want in zip(*grads, strict=True):
            scale = 1 + want.abs().max().item()
            torch.testing.assert_close(got, want, rtol=4 * eps, atol=16 * eps * scale)


def test_strided_weights(backend: str) -> None:
    """Parameters that are not contiguous."""
    case = Case(c=6, dtype=torch.float64)
    module, x = make_module(case), make_input(case).requires_grad_()
    strange = make_module(case)
    for branch in (strange.primary_conv, strange.cheap_operation):
        w = branch[0].weight.detach()
        wide = torch.empty(*w.shape[:3], 2 * w.shape[3], dtype=w.dtype)
        wide[..., ::2] = w
        branch[0].weight = torch.nn.Parameter(wide[..., ::2])
        gamma = branch[1].weight.detach()
        branch[1].weight = torch.nn.Parameter(gamma.repeat_interleave(3)[::3])
    other = make_input(case).requires_grad_()
    want, got = module(x), strange(other)
    torch.testing.assert_close(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(other.grad, x.grad)
    for p, q in zip(strange.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(strange.eval()(x), module.eval()(x))


def test_negated_and_conjugated_views(backend: str) -> None:
    """Lazily negated and conjugated views are resolved before a kernel reads them."""
    case = Case()
    module, x = make_module(case).eval(), make_input(case)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(module(lazy), module(-x))
    imaginary = torch.complex(torch.zeros_like(x), x).conj().imag
    with torch.no_grad():
        torch.testing.assert_close(module(imaginary), module(-x))
