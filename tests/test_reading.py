"""Promise: a forward that reads variable state is never computed wrongly, fused or not.

Each module is compared with its unfused copy, before and after a change of the values that its
forward reads. Whether it was fused matters only in the tests that check it.
"""

from __future__ import annotations

import concurrent.futures
import copy
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import Gated, Sliced, conv_bn_act, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from twins import TRAINING, agree, image

import ghost_ops
from ghost_ops.fusion.read import read
from ghost_ops.reference import GhostBottleneck

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*unfused:UserWarning", "ignore:fuse changed nothing:UserWarning"
)


def reason(module: nn.Module) -> str:
    """Why ``fuse`` leaves a module."""
    with pytest.warns(UserWarning, match="fuse changed nothing"):
        ghost_ops.fuse(module)
    return ghost_ops.report(module).in_state("left")[0].detail


def branches(self: nn.Module, x: Tensor) -> Tensor:
    y = self.primary_conv(x)
    return torch.cat([y, self.cheap_operation(y)], 1)


class Switches:
    relu = False


def helper() -> None:
    """The forward reads an attribute of this function."""


class Listed(nn.Module):
    """Its layers are in lists, which are iterated over and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(conv_bn_act(6, 4, 1, 1, 1, nn.ReLU()))
        self.second = nn.ModuleList(conv_bn_act(4, 4, 3, 1, 4, nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first:
            x = layer(x)
        z = x
        for layer in self.second:
            z = layer(z)
        return torch.cat([x, z], 1)


class OneList(Sliced):
    """Both branches in one list."""

    def __init__(self) -> None:
        super().__init__(6, 8)
        self.parts = nn.ModuleList([self.primary_conv, self.cheap_operation])
        del self.primary_conv, self.cheap_operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts[0](x)
        return torch.cat([y, self.parts[1](y)], 1)


def of(forward: Callable[..., Tensor], **attributes: Any) -> nn.Module:
    module = type("Form", (Sliced,), {"forward": forward})(6, 8)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def reads_class(self: nn.Module, x: Tensor) -> Tensor:
    out = branches(self, x)
    return F.relu(out) if Switches.relu else out


def reads_class_by_name(self: nn.Module, x: Tensor) -> Tensor:
    switches = Switches
    out = branches(self, x)
    return F.relu(out) if switches.relu else out


def reads_attribute_class(self: nn.Module, x: Tensor) -> Tensor:
    out = branches(self, x)
    return F.relu(out) if self.config.relu else out  # type: ignore[union-attr]


class Base(Sliced):
    flag = False


class ReadsSuper(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = branches(self, x)
        return F.relu(out) if super().flag else out


def reads_function(self: nn.Module, x: Tensor) -> Tensor:
    out = branches(self, x)
    return F.relu(out) if helper.relu else out  # type: ignore[attr-defined]


def imports(self: nn.Module, x: Tensor) -> Tensor:
    import test_reading

    out = branches(self, x)
    return F.relu(out) if test_reading.Switches.relu else out


def catches(self: nn.Module, x: Tensor) -> Tensor:
    out = branches(self, x)
    try:
        if x.amax() > 0:
            out = F.relu(out)
    except Exception:
        pass
    return out


def catches_everything(self: nn.Module, x: Tensor) -> Tensor:
    out = branches(self, x)
    try:
        if x.amax() > 0:
            out = F.relu(out)
    except:  # noqa: E722
        pass
    return out


def counts() -> nn.Module:
    calls = 0

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return branches(self, x) * calls

    return of(forward)


def hashes_a_size(self: nn.Module, x: Tensor) -> Tensor:
    out = branches(self, x)
    return F.relu(out) if x.shape[2] in {11, 12} else out


def drops_a_result(self: nn.Module, x: Tensor) -> Tensor:
    out = branches(self, x)
    self.statistics(out)
    return out


def clamps(self: nn.Module, x: Tensor) -> Tensor:
    return branches(self, x).clamp(0, 6)


STORED: list[Tensor] = []


def stores(self: nn.Module, x: Tensor) -> Tensor:
    global STORED
    STORED = [x]
    return branches(self, x)


MISLEADING = {
    "class": lambda: of(reads_class),
    "class by another name": lambda: of(reads_class_by_name),
    "class as an attribute": lambda: of(reads_attribute_class, config=Switches),
    "function": lambda: of(reads_function),
    "import": lambda: of(imports),
    "super": lambda: ReadsSuper(6, 8),
    "except": lambda: of(catches),
    "bare except": lambda: of(catches_everything),
    "nonlocal": counts,
    "size in a set": lambda: of(hashes_a_size),
    "result not used": lambda: of(drops_a_result, statistics=nn.BatchNorm2d(8)),
    "clamp": lambda: of(clamps),
    "store": lambda: of(stores),
    "lists": Listed,
    "one list": OneList,
}


@TRAINING
@pytest.mark.parametrize("name", MISLEADING)
def test_what_forward_reads(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "relu", False, raising=False)
    plain = randomize(MISLEADING[name]()).double().train(training)
    fused = copy.deepcopy(plain)
    if name == "nonlocal":  # both copies would count in the same cell
        assert "STORE_DEREF" in reason(fused)
        return
    report = ghost_ops.report(ghost_ops.fuse(fused))
    followed = name in ("class", "function", "lists", "one list")
    assert bool(report.in_state("fused")) == followed, report
    agree(fused, plain)
    monkeypatch.setattr(Switches, "relu", True)
    monkeypatch.setattr(helper, "relu", True)
    monkeypatch.setattr(Base, "flag", True)
    agree(fused, plain)
    if name == "store":
        assert isinstance(sys.modules[__name__].STORED[0], Tensor)


def test_another_class() -> None:
    """The module gets a class with another method that its forward calls."""
    plain = randomize(of(lambda self, x: self.post(branches(self, x)))).double().eval()  # type: ignore[misc]
    type(plain).post = lambda self, x: F.relu(x)
    fused = copy.deepcopy(plain)
    assert ghost_ops.report(ghost_ops.fuse(fused)).in_state("fused")
    agree(fused, plain)
    for module in (fused, plain):
        module.__class__ = type("Other", (type(module),), {"post": lambda self, x: F.silu(x)})
    with torch.no_grad():  # the packed weights are those of the former class
        torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-8, atol=1e-9)
    agree(fused, plain)


def test_no_guard_of_what_has_changed_since_it_was_read() -> None:
    module = Sliced(6, 8)
    record = read(module).record
    assert record.watch(module) is not None
    module.out_chs = 7
    assert record.watch(module) is None


@pytest.mark.filterwarnings("default:.*unfused:UserWarning")
@pytest.mark.usefixtures("unsaid")
def test_the_warning_names_what_cannot_be_followed() -> None:
    module = GhostBottleneck(6, 12, 6).double().eval()
    ghost_ops.fuse(module)
    module.ghost1.register_forward_hook(lambda *_: None)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"ghost1, a \w+: it has hooks"):
        module(image())


def test_one_comparison_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sets the number of threads, a setting of the process, and has to restore it."""
    running = most = 0

    def compare(*_: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1

    monkeypatch.setattr("ghost_ops.fusion.check._compare_modes", compare)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        models = pool.map(lambda _: ghost_ops.fuse(Sliced(6, 8)), range(4))
        assert all(type(model) is not Sliced for model in models)
    assert most == 1


def test_part_changed_in_place_through_another_name() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = branches(self, x)
        part = out[:, :4]
        part.relu_()
        return out

    assert "changed in place through another" in reason(of(forward))


def test_zero_at_the_ends_of_a_clamp() -> None:
    """At 0 and 6, where a clamp passes the gradient and ReLU6 does not."""
    plain = of(clamps).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    agree(fused, plain)


def replace_in_list(module: nn.Module) -> None:
    module.first[0] = randomize(nn.Sequential(nn.Conv2d(6, 4, 1, bias=False)), 3)[0].double()  # type: ignore[index]


def append_to_list(module: nn.Module) -> None:
    module.second.append(nn.SiLU())  # type: ignore[union-attr]


def delete_from_list(module: nn.Module) -> None:
    del module.second[2]  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [replace_in_list, append_to_list, delete_from_list])
def test_lists_of_modules(change: Callable[[nn.Module], None]) -> None:
    plain = randomize(Listed()).double().eval()
    fused = copy.deepcopy(plain)
    assert ghost_ops.report(ghost_ops.fuse(fused)).in_state("fused")
    agree(fused, plain)
    for module in (fused, plain):
        change(module)
    agree(fused, plain)


def circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class Twice(nn.ReLU):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Scaled(nn.Conv2d):
    scale = 1.0

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._parameters["weight"] * self.scale


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


def set_scale(module: nn.Module, scale: float) -> None:
    module.primary_conv[0].__class__ = Scaled  # type: ignore[index]
    module.primary_conv[0].scale = scale  # type: ignore[index]


def attribute_bias(module: nn.Module, factor: float) -> None:
    conv = module.cheap_operation[0]  # type: ignore[index]
    if "bias" in conv._parameters:
        del conv.bias
        conv.bias = torch.ones(4, dtype=torch.float64)
    conv.bias.mul_(factor)


CHANGES: dict[str, tuple[Callable[[nn.Module], None], ...]] = {
    "circular padding": (
        lambda m: setattr(
            m.cheap_operation[0], "_conv_forward", types.MethodType(circular, m.cheap_operation[0])
        ),
    ),
    "own call": (lambda m: m.cheap_operation.__setitem__(2, Twice()),),
    "property": (lambda m: set_scale(m, 2.0), lambda m: set_scale(m, 3.0)),
    "plain bias": (lambda m: attribute_bias(m, 2.0), lambda m: attribute_bias(m, 3.0)),
    "parametrised": (
        lambda m: parametrize.register_parametrization(m.primary_conv[0], "weight", Halved()),
        lambda m: m.primary_conv[0].parametrizations.weight.original.data.mul_(2),
    ),
    "PReLU of a class of its own": (
        lambda m: m.primary_conv.__setitem__(2, type("Mine", (nn.PReLU,), {})().double()),
    ),
    "dictionaries": (
        lambda m: setattr(m.primary_conv, "_modules", {**m.primary_conv._modules, "2": nn.SiLU()}),
    ),
}


@TRAINING
@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_layers(name: str, training: bool) -> None:
    plain = randomize(Sliced(6, 8)).double().train(training)
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    agree(fused, plain)
    for change in CHANGES[name]:
        for module in (fused, plain):
            with torch.no_grad():
                change(module)
        agree(fused, plain)
        agree(fused, plain)


@pytest.mark.parametrize("old", [True, False], ids=["hooks", "parametrizations"])
@pytest.mark.parametrize("how", ["prelu", "one norm in eval", "conv_dw", "printed"])
def test_spectral_norm_iterates_once(how: str, old: bool) -> None:
    """Every access to the weight in training updates its vectors: a second access is noticed."""
    torch.manual_seed(0)
    bottleneck = how == "conv_dw"
    plain = GhostBottleneck(6, 12, 8, stride=2) if bottleneck else Sliced(6, 8)
    plain = randomize(plain).double()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    for module in (fused, plain):
        conv = module.conv_dw if bottleneck else module.primary_conv[0]  # type: ignore[index]
        torch.manual_seed(1)
        (spectral_norm if old else parametrizations.spectral_norm)(conv)
        if how == "prelu":
            module.primary_conv[2] = nn.PReLU().double()  # type: ignore[index]
        elif how == "one norm in eval":
            module.cheap_operation[1].eval()  # type: ignore[index]
    for _ in range(2):
        agree(fused, plain)
        if how == "printed":
            repr(fused)


def test_legacy_tensor_types_are_refused() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return branches(self, x) if isinstance(x, torch.DoubleTensor) else x

    assert "DoubleTensor" in reason(of(forward))


class Counter(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


def then_counts(self: nn.Module, x: Tensor) -> Tensor:
    return self.counter(branches(self, x))


def test_a_module_that_cannot_be_followed_is_called() -> None:
    """The layers behind the concatenation run unfused."""
    plain = randomize(of(then_counts, counter=Counter())).double().eval()
    fused = copy.deepcopy(plain)
    assert ghost_ops.report(ghost_ops.fuse(fused)).in_state("fused")
    for n in (3, 6):
        agree(fused, plain)
        assert fused.counter.calls == plain.counter.calls == n


class Sum(GhostBottleneck):
    """The sum is out of place, so its dtype depends on both terms."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost2(self.ghost1(x)) + x


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_dtype_of_a_sum_under_autocast(grad: bool) -> None:
    plain = randomize(Sum(6, 12, 6)).eval()
    fused = copy.deepcopy(plain)
    assert len(ghost_ops.report(ghost_ops.fuse(fused)).in_state("fused")) == 3
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        got, want = fused(image().float()), plain(image().float())
    assert got.dtype is want.dtype is torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("part", ["ghost2.primary_conv.1", "conv_dw", "se.conv_expand"])
def test_dtypes_that_differ_raise_as_in_pytorch(part: str) -> None:
    plain = GhostBottleneck(6, 12, 6, stride=2, se_ratio=0.25).double().eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    agree(fused, plain)
    for module in (fused, plain):
        module.get_submodule(part).float()
        with torch.no_grad(), pytest.raises(RuntimeError):
            module(image())


def test_a_gate_of_one_channel() -> None:
    plain = randomize(Gated(6, 8)).double().eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    agree(fused, plain)
    for module in (fused, plain):
        module.short_conv = randomize(nn.Sequential(nn.Conv2d(6, 1, 1)), 5).double()
    agree(fused, plain)


def test_functions_replaced_in_compiled_training(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = randomize(Sliced(6, 8)).double()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    old = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: old(self, x) * 2)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(image()), plain(image()), rtol=1e-8, atol=1e-9)
    torch.compiler.reset()
