"""Promise: in training, a batch norm and activation after the concatenation run as one operator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, assert_close, covering, same_bits, with_layout
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from twins import observe, same

import ghost_ops
from ghost_ops import activations
from ghost_ops.autograd import tail
from ghost_ops.autograd.forward import RunningUpdate
from ghost_ops.autograd.tail import Norm, TailSettings, ghost_tail, tail_formula

CASES = covering(
    {
        "m": [1, 5, 16, 20],
        "per": [1, 2],
        "cut": [0, 1],
        "d": [1, 3, 5, 7],
        "size": [(3, 7, 9), (2, 1, 4), (9, 8, 8), (1, 33, 20)],
        "act": ["none", "relu", "silu", "leaky_relu"],
        "residual": [False, True],
        "batch_stats": [False, True],
        "affine": [False, True],
        "layout": LAYOUTS,
        "dtype": DTYPES,
    }
)
# So many images that the loops over them have several items.
EIGHTY_IMAGES = {"m": 16, "per": 1, "cut": 0, "d": 3, "size": (80, 8, 8), "act": "relu"}
EIGHTY_IMAGES |= {"residual": True, "batch_stats": True, "affine": True, "layout": "nhwc"}
EIGHTY_IMAGES["dtype"] = torch.float32


@pytest.fixture
def calls(native: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lists the calls of the fused operator."""
    seen: list[str] = []
    for name in ("ghost_tail_forward", "ghost_tail_backward"):
        run = getattr(tail, name)
        spy = lambda *a, name=name, run=run: (seen.append(name), run(*a))[1]  # noqa: E731
        monkeypatch.setattr(tail, name, spy)
    yield seen


def tensors(row: dict[str, Any], seed: int = 0) -> tuple[list[Tensor | None], TailSettings]:
    """y, w2, gamma, beta, mean, var and residual in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    (n, h, w), m = row["size"], row["m"]
    g = m * row["per"]
    out = max(m, m + g - row["cut"])
    affine = [random(out), random(out)] if row["affine"] else [None, None]
    stats = [random(out), random(out).abs() + 0.5]
    residual = random(n, out, h, w) if row["residual"] else None
    values = [random(n, m, h, w) + 1, random(g, 1, row["d"], row["d"]), *affine, *stats, residual]
    act, slope = activations.resolve(row["act"])
    return values, TailSettings(out, 1e-5, act, slope, row["batch_stats"])


def results(
    function: Callable[..., Tensor], values: list[Tensor | None], settings: TailSettings
) -> dict[str, Tensor]:
    """Output, gradients, and running statistics afterwards."""
    y, w2, gamma, beta, mean, var, residual = (None if t is None else t.clone() for t in values)
    wanted = {"y": y, "w2": w2, "gamma": gamma, "beta": beta, "residual": residual}
    wanted = {name: t.requires_grad_() for name, t in wanted.items() if t is not None}
    out = function(y, w2, Norm(gamma, beta, mean, var), residual, settings)
    grad = torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), "mean": mean, "var": var} | dict(zip(wanted, grads, strict=True))


def fused(*arguments: Any) -> Tensor:
    return ghost_tail(*arguments, RunningUpdate(0.25))


def plain(*arguments: Any) -> Tensor:
    return tail_formula(*arguments, 0.25)


@pytest.mark.parametrize("row", [*CASES, EIGHTY_IMAGES], ids=str)
def test_agrees_with_float64(calls: list[str], row: dict[str, Any]) -> None:
    values, settings = tensors(row)
    dtype, maps = row["dtype"], (0, 6)
    values = [
        None if t is None else with_layout(t.to(dtype), row["layout"]) if i in maps else t.to(dtype)
        for i, t in enumerate(values)
    ]
    exact = results(plain, [None if t is None else t.double() for t in values], settings)
    eager, got = results(plain, values, settings), results(fused, values, settings)
    assert calls == ["ghost_tail_forward", "ghost_tail_backward"]
    low = dtype in (torch.bfloat16, torch.float16)
    for name, want in exact.items():
        # A ReLU whose input rounds to the other side of 0 changes single elements of a gradient.
        # The gradient of a 1x1 w2 is nearly zero, because the norm divides by the size of w2.
        one = torch.ones(1) if name == "w2" else None
        slack = 4.0 if low else 8.0
        assert_close(got[name], want, eager[name], name, rms=low, slack=slack, scale=one)
    if row["m"] > 1:  # with one channel y is contiguous in both layouts
        assert with_layout(got["out"], row["layout"]) is got["out"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_stats", [False, True])
def test_gradcheck(calls: list[str], layout: str, batch_stats: bool) -> None:
    row = EIGHTY_IMAGES | {"m": 2, "per": 2, "cut": 1, "size": (2, 3, 4), "act": "silu"}
    values, settings = tensors(row | {"batch_stats": batch_stats})
    y, w2, gamma, beta, mean, var, residual = values
    inputs = [with_layout(y, layout), w2, gamma, beta, with_layout(residual, layout)]
    inputs = [t.requires_grad_() for t in inputs]

    def function(y: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        norm = Norm(gamma, beta, mean.clone(), var.clone())
        return ghost_tail(y, w2, norm, residual, settings, RunningUpdate())

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert "ghost_tail_backward" in calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads(native: str, layout: str) -> None:
    values, settings = tensors(EIGHTY_IMAGES)
    values = [t.float() for t in values]
    values[0] = with_layout(values[0], layout)
    before, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(results(fused, values, settings))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(same_bits(seen[0][name], t) for name, t in other.items())


@pytest.mark.parametrize("wanted", range(5))
def test_only_one_gradient_is_required(calls: list[str], wanted: int) -> None:
    values, settings = tensors(EIGHTY_IMAGES | {"size": (2, 5, 6)})
    y, w2, gamma, beta, mean, var, residual = values
    inputs = [y, w2, gamma, beta, residual]
    inputs[wanted].requires_grad_()

    def run(function: Callable[..., Tensor]) -> Tensor:
        norm = Norm(gamma, beta, mean.clone(), var.clone())
        out = function(y, w2, norm, residual, settings)
        return torch.autograd.grad(out.cos().sum(), inputs[wanted])[0]

    torch.testing.assert_close(run(fused), run(plain), rtol=1e-9, atol=1e-9)


class Unit(nn.Module):
    """A Ghost module without norms."""

    def __init__(self, inp: int, oup: int, k: int = 3, s: int = 1, bias: bool = False) -> None:
        super().__init__()
        half = oup // 2
        self.primary = nn.Conv2d(inp, half, k, s, k // 2, bias=bias)
        self.cheap = nn.Conv2d(half, oup - half, 3, 1, 1, groups=half, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)


class Tailed(nn.Module):
    """With its norm and activation after the concatenation."""

    def __init__(
        self, k: int = 3, act: nn.Module | None = None, bias: bool = False, **norm: Any
    ) -> None:
        super().__init__()
        self.primary = nn.Conv2d(6, 6, k, 1, k // 2, bias=bias)
        self.cheap = nn.Conv2d(6, 12, 3, 1, 1, groups=6, bias=False)
        self.bn, self.act = nn.BatchNorm2d(17, **norm), act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return self.act(self.bn(torch.cat([y, self.cheap(y)], 1)[:, :17]))


class Block(nn.Module):
    """A ResNet's block; its shortcut is a Ghost module, a convolution, or the identity."""

    def __init__(self, shortcut: str, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        oup, s = (6, 1) if shortcut == "none" else (8, 2)
        self.conv1, self.bn1 = Unit(6, oup, 3, s), nn.BatchNorm2d(oup)
        self.conv2, self.bn2 = Unit(oup, oup), nn.BatchNorm2d(oup)
        side = {"ghost": Unit(6, oup, 1, s), "conv": nn.Conv2d(6, oup, 1, s, bias=False)}
        self.shortcut = nn.Sequential()
        if shortcut != "none":
            self.shortcut = nn.Sequential(side[shortcut], nn.BatchNorm2d(oup))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.act(out)


# Models, and how many of their operators are fused ones.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "3x3": (Tailed, 1),
    "1x1": (lambda: Tailed(1), 1),
    "SiLU": (lambda: Tailed(act=nn.SiLU()), 1),
    "linear": (lambda: Tailed(act=nn.Identity()), 1),
    "bias": (lambda: Tailed(bias=True), 1),
    "average": (lambda: Tailed(momentum=None), 1),
    "no affine": (lambda: Tailed(affine=False), 1),
    "no statistics": (lambda: Tailed(track_running_stats=False), 1),
    "Tanh": (lambda: Tailed(act=nn.Tanh()), 0),
    "block": (lambda: Block("none"), 2),
    "block, ghost": (lambda: Block("ghost"), 3),
    "block, conv": (lambda: Block("conv"), 2),
    "block, SiLU": (lambda: Block("none", F.silu), 2),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A fused model in training, and its plain twin."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), MODELS[name][0]()).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        model(images())  # running statistics
    other = copy.deepcopy(model)
    report = ghost_ops.report(ghost_ops.fuse(other))
    assert report.in_state("fused"), report
    return other, model


def images(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(size or (3, 6, 8, 10)), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_modules_agree(calls: list[str], name: str, layout: str) -> None:
    other, model = pair(name)
    x, count = with_layout(images(), layout), MODELS[name][1]
    for _ in range(2):
        calls.clear()
        same(observe(other, x), observe(model, x))
        assert calls == ["ghost_tail_forward"] * count + ["ghost_tail_backward"] * count
    for m in (model, other):  # frozen statistics, with gradients
        m.eval()
    same(observe(other, x), observe(model, x))
    for m in (model, other):
        m.train()
    same(observe(other, x, grad=False), observe(model, x, grad=False))


def _freeze(model: nn.Module) -> None:
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.eval()


def _weight_norm(model: nn.Module) -> None:
    for conv in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        parametrizations.weight_norm(conv)


def _no_grad(model: nn.Module) -> None:
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.requires_grad_(False)


def _hook(model: nn.Module) -> None:
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1):
        conv.register_forward_hook(lambda module, args, out: out * 2)


def _norm_hook(model: nn.Module) -> None:
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.register_forward_hook(lambda module, args, out: out + 1)


CHANGES = {
    "frozen": _freeze,
    "weight norm": _weight_norm,
    "no grad": _no_grad,
    "hook": _hook,
    "norm hook": _norm_hook,
}


@pytest.mark.filterwarnings("ignore:.*runs its own forward")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["3x3", "block", "block, ghost"])
def test_changes_afterwards(calls: list[str], name: str, change: str) -> None:
    models = pair(name)
    for model in models:
        CHANGES[change](model)
    calls.clear()
    same(*(observe(model, images()) for model in models))
    assert ("ghost_tail_backward" in calls) == (change in ("frozen", "no grad", "weight norm"))


@pytest.mark.parametrize("size", [(1, 6, 1, 1), (0, 6, 8, 8), (2, 5, 8, 8)], ids=str)
@pytest.mark.parametrize("name", ["3x3", "block"])
def test_what_pytorch_refuses(native: str, name: str, size: tuple[int, ...]) -> None:
    same(*(observe(model, images(*size)) for model in pair(name)), may_raise=True)


@pytest.mark.parametrize("name", ["3x3", "block", "block, ghost"])
def test_autocast(calls: list[str], name: str) -> None:
    other, model = (m.float() for m in pair(name))
    x, exact = images().float(), copy.deepcopy(model).double()

    def grads(m: nn.Module, autocast: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = m(x.to(next(m.parameters()).dtype))
        assert out.dtype is (dtype if autocast else torch.float64)
        found = torch.autograd.grad(out.double().cos().sum(), list(m.parameters()))
        return out, torch.cat([g.flatten().double() for g in found])

    wanted, eager, got = grads(exact, False), grads(model, True), grads(other, True)
    assert "ghost_tail_backward" in calls
    for a, b, c in zip(got, wanted, eager, strict=True):
        assert_close(a, b, c, rms=True, slack=4.0, dtype=torch.bfloat16)


def test_out_may_change_in_place(native: str) -> None:
    models = pair("linear")

    def call(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).mul_(2)

    same(*(observe(model, images(), call(model)) for model in models))


def test_saves_less_and_learns_the_same(calls: list[str]) -> None:
    from examples.networks import ghost_resnet

    torch.manual_seed(0)
    model = ghost_resnet(8).double().train()
    other = copy.deepcopy(model)
    ghost_ops.fuse(other)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    losses, saved = [], []
    for m in (model, other):
        optimizer, total = torch.optim.SGD(m.parameters(), lr=0.1), 0

        def keep(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        losses.append([])
        for step in range(5):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = F.cross_entropy(m(x), y)
            if step == 0:
                saved.append(total)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert calls
    assert saved[1] < 0.8 * saved[0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
