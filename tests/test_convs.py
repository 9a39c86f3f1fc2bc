"""Ghost modules with a k x k primary convolution as one operator, and what is made of it: folded
layers behind a concatenation, residual blocks, and the convolutions between Ghost modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import Conv, GhostConv, RawConvs, Sliced, randomize
from helpers import DTYPES, LAYOUTS, activation, assert_close, covering, with_layout
from torch import Tensor, nn
from twins import HOOKS, add_hook, agree, observe, same

import ghost_ops
from ghost_ops import activations, backends, eager_ops, model_ops, ops
from ghost_ops.eager_ops import compute_dtype
from ghost_ops.fusion import timing
from ghost_ops.fusion.conv import FusedConv
from ghost_ops.fusion.residual import FusedResidual

CASES = covering(
    {
        "shape": [(2, 5, 9, 7), (1, 16, 14, 14), (3, 3, 7, 7), (1, 33, 6, 19)],
        "k": [1, 3, 5],
        "stride": [1, 2],
        "padding": [0, 1, 2],
        "m": [4, 13],
        "ghosts": [(1, 1), (2, 3), (3, 5), (2, 7)],
        "cut": [0, 1],
        "tail": [False, True],
        "residual": [False, True],
        "act": ["relu", "silu", "leaky_relu", "none"],
        "layout": list(LAYOUTS),
        "dtype": list(DTYPES),
    }
)  # fmt: skip


def ids(row: dict) -> str:
    return "-".join(str(v).replace("torch.", "") for v in row.values())


class Given:
    """Tensors for one row, and the operator's arguments."""

    def __init__(self, row: dict) -> None:
        gen = torch.Generator().manual_seed(1)
        dtype, wide = row["dtype"], compute_dtype(row["dtype"])
        n, c, h, w = row["shape"]
        k, m, (ratio, d) = row["k"], row["m"], row["ghosts"]
        self.row, self.g = row, m * (ratio - 1)
        tail = row["tail"] and ratio > 1
        self.out = m + self.g - (row["cut"] if ratio > 1 else 0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=gen, dtype=torch.float64)

        self.x = with_layout(random(n, c, h, w).to(dtype), row["layout"])
        self.w1 = (random(m, c, k, k) * (c * k * k) ** -0.5).to(dtype)
        self.w2 = (random(self.g, 1, d, d) * d**-1.0).to(dtype)
        self.norms = [
            t.to(wide)
            for size in (m, self.g)
            for t in (random(size), random(size), random(size), random(size).abs() + 0.5)
        ]
        self.ends = (random(m).to(wide), random(m).to(wide)) if tail else ()
        p, s = row["padding"], row["stride"]
        size = [(v + 2 * p - k) // s + 1 for v in (h, w)]
        self.residual = None
        if row["residual"]:
            self.residual = with_layout(random(n, self.out, *size).to(dtype), row["layout"])
        self.acts = ("none" if tail else row["act"]), row["act"]
        codes = (activations.CODES[act] for act in self.acts)
        (act1, act2), slope = codes, activations.DEFAULT_SLOPE
        self.numbers = (
            k, p, tail, m, self.out, ratio, d if self.g else 1, s, act1, slope, act2, slope,
        )  # fmt: skip

    def packed(self, functions: Any) -> Tensor:
        rows = self.w1.permute(0, 2, 3, 1).reshape(self.w1.size(0), -1, 1, 1)
        w2 = self.w2 if self.g else self.w2.new_empty(0, 1, 1, 1)
        n = self.norms
        made = functions.ghost_pack(rows, *n[:4], 1e-3, w2, *n[4:], 1e-3)
        return torch.cat([made, *self.ends])

    def formula(self, dtype: torch.dtype) -> Tensor:
        x, w1, w2 = (t.to(dtype) for t in (self.x, self.w1, self.w2))
        n = [t.to(dtype) for t in self.norms]
        row = self.row

        def norm(u: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return F.batch_norm(u, mean, var, gamma, beta, False, 0.0, 1e-3)

        u = F.conv2d(x, w1, None, row["stride"], row["padding"])
        y = activation(self.acts[0], norm(u, *n[:4]))
        out = y
        if self.ends:
            scale, shift = (t.to(dtype).view(-1, 1, 1) for t in self.ends)
            out = activation(self.acts[1], y * scale + shift)
        if self.g:
            v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
            out = torch.cat([out, activation(self.acts[1], norm(v, *n[4:]))], 1)
        out = out[:, : self.out]
        return out if self.residual is None else out + self.residual.to(dtype)


@pytest.mark.parametrize("row", CASES, ids=ids)
def test_operator(every_isa: str, row: dict) -> None:
    given = Given(row)
    packed = given.packed(eager_ops if every_isa == "eager" else ops.native)
    got = model_ops.ghost_conv_apply(given.x, packed, given.residual, *given.numbers)
    want = given.formula(torch.float64)
    eager = given.formula(compute_dtype(row["dtype"])).to(row["dtype"])
    assert got.dtype == row["dtype"]
    assert got.shape == want.shape
    fmt = torch.channels_last if row["layout"] == "nhwc" else torch.contiguous_format
    assert got.is_contiguous(memory_format=fmt)
    assert_close(got, want, eager, scale=want.abs().max() + 4)


@pytest.mark.parametrize("row", CASES[::9], ids=ids)
def test_opcheck(row: dict) -> None:
    given = Given(row)
    arguments = (given.x, given.packed(ops.native), given.residual, *given.numbers)
    torch.library.opcheck(torch.ops.ghost_ops.ghost_conv_apply.default, arguments)


def test_threads_change_no_bit(native: str) -> None:
    given = Given({**CASES[0], "shape": (3, 16, 19, 17), "dtype": torch.float32})
    packed, results = given.packed(ops.native), []
    numbers = given.numbers
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(model_ops.ghost_conv_apply(given.x, packed, None, *numbers))
    assert torch.equal(*results)


BAD = {
    "too few parameters": lambda x, packed, residual: (x, packed[:-1], residual),
    "residual of another shape": lambda x, packed, residual: (x, packed, residual[:, :1]),
    "residual of another dtype": lambda x, packed, residual: (x, packed, residual.double()),
    "smaller than the kernel": lambda x, packed, _: (x[..., :1, :1].contiguous(), packed, None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(backend: str, name: str) -> None:
    row = {**CASES[0], "shape": (2, 5, 9, 7), "k": 5, "padding": 1, "stride": 1, "residual": True}
    given = Given({**row, "dtype": torch.float32})
    packed = given.packed(eager_ops if backend == "eager" else ops.native)
    with pytest.raises(RuntimeError):
        arguments = BAD[name](given.x, packed, given.residual)
        model_ops.ghost_conv_apply(*arguments, *given.numbers)


# --- modules ----------------------------------------------------------------------------------


@pytest.fixture
def convs(native: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the operators that ran, the kernel being there, or what runs in its place."""
    names: list[str] = []
    operator = model_ops.native_ghost_conv_apply

    def counted(*arguments: Any) -> Tensor:
        names.append("ghost_conv_apply")
        return operator(*arguments)

    monkeypatch.setattr(model_ops, "has_conv_kernel", lambda: True)
    monkeypatch.setattr(model_ops, "native_ghost_conv_apply", counted)
    yield names


class Basic(nn.Module):
    """As Ghost-ResNet's: norms and activations outside of Ghost modules of two convolutions."""

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
    """A Ghost module of a 3x3 and a 3x3 depthwise convolution, and nothing else."""

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
    """As timm's, whose batch norm has its activation in it and calls a function."""

    class Norm(nn.BatchNorm2d):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                0.1, self.eps,
            )  # fmt: skip
            return self.act(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 8, 3, 2, 1, bias=False), self.Norm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def with_ghost(*modules: nn.Module) -> nn.Module:
    """A model with a Ghost module: without any, convolutions are left alone."""
    return nn.Sequential(Sliced(6, 6), *modules)


SILU = nn.SiLU()
BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (lambda: with_ghost(Basic(6, 6)), "residual block: ghost + ghost + x"),
    "residual, odd": (lambda: with_ghost(Basic(6, 9, 2, "conv")),
                      "residual block: ghost + ghost + conv"),
    "residual, ghost": (lambda: with_ghost(Basic(6, 8, 2, "ghost")),
                        "residual block: ghost + ghost + ghost"),
    "residual, norms inside": (lambda: with_ghost(Inside()), "residual block: ghost + ghost + x"),
    "conv": (lambda: with_ghost(Conv(6, 8, 3, 2, 1, SILU)), "conv 6 -> 8, 3x3 stride 2"),
    "conv, 1x1": (lambda: with_ghost(Conv(6, 7, 1, 1, 1, nn.ReLU())), "conv 6 -> 7, 1x1"),
    "conv, 5x5": (lambda: with_ghost(Conv(6, 7, 5, 1, 1, nn.Identity())), "conv 6 -> 7, 5x5"),
    "depthwise": (lambda: with_ghost(Conv(6, 6, 5, 2, 6, SILU)), "depthwise 6, 5x5 stride 2"),
    "timm's norm": (lambda: with_ghost(FrozenNorm()), "conv 6 -> 8, 3x3 stride 2"),
}  # fmt: skip


class Inside(nn.Module):
    """Norms and activations inside of the Ghost modules; the second one is linear."""

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
    report = ghost_ops.fuse(fused)
    assert [e.detail for e in report.entries if e.name == "1"] == [detail], report
    assert not report.left
    assert isinstance(fused[1], FusedConv if ("conv" in detail[:4]) else nn.Module)
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
    if name.startswith("residual"):
        assert len(convs) == 2 * (3 if name == "residual, ghost" else 2)
    elif name not in ("conv, 1x1", "depthwise"):
        assert len(convs) == 2


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
    """Of another size than the module says: a convolution takes it as it is."""
    conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    o, i, _, _ = conv.weight.shape
    conv.weight = nn.Parameter(torch.ones(o, i, 4, 4, dtype=conv.weight.dtype))


def replace_activation(module: nn.Module) -> None:
    for m in list(module.modules()):
        for child, act in m._modules.items():
            if isinstance(act, (nn.ReLU, nn.SiLU)):
                m._modules[child] = nn.Tanh()


CHANGES = (
    scale, change_eps, change_norms, change_running, change_stride, change_weight,
    replace_activation,
)  # fmt: skip


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
    assert ghost_ops.fuse(fused).swapped
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
    assert not ghost_ops.fuse(nn.Sequential(copy.deepcopy(conv))).entries
    model = with_ghost(conv, Basic(8, 8))
    report = ghost_ops.fuse(model, inference)
    assert isinstance(model[1], FusedConv) == (inference is None)
    assert isinstance(model[2], FusedResidual) == (inference is None)
    assert {e.action for e in ghost_ops.fuse(model, inference).entries} <= {"already", "left"}
    assert isinstance(report.entries[0].detail, str)


def test_convolutions_inside_of_fused_modules_stay(convs: list[str]) -> None:
    model = nn.Sequential(GhostConv(6, 8), Conv(8, 8, 3, 1, 1, nn.SiLU()))
    names = [e.name for e in ghost_ops.fuse(model).swapped]
    assert names == ["0", "1"]


def test_without_a_kernel(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_ops, "has_conv_kernel", lambda: False)
    plain = randomize(with_ghost(Conv(6, 8, 3, 1, 1, nn.ReLU()), Basic(8, 8))).double().eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    assert not any(isinstance(m, (FusedConv, FusedResidual)) for m in fused.modules())
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


@pytest.mark.parametrize("k", [1, 3])
def test_training_of_a_library_convolution_is_its_own_forward(native: str, k: int) -> None:
    model = randomize(nn.Sequential(Sliced(6, 8, k=k))).double()
    report = ghost_ops.fuse(model)
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
        return (1.5e-3, 1.2e-3) if isinstance(module, FusedConv) else (1e-3, 2e-3)

    seen: list = []
    monkeypatch.setattr(timing, "_compare", compare)
    model = randomize(with_ghost(Conv(6, 8, 3, 2, 1, nn.ReLU()), Basic(8, 8), RawConvs(8, 4, True)))
    plain = copy.deepcopy(model)
    before = [b.clone() for b in model.buffers()]
    report = ghost_ops.fuse(model, example=torch.randn(2, 6, 8, 8))
    assert seen[0] == ("FusedRawConvs", (2, 8, 4, 4))
    assert [name for name, _ in seen].count("FusedConv") == 1
    (entry,) = (e for e in report.entries if e.action == "kept")
    assert (entry.name, entry.kind) == ("1", "Conv")
    assert entry.detail == "plain is faster here: 1.2 ms to 1.5"
    assert "1 kept" in repr(report)
    assert entry not in report.swapped
    assert type(model[1]) is Conv
    assert isinstance(model[2], FusedResidual)
    assert all(m.training for m in model.modules())
    assert all(map(torch.equal, model.buffers(), before))
    assert not any(m._forward_pre_hooks for m in model.modules())
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_example_is_timed(convs: list[str]) -> None:
    model = randomize(with_ghost(Conv(6, 8, 3, 1, 1, nn.ReLU()))).eval()
    plain = copy.deepcopy(model)
    report = ghost_ops.fuse(model, example=torch.randn(1, 6, 8, 8))
    assert {e.action for e in report.entries} <= {"swapped", "kept"}
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    with pytest.raises(RuntimeError):
        ghost_ops.fuse(copy.deepcopy(plain), example=torch.randn(1, 5, 8, 8))


def test_where_the_kernel_is_the_check_is_the_dispatchers(native: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key("ghost_ops::ghost_conv_apply", "CPU")
    assert model_ops.has_conv_kernel() == has
    assert backends.select("cpu", torch.float32) == "native"
