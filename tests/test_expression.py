"""Promise: modules of convolutions, Ghost modules, sums, concatenations and pooling, up to whole
networks, run as one operator with the same numbers, and every change of them takes effect."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import Conv, GhostConv, RawConvs, Sliced, randomize
from helpers import DTYPES, LAYOUTS, assert_close, recorded, with_layout
from torch import Tensor, nn
from twins import HOOKS, add_hook, agree, observe, same

import ghost_ops
from ghost_ops import ops
from ghost_ops.fusion import timing
from ghost_ops.fusion.expression import FusedExpression, match_expression
from ghost_ops.fusion.guards import Refusal
from ghost_ops.fusion.read import read
from ghost_ops.ops import conv

PROGRAM = "ghost_ops::run_program"


@pytest.fixture
def convs(native: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the operators that ran; without the kernel its formula runs in its place."""
    names: list[str] = []
    operator = ops.native_ghost_conv_apply

    def counted(*arguments: Any) -> Tensor:
        names.append("ghost_conv_apply")
        return operator(*arguments)

    for module in (ops, conv):
        monkeypatch.setattr(module, "has_conv_kernel", lambda: True)
        monkeypatch.setattr(module, "native_ghost_conv_apply", counted)
    yield names


class Basic(nn.Module):
    """A block of Ghost-ResNet: norm and activation outside of Ghost modules of two convolutions."""

    def __init__(
        self, inp: int, oup: int, stride: int = 1, shortcut: str = "x", norms: bool = True
    ) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = Raw(inp, oup, stride), Raw(oup, oup)
        self.bn1 = nn.BatchNorm2d(oup) if norms else nn.Identity()
        self.bn2 = nn.BatchNorm2d(oup, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = {
            "x": lambda: None,
            "conv": lambda: nn.Sequential(
                nn.Conv2d(inp, oup, 1, stride, bias=False), nn.BatchNorm2d(oup)
            ),
            "ghost": lambda: nn.Sequential(Raw(inp, oup, stride), nn.BatchNorm2d(oup)),
        }[shortcut]()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.ghost1(x)))
        out = self.bn2(self.ghost2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Raw(nn.Module):
    """A Ghost module of a 3x3 and a 3x3 depthwise convolution, without norm and activation."""

    def __init__(self, inp: int, oup: int, stride: int = 1) -> None:
        super().__init__()
        m = -(-oup // 2)
        self.oup = oup
        self.primary = nn.Conv2d(inp, m, 3, stride, 1, bias=False)
        self.cheap = nn.Conv2d(m, m, 3, 1, 1, groups=m, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)[:, : self.oup]


class Tailed(nn.Module):
    """A Ghost module with its norm and activation behind the concatenation."""

    def __init__(self, k: int = 3, oup: int = 7, act: nn.Module | None = None) -> None:
        super().__init__()
        m = -(-oup // 2)
        self.oup = oup
        self.primary = nn.Conv2d(6, m, k, 1, k // 2, bias=False)
        self.cheap = nn.Conv2d(m, m, 3, 1, 1, groups=m)
        self.bn, self.act = nn.BatchNorm2d(oup), act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return self.act(self.bn(torch.cat([y, self.cheap(y)], 1)[:, : self.oup]))


class FrozenNorm(nn.Module):
    """timm's batch norm with activation, which calls F.batch_norm."""

    class Norm(nn.BatchNorm2d):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                0.1,
                self.eps,
            )
            return self.act(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 8, 3, 2, 1, bias=False), self.Norm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def with_ghost(*modules: nn.Module) -> nn.Module:
    """A model with a Ghost module; without one ``fuse`` leaves convolutions unfused.

    There is no kernel for its last layer, so the model as a whole is not fused.
    """
    return nn.Sequential(Sliced(6, 6), *modules, nn.Softsign())


SILU = nn.SiLU()
BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (lambda: with_ghost(Basic(6, 6)), "one operator: 2 ghost, 1 sum"),
    "residual, odd": (
        lambda: with_ghost(Basic(6, 9, 2, "conv")),
        "one operator: 2 ghost, 1 conv, 1 sum",
    ),
    "residual, ghost": (
        lambda: with_ghost(Basic(6, 8, 2, "ghost")),
        "one operator: 3 ghost, 1 sum",
    ),
    "residual, norms inside": (lambda: with_ghost(Inside()), "one operator: 2 ghost, 1 sum"),
    "conv": (lambda: with_ghost(Conv(6, 8, 3, 2, 1, SILU)), "conv 6 -> 8, 3x3 stride 2"),
    "conv, 1x1": (lambda: with_ghost(Conv(6, 7, 1, 1, 1, nn.ReLU())), "conv 6 -> 7, 1x1"),
    "conv, 5x5": (lambda: with_ghost(Conv(6, 7, 5, 1, 1, nn.Identity())), "conv 6 -> 7, 5x5"),
    "depthwise": (lambda: with_ghost(Conv(6, 6, 5, 2, 6, SILU)), "depthwise 6, 5x5 stride 2"),
    "timm's norm": (lambda: with_ghost(FrozenNorm()), "conv 6 -> 8, 3x3 stride 2"),
}


class Inside(nn.Module):
    """Norm and activation inside of the Ghost modules; the second module is linear."""

    def __init__(self) -> None:
        super().__init__()
        linear = nn.Identity(), nn.Identity()
        self.conv1, self.conv2 = Sliced(6, 8, k=3), Sliced(8, 6, 3, 2, 3, 1, *linear)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(self.conv1(x)))


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    make, detail = BLOCKS[name]
    plain = randomize(make()).to(dtype).eval()
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert [e.detail for e in report.entries if e.name == "1"] == [detail], report
    assert not report.in_state("left")
    assert isinstance(fused[1], FusedExpression)
    return fused, plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_in_inference(convs: list[str], name: str, dtype: torch.dtype, layout: str) -> None:
    fused, plain = pair(name, dtype)
    x = with_layout(torch.randn(2, 6, 9, 11).to(dtype), layout)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        convs.clear()
        got, eager = fused(x), plain(x)
        want = copy.deepcopy(plain).double()(x.double())
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
        assert_close(got, want, eager)
        assert torch.equal(fused(x), got)
        with recorded() as names:
            fused[1](x)
    if name.startswith("residual"):
        assert names == [PROGRAM]
    elif name not in ("conv, 1x1", "depthwise"):
        assert len(convs) == 3


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_agree_in_all_modes(convs: list[str], name: str) -> None:
    fused, plain = pair(name)
    agree(fused, plain)
    agree(fused.train(), plain.train())
    agree(fused.eval(), plain.eval())
    ghost_ops.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    agree(fused, plain)


def scale(module: nn.Module) -> None:
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point():
                t.mul_(1.25).add_(0.1)


def change_eps(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.4


def change_norms(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train()


def change_running(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var = m.running_var * 2


def change_stride(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m.groups == 1:
            m.stride = (3, 3)
            break


def change_weight(module: nn.Module) -> None:
    """A weight of another size than the module's attributes say, which a convolution accepts."""
    conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    o, i, _, _ = conv.weight.shape
    conv.weight = nn.Parameter(torch.ones(o, i, 4, 4, dtype=conv.weight.dtype))


def replace_activation(module: nn.Module) -> None:
    for m in list(module.modules()):
        for child, act in m._modules.items():
            if isinstance(act, (nn.ReLU, nn.SiLU)):
                m._modules[child] = nn.Tanh()


CHANGES = (
    scale,
    change_eps,
    change_norms,
    change_running,
    change_stride,
    change_weight,
    replace_activation,
)


@pytest.mark.filterwarnings("ignore:.*runs its own forward")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BLOCKS)
def test_changes_take_effect(
    convs: list[str], name: str, change: Callable[[nn.Module], None]
) -> None:
    models = pair(name)
    agree(*models)
    for model in models:
        change(model[1])
    agree(*models, may_raise=True)


@pytest.mark.filterwarnings("ignore:.*runs its own forward")
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_run(convs: list[str], name: str, kind: str) -> None:
    models = pair(name)
    agree(*models)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for inner in dict(models[1][1].named_modules()):
        seen = []
        for model in models:
            calls: list = []
            handle = add_hook(model[1].get_submodule(inner), kind, calls, inner)
            seen.append([observe(model, x, grad=grad, calls=calls) for grad in (True, False)])
            handle.remove()
        for got, want in zip(*seen, strict=True):
            same(got, want, may_raise=True)
    agree(*models)


@pytest.mark.filterwarnings("ignore:.*runs its own forward")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.Identity(), nn.Tanh()], ids=str)
@pytest.mark.parametrize("oup", [7, 8])
def test_tail_is_folded(convs: list[str], k: int, act: nn.Module, oup: int) -> None:
    plain = randomize(Tailed(k, oup, act)).double().eval()
    fused = copy.deepcopy(plain)
    assert ghost_ops.report(ghost_ops.fuse(fused)).in_state("fused")
    convs.clear()
    agree(fused, plain)
    assert len(convs) == (2 * (k == 3) if isinstance(act, nn.Tanh) else 2)
    for change in CHANGES:
        one, other = copy.deepcopy(fused), copy.deepcopy(plain)
        agree(one, other)
        change(one), change(other)
        agree(one, other, may_raise=True)


@pytest.mark.parametrize("inference", [None, False])
def test_without_ghosts_or_inference(convs: list[str], inference: bool | None) -> None:
    conv = Conv(6, 8, 3, 1, 1, nn.ReLU())
    alone = nn.Sequential(copy.deepcopy(conv))
    with pytest.warns(UserWarning, match="found no Ghost module in model, a Sequential"):
        ghost_ops.fuse(alone)
    assert not ghost_ops.report(alone).entries
    model = with_ghost(conv, Basic(8, 8))
    ghost_ops.fuse(model, inference)
    assert isinstance(model[1], FusedExpression) == (inference is None)
    assert isinstance(model[2], FusedExpression) == (inference is None)
    report = ghost_ops.report(model)
    states = {e.state for e in report.entries if e.kind in ("Conv", "Basic")}
    assert states == {"fused" if inference is None else "plain"}
    assert ghost_ops.report(ghost_ops.fuse(model, inference)) == report


def test_convolutions_inside_of_fused_modules_stay(convs: list[str]) -> None:
    model = nn.Sequential(GhostConv(6, 8), Conv(8, 8, 3, 1, 1, nn.SiLU()))
    names = [e.name for e in ghost_ops.report(ghost_ops.fuse(model)).in_state("fused")]
    assert names == ["(model)", "0", "1"]


def test_without_a_kernel(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ops, conv):
        monkeypatch.setattr(module, "has_conv_kernel", lambda: False)
    plain = randomize(with_ghost(Conv(6, 8, 3, 1, 1, nn.ReLU()), Basic(8, 8))).double().eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    assert not any(isinstance(m, FusedExpression) for m in fused.modules())
    agree(fused, plain)


def test_eager_backend_and_autocast_run_the_own_forward(convs: list[str]) -> None:
    fused, plain = pair("conv", torch.float32)
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        fused(x)
        ran = len(convs)
        with ghost_ops.use_backend("eager"):
            torch.testing.assert_close(fused[1](x), plain[1](x), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused[1](x), plain[1](x))
    assert len(convs) == ran


# --- in training ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith("residual")])
def test_training_under_autocast(convs: list[str], name: str) -> None:
    """An in-place sum keeps the dtype of its first term."""
    fused, plain = (model.train()[1] for model in pair(name, torch.float32))
    x = torch.randn(2, 6, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fused(x), plain(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("k", [1, 3])
def test_training_of_a_library_convolution_is_its_own_forward(native: str, k: int) -> None:
    model = randomize(nn.Sequential(Sliced(6, 8, k=k))).double()
    report = ghost_ops.report(ghost_ops.fuse(model))
    assert ("fused in inference only" in report.entries[0].detail) == (k == 3)
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {type(node).__name__ for node in nodes_of(model(x).grad_fn)}
    assert ("GhostModuleFunctionBackward" in names) == (k == 1)
    ours = ghost_ops.FusedGhostModule(6, 8, kernel_size=k).double()
    assert "GhostModuleFunction" in type(ours(x).grad_fn).__name__


def nodes_of(node: Any) -> Iterator[Any]:
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is not None:
            yield node
            waiting += [n for n, _ in node.next_functions]


# --- example ----------------------------------------------------------------------------------


def test_example_restores_what_is_slower(convs: list[str], monkeypatch: Any) -> None:
    def compare(module: nn.Module, x: Tensor) -> tuple[float, float]:
        seen.append((type(module).__name__, tuple(x.shape)))
        assert not module.training
        assert not torch.is_grad_enabled()
        return (1.5e-3, 1.2e-3) if isinstance(module, Conv) else (1e-3, 2e-3)

    seen: list = []
    monkeypatch.setattr(timing, "_compare", compare)
    model = randomize(with_ghost(Conv(6, 8, 3, 2, 1, nn.ReLU()), Basic(8, 8), RawConvs(8, 4, True)))
    plain = copy.deepcopy(model)
    before = [b.clone() for b in model.buffers()]
    report = ghost_ops.report(ghost_ops.fuse(model, example=torch.randn(2, 6, 8, 8)))
    assert seen[0] == ("FusedRawConvs", (2, 8, 4, 4))
    assert [name for name, _ in seen].count("FusedConv") == 1
    (entry,) = (e for e in report.entries if e.state == "kept")
    assert (entry.name, entry.kind) == ("1", "Conv")
    assert entry.detail == "plain is faster here: 1.2 ms to 1.5"
    assert "1 kept" in repr(report)
    assert entry not in report.in_state("fused")
    assert type(model[1]) is Conv
    assert isinstance(model[2], FusedExpression)
    assert all(m.training for m in model.modules())
    assert all(map(torch.equal, model.buffers(), before))
    assert not any(m._forward_pre_hooks for m in model.modules())
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_example_is_timed(convs: list[str]) -> None:
    model = randomize(with_ghost(Conv(6, 8, 3, 1, 1, nn.ReLU()))).eval()
    plain = copy.deepcopy(model)
    report = ghost_ops.report(ghost_ops.fuse(model, example=torch.randn(1, 6, 8, 8)))
    assert {e.state for e in report.entries} <= {"fused", "kept"}
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


# --- larger expressions -----------------------------------------------------------------------


class Forward(nn.Module):
    """A Ghost module, two convolutions and a head, with the given forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.ghost = Sliced(6, 6)
        self.a, self.b = Conv(6, 6, 3, 1, 1, nn.ReLU()), Conv(6, 6, 1, 1, 1, nn.SiLU())
        self.down, self.dw = Conv(6, 8, 3, 2, 1, nn.ReLU()), Conv(6, 6, 3, 1, 6, nn.Identity())
        self.wide = nn.Conv2d(6, 9, 1)
        self.reduce, self.expand = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.linear, self.last = nn.Linear(9, 5), nn.Linear(5, 4, bias=False)
        self.pool, self.flat, self.drop = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)
        self.big, self.unpadded = nn.Conv2d(6, 6, 9, 1, 4), nn.Conv2d(6, 6, 2)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


def twice_used(m: Any, x: Tensor) -> Tensor:
    y = m.ghost(x)
    z = F.relu(y + m.a(y))
    return z + y


def changed_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.ghost(x)
    y += m.b(x)
    return F.hardswish(m.dw(y).add_(x), inplace=True)


def head(m: Any, x: Tensor) -> Tensor:
    x = m.pool(m.a(m.ghost(x)))
    x = m.flat(F.hardswish(m.wide(x)))
    return m.last(m.drop(F.relu(m.linear(x))))


def gated(m: Any, x: Tensor) -> Tensor:
    y = m.a(m.ghost(x))
    return m.b(y * m.gate(y)) + x


def dense(m: Any, x: Tensor) -> Tensor:
    y = m.ghost(x)
    return torch.cat([x, y, m.b(y), x], 1)


def shared_vector(m: Any, x: Tensor) -> Tensor:
    y = m.pool(m.wide(m.ghost(x)))
    z = F.relu(y.flatten(1))
    return m.linear(z) + m.linear(y.flatten(1))


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "used twice": (twice_used, "1 ghost, 1 conv, 2 sum"),
    "in place": (changed_in_place, "1 ghost"),
    "head": (head, "1 ghost, 2 conv, 1 mean, 2 linear, 1 sum"),
    "gate": (gated, "1 squeeze-excite"),
    "dense": (dense, "1 ghost, 1 conv, 1 concat"),
    "activation first": (lambda m, x: m.ghost(F.silu(x)) + m.a(x) + x, "1 ghost"),
    "pooled": (lambda m, x: m.pool(m.ghost(x)), "1 ghost, 1 mean"),
    "pooled, joined": (
        lambda m, x: torch.cat([m.pool(m.ghost(x)), m.wide(m.pool(m.a(x)))], 1).flatten(1),
        "1 ghost, 2 mean, 2 conv, 1 concat",
    ),
    "flattened": (shared_vector, "1 mean"),
    "means": (lambda m, x: m.down(m.ghost(x)).mean((2, 3)), "1 ghost, 1 conv, 1 mean"),
    "down": (lambda m, x: F.relu(m.down(x) + m.down(m.ghost(x))), "1 sum"),
}


def forwards(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    forward, detail = FORWARDS[name]
    plain = randomize(Forward(forward)).to(dtype).eval()
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    entry = next(e for e in report.entries if e.name == "(model)")
    assert detail in entry.detail
    assert entry.state == "fused"
    return fused, plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORWARDS)
def test_forward_is_one_operator(
    convs: list[str], name: str, dtype: torch.dtype, layout: str
) -> None:
    fused, plain = forwards(name, dtype)
    x = with_layout(torch.randn(2, 6, 9, 11).to(dtype), layout)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = x.clone()
        got, eager = fused(x), plain(x)
        assert_close(got, copy.deepcopy(plain).double()(x.double()), eager)
        assert got.dtype == dtype
        if got.dim() == 4 and got.size(2) > 1:
            assert got.is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
        else:
            assert got.is_contiguous()
        with recorded() as names:
            assert torch.equal(fused(x), got)
        assert [n for n in names if n.startswith("ghost_ops")] == [PROGRAM]
        assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:.*runs its own forward")
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_agree(convs: list[str], name: str) -> None:
    agree(*forwards(name))
    for change in CHANGES:
        models = forwards(name)
        for model in models:
            change(model)
        agree(*models, may_raise=True)
    fused, plain = forwards(name)
    for model in (fused, plain):
        model.ghost.register_forward_hook(lambda m, x, out: out * 2)
    agree(fused, plain)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.ghost(x) + m.pool(m.a(x)),
        lambda m, x: m.ghost(x) + m.unpadded(x).mean((2, 3), keepdim=True),
        lambda m, x: m.flat(m.wide(m.ghost(x))),
        lambda m, x: m.big(m.ghost(x)),
        lambda m, x: F.max_pool2d(m.ghost(x), 2),
        lambda m, x: m.ghost(x) * 2,
        lambda m, x: m.pool(m.pool(m.ghost(x))),
        lambda m, x: x * m.gate(x) + m.ghost(x),
        lambda m, x: (lambda y: m.a(y * m.gate(y)) + y)(m.ghost(x)),
        lambda m, x: F.silu(x) + F.relu(x),
        lambda m, x: m.ghost(m.pool(m.a(x))),
        lambda m, x: (lambda y: y * m.gate(y))(m.pool(m.ghost(x))),
    ],
)
def test_what_is_no_program_runs_itself(convs: list[str], forward: Callable) -> None:
    plain = randomize(Forward(forward)).double().eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    assert type(fused) is Forward
    agree(fused, plain)


def test_shapes_that_may_differ_are_not_joined(convs: list[str]) -> None:
    """PyTorch broadcasts sums over sizes of 1; a program does not."""
    forward = lambda m, x: m.unpadded(m.ghost(x)) + m.a(m.ghost(x))  # noqa: E731
    plain = randomize(Forward(forward)).double().eval()
    fused = copy.deepcopy(plain)
    with pytest.raises(Refusal, match="shapes may differ"):
        match_expression(read(plain)).bind(plain)
    ghost_ops.fuse(fused)
    assert type(fused) is Forward
    x = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))


def test_a_module_inside_is_packed_anew_with_all_of_it(convs: list[str]) -> None:
    fused, plain = forwards("used twice")
    x = torch.randn(1, 6, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        fused(x)
        for model in (fused, plain):
            model.ghost.primary_conv[0].weight.data.mul_(3)
        ghost_ops.reset_cache(fused.ghost)
        torch.testing.assert_close(fused(x), plain(x))


class NormTwice(Tailed):
    """The norm's result has two uses; fused, the norm would run once for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap.bias = None  # ``ghost_tail`` takes no bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        u = self.bn(torch.cat([y, self.cheap(y)], 1)[:, : self.oup])
        return self.act(u) + u


def test_statistics_move_once(convs: list[str]) -> None:
    plain = randomize(nn.Sequential(Sliced(6, 6), NormTwice())).double()
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert "1" in {entry.name for entry in report.in_state("fused")}
    agree(fused.train(), plain.train())
    agree(fused.eval(), plain.eval())
