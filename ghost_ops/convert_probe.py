"""Whether a module's forward computes what its structure suggests: tried on a copy, in float64.

A Python function cannot be read, but it can be run. ``ghost`` and the like clone a module without
its hooks, fill the clone with random parameters and statistics, and compare its forward with the
formula, in eval and in training mode. Two functions of this kind (sums, products and activations of
random numbers) that agree to 1e-9 at some hundred points are the same. The model itself is neither
run nor changed, and no random number is drawn from PyTorch's generator.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations
from .convert_layouts import (
    Branch,
    Layout,
    Refusal,
    first_conv,
    read,
    settings_of,
    slopes_of,
)
from .reference import Norms

_TOLERANCE = 1e-9
_HOOK_DICTS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
# What the fused modules keep in their __dict__.
_FUSED_STATE = ("_ghost_ops", "_packed", "_structure")


def clone(module: nn.Module, generator: torch.Generator, memo: dict[int, Any] | None = None) -> Any:
    """A copy on the CPU in float64 with random parameters and buffers, and no hooks."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    kind = getattr(type(module), "_ghost_ops_base", type(module))  # unfused, where it is fused
    copy = memo[id(module)] = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    for name in _FUSED_STATE:
        copy.__dict__.pop(name, None)
    for name in _HOOK_DICTS:
        if name in copy.__dict__:
            copy.__dict__[name] = OrderedDict()
    for group in ("_parameters", "_buffers"):
        copy.__dict__[group] = {
            name: _random(t, group == "_buffers", generator, memo)
            for name, t in module.__dict__[group].items()
        }
    copy.__dict__["_modules"] = {
        name: child if child is None else clone(child, generator, memo)
        for name, child in module._modules.items()
    }
    for name, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            copy.__dict__[name] = types.MethodType(value.__func__, copy)
        elif isinstance(value, Tensor):
            copy.__dict__[name] = _random(value, True, generator, memo)
    return copy


def _random(t: Tensor | None, positive: bool, generator: torch.Generator, memo: dict) -> Any:
    if t is None or id(t) in memo:
        return None if t is None else memo[id(t)]
    if not t.is_floating_point():
        made = torch.zeros(t.shape, dtype=t.dtype)
    elif t.dim() < 2 or positive:
        made = torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5
    else:
        scale = max(t.numel() // max(t.size(0), 1), 1) ** -0.5
        made = torch.randn(t.shape, generator=generator, dtype=torch.float64) * scale
    memo[id(t)] = made
    return made


def norms_of(primary: Branch, cheap: Branch, training: bool) -> Norms:
    """The tensors of both norms; a convolution's bias is the shift of a norm that does nothing."""
    return Norms(*_norm(primary, training), *_norm(cheap, training))


def _norm(branch: Branch, training: bool) -> tuple[Tensor | None, ...]:
    bn, weight = branch.bn, branch.conv.weight
    if bn is None:
        size = weight.size(0)
        return None, branch.conv.bias, weight.new_zeros(size), weight.new_ones(size)
    if training and not bn.track_running_stats:
        return bn.weight, bn.bias, None, None
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def uses_batch_stats(branch: Branch) -> bool:
    """Whether the branch's norm takes the statistics of the batch."""
    bn = branch.bn
    return bn is not None and (bn.training or (bn.running_mean is None and bn.running_var is None))


def small_gate(x: Tensor, short_conv: nn.Module) -> Tensor:
    """GhostModuleV2's gate, [N, oup, H // 2, W // 2], from x halved by average pooling.

    Source: GhostNetV2, NeurIPS 2022 (arXiv:2211.12905), section 4.1, decoupled fully connected
    attention.
    """
    return torch.sigmoid(short_conv(F.avg_pool2d(x, kernel_size=2, stride=2)))


def gate_of(x: Tensor, short_conv: nn.Module, size: tuple[int, int]) -> Tensor:
    """The gate brought to the size of the module's output."""
    return F.interpolate(small_gate(x, short_conv), size=size, mode="nearest")


def formula(layout: Layout, x: Tensor, out_channels: int) -> Tensor:
    """What the layout's children stand for, in plain PyTorch."""
    primary, cheap = layout.primary, layout.cheap
    settings = settings_of(layout, out_channels)
    slopes = slopes_of(primary, cheap)
    first = _branch(primary, x, settings.act1, settings.slope1, slopes.slopes1)
    second = _branch(cheap, first, settings.act2, settings.slope2, slopes.slopes2)
    out = torch.cat([first, second], 1)[:, :out_channels]
    if layout.gate is None:
        return out
    return out * gate_of(x, layout.gate, (out.size(2), out.size(3)))


def _branch(branch: Branch, x: Tensor, act: int, slope: float, slopes: Tensor | None) -> Tensor:
    bn, conv = branch.bn, branch.conv
    u = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if bn is not None:
        batch = uses_batch_stats(branch)
        mean, var = (None, None) if batch else (bn.running_mean, bn.running_var)
        u = F.batch_norm(u, mean, var, bn.weight, bn.bias, batch, 0.0, bn.eps)
    return activations.apply(u, act, slope, slopes=slopes)


def _input(conv: nn.Conv2d, generator: torch.Generator) -> Tensor:
    reach = [s * (k - 1) + 1 for s, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    h, w = 6 + max(reach[0], 2) + conv.stride[0], 5 + max(reach[1], 2) + conv.stride[1]
    shape = (2, conv.in_channels, h, w)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def compare(got: Any, want: Tensor, mode: str) -> None:
    """Raise ``Refusal`` if the forward's result is not what the formula gives."""
    if not isinstance(got, Tensor):
        raise Refusal(f"its forward gives a {type(got).__name__}, not a tensor")
    if got.shape != want.shape:
        raise Refusal(
            f"its forward gives {list(got.shape)} where the formula gives {list(want.shape)}"
        )
    error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-3)
    if not error <= _TOLERANCE:
        raise Refusal(
            f"its forward computes something else in {mode} mode: it differs from the formula by "
            f"{error:.1e} of the largest value, for random parameters in float64"
        )


def run(call: Callable[[], Any]) -> Any:
    """The result of a forward on random data. Raises ``Refusal`` if it raises."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return call()
    except Exception as error:
        raise Refusal(
            f"its forward does not run on one tensor: {type(error).__name__}: {error}"
        ) from error


def ghost(module: nn.Module, names: tuple[str, str]) -> int:
    """The number of output channels of a Ghost module whose forward is the formula.

    Raises:
        Refusal: it is not; the message says what is different.
    """
    generator = torch.Generator().manual_seed(0)
    copy = clone(module, generator)
    layout = read(copy, names)
    x = _input(layout.primary.conv, generator)
    m, g = layout.primary.conv.out_channels, layout.cheap.conv.out_channels
    for mode in ("eval", "training"):
        copy.train(mode == "training")
        got = run(lambda: copy(x.clone()))
        out_channels = got.size(1) if isinstance(got, Tensor) and got.dim() == 4 else m + g
        if not m <= out_channels <= m + g:
            raise Refusal(
                f"its forward gives {out_channels} channels, not the {m} intrinsic maps and up to "
                f"{g} ghosts of them"
            )
        want = run(lambda channels=out_channels: formula(layout, x, channels))
        compare(got, want, mode)
    return out_channels


def concatenates(module: nn.Module, names: tuple[str, str]) -> bool:
    """Whether a module gives more channels than either of its branches, as a concatenation does."""
    generator = torch.Generator().manual_seed(0)
    conv1, conv2 = (first_conv(module._modules[name]) for name in names)
    if conv1 is None or conv2 is None:
        return False
    try:
        copy = clone(module, generator).eval()
        got = run(lambda: copy(_input(conv1, generator)))
    except Refusal:
        return False
    m, g = conv1.out_channels, conv2.out_channels
    return isinstance(got, Tensor) and got.dim() == 4 and max(m, g) < got.size(1) <= m + g
