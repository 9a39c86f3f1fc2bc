"""The forms in which Ghost modules are written, read back into convolutions, norms and activations.

A Ghost module has two branches, a primary one and a cheap one, each a convolution with or without a
batch norm and an activation. ``read`` finds them by structure: under any two names, as a
Sequential, as a module of its own (``conv``, ``bn``, ``act``) or as a bare convolution. It tells
which of the formula's invariants does not hold where one does not. What a module's forward makes of
its branches is not read but tried, see ``convert_probe``.

====================  ===========================================================================
form                  where it is found
====================  ===========================================================================
conv-bn-act twice     the authors' GhostModule, timm's ``ghostnet_*``, NanoDet's (not sliced)
``cv1`` and ``cv2``   Ultralytics' GhostConv, also after its own ``fuse()`` took the norms out
convolutions alone    variants without norm and activation; with a bias: GhostNetV3 after its
                      reparameterisation
with ``short_conv``   GhostModuleV2 and V3: the output times a gate computed from pooled input
====================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from . import activations
from .reference import Settings, Slopes
from .structure import _GLOBAL_HOOKS, _computes_as, _hooks_of

# Names of (primary, cheap) that mark a Ghost module even where its structure is not one.
KNOWN_NAMES = ("primary_conv", "cheap_operation")
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


class Refusal(Exception):
    """Not a Ghost module that the fused ops can compute; the message names the invariant."""


class Branch(NamedTuple):
    """A convolution and what follows it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None
    act: nn.Module | None  # None: nothing; a PReLU only Ghost modules compute
    modules: tuple[nn.Module, ...]  # all of them, containers included


class Layout(NamedTuple):
    """A Ghost module's branches and the names that they are found under."""

    names: tuple[str, str]
    primary: Branch
    cheap: Branch
    gate: nn.Module | None  # GhostModuleV2's short_conv

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that the fused ops compute in the place of."""
        return (*self.primary.modules, *self.cheap.modules)


def _is_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Sequential and len(module) == 0)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    if not children or isinstance(module, nn.Conv2d):
        yield module
    for child in children if not isinstance(module, nn.Conv2d) else ():
        yield from _leaves(child)


def first_conv(module: nn.Module) -> nn.Conv2d | None:
    """The convolution that a branch starts with, or None if it does not."""
    leaf = next(_leaves(module), None)
    return leaf if isinstance(leaf, nn.Conv2d) else None


def read_branch(module: nn.Module, name: str) -> Branch:
    """The convolution, batch norm and activation of a branch.

    Raises:
        Refusal: there is something else in it, or in another order.
    """
    conv: nn.Conv2d | None = None
    bn: nn.BatchNorm2d | None = None
    act: nn.Module | None = None
    for leaf in _leaves(module):
        kind = type(leaf)
        if _is_nothing(leaf):
            continue
        if isinstance(leaf, nn.Conv2d):
            if not _computes_as(kind, nn.Conv2d):
                raise Refusal(f"{name} has a {kind.__name__}, which may not compute as a Conv2d")
            if conv is not None:
                raise Refusal(f"{name} has more than one convolution")
            conv = leaf
        elif conv is None:
            raise Refusal(f"{name} has a {kind.__name__} before its convolution")
        elif isinstance(leaf, nn.BatchNorm2d) and _computes_as(kind, nn.BatchNorm2d):
            if bn is not None or act is not None:
                raise Refusal(f"{name} has a second batch norm, or one after its activation")
            bn = leaf
        elif activations.of_ghost_branch(leaf) is not None:
            if act is not None:
                raise Refusal(f"{name} has a second activation, {kind.__name__}")
            act = leaf
        elif isinstance(leaf, _NORMS):
            raise Refusal(f"{name} has a {kind.__name__} in the place of a BatchNorm2d")
        else:
            raise Refusal(f"{name} has a {kind.__name__}, which the fused ops do not compute")
    if conv is None:
        raise Refusal(f"{name} has no convolution")
    if bn is not None and conv.bias is not None:
        raise Refusal(f"{name} has a convolution with a bias before its batch norm")
    if bn is not None and bn.num_features != conv.out_channels:
        raise Refusal(
            f"{name} has a batch norm of {bn.num_features} channels behind a convolution of "
            f"{conv.out_channels}"
        )
    if type(act) is nn.PReLU and act.num_parameters not in (1, conv.out_channels):
        raise Refusal(
            f"{name} has a PReLU of {act.num_parameters} slopes behind {conv.out_channels} channels"
        )
    return Branch(conv, bn, act, tuple(module.modules()))


def check_geometry(primary: Branch, cheap: Branch, names: tuple[str, str]) -> None:
    """Raise ``Refusal`` with the first invariant of the formula that the convolutions break."""
    conv1, conv2 = primary.conv, cheap.conv
    m, d = conv1.out_channels, conv2.kernel_size[0]
    for name, conv in zip(names, (conv1, conv2), strict=True):
        if conv.padding_mode != "zeros":
            raise Refusal(f"{name} pads with {conv.padding_mode!r}, not with zeros")
        if isinstance(conv.padding, str):
            raise Refusal(f"{name} has padding={conv.padding!r}, not numbers")
    if conv2.in_channels != m:
        raise Refusal(f"{names[1]} takes {conv2.in_channels} channels, but {names[0]} gives {m}")
    if conv2.groups != m:
        raise Refusal(f"{names[1]} is not depthwise: groups={conv2.groups} for {m} channels")
    if conv2.kernel_size != (d, d):
        raise Refusal(f"{names[1]} has a kernel that is not square: {conv2.kernel_size}")
    if d % 2 == 0:
        raise Refusal(f"{names[1]} has an even kernel size, {d}")
    if conv2.stride != (1, 1):
        raise Refusal(f"{names[1]} has stride {conv2.stride}, not 1")
    if conv2.dilation != (1, 1):
        raise Refusal(f"{names[1]} has dilation {conv2.dilation}, not 1")
    if conv2.padding != (d // 2, d // 2):
        raise Refusal(f"{names[1]} has padding {conv2.padding}, not {d // 2}, half its kernel")


def check_hooks(modules: tuple[nn.Module, ...], what: str) -> None:
    """Raise ``Refusal`` if a module inside has hooks, which would not run any more."""
    for module in modules:
        if any(_hooks_of(module)):
            kind = type(module).__name__
            raise Refusal(f"a {kind} inside {what} has hooks, which run only if it does")
    if any(_GLOBAL_HOOKS):
        raise Refusal("there are hooks on all modules, which would not run for those inside")


def candidate(module: nn.Module) -> tuple[str, str] | None:
    """The names of a primary and a cheap branch among the children, or None if there are none.

    Either the names say so, or the second branch starts with a depthwise convolution of what the
    first gives, and there are no others.
    """
    children = {name: child for name, child in module._modules.items() if child is not None}
    if KNOWN_NAMES[0] in children and KNOWN_NAMES[1] in children:
        return KNOWN_NAMES
    convs = {name: conv for name, child in children.items() if (conv := first_conv(child))}
    if len(convs) != 2:
        return None
    (name1, conv1), (name2, conv2) = convs.items()
    depthwise = conv2.groups == conv2.in_channels == conv1.out_channels
    return (name1, name2) if depthwise and conv2.groups > 1 else None


def read(module: nn.Module, names: tuple[str, str]) -> Layout:
    """The layout of a candidate.

    Raises:
        Refusal: an invariant does not hold; the message names it.
    """
    primary_module, cheap_module = module._modules[names[0]], module._modules[names[1]]
    rest = [
        (name, child)
        for name, child in module._modules.items()
        if name not in names and child is not None and not _is_nothing(child)
    ]
    if "primary_rpr_conv" in dict(rest):
        raise Refusal(
            "it still has the branches that it is trained with: reparameterize it first (V3's "
            "reparameterize() or switch_to_deploy())"
        )
    if "forward" in module.__dict__:
        raise Refusal("its forward is replaced on the object")
    primary = read_branch(primary_module, names[0])
    cheap = read_branch(cheap_module, names[1])
    check_geometry(primary, cheap, names)
    gate = dict(rest).get("short_conv")
    if gate is not None and type(module._modules.get("gate_fn")) is not nn.Sigmoid:
        raise Refusal("short_conv is there, but no gate_fn that is a Sigmoid")
    for name, child in rest:
        if any(True for _ in child.parameters()) and child is not gate:
            raise Refusal(f"it has a further child with parameters, {name}")
    layout = Layout(names, primary, cheap, gate)
    check_hooks(layout.modules, "it")
    return layout


def settings_of(layout: Layout, out_channels: int) -> Settings:
    """``reference.Settings`` of a layout. A branch without batch norm has eps 0."""
    conv = layout.primary.conv
    nothing = (activations.NONE, activations.DEFAULT_SLOPE)
    act1, act2 = (
        nothing if branch.act is None else activations.of_ghost_branch(branch.act)
        for branch in (layout.primary, layout.cheap)
    )
    assert act1 is not None and act2 is not None
    return Settings(
        out_channels, conv.stride, conv.padding, conv.dilation, conv.groups,
        layout.primary.bn.eps if layout.primary.bn is not None else 0.0,
        layout.cheap.bn.eps if layout.cheap.bn is not None else 0.0,
        *act1, *act2,
    )  # fmt: skip


def slopes_of(primary: Branch, cheap: Branch) -> Slopes:
    """The slopes of the branches' PReLUs."""
    return Slopes(
        *(
            activations.slopes_of(branch.act, branch.conv.weight.size(0))
            for branch in (primary, cheap)
        )
    )
