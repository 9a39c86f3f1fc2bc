"""Promise: a fused GhostNet trains to the numbers of the plain one, with norms of every kind.

Outputs, all gradients, running statistics and counters, in float64, over two steps with dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, autograd_nodes, with_layout
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ghost_ops
from ghost_ops import reference
from ghost_ops.autograd import layers

# The number of autograd nodes of our operators in one training step.
NODES = {"DepthwiseFunctionBackward": 9, "GhostModuleFunctionBackward": 32 + 7}


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    return reference.ghostnet(0.5, 10, dropout=0.3).double().train()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def bare(bn: nn.BatchNorm2d) -> None:
    bn.track_running_stats, bn.num_batches_tracked = False, None
    bn.running_mean = bn.running_var = None


def without_affine(bn: nn.BatchNorm2d) -> None:
    bn.weight = bn.bias = None


def without_momentum(bn: nn.BatchNorm2d) -> None:
    bn.momentum = None


def every(change: Callable[[nn.BatchNorm2d], object]) -> Callable[[nn.Module], None]:
    def function(model: nn.Module) -> None:
        for bn in norms(model):
            change(bn)

    return function


def between(change: Callable[[nn.BatchNorm2d], object]) -> Callable[[nn.Module], None]:
    """Change the norms outside of the Ghost modules."""

    def function(model: nn.Module) -> None:
        for name, bn in model.named_modules():
            if isinstance(bn, nn.BatchNorm2d) and "ghost" not in name:
                change(bn)

    return function


def freeze(bn: nn.BatchNorm2d) -> None:
    bn.eval()
    assert bn.running_mean is not None and bn.running_var is not None
    bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    bn.running_var.fill_(1.5)


def freeze_weights(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("conv_dw" not in name and "shortcut" not in name and "stem" not in name)


def hooked(model: nn.Module) -> None:
    model.conv_stem.register_forward_hook(lambda m, args, out: out * 1.5)


def weight_normed(model: nn.Module) -> None:
    for path in ("conv_head", "blocks.1.0.conv_dw", "blocks.1.0.shortcut.2", "conv_stem"):
        parametrizations.weight_norm(model.get_submodule(path))


def no_dropout(model: nn.Module) -> None:
    model.dropout = 0.0


def biased(model: nn.Module) -> None:
    torch.manual_seed(2)
    for path in ("conv_stem", "blocks.1.0.conv_dw", "blocks.1.0.shortcut.2"):
        conv = model.get_submodule(path)
        conv.bias = nn.Parameter(torch.randn(conv.out_channels, dtype=torch.float64))


CHANGES: dict[str, tuple[Callable[[nn.Module], object], bool]] = {
    # the change, and whether the whole network stays fused after it
    "as it is": (lambda model: None, True),
    "no dropout": (no_dropout, True),
    "norms frozen": (every(freeze), True),
    "norms between frozen": (between(freeze), True),
    "one norm frozen": (lambda model: freeze(model.bn1), True),
    "no running statistics": (between(bare), True),
    "no affine": (between(without_affine), True),
    "no momentum": (every(without_momentum), True),
    "weights frozen": (freeze_weights, True),
    "hook on the stem": (hooked, False),
    "weight norm": (weight_normed, False),
    "biases": (biased, False),
}


def step(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)  # for dropout
    model.zero_grad(set_to_none=True)
    out = model(x)
    F.cross_entropy(out, torch.arange(len(x)) % 10).backward()
    return out


def assert_same(fused: nn.Module, plain: nn.Module, out: Tensor, want: Tensor) -> None:
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(out, want, **close)
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, **close, msg=lambda m, n=name: f"{n}: {m}")
    for (name, b), c in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", CHANGES)
def test_network(native: str, name: str) -> None:
    change, stays = CHANGES[name]
    plain = plain_network()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    for model in (plain, fused):
        change(model)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for seed in (1, 2):
        out, want = step(fused, x, seed), step(plain, x, seed)
        assert_same(fused, plain, out, want)
        if stays:
            found = autograd_nodes(out)
            assert {name: found[name] for name in NODES} == NODES
    twin = copy.deepcopy(fused)
    assert_same(twin, plain, step(twin, x, 3), step(plain, x, 3))
    assert fused.eval()(x).shape == (3, 10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(native: str, layout: str) -> None:
    plain = plain_network()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    x = with_layout(torch.randn(2, 3, 64, 64, dtype=torch.float64), layout)
    if layout == "nhwc":
        fused, plain = (m.to(memory_format=torch.channels_last) for m in (fused, plain))
    x.requires_grad_()
    y = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    assert_same(fused, plain, step(fused, x, 1), step(plain, y, 1))
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-9)


def test_without_gradients(native: str) -> None:
    """Training mode under no_grad updates the running statistics and records no graph."""
    plain = plain_network()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(4)
        out = fused(x)
        torch.manual_seed(4)
        want = plain(x)
    assert not out.requires_grad
    assert_same(fused, plain, out, want)


def test_differentiable_twice(native: str) -> None:
    plain = plain_network()
    plain.dropout = 0.0
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def penalty(model: nn.Module) -> list[Tensor]:
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(y).square().sum(), y, create_graph=True)
        wanted = [p for n, p in model.named_parameters() if "conv_dw" in n or "stem" in n]
        return list(torch.autograd.grad(g.square().sum(), wanted))

    for a, b in zip(penalty(fused), penalty(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * float(b.abs().max()))


def test_one_value_per_channel(native: str) -> None:
    """PyTorch's exception."""
    model = plain_network()
    ghost_ops.fuse(model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_norm_of_another_class(native: str) -> None:
    plain = plain_network()
    plain.bn1 = Doubled(plain.bn1.num_features).double()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same(fused, plain, step(fused, x, 1), step(plain, x, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_depthwise_inside_autocast(native: str, dtype: torch.dtype) -> None:
    """float32 parameters, and a map in 16 bits from the layer before."""
    settings = layers.DepthwiseSettings(2, 1e-5, True, 1, 0.0)
    weight, gamma = (torch.rand(s).requires_grad_() for s in ((8, 1, 3, 3), (8,)))
    x = torch.randn(2, 8, 9, 9).to(dtype).requires_grad_()
    norm = layers.Norm(gamma, None, None, None)
    with torch.autocast("cpu", dtype):
        out = layers.depthwise(x, weight, norm, settings, layers.RunningUpdate())
    assert out is not None and out.dtype is dtype
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype is dtype
    assert weight.grad is not None and weight.grad.dtype is torch.float32
