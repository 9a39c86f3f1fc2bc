"""Promise: the modules are drop-in replacements of the authors' published one.

The same state_dict keys, random draws, defaults and numbers.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import Case, Params, make_input, make_module, oracle
from torch import Tensor, nn

from ghost_ops import FusedGhostModule
from ghost_ops.reference import GhostBottleneck, GhostModule, SqueezeExcite


class Published(nn.Module):
    """The module as the paper's authors wrote it."""

    def __init__(self, inp, oup, kernel_size=1, ratio=2, dw_size=3, stride=1, relu=True):  # type: ignore[no-untyped-def]
        super().__init__()
        self.oup = oup
        init_channels = math.ceil(oup / ratio)
        new_channels = init_channels * (ratio - 1)
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inp, init_channels, kernel_size, stride, kernel_size // 2, bias=False),
            nn.BatchNorm2d(init_channels),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(
                *(init_channels, new_channels, dw_size, 1, dw_size // 2),
                groups=init_channels,
                bias=False,
            ),
            nn.BatchNorm2d(new_channels),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.oup, :, :]


CONFIGURATIONS = pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"relu": False},
        {"ratio": 3},
        {"ratio": 7},
        {"dw_size": 5, "stride": 2},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 2},
    ],
    ids=str,
)
BOTH = pytest.mark.parametrize("cls", [GhostModule, FusedGhostModule])


@BOTH
@CONFIGURATIONS
def test_same_draws_and_keys(cls: type[nn.Module], kwargs: dict[str, int]) -> None:
    torch.manual_seed(3)
    published = Published(6, 9, **kwargs)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = cls(6, 9, **kwargs)
    assert torch.equal(torch.rand(1), after)
    assert list(ours.state_dict()) == list(published.state_dict())
    for (name, a), b in zip(
        ours.state_dict().items(), published.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert ours.oup == 9
    for name in ("primary_conv", "cheap_operation"):
        for a, b in zip(getattr(ours, name), getattr(published, name), strict=True):
            assert repr(a) == repr(b)


@CONFIGURATIONS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_reference_is_the_published_module(kwargs: dict[str, int], training: bool) -> None:
    torch.manual_seed(3)
    published = Published(6, 9, **kwargs).train(training)
    ours = GhostModule(6, 9, **kwargs).train(training)
    ours.load_state_dict(published.state_dict())
    x = torch.randn(2, 6, 7, 8)
    assert torch.equal(ours(x), published(x))
    for (name, a), b in zip(
        ours.state_dict().items(), published.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@CONFIGURATIONS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_is_the_published_module(
    backend: str, kwargs: dict[str, int], training: bool
) -> None:
    torch.manual_seed(3)
    published = Published(6, 9, **kwargs).train(training)
    ours = FusedGhostModule(6, 9, **kwargs).train(training)
    ours.load_state_dict(published.state_dict())
    x = torch.randn(2, 6, 7, 8)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(
        ours.state_dict().items(), published.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


def test_same_arguments() -> None:
    published = list(inspect.signature(Published).parameters.values())
    for cls in (GhostModule, FusedGhostModule):
        ours = list(inspect.signature(cls).parameters.values())[: len(published)]
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in published]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.float64),
        Case(dtype=torch.float64, ratio=3, d=5, oup=11),
        Case(dtype=torch.float64, ratio=1),
        Case(dtype=torch.float64, k=3, stride=2, ratio=4, d=7),
        Case(dtype=torch.float64, d=1, act1="none", act2="none"),
    ],
    ids=str,
)
def test_reference_is_the_oracle(case: Case, training: bool) -> None:
    module, x = make_module(case, GhostModule).train(training), make_input(case)
    want = oracle(Params.of(module).to(), x, case, training).out
    torch.testing.assert_close(module(x), want)


def test_squeeze_excite() -> None:
    se = SqueezeExcite(20, se_ratio=0.25)
    assert se.conv_reduce.out_channels == 8  # a multiple of 4, at least 0.9 * 5
    layers = ("conv_reduce", "conv_expand")
    keys = [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]
    assert list(dict(se.named_parameters())) == keys
    x = torch.randn(2, 20, 5, 6)
    s = x.mean((2, 3)) @ se.conv_reduce.weight[..., 0, 0].t() + se.conv_reduce.bias
    s = torch.relu(s) @ se.conv_expand.weight[..., 0, 0].t() + se.conv_expand.bias
    gate = ((s + 3) / 6).clamp(0, 1)
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])


@pytest.mark.parametrize("se_ratio", [0.0, None, 0.25])
@pytest.mark.parametrize(("inp", "oup", "stride"), [(8, 8, 1), (8, 12, 1), (8, 8, 2), (8, 16, 2)])
def test_bottleneck(inp: int, oup: int, stride: int, se_ratio: float | None) -> None:
    block = GhostBottleneck(inp, 20, oup, 3, stride, se_ratio=se_ratio).eval()
    x = torch.randn(2, inp, 9, 10)
    got = block(x)
    y = block.ghost1(x)
    if stride > 1:
        y = block.bn_dw(block.conv_dw(y))
    if se_ratio:
        y = block.se(y)
    else:
        assert block.se is None
    want = block.ghost2(y) + (x if inp == oup and stride == 1 else block.shortcut(x))
    assert torch.equal(got, want)
    assert got.shape == (2, oup, -(-9 // stride), -(-10 // stride))
    # The second Ghost module is linear, the first is not.
    assert isinstance(block.ghost1.primary_conv[2], nn.ReLU)
    assert isinstance(block.ghost2.primary_conv[2], nn.Sequential)
