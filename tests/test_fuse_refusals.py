"""Promise: ``fuse`` leaves look-alikes unchanged, and names the invariant that does not hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from ghost_forms import GhostConv, Sliced
from torch import Tensor, nn

import ghost_ops
from ghost_ops import convert


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
    entries = convert.fuse_modules(model, inference=False)
    assert [e.state for e in entries] == ["left", "fused"]
    assert message in entries[0].detail
    assert type(model[0]) is kinds[1]
    assert all(t is state[key] for key, t in model.state_dict(keep_vars=True).items())
    report = ghost_ops.report(model)
    assert [e.name for e in report.in_state("fused")] == ["1"]
    # As a Ghost module it is left, but inference has one operator for its layers.
    assert message in repr(report) or name == "ghosts first"


def test_forward_replaced_on_the_object() -> None:
    module = Sliced(6, 8)
    module.forward = lambda x: x
    with pytest.warns(UserWarning, match=r"changed nothing .* forward is replaced"):
        ghost_ops.fuse(module)
    assert "forward is replaced" in ghost_ops.report(module).in_state("left")[0].detail


def test_hooks_inside() -> None:
    module = Sliced(6, 8)
    module.primary_conv[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"changed nothing .* hooks"):
        ghost_ops.fuse(module)
    assert "hooks" in ghost_ops.report(module).in_state("left")[0].detail


class Unmerged(Sliced):
    """GhostNetV3 before its reparameterisation: a branch is a sum of convolutions."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.primary_rpr_conv = nn.ModuleList([nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_rpr_conv[0](x) + self.primary_rpr_conv[1](x)
        return torch.cat([y, self.cheap_operation(y)], 1)


def test_branches_still_to_be_reparameterised() -> None:
    with pytest.warns(UserWarning, match=r"changed nothing .* reparameterize it first"):
        ghost_ops.fuse(Unmerged())


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
    kinds, name = [type(m) for m in model.modules()], type(model).__name__
    message = rf"found no Ghost module in model, a {name}, and changed nothing\. fuse looks for"
    for _ in range(2):
        with pytest.warns(UserWarning, match=message) as given:
            assert ghost_ops.fuse(model) is model
        assert len(given) == 1 and given[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ghost_ops.unfuse(model) is model
        assert not ghost_ops.report(model).entries
    assert repr(ghost_ops.report(model)) == f"{name}: no Ghost modules"
    assert [type(m) for m in model.modules()] == kinds


def test_nothing_but_look_alikes() -> None:
    message = r"changed nothing in model, a Sequential: 2 modules look .* 0, a Sliced: .*depthwise"
    with pytest.warns(UserWarning, match=message):
        ghost_ops.fuse(nn.Sequential(cheap(groups=1), cheap(dilation=2)))


@pytest.mark.parametrize("function", [ghost_ops.fuse, ghost_ops.unfuse, ghost_ops.report])
@pytest.mark.parametrize("model", ["model", None, nn.Conv2d], ids=["string", "None", "class"])
def test_not_a_module(function: Callable, model: object) -> None:
    got = "the class Conv2d" if model is nn.Conv2d else type(model).__name__
    with pytest.raises(TypeError, match=rf"^model must be an nn\.Module, got {got}$"):
        function(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_torch_jit() -> None:
    message = r"^model must be .*, got a RecursiveScriptModule, compiled by torch\.jit: fuse the "
    module = torch.jit.script(Sliced(6, 8))
    with pytest.raises(TypeError, match=message):
        ghost_ops.fuse(module)
    assert "compiled by torch.jit" in ghost_ops.report(module).in_state("left")[0].detail


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"inference": "eval"}, TypeError, "inference must be None, True or False, got str"),
        ({"inference": torch.zeros(2)}, TypeError, "inference must be .*, got Tensor"),
        ({"example": "x"}, TypeError, "example must be a Tensor, an input of the model, got str"),
        ({"example": (1, 6, 8, 8)}, TypeError, "example must be a Tensor, .*, got tuple"),
        ({"example": torch.randn(1, 5, 8, 8)}, RuntimeError, r"example must be an input .*\[1, 5"),
        (
            {"example": torch.randn(1, 6, 8, 8).double()},
            RuntimeError,
            r"example must be .* in torch\.float64 on cpu.*The model has torch\.float32 weights on",
        ),
        (
            {"example": torch.randn(1, 6, 8, 8, device="meta")},
            RuntimeError,
            r"example must be .* on meta.* The model has torch\.float32 weights on cpu",
        ),
    ],
    ids=["inference", "tensor", "string", "tuple", "channels", "dtype", "device"],
)
def test_bad_arguments_change_nothing(
    arguments: dict, error: type[Exception], message: str
) -> None:
    model = nn.Sequential(Sliced(6, 8), Sliced(8, 8))
    ghost_ops.fuse(model[1])
    kinds, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    with pytest.raises(error, match=message):
        ghost_ops.fuse(model, **arguments)
    assert [type(m) for m in model.modules()] == kinds
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_look_alike_does_not_stop_the_rest() -> None:
    model = nn.ModuleDict({"bad": cheap(groups=1), "good": GhostConv(6, 8)})
    report = ghost_ops.report(ghost_ops.fuse(model))
    assert [e.name for e in report.in_state("left")] == ["bad"]
    assert [e.name for e in report.in_state("fused")] == ["good"]
    assert repr(report).endswith("ModuleDict: 1 fused, 1 left")
