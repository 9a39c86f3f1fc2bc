"""Promise: whatever people do with a fused model, it computes what its plain twin computes.

The same change is applied to both; ``twins`` makes and compares them. Random changes are in
``test_random_changes``, compilers and tracers in ``test_tracing``.
"""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import FORMS, Sliced, randomize
from helpers import ACTIVATIONS
from processes import python
from torch import Tensor, nn
from twins import (
    BOTTLENECKS,
    FAMILIES,
    FEW,
    HOOKS,
    NETWORKS,
    REWRITTEN,
    TRAINING,
    Functional,
    add_hook,
    agree,
    image,
    made,
    observe,
    same,
    setting,
    twins,
)

import ghost_ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs its own forward"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


# --- replicas and other copies ----------------------------------------------------------------


def replica(model: nn.Module) -> nn.Module:
    """A replica as ``nn.DataParallel`` makes it; its parameters are tensors with a graph."""
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for m, other in copies.items():
        for name, child in m._modules.items():
            if child is not None:
                setattr(other, name, copies[child])
        other_weights(m, other)
        for name, b in m._buffers.items():
            other._buffers[name] = b if b is None else b + (0.25 if b.is_floating_point() else 0)
    return copies[model]


def other_weights(module: nn.Module, other: nn.Module) -> None:
    for name, p in module._parameters.items():
        if p is None:
            other._parameters[name] = None
        else:
            setattr(other, name, p * 1.5)


def replica_of_convolutions(model: nn.Module) -> nn.Module:
    """A replica whose convolutions alone have other weights."""
    other = model._replicate_for_data_parallel()
    if isinstance(model, nn.Conv2d):
        other_weights(model, other)
    else:
        other._parameters = model._parameters
    for name, child in model._modules.items():
        other._modules[name] = child and replica_of_convolutions(child)
    return other


def scaled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


def shallow(model: nn.Module) -> nn.Module:
    other = type(model).__new__(type(model))
    other.__dict__ = model.__dict__.copy()
    other._modules = copy.deepcopy(model._modules)
    return scaled(other)


def copied(model: nn.Module) -> nn.Module:
    other = copy.copy(model)
    other._modules = copy.deepcopy(model._modules)
    return scaled(other)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replica": replica,
    "replica of convolutions": replica_of_convolutions,
    "copy of __dict__": shallow,
    "copy.copy": copied,
    "deepcopy": lambda model: scaled(copy.deepcopy(model)),
    "pickle": lambda model: scaled(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("how", COPIES)
@TRAINING
@pytest.mark.parametrize(
    "family", [*FEW, "bottleneck", "flat", "batch norm after", "PReLU", "Ultralytics, folded"]
)
def test_copies_compute_with_their_own_weights(family: str, training: bool, how: str) -> None:
    for warm in (False, True):
        fused, plain = twins(family, training)
        if warm:
            agree(fused, plain)
        pairs = [(COPIES[how](model), model) for model in (fused, plain)]
        for grad in (True, False, False):
            same(*(observe(other, image(), grad=grad, owner=model) for other, model in pairs))
        same(*(observe(model, image(), grad=False) for model in (fused, plain)))


# --- the arguments of forward -----------------------------------------------------------------


@TRAINING
def test_arguments_of_forward(training: bool) -> None:
    models = twins("optional argument", training)
    good: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda m, x: m(x),
        lambda m, x: m(feat=x),
        lambda m, x: m(x, scale=2.0),
        lambda m, x: m(feat=x, scale=2.0),
        lambda m, x: m(x, 0.5),
        lambda m, x: m(x, 1.0),
        lambda m, x: m(x, x[:, :1]),
    ]
    bad: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda m, x: m(),
        lambda m, x: m(x, 1.0, 2.0),
        lambda m, x: m(x, other=1),
        lambda m, x: m(x=x),
    ]
    calls = [*good, *bad, good[0]]
    for call in calls:
        for grad in (True, False):
            seen = [observe(m, image(), functools.partial(call, m), grad=grad) for m in models]
            same(*seen, may_raise=True)


# --- hooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", [*FEW, "identity after", "dropout after"])
def test_hooks_of_children_without_parameters(family: str, when: str, kind: str) -> None:
    model = made(family)
    modules = dict(model.named_children() if family == "network" else model.named_modules())
    for name in [name for name, m in modules.items() if name and not list(m.parameters())]:
        fused, plain = twins(family)
        if when == "after":
            agree(fused, plain)
        else:
            ghost_ops.unfuse(fused)
        calls: list = []
        handles = [add_hook(m.get_submodule(name), kind, calls, name) for m in (fused, plain)]
        if when == "before":
            ghost_ops.fuse(fused)
        for training, grad in ((True, True), (False, False)):
            models = (m.train(training) for m in (fused, plain))
            seen = [observe(m, image(), grad=grad, calls=calls) for m in models]
            same(*seen, may_raise=True)
        for handle in handles:
            handle.remove()
        same(*(observe(model, image(), grad=False) for model in (fused, plain)))
        assert not calls


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("family", ["Ultralytics", "FusedGhostModule", "bottleneck", "network"])
def test_hooks_of_all_modules_come_and_go(family: str, kind: str) -> None:
    models, seen = twins(family), []
    agree(*models)
    for model in models:
        calls: list = []
        handle = add_hook(None, kind, calls, names={m: n for n, m in model.named_modules()})
        try:
            seen.append([observe(model, image(), grad=grad, calls=calls) for grad in (True, False)])
        finally:
            handle.remove()
        calls.clear()
        seen[-1].append(observe(model, image(), calls=calls))
    for got, want in zip(*seen, strict=True):
        same(got, want, may_raise=True)


WARNED_ONCE = """
import warnings, torch, ghost_ops
module = ghost_ops.FusedGhostModule(6, 8).eval()
module.primary_conv[0].register_forward_hook(lambda *_: None)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        module(torch.zeros(1, 6, 4, 4))
ours = [w for w in caught if "runs its own forward" in str(w.message)]
assert len(ours) == 1 and ours[0].category is UserWarning, [str(w.message) for w in caught]
"""


def test_a_warning_says_once_that_the_own_forward_runs() -> None:
    """In a fresh interpreter, in which no other test caused the warning."""
    done = python(WARNED_ONCE)
    assert done.returncode == 0, done.stderr


# --- changes of heads, rates and attributes ---------------------------------------------------


CHANGES: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "pooling": ("network", setting("global_pool", lambda: nn.AdaptiveMaxPool2d(1))),
    "classifier": ("network", setting("classifier", lambda: nn.Linear(16, 3).double())),
    "no classifier": ("network", setting("classifier", nn.Identity)),
    "activation": ("network", setting("act2", nn.SiLU)),
    "network": ("network", setting("dropout", lambda: 0.5)),
    "module": ("dropout after", setting("out.0.p", lambda: 0.5)),
    "width": ("authors", setting("out_chs", lambda: 5)),
    "width, ratio 3": ("FusedGhostModule, odd, ratio 3, 5x5", setting("oup", lambda: 7)),
    "wider": ("flat", setting("oup", lambda: 8)),
    "width of a part": ("bottleneck", setting("ghost2.oup", lambda: 5)),
    "slope": ("functional activation", setting("slope", lambda: 0.4)),
    "no module": ("activation after", setting("act", lambda: None)),
    "stride": ("bottleneck, stride 2", setting("stride", lambda: 1)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@TRAINING
def test_changes_after_fuse(name: str, training: bool, warm: bool) -> None:
    family, change = CHANGES[name]
    fused, plain = twins(family, training)
    if warm:
        agree(fused, plain)
    for model in (fused, plain):
        torch.manual_seed(3)  # new layers start alike
        change(model)
    agree(fused, plain, may_raise=name in ("width of a part", "stride"))


SLOPE, ACTIVATION = 0.1, F.relu


class ReadsGlobals(Functional):
    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.primary(x), SLOPE)
        return torch.cat([y, ACTIVATION(self.cheap(y))], 1)


def reads_a_closure() -> tuple[nn.Module, Callable[[float], None]]:
    slope = 0.1

    class ReadsClosure(Functional):
        def forward(self, x: Tensor) -> Tensor:
            y = F.leaky_relu(self.primary(x), slope)
            return torch.cat([y, F.leaky_relu(self.cheap(y), slope)], 1)

    def set_slope(value: float) -> None:
        nonlocal slope
        slope = value

    return ReadsClosure(), set_slope


@TRAINING
@pytest.mark.parametrize("what", ["number", "function", "closure", "class", "class's forward"])
def test_changes_of_what_forward_reads(
    what: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes of globals, closures, and attributes and methods of classes."""
    plain, set_slope = reads_a_closure() if what == "closure" else (ReadsGlobals(), None)
    if what.startswith("class"):
        plain = Functional()
    randomize(plain).double().train(training)
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    agree(fused, plain)
    if set_slope:
        set_slope(0.4)
    elif what in ("number", "function"):
        name, value = ("SLOPE", 0.4) if what == "number" else ("ACTIVATION", torch.tanh)
        monkeypatch.setitem(globals(), name, value)
    elif what == "class":
        monkeypatch.setattr(Functional, "slope", 0.4)
    else:
        monkeypatch.setattr(Functional, "forward", lambda self, x: self.primary(x) * 2)
    agree(fused, plain)


# --- modules that fuse does not change --------------------------------------------------------

COUNTED: list[int] = []


def branches(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.primary_conv(x)
    return y, self.cheap_operation(y)


def joined(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat(branches(self, x), 1)


def by_size(self: nn.Module, x: Tensor) -> Tensor:
    if x.shape[-1] > 12:
        x = F.pad(x, (0, x.shape[-1] % 2))
    return joined(self, x)


def by_value(self: nn.Module, x: Tensor) -> Tensor:
    y, z = branches(self, x)
    return torch.cat([y, z], 1) if x.sum() > 0 else torch.cat([z, y], 1)


def counts(self: nn.Module, x: Tensor) -> Tensor:
    self.calls += 1
    return joined(self, x)


def counts_elsewhere(self: nn.Module, x: Tensor) -> Tensor:
    COUNTED.append(1)
    return joined(self, x)


def prints(self: nn.Module, x: Tensor) -> Tensor:
    print("called")
    return joined(self, x)


def raises(self: nn.Module, x: Tensor) -> Tensor:
    joined(self, x)
    raise ZeroDivisionError("on purpose")


def form(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """The children of a Ghost module with another forward."""
    module = type("Other", (Sliced,), {"forward": forward})(6, 8)
    vars(module).update(attributes)
    return module


def dimensional(conv: type, norm: type) -> nn.Module:
    module, cheap = form(joined), conv(4, 4, 3, padding=1, groups=4)
    module.primary_conv = nn.Sequential(conv(6, 4, 1), norm(4), nn.ReLU())
    module.cheap_operation = nn.Sequential(cheap, norm(4), nn.ReLU())
    return module


def group_norm() -> nn.Module:
    module = Sliced(6, 8)
    module.cheap_operation[1] = nn.GroupNorm(2, 4)
    return module


LEFT: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: form(lambda self, x: sum(branches(self, x))),
    "ghosts first": lambda: form(lambda self, x: torch.cat(branches(self, x)[::-1], 1)),
    "Conv1d": lambda: dimensional(nn.Conv1d, nn.BatchNorm1d),
    "Conv3d": lambda: dimensional(nn.Conv3d, nn.BatchNorm3d),
    "ConvTranspose2d": lambda: dimensional(nn.ConvTranspose2d, nn.BatchNorm2d),
    "Mish": lambda: Sliced(6, 8, act1=nn.Mish(), act2=nn.Mish()),
    "ELU": lambda: Sliced(6, 8, act2=nn.ELU()),
    "GroupNorm": group_norm,
    "size of the input": lambda: form(by_size),
    "values of the input": lambda: form(by_value),
    "sets an attribute": lambda: form(counts, calls=0),
    "changes a global": lambda: form(counts_elsewhere),
    "prints": lambda: form(prints),
    "list": lambda: form(lambda s, x: joined(s, x)[:, : s.cfg[0]], cfg=[8]),
    "dict": lambda: form(lambda s, x: joined(s, x)[:, : s.cfg["oup"]], cfg={"oup": 8}),
    "namespace": lambda: form(
        lambda s, x: joined(s, x)[:, : s.cfg.oup], cfg=types.SimpleNamespace(oup=8)
    ),
    "no_grad": lambda: form(torch.no_grad()(joined)),
    "raises": lambda: form(raises),
}
LATER: dict[str, Callable[[Any], None]] = {
    "list": lambda module: module.cfg.__setitem__(0, 5),
    "dict": lambda module: module.cfg.update(oup=5),
    "namespace": lambda module: setattr(module.cfg, "oup", 5),
}


@TRAINING
@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str, training: bool, capsys: pytest.CaptureFixture[str]) -> None:
    plain = randomize(LEFT[name]()).double().train(training)
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert not report.in_state("fused")
    assert all(entry.detail for entry in report.in_state("left"))
    assert type(fused) is type(plain)
    inputs = [image(), image(w=13), -image()]
    if name in ("Conv1d", "Conv3d"):
        inputs = [x.flatten(2) if name == "Conv1d" else x.unflatten(2, (3, -1)) for x in inputs]
    results, effects = [], []
    for model in (fused, plain):
        assert getattr(model, "calls", 0) == 0  # fuse has called the module without effect on it
        COUNTED.clear()
        capsys.readouterr()
        results.append([observe(model, x, grad=grad) for x in inputs for grad in (True, False)])
        LATER.get(name, bool)(model)
        results[-1].append(observe(model, inputs[0]))
        effects.append((getattr(model, "calls", 0), len(COUNTED), capsys.readouterr().out))
    for got, want in zip(*results, strict=True):
        same(got, want, may_raise=name == "raises")
    assert effects[0] == effects[1]


# --- weights written behind PyTorch's back ----------------------------------------------------


@TRAINING
@pytest.mark.parametrize("family", FAMILIES)
def test_data_and_reset_cache(family: str, training: bool) -> None:
    fused, plain = twins(family, training)
    agree(fused, plain)
    outer = nn.Sequential(nn.ModuleList([fused]), nn.Identity())
    for factor, reset in ((0.5, fused.reset_cache), (0.7, lambda: ghost_ops.reset_cache(outer))):
        for model in (fused, plain):
            for p in model.parameters():
                p.data.mul_(factor)
        reset()
        agree(fused, plain)
    ghost_ops.reset_cache(plain)  # does nothing


@pytest.mark.parametrize("model", [None, "model", {}, torch.zeros(1), nn.Module], ids=str)
def test_reset_cache_of_no_module(model: object) -> None:
    with pytest.raises(TypeError):
        ghost_ops.reset_cache(model)  # type: ignore[arg-type]


# --- the same formula, written otherwise; and the mode when fuse runs -------------------------


@TRAINING
@pytest.mark.parametrize("family", [*REWRITTEN, *FORMS])
def test_fused_however_it_is_written(family: str, training: bool) -> None:
    plain = copy.deepcopy(made(family)).train(training)
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert [(e.name, e.state) for e in report.entries] == [("(model)", "fused")], report
    assert isinstance(fused, type(plain))
    agree(fused, plain)
    agree(fused.train(not training), plain.train(not training))


class CallsFunction(Functional):
    """Calls an activation function that is an attribute."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.primary(x))
        return torch.cat([y, self.function(self.cheap(y))], 1)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if hasattr(F, name)])
def test_functional_activations_are_fused(name: str) -> None:
    plain = randomize(CallsFunction(getattr(F, name))).double()
    fused = copy.deepcopy(plain)
    assert ghost_ops.report(ghost_ops.fuse(fused)).in_state("fused")
    agree(fused, plain)


@TRAINING
@pytest.mark.parametrize("family", [*BOTTLENECKS, *NETWORKS])
def test_bottlenecks_and_networks_are_fused_in_either_mode(family: str, training: bool) -> None:
    plain = copy.deepcopy(made(family)).train(training)
    for inference in (None, True, False):
        fused = copy.deepcopy(plain)
        report = ghost_ops.report(ghost_ops.fuse(fused, inference=inference))
        names, whole = [entry.name for entry in report.in_state("fused")], inference is not False
        assert ("(model)" in names) is whole
        assert (type(fused) is not type(plain)) is whole
        assert any(name.endswith("ghost1") for name in names) or family == "network"
        agree(fused, plain)
        agree(fused.train(not training), plain.train(not training))
        plain.train(training)


# --- bad input --------------------------------------------------------------------------------


def test_a_module_that_contains_itself() -> None:
    plain = randomize(Sliced(6, 8)).double()
    fused = copy.deepcopy(plain)
    for model in (fused, plain):
        model.itself = model
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert not report.in_state("fused")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", FEW)
def test_meta_device(family: str) -> None:
    plain = copy.deepcopy(made(family)).eval()
    fused = copy.deepcopy(plain).to("meta")
    ghost_ops.fuse(fused)
    with torch.no_grad():
        out = fused(image().to("meta"))
        assert out.is_meta
        assert out.shape == plain(image()).shape
    fused.to_empty(device="cpu").load_state_dict(plain.state_dict())
    agree(fused, plain)


@pytest.mark.parametrize("family", FEW)
def test_another_default_device(family: str) -> None:
    """``fuse`` and a copy under ``torch.device``, a mode that intercepts PyTorch's functions."""
    fused, plain = copy.deepcopy(made(family)).eval(), copy.deepcopy(made(family)).eval()
    with torch.device("meta"):
        report = ghost_ops.report(ghost_ops.fuse(fused))
        assert report.in_state("fused") or isinstance(fused, ghost_ops.FusedGhostModule)
        fused = copy.deepcopy(fused)
    agree(fused, plain)


class Activated(ghost_ops.FusedGhostModule):
    """A subclass whose forward calls the fused one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


@TRAINING
def test_a_subclass_with_a_forward_of_its_own(training: bool) -> None:
    fused = randomize(Activated(6, 8)).double().train(training)
    plain = ghost_ops.reference.GhostModule(6, 8).double().train(training)
    plain.load_state_dict(fused.state_dict())
    x = image()
    torch.testing.assert_close(fused(x), F.silu(plain(x)), rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), F.silu(plain(x)), rtol=1e-8, atol=1e-9)
    assert fused._ghost_state().parts is not None


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", FEW)
def test_fuse_inside_compile(family: str) -> None:
    plain = copy.deepcopy(made(family)).eval()
    model = copy.deepcopy(plain)
    kinds = [type(m) for m in model.modules()]
    names = [list(vars(m)) for m in model.modules()]

    def f(x: Tensor) -> Tensor:
        ghost_ops.fuse(model)
        return model(x)

    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        torch.compile(f, backend="eager")(image())
    assert [type(m) for m in model.modules()] == kinds
    assert [list(vars(m)) for m in model.modules()] == names
    agree(model, plain)
