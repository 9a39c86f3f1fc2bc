"""What a Ghost module is made of at the moment, and whether the fused ops can stand for it.

The children of a module can be replaced, re-parametrised, hooked or reconfigured at any time, so
they are read at every call. ``inspect`` does that in full; ``Structure.is_current`` tells cheaply
whether a former answer still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import activations, watch
from .reference import NO_SLOPES, Settings, Slopes

# Forward pre-hooks that only compute a parameter from others: they can be run without the module.
_PARAMETER_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)

_GLOBAL_HOOKS = (
    module_globals._global_forward_pre_hooks,
    module_globals._global_forward_hooks,
    module_globals._global_backward_pre_hooks,
    module_globals._global_backward_hooks,
)

_CONV_STATE = ("stride", "padding", "dilation", "groups", "padding_mode")
# The activations that have a setting, and its name.
_ACT_STATE = {nn.LeakyReLU: "negative_slope", nn.GELU: "approximate"}


class Structure:
    """The six children of a Ghost module that the fused ops can compute, and their settings."""

    __slots__ = (
        "act1",
        "act2",
        "bn1",
        "bn2",
        "cheap",
        "children",
        "conv1",
        "conv2",
        "dicts",
        "hooks",
        "parameter_hooks",
        "prelus",
        "primary",
        "settings",
        "unchanged",
    )

    def __init__(self, primary: nn.Sequential, cheap: nn.Sequential) -> None:
        self.primary, self.cheap = primary, cheap
        self.conv1, self.bn1, self.act1 = primary
        self.conv2, self.bn2, self.act2 = cheap
        self.children = (*primary, *cheap)
        self.prelus = tuple(act for act in (self.act1, self.act2) if type(act) is nn.PReLU)
        everyone = (primary, cheap, *self.children)
        self.dicts = tuple(module.__dict__ for module in everyone)
        self.hooks = tuple(hooks for module in everyone for hooks in _hooks_of(module))
        self.hooks += _GLOBAL_HOOKS
        self.parameter_hooks: tuple[tuple[Any, nn.Module], ...] = ()
        self.settings: Settings
        self.unchanged: Callable[[], bool] = _never

    def watched(self, module: nn.Module) -> tuple[tuple, tuple, tuple]:
        """What ``settings`` and the absence of hooks depend on: dicts, items, absent of a Watch.

        ``module`` is the Ghost module; its attribute ``oup`` is left out, which would tie it to
        the watch that it holds.
        """
        items = [(module._modules, "primary_conv"), (module._modules, "cheap_operation")]
        for conv in (self.conv1, self.conv2):
            items += [(conv.__dict__, name) for name in _CONV_STATE]
        items += [(bn.__dict__, "eps") for bn in (self.bn1, self.bn2)]
        for act in (self.act1, self.act2):
            if type(act) in _ACT_STATE:
                items.append((act.__dict__, _ACT_STATE[type(act)]))
        dicts = (self.primary._modules, self.cheap._modules, *self.hooks)
        return dicts, tuple(items), tuple((attributes, "forward") for attributes in self.dicts)

    def is_current(self, module: nn.Module) -> bool:
        """Whether the module still is as it was inspected: children, attributes and no hooks."""
        return module.oup == self.settings.out_channels and self.unchanged()

    @property
    def has_slopes(self) -> bool:
        """Whether a branch ends in a PReLU."""
        return bool(self.prelus)

    def slopes(self) -> Slopes:
        """The slopes per channel of the branches' PReLUs.

        Raises:
            RuntimeError: a PReLU has neither one slope nor one a channel.
        """
        if not self.prelus:
            return NO_SLOPES
        return Slopes(
            activations.slopes_of(self.act1, self.conv1.weight.size(0)),
            activations.slopes_of(self.act2, self.conv2.weight.size(0)),
        )

    def run_parameter_hooks(self) -> None:
        """Let weight norm, spectral norm and pruning compute their parameters."""
        for hook, module in self.parameter_hooks:
            hook(module, None)


def _hooks_of(module: nn.Module) -> tuple[dict, ...]:
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def inspect(module: nn.Module) -> Structure | str:
    """The structure of a Ghost module, or the reason why it must run unfused.

    Raises:
        RuntimeError: the second convolution cannot follow the first.
    """
    primary, cheap = module.primary_conv, module.cheap_operation
    for name, branch in (("primary_conv", primary), ("cheap_operation", cheap)):
        if type(branch) is not nn.Sequential or len(branch) != 3:
            return f"{name} is not a Sequential of convolution, batch norm and activation"
        for child, base in ((branch[0], nn.Conv2d), (branch[1], nn.BatchNorm2d)):
            if not isinstance(child, base) or not _computes_as(type(child), base):
                return f"{name} has a {type(child).__name__} in the place of a {base.__name__}"
        if activations.of_ghost_branch(branch[2]) is None:
            return f"{name} has the activation {type(branch[2]).__name__}"
    found = Structure(primary, cheap)
    for attributes in found.dicts:
        if "forward" in attributes:
            return "a submodule's forward is replaced"
    reason = _hooks(found) or _geometry(found)
    if reason:
        return reason
    conv = found.conv1
    act1, act2 = map(activations.of_ghost_branch, (found.act1, found.act2))
    assert act1 is not None and act2 is not None
    found.settings = Settings(
        module.oup, conv.stride, conv.padding, conv.dilation, conv.groups,
        found.bn1.eps, found.bn2.eps, *act1, *act2,
    )  # fmt: skip
    if not torch.compiler.is_compiling() and not found.parameter_hooks:
        # A subclass may keep an attribute elsewhere: then every call inspects anew.
        with suppress(KeyError):
            found.unchanged = watch.make(*found.watched(module)).unchanged
    return found


def _never() -> bool:
    return False


def _computes_as(kind: type, base: type) -> bool:
    """Whether a subclass has its base's forward (as one made by a parametrisation has)."""
    return all(
        getattr(kind, name, None) is getattr(base, name, None)
        for name in ("forward", "_conv_forward", "_check_input_dim")
    )


def _hooks(found: Structure) -> str | None:
    """Collect the hooks that can run on their own; the reason if there are others."""
    if not any(found.hooks):
        return None
    parameter_hooks = []
    for child in found.children:
        for hook in child._forward_pre_hooks.values():
            if isinstance(hook, _PARAMETER_HOOKS):
                parameter_hooks.append((hook, child))
    if len(parameter_hooks) != sum(len(hooks) for hooks in found.hooks):
        return "a submodule has hooks, which run only if it does"
    found.parameter_hooks = tuple(parameter_hooks)
    return None


def _geometry(found: Structure) -> str | None:
    """The reason why these convolutions are not those of the formula, or None."""
    conv1, conv2 = found.conv1, found.conv2
    for name, conv in (("primary", conv1), ("cheap", conv2)):
        if conv.bias is not None:
            return f"the {name} convolution has a bias"
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return f"the {name} convolution has padding {conv.padding!r}, {conv.padding_mode!r}"
    d, m = conv2.kernel_size[0], conv1.out_channels
    if conv2.in_channels != m:
        raise RuntimeError(
            f"cheap_operation's convolution takes {conv2.in_channels} channels, but "
            f"primary_conv's gives {m}"
        )
    if (
        conv2.kernel_size != (d, d)
        or d % 2 == 0
        or conv2.padding != (d // 2, d // 2)
        or conv2.stride != (1, 1)
        or conv2.dilation != (1, 1)
        or conv2.groups != m
    ):
        return "the cheap convolution is not depthwise of stride 1 with 'same' padding"
    return None
