"""Promise: ``report`` shows the state of a model at the time of the call, and changes nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from ghost_forms import GhostConv, Sliced, randomize
from torch import nn
from twins import network, small_network

import ghost_ops
from ghost_ops import FusedGhostModule, reference
from ghost_ops.fusion import timing


def states(model: nn.Module) -> dict[str, str]:
    return {entry.name: entry.state for entry in ghost_ops.report(model).entries}


def details(model: nn.Module) -> dict[str, str]:
    return {entry.name: entry.detail for entry in ghost_ops.report(model).entries}


def pair() -> nn.Sequential:
    return nn.Sequential(Sliced(6, 8), GhostConv(8, 8))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused form of ``Sliced`` takes longer than its plain form."""

    def compare(module: nn.Module, _: torch.Tensor) -> tuple[float, float]:
        return (3e-3, 1e-3) if isinstance(module, Sliced) else (1e-3, 2e-3)

    monkeypatch.setattr(timing, "_compare", compare)


def test_before_and_after() -> None:
    model = pair()
    plain = details(model)
    assert set(states(model).values()) == {"plain"}
    assert all(detail.startswith("can be fused: ") for detail in plain.values())
    ghost_ops.fuse(model)
    assert set(states(model).values()) == {"fused"}
    assert {name: f"can be fused: {detail}" for name, detail in details(model).items()} == plain
    ghost_ops.unfuse(model)
    assert details(model) == plain


def test_what_inference_would_add(native: str) -> None:
    """After ``fuse(inference=False)`` the bottleneck is plain, its Ghost modules are fused."""
    model = reference.GhostBottleneck(6, 12, 8)
    ghost_ops.fuse(model, inference=False)
    assert states(model) == {"(model)": "plain", "ghost1": "fused", "ghost2": "fused"}
    assert details(model)["(model)"].startswith("can be fused: bottleneck")


def test_built_fused() -> None:
    class Mine(FusedGhostModule):
        pass

    report = ghost_ops.report(nn.Sequential(FusedGhostModule(6, 8), Mine(8, 8)))
    ours = [e for e in report.in_state("fused") if e.name != "(model)"]
    assert [(e.name, e.kind) for e in ours] == [("0", "GhostModule"), ("1", "Mine")]


def test_whole_network(native: str) -> None:
    net = ghost_ops.fuse(ghost_ops.unfuse(network()))
    assert set(states(net).values()) == {"fused"}
    assert details(net)["(model)"].startswith("network")
    net.classifier = nn.Linear(16, 3)  # another number of classes
    assert set(states(net).values()) == {"fused"}
    net.classifier = nn.Identity()  # features
    assert states(net)["(model)"] == "fallback"
    assert "linear layer" in details(net)["(model)"]
    assert states(net)["blocks.0.0.ghost1"] == "fused"
    net.classifier = nn.Linear(16, 5)
    assert set(states(net).values()) == {"fused"}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("called", [True, False], ids=["called", "not called"])
def test_mode_and_calls_do_not_matter(native: str, training: bool, called: bool) -> None:
    net = small_network()
    want = ghost_ops.report(net)
    net.train(training)
    if called:
        net(torch.randn(2, 3, 16, 16))
    assert ghost_ops.report(net) == want


@pytest.mark.parametrize("change", ["hook", "child", "forward", "attribute"])
def test_changes_afterwards(change: str) -> None:
    model = ghost_ops.fuse(pair())
    module = model[0]
    handle = None
    if change == "hook":
        handle = module.primary_conv.register_forward_hook(lambda *_: None)
    elif change == "child":
        module.cheap_operation[1] = nn.GroupNorm(2, 4)
    elif change == "forward":
        module.forward = lambda x: x
    else:
        module.cheap_operation[0].dilation = (2, 2)
    entry = ghost_ops.report(model).in_state("fallback")[-1]
    assert (entry.name, entry.kind) == ("0", "Sliced")
    words = {"hook": "hooks", "child": "GroupNorm", "forward": "replaced", "attribute": "dilation"}
    assert words[change] in entry.detail
    assert states(model)["1"] == "fused"
    ghost_ops.unfuse(model)
    assert states(model)["0"] == "left"
    if handle is not None:
        handle.remove()
        assert states(model)["0"] == "plain"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str) -> None:
    model = ghost_ops.fuse(nn.Sequential(pair(), reference.GhostModule(8, 8)))
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    report = ghost_ops.report(model)
    assert ghost_ops.report(other) == report
    ghost_ops.unfuse(other)
    assert set(states(other).values()) == {"plain"}
    assert ghost_ops.report(model) == report


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("end", ["fuse", "unfuse", "child", "deepcopy", "pickle", "mode", "weight"])
def test_kept_for_its_speed(end: str) -> None:
    """The times are remembered as long as the module stays plain and computes the same."""
    model = ghost_ops.fuse(pair(), example=torch.randn(1, 6, 8, 8))
    assert (states(model)["0"], states(model)["1"]) == ("kept", "fused")
    assert details(model)["0"] == "plain is faster here: 1 ms to 3"
    assert type(model[0]) is Sliced
    if end == "fuse":
        ghost_ops.fuse(model)
    elif end == "unfuse":
        ghost_ops.unfuse(model)
    elif end == "child":
        model[0].primary_conv[2] = nn.SiLU()
    elif end == "mode":
        model.eval()
    elif end == "weight":
        randomize(model, 3)
    else:
        copied = copy.deepcopy(model) if end == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert states(model)["0"] == "kept"
        model = copied
    kept = {"mode": "kept", "weight": "kept", "fuse": "fused"}
    assert states(model)["0"] == kept.get(end, "plain")
    assert states(model)["1"] == ("plain" if end == "unfuse" else "fused")


@pytest.mark.usefixtures("slow")
def test_kept_again() -> None:
    model = pair()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ghost_ops.fuse(model, example=torch.randn(1, 6, 8, 8))
        assert states(model)["0"] == "kept"


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(pair(), reference.GhostBottleneck(8, 16, 8)),
    "fused": small_network,
    "shared": lambda: nn.Sequential(*([Sliced(6, 6)] * 2)),
    "method on the object": lambda: nn.Sequential(folded(), nn.Sequential()),
    "FX graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU())),
}


def folded() -> nn.Module:
    module = GhostConv(6, 8)
    module.cv1.fold(), module.cv2.fold()
    return module


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name: str) -> None:
    model = MODELS[name]()
    state = torch.get_rng_state()
    before = [(m, type(m), dict(m.__dict__), dict(m._modules)) for m in model.modules()]
    tensors = [(t, t._version, t.clone()) for t in model.state_dict(keep_vars=True).values()]
    first = ghost_ops.report(model)
    assert ghost_ops.report(model) == first
    assert torch.equal(torch.get_rng_state(), state)
    for module, kind, values, children in before:
        assert type(module) is kind
        assert module.__dict__.keys() == values.keys()
        assert all(module.__dict__[key] is value for key, value in values.items())
        assert dict(module._modules) == children
    for t, version, value in tensors:
        assert t._version == version and torch.equal(t, value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_parts_inside() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    model = nn.Sequential(Sliced(6, 8), scripted, torch.compile(GhostConv(8, 8), backend="eager"))
    assert states(model) == {"0": "plain", "2._orig_mod": "plain"}
    ghost_ops.fuse(model)
    assert states(model) == {"0": "fused", "2._orig_mod": "fused"}


def test_entries_are_data() -> None:
    model = nn.Sequential(Sliced(6, 8), GhostConv(8, 8))
    model[1].cv2.conv.dilation = (2, 2)
    report = ghost_ops.report(ghost_ops.fuse(model))
    assert str(report) == repr(report)
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class", "state", "detail"]
    assert lines[2].split()[:3] == ["0", "Sliced", "fused"]
    assert lines[3].split()[:3] == ["1", "GhostConv", "left"]
    assert lines[-1].startswith("Sequential: ") and lines[-1].endswith(" fused, 1 left")
    assert [e.name for e in report.in_state("left")] == ["1"]
    with pytest.raises(ValueError, match=r"state must be one of fused, fallback, .*, got 'fuse'"):
        report.in_state("fuse")
