"""Promise: ``fuse`` leaves look-alikes unchanged, and names the invariant that does not hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ghost_forms import GhostConv, Sliced
from torch import Tensor, nn

import ghost_ops


def edited(change: Callable[[nn.Module], None]) -> nn.Module:
    module = Sliced(6, 8)
    change(module)
    return module


def cheap(**changes: object) -> nn.Module:
    arguments = {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False, **changes}

    def change(module: nn.Module) -> None:
        module.cheap_operation[0] = nn.Conv2d(4, 4, **arguments)

    return edited(change)


def other_forward(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    kind = type("Other", (Sliced,), {"forward": forward})
    return kind(6, 8)


def branch(index: int, layer: nn.Module) -> nn.Module:
    def change(module: nn.Module) -> None:
        module.cheap_operation[index] = layer

    return edited(change)


def swapped(self: nn.Module, x: Tensor) -> Tensor:
    y = self.primary_conv(x)
    return torch.cat([self.cheap_operation(y), y], 1)


def added(self: nn.Module, x: Tensor) -> Tensor:
    return Sliced.forward(self, x) + 1e-3


def from_x(self: nn.Module, x: Tensor) -> Tensor:
    y = self.primary_conv(x)
    return torch.cat([y, self.cheap_operation(y * 1.0001)], 1)


def two_inputs(self: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    return Sliced.forward(self, x) + skip


LOOK_ALIKES = {
    "not depthwise": (lambda: cheap(groups=1), "not depthwise"),
    "grouped in two": (lambda: cheap(groups=2), "not depthwise"),
    "even kernel": (lambda: cheap(kernel_size=4, padding=2), "even kernel"),
    "no padding": (lambda: cheap(padding=0), "padding"),
    "dilation": (lambda: cheap(dilation=2, padding=2), "dilation"),
    "stride": (lambda: cheap(stride=2), "stride"),
    "reflected padding": (lambda: cheap(padding_mode="reflect"), "reflect"),
    "long kernel": (lambda: cheap(kernel_size=(3, 5), padding=(1, 2)), "square"),
    "PReLU": (lambda: branch(2, nn.PReLU(3)), "parameter numbers = 3 and channel size = 4"),
    "Mish": (lambda: branch(2, nn.Mish()), "Mish"),
    "GroupNorm": (lambda: branch(1, nn.GroupNorm(2, 4)), "GroupNorm"),
    "InstanceNorm": (lambda: branch(1, nn.InstanceNorm2d(4)), "InstanceNorm2d"),
    "second activation": (
        lambda: branch(2, nn.Sequential(nn.ReLU(), nn.SiLU())),
        "it has an activation",
    ),
    "ghosts first": (lambda: other_forward(swapped), "its second branch does not come from"),
    "something added": (lambda: other_forward(added), "ends with add"),
    "something between": (lambda: other_forward(from_x), "does not come from its first"),
    "two inputs": (lambda: other_forward(two_inputs), "missing 1 required positional argument"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes(name: str) -> None:
    make, message = LOOK_ALIKES[name]
    model = nn.Sequential(make(), Sliced(8, 8))
    kinds, state = [type(m) for m in model.modules()], model.state_dict(keep_vars=True)
    report = ghost_ops.fuse(model, inference=False)
    assert [e.action for e in report.entries] == ["left", "swapped"]
    assert message in report.left[0].detail
    assert type(model[0]) is kinds[1]
    assert all(t is state[key] for key, t in model.state_dict(keep_vars=True).items())
    assert message in repr(report)


def test_forward_replaced_on_the_object() -> None:
    module = Sliced(6, 8)
    module.forward = lambda x: x
    report = ghost_ops.fuse(module)
    assert "forward is replaced" in report.left[0].detail


def test_hooks_inside() -> None:
    module = Sliced(6, 8)
    module.primary_conv[0].register_forward_hook(lambda *_: None)
    assert "hooks" in ghost_ops.fuse(module).left[0].detail


class Unmerged(Sliced):
    """GhostNetV3 before its reparameterisation: a branch is a sum of convolutions."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.primary_rpr_conv = nn.ModuleList([nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_rpr_conv[0](x) + self.primary_rpr_conv[1](x)
        return torch.cat([y, self.cheap_operation(y)], 1)


def test_branches_still_to_be_reparameterised() -> None:
    assert "reparameterize" in ghost_ops.fuse(Unmerged()).left[0].detail


class Separable(nn.Module):
    """A depthwise separable convolution: the same two convolutions without the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.depth = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(self.point(x))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(),
        nn.Linear(2, 3),
        nn.Conv2d(3, 4, 1),
        Separable(),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)),
    ],
    ids=["empty", "linear", "convolution", "separable", "sequential"],
)
def test_no_ghost_modules(model: nn.Module) -> None:
    kinds = [type(m) for m in model.modules()]
    for report in (ghost_ops.fuse(model), ghost_ops.unfuse(model)):
        assert not report.entries
        assert "no Ghost modules found, nothing changed" in repr(report)
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("function", [ghost_ops.fuse, ghost_ops.unfuse])
def test_not_a_module(function: Callable) -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        function("model")


def test_a_look_alike_does_not_stop_the_rest() -> None:
    model = nn.ModuleDict({"bad": cheap(groups=1), "good": GhostConv(6, 8)})
    report = ghost_ops.fuse(model)
    assert [e.name for e in report.left] == ["bad"]
    assert [e.name for e in report.swapped] == ["good"]
    assert repr(report).endswith("ModuleDict: 1 swapped, 1 left")
