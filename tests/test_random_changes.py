"""Promise: after one random change a fused model computes what its plain twin computes.

``twins`` has the families of models and the comparison. Both twins get the same change, one of
``CHANGES``; if the plain one raises, the fused one raises the same. ``check(seed)`` runs one case.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from ghost_forms import FORMS, randomize
from helpers import recorded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune
from twins import (
    BOTTLENECKS,
    FAMILIES,
    HOOKS,
    NETWORKS,
    OURS,
    REWRITTEN,
    Seen,
    add_hook,
    image,
    made,
    observe,
    same,
    twins,
)

import ghost_ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs its own forward"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed"),
]


# --- changes ----------------------------------------------------------------------------------


@dataclass
class Site:
    """The module that a change is applied to.

    Attributes:
        root, path: the model, and the name of the module in it.
        plain: the same module in the plain model before any change; read only.
        calls: the list that hooks append to.
        stack: removes hooks and patches of classes at the end of the case.
    """

    root: nn.Module
    path: str
    plain: nn.Module
    calls: list
    stack: contextlib.ExitStack

    @property
    def layer(self) -> Any:
        return self.root.get_submodule(self.path)

    @property
    def parent(self) -> tuple[nn.Module, str]:
        path, _, name = self.path.rpartition(".")
        return self.root.get_submodule(path), name

    def put(self, child: nn.Module | None) -> None:
        if child is not None:
            child.double().train(self.layer.training)
        setattr(*self.parent, child)

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.layer, name, value)


def other_conv(s: Site, **changes: Any) -> None:
    c = s.layer
    bias = changes.pop("bias", c.bias is not None)
    arguments = c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.dilation
    s.put(nn.Conv2d(*arguments, c.groups, bias))


def step(s: Site) -> None:
    for p in s.root.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(s.root.parameters(), lr=0.05).step()


def train_a_step(s: Site) -> None:
    modes = {m: m.training for m in s.root.modules()}
    s.root.train()(image(seed=5))
    for m, mode in modes.items():
        m.training = mode


def write_behind(s: Site) -> None:
    for p in s.root.parameters():
        p.data.mul_(0.5)
    ghost_ops.reset_cache(s.root)


def drop_statistics(s: Site) -> None:
    s.set(track_running_stats=False, running_mean=None, running_var=None)


def own_forward(s: Site) -> None:
    old = s.layer.forward
    s.layer.forward = lambda *args, **kwargs: old(*args, **kwargs) * 1.25


def class_forward(s: Site) -> None:
    kind = type(s.plain)
    old = kind.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return old(self, *args, **kwargs) * 1.25

    s.stack.enter_context(mock.patch.object(kind, "forward", forward))


def other_class(s: Site) -> None:
    kind = type(s.plain)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return kind.forward(self, x) * 1.25

    s.layer.__class__ = type("Other", (kind,), {"forward": forward})


def hook(kind: str, factor: float | None) -> Callable[[Site], None]:
    def change(s: Site) -> None:
        s.stack.callback(add_hook(s.layer, kind, s.calls, s.path, factor).remove)

    return change


def hook_of_all(kind: str) -> Callable[[Site], None]:
    def change(s: Site) -> None:
        names = {m: name for name, m in s.root.named_modules()}
        s.stack.callback(add_hook(None, kind, s.calls, names=names).remove)

    return change


def passing_hook(s: Site) -> None:
    handle = add_hook(s.layer, "forward", s.calls, s.path, 2.0)
    s.root(image(seed=5))
    handle.remove()


def tensor(s: Site, name: str, how: str) -> None:
    old = getattr(s.layer, name)
    if how == "in place":
        old.mul_(1.5).add_(0.1)
    elif how == "frozen":
        old.requires_grad_(False)
    else:
        new = old * 1.5 + 0.1 if how == "replaced" else None
        parameter = isinstance(old, nn.Parameter) and new is not None
        setattr(s.layer, name, nn.Parameter(new) if parameter else new)


def new_conv_bias(s: Site) -> None:
    s.layer.bias = nn.Parameter(torch.linspace(-1, 1, s.layer.out_channels, dtype=torch.float64))


def attribute(s: Site) -> None:
    """Change every number among the module's own attributes."""
    for name, old in own_numbers(s.plain).items():
        setattr(s.layer, name, not old if isinstance(old, bool) else old + (-1 if old else 0.5))


def own_numbers(module: nn.Module) -> dict[str, Any]:
    names = [*vars(module), *(["slope"] if hasattr(type(module), "slope") else [])]
    values = {n: getattr(module, n) for n in names if n[0] != "_" and n != "training"}
    return {n: v for n, v in values.items() if isinstance(v, (bool, int, float))}


ANY, LEAF, CONTAINER = "any module", "a layer of PyTorch", nn.Sequential
CONV, NORM = nn.Conv2d, nn.BatchNorm2d
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.PReLU)
CHANGES: dict[str, tuple[Any, Callable[[Site], Any]]] = {
    # values
    **{f"weight {how}": ((CONV, NORM), functools.partial(tensor, name="weight", how=how))
       for how in ("in place", "replaced", "frozen")},
    **{f"norm's {name} {how}": (NORM, functools.partial(tensor, name=name, how=how))
       for name in ("bias", "running_mean", "running_var") for how in ("in place", "replaced")},
    "no scale": (NORM, functools.partial(tensor, name="weight", how="removed")),
    "no running mean": (NORM, functools.partial(tensor, name="running_mean", how="removed")),
    "count of batches": (NORM, lambda s: s.layer.num_batches_tracked.add_(5)),
    "new bias": (CONV, new_conv_bias),
    "other dtype": (LEAF, lambda s: s.layer.float()),
    "weight norm": (CONV, lambda s: parametrizations.weight_norm(s.layer)),
    "pruned": (CONV, lambda s: prune.l1_unstructured(s.layer, "weight", 0.3)),
    # settings
    "eps": (NORM, lambda s: s.set(eps=0.3)),
    "momentum": (NORM, lambda s: s.set(momentum=0.5)),
    "momentum None": (NORM, lambda s: s.set(momentum=None)),
    "no tracking": (NORM, lambda s: s.set(track_running_stats=False)),
    "no statistics": (NORM, drop_statistics),
    "fresh statistics": (NORM, lambda s: s.layer.reset_running_stats()),
    "slope": (nn.LeakyReLU, lambda s: s.set(negative_slope=0.4)),
    "in place or not": ((nn.ReLU, nn.LeakyReLU), lambda s: s.set(inplace=not s.layer.inplace)),
    "rate": (nn.Dropout2d, lambda s: s.set(p=0.5)),
    "stride": (CONV, lambda s: s.set(stride=(3 - s.layer.stride[0],) * 2)),
    "padding": (CONV, lambda s: s.set(padding=(1, 1))),
    "no padding": (CONV, lambda s: s.set(padding=(0, 0))),
    "padding and dilation": (CONV, lambda s: s.set(padding=(2, 2), dilation=(2, 2))),
    "groups": (CONV, lambda s: s.set(groups=2)),
    "padding mode": (CONV, lambda s: s.set(padding_mode="circular")),
    "attribute": ("own numbers", attribute),
    # modes
    "mode": (ANY, lambda s: s.layer.train(not s.layer.training)),
    "flag of the mode": (ANY, lambda s: s.set(training=not s.layer.training)),
    "mode of the model": (ANY, lambda s: s.root.train(not s.root.training)),
    "mode of the norms": (ANY, lambda s: [m.train(not m.training) for m in s.root.modules()
                                          if isinstance(m, NORM)]),
    # children
    "other convolution": (CONV, other_conv),
    "convolution with a bias": (CONV, functools.partial(other_conv, bias=True)),
    "other norm": (NORM, lambda s: s.put(randomize(
        nn.Sequential(NORM(s.layer.num_features, eps=0.01, momentum=0.3)), 5)[0])),
    "group norm": (NORM, lambda s: s.put(nn.GroupNorm(1, s.layer.num_features))),
    **{f"activation {kind.__name__}": (ACTIVATIONS, lambda s, kind=kind: s.put(kind()))
       for kind in (nn.SiLU, nn.ReLU6, nn.PReLU, nn.Tanh, nn.Mish, nn.GELU)},
    "identity": (LEAF, lambda s: s.put(nn.Identity())),
    "nothing": (LEAF, lambda s: s.put(None)),
    "deleted": (LEAF, lambda s: delattr(*s.parent)),
    "appended": (CONTAINER, lambda s: s.layer.append(nn.Tanh())),
    "dropout appended": (CONTAINER, lambda s: s.layer.append(nn.Dropout(0.5))),
    "last one away": (CONTAINER, lambda s: s.layer.pop(-1) if len(s.layer) else None),
    "unused child": (ANY, lambda s: s.layer.add_module("unused", nn.ReLU())),
    # code
    "forward of the object": (ANY, own_forward),
    "forward of the class": ("class of others", class_forward),
    "another class": (LEAF, other_class),
    **{f"{kind} hook{', scaling' if factor else ''}": (ANY, hook(kind, factor))
       for kind in HOOKS for factor in (None, 1.25)},
    **{f"{kind} hook of all": (ANY, hook_of_all(kind)) for kind in HOOKS},
    "hook that is removed": (ANY, passing_hook),
    # the whole model
    "other state": (ANY, lambda s: s.root.load_state_dict(
        randomize(copy.deepcopy(s.root), 9).state_dict())),
    "optimiser step": (ANY, step),
    "training step": (ANY, train_a_step),
    "frozen": (ANY, lambda s: s.root.requires_grad_(False)),
    "to and fro": (ANY, lambda s: s.root.float().double()),
    "channels_last": (ANY, lambda s: s.root.to(memory_format=torch.channels_last)),
    "behind PyTorch's back": (ANY, write_behind),
    "deepcopy": (ANY, lambda s: copy.deepcopy(s.root)),
    "pickle": (ANY, lambda s: pickle.loads(pickle.dumps(s.root))),
}  # fmt: skip
COPIES = ("deepcopy", "pickle")  # they return another model
# Not drawn after a compiled call: PyTorch's compiler does not notice these changes.
UNGUARDED = [*COPIES, "forward of the class", *(name for name in CHANGES if " hook" in name)]


def applies(kind: Any, module: nn.Module) -> bool:
    where = type(module).__module__
    layer = where.startswith("torch.nn") and not list(module.children())
    if kind == "own numbers":
        return not where.startswith("torch.nn") and bool(own_numbers(module))
    if kind == "class of others":  # our own modules become another class, not a subclass
        return layer or not where.startswith(("torch", "ghost_ops"))
    return kind == ANY or (layer if kind == LEAF else isinstance(module, kind))


# --- cases ------------------------------------------------------------------------------------


@dataclass
class Case:
    """One case. ``changes`` are pairs of kind and place; only compiled cases use the second."""

    family: str
    fused_in_training: bool
    training: bool
    warm: bool
    grad: bool
    x_grad: bool
    channels_last: bool
    changes: list[tuple[str, str]]


DECK = [*FORMS, *REWRITTEN, *2 * [*OURS, *BOTTLENECKS], *3 * [*NETWORKS]]


def dealt(items: list[str], index: int) -> str:
    """The item at an index of an endless deck: each round has every item once, in its own order."""
    deck = list(items)
    random.Random(index // len(deck)).shuffle(deck)
    return deck[index % len(deck)]


def sites(family: str, label: str) -> list[str]:
    """Names of the modules that a change of this kind applies to."""
    kind = CHANGES[label][0]
    return [name for name, module in made(family).named_modules() if applies(kind, module)]


def draw(seed: int) -> Case:
    rng = random.Random(seed)
    label, family = dealt(list(CHANGES), seed), dealt(DECK, seed)
    if not sites(family, label):
        family = rng.choice([name for name in FAMILIES if sites(name, label)])
    seconds = [name for name in CHANGES if name not in UNGUARDED and sites(family, name)]
    changes = [(name, rng.choice(sites(family, name))) for name in (label, rng.choice(seconds))]
    return Case(family, *(rng.random() < p for p in (0.5, 0.5, 0.7, 0.5, 0.8, 0.2)), changes)


def change(
    model: nn.Module, case: Case, index: int, calls: list, stack: contextlib.ExitStack
) -> nn.Module:
    """Apply one change of a case; return the model that has it, which may be a copy."""
    label, path = case.changes[index]
    torch.manual_seed(11)  # new layers start alike
    with torch.no_grad():
        plain = made(case.family).get_submodule(path)
        other = CHANGES[label][1](Site(model, path, plain, calls, stack))
    return other if label in COPIES else model


def second_applies(case: Case) -> bool:
    """Whether the plain model takes the second change after the first one.

    It does not if the first one removed what the second one changes.
    """
    model = copy.deepcopy(made(case.family)).train(case.training)
    with contextlib.ExitStack() as stack:
        model = change(model, case, 0, [], stack)
        try:
            change(model, case, 1, [], stack)
        except Exception:
            return False
    return True


def run(model: nn.Module, case: Case, compiler: Callable | None = None) -> list[Seen]:
    """Apply the changes of a case to a model; return its observations up to the first exception.

    Args:
        compiler: makes the callable after the first change, and a second change follows.
    """
    x = image().contiguous(memory_format=torch.channels_last) if case.channels_last else image()
    calls: list = []
    seen: list[Seen] = []

    def look(call: Callable | None, *grads: bool) -> bool:
        for grad in grads:
            seen.append(observe(model, x, call, grad=grad, x_grad=case.x_grad, calls=calls))
            if "raised" in seen[-1]:
                return False
        return True

    with contextlib.ExitStack() as stack:
        if case.warm and not compiler:
            look(None, case.grad, case.grad)
        model = change(model, case, 0, calls, stack)
        if compiler:
            call = compiler(model)
            if look(call, case.grad) and len(case.changes) > 1:
                change(model, case, 1, calls, stack)
                look(call, case.grad)
            return seen
        if not look(None, case.grad, case.grad, not case.grad):
            return seen
    look(None, case.grad)  # hooks and patches are removed
    return seen


def same_all(got: list[Seen], want: list[Seen], any_error: bool = False) -> None:
    if any_error:  # torch.compile replaces exception types
        got, want = (
            [{**s, "raised": Exception} if "raised" in s else s for s in seen]
            for seen in (got, want)
        )
    for a, b in zip(got, want, strict=False):
        same(a, b, may_raise=True)
    assert len(got) == len(want)


class Compiler:
    """``torch.compile`` with a backend, from a clean state; counts the graphs."""

    def __init__(self, backend: str) -> None:
        self.counter = CompileCounterWithBackend(backend)
        torch.compiler.reset()

    def __call__(self, model: nn.Module) -> Callable:
        return torch.compile(model, backend=self.counter)


def check(seed: int, backend: str | None = None) -> None:
    case = draw(seed)
    try:
        fused, plain = (m.train(case.training) for m in twins(case.family, case.fused_in_training))
        if backend is None:
            same_all(run(fused, case), run(plain, case))
            return
        if not second_applies(case):
            case.changes.pop()
        spare, compiler = copy.deepcopy(plain), Compiler(backend)
        got, want = run(fused, case, compiler), run(plain, case, lambda model: None)
        assert compiler.counter.frame_count or "raised" in want[0]
        try:
            same_all(got, want, any_error=True)
        except AssertionError:
            # torch.compile itself can differ from eager mode: global hooks also run for the module
            # that it makes. Then the twin is compiled too.
            twin = run(spare, case, Compiler(backend))
            for s, t in zip(twin, want, strict=False):
                assert "raised" not in s or "raised" in t, f"compiled, plain: {s['message']}"
            same_all(got, twin, any_error=True)
    except Exception as error:
        raise AssertionError(f"check({seed}, {backend!r}): {case}\n{error}") from error


# --- the tests --------------------------------------------------------------------------------

CASES = 10  # in a chunk; chunks from 30 on are slow ones
CHUNKS, COMPILED = (
    [pytest.param(chunk, marks=pytest.mark.slow if chunk >= quick else ()) for chunk in range(240)]
    for quick in (30, 20)
)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_random_changes(chunk: int) -> None:
    for seed in range(chunk * CASES, (chunk + 1) * CASES):
        check(seed)


@pytest.mark.parametrize("chunk", COMPILED)
def test_random_changes_compiled(chunk: int) -> None:
    """One case of a chunk, compiled: one change before the first call and one after it."""
    try:
        check(chunk * CASES + 1, "aot_eager" if chunk % 3 == 0 else "eager")
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_run_fused(native: str, family: str, training: bool) -> None:
    """Every family runs our operators; without that the tests above would prove nothing."""
    if training and any(word in family for word in ("k=3", "grouped")):
        pytest.skip("a primary convolution that is no plain 1x1 is fused in inference only")
    fused, _ = twins(family, not training)
    fused.train(training)
    with torch.set_grad_enabled(training), recorded() as names:
        fused(image())
    assert any(name.startswith("ghost_ops::") for name in names), set(names)


def test_every_change_and_family_is_drawn() -> None:
    cases = [draw(seed) for seed in range(30 * CASES)]
    assert {case.family for case in cases} == set(FAMILIES)
    assert {case.changes[0][0] for case in cases} == set(CHANGES)
