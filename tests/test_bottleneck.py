"""Promise: a Ghost bottleneck is few operators in inference, else its children one by one."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from ghost_forms import Sliced, YoloBottleneck, randomize
from helpers import DTYPES, LAYOUTS, assert_close, recorded, with_layout
from torch import Tensor, nn

import ghost_ops
from ghost_ops import FusedGhostBottleneck, SqueezeExcite
from ghost_ops.fusion.bottleneck import PackedBottleneck
from ghost_ops.reference import GhostBottleneck, GhostModule

# (in, mid, out, kernel, stride, squeeze-excite ratio): every kind of bottleneck in GhostNet.
BLOCKS = [
    (8, 12, 8, 3, 1, 0.0),
    (8, 20, 8, 5, 1, 0.25),
    (8, 20, 12, 3, 1, 0.25),
    (8, 13, 10, 3, 2, 0.0),
    (8, 20, 12, 5, 2, 0.25),
]


def pair(block: tuple, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    plain = randomize(GhostBottleneck(*block[:5], se_ratio=block[5])).to(dtype)
    fused = FusedGhostBottleneck(*block[:5], se_ratio=block[5]).to(dtype)
    fused.load_state_dict(plain.state_dict())
    return fused, plain


def image(dtype: torch.dtype = torch.float64, layout: str = "nchw", seed: int = 1) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, 9, 10, generator=gen, dtype=torch.float64)
    return with_layout(x, layout).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_training(backend: str, block: tuple, layout: str) -> None:
    results = []
    for model in pair(block):
        x = image(layout=layout).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        results.append([out, x.grad, *grads, *(b.double() for b in model.buffers())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_inference(every_isa: str, block: tuple, layout: str, dtype: torch.dtype) -> None:
    fused, plain = (model.eval() for model in pair(block, dtype))
    x = image(dtype, layout)
    with torch.no_grad():
        got, eager = fused(x), plain(x)
        want = copy.deepcopy(plain).double()(x.double())
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
        assert_close(got, want, eager)
        assert torch.equal(fused(x), got)


def test_initial_values_are_the_reference(native: str) -> None:
    torch.manual_seed(4)
    a = GhostBottleneck(8, 20, 12, 5, 2, se_ratio=0.25)
    torch.manual_seed(4)
    b = FusedGhostBottleneck(8, 20, 12, 5, 2, se_ratio=0.25)
    assert list(a.state_dict()) == list(b.state_dict())
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("block", "ops"), list(zip(BLOCKS, (2, 3, 5, 5, 6), strict=True)))
def test_few_operators(native: str, block: tuple, ops: int) -> None:
    """The first call packs; later calls run one operator, a program of few instructions."""
    fused, _ = (model.eval() for model in pair(block, torch.float32))
    x = image(torch.float32)
    with torch.no_grad():
        fused(x)
        with recorded() as names:
            fused(x)
    assert names == ["ghost_ops::run_program"]
    assert len(PackedBottleneck(fused._ghost_ops.parts, "native").program()) == ops


def edit(path: str, name: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        with torch.no_grad():
            getattr(module.get_submodule(path), name).mul_(1.7).add_(0.1)

    change.__name__ = f"{path}.{name}"
    return change


def train_a_step(module: nn.Module) -> None:
    module.train()
    module(image(seed=5) * 3)
    module.eval()


def load(module: nn.Module) -> None:
    module.load_state_dict(randomize(copy.deepcopy(module), 9).state_dict())


def new_gate(module: nn.Module) -> None:
    module.se = randomize(SqueezeExcite(20), 3).double()


def no_gate(module: nn.Module) -> None:
    module.se = None


def new_eps(module: nn.Module) -> None:
    module.bn_dw.eps = 0.3


def new_shortcut(module: nn.Module) -> None:
    module.shortcut[2] = randomize(nn.Sequential(nn.Conv2d(8, 12, 1)), 4)[0].double()


def through_data(module: nn.Module) -> None:
    module.conv_dw.weight.data = module.conv_dw.weight.data * 2


CHANGES = [
    train_a_step,
    load,
    new_gate,
    no_gate,
    new_eps,
    new_shortcut,
    through_data,
    edit("ghost1.primary_conv.0", "weight"),
    edit("ghost2.cheap_operation.1", "running_var"),
    edit("conv_dw", "weight"),
    edit("bn_dw", "running_mean"),
    edit("se.conv_reduce", "bias"),
    edit("se.conv_expand", "weight"),
    edit("shortcut.0", "weight"),
    edit("shortcut.3", "bias"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_changes_are_noticed(native: str, mode: str, change: Callable) -> None:
    models = [model.eval() for model in pair(BLOCKS[-1])]
    guard = torch.no_grad if mode == "no_grad" else torch.inference_mode
    with guard():
        before = models[0](image())
        models[0](image())
    for model in models:
        change(model)
    with guard():
        got, want = (model(image()) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    assert (got - before).abs().max() > 1e-3, "the change changes nothing: it tests nothing"


def test_hooks_inside_run(native: str) -> None:
    fused, plain = (model.eval() for model in pair(BLOCKS[-1]))
    x, calls = image(), []
    with torch.no_grad():
        fused(x)
        handles = [
            fused.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
            for name in ("se", "conv_dw", "ghost1", "shortcut")
        ]
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)
        assert len(calls) == 4
        for handle in handles:
            handle.remove()
        with recorded() as names:
            fused(x)
            names.clear()
            fused(x)
        assert all(name.startswith("ghost_ops::") for name in names)


def test_copies(native: str) -> None:
    fused, plain = (model.eval() for model in pair(BLOCKS[-1]))
    x = image()
    with torch.no_grad():
        want = fused(x)
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), want)
            other.conv_dw.weight.zero_()
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)
            assert (other(x) - want).abs().max() > 1e-3


def test_autocast(native: str) -> None:
    fused, plain = (model.eval() for model in pair(BLOCKS[-1], torch.float32))
    x = image(torch.float32)
    with torch.no_grad():
        fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = fused(x), plain(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.1)


# --- fuse(): other people's bottlenecks -------------------------------------------------------


class OtherGate(nn.Module):
    """timm's squeeze-and-excitation, whose gate function is a module."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act = nn.Conv2d(channels, 4, 1), nn.SiLU()
        self.bn = nn.Identity()
        self.fc2, self.gate = nn.Conv2d(4, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))))


def timm_like(gate: nn.Module) -> nn.Module:
    block = GhostBottleneck(8, 20, 8)
    block.ghost1, block.ghost2 = (
        Sliced(8, 20),
        Sliced(20, 8, act1=nn.Identity(), act2=nn.Identity()),
    )
    block.se = OtherGate(20, gate)
    return block


FOREIGN = {
    "Ultralytics": lambda: YoloBottleneck(8, 8, 3, 1),
    "Ultralytics, stride 2": lambda: YoloBottleneck(8, 16, 3, 2),
    "hard sigmoid": lambda: timm_like(nn.Hardsigmoid()),
    "sigmoid": lambda: timm_like(nn.Sigmoid()),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign(backend: str, name: str) -> None:
    plain = randomize(FOREIGN[name]()).double()
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused, inference=True))
    assert len(report.in_state("fused")) == 3, report
    results = []
    for model in (fused, plain):
        x = image().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = model.train()(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
        with torch.no_grad():
            results.append([out, *grads, model.eval()(x), model(x)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("inference", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
def test_inference_argument(inference: bool | None, training: bool) -> None:
    model = randomize(timm_like(nn.Sigmoid())).train(training)
    kind = type(model)
    ghost_ops.fuse(model, inference)
    assert (type(model) is not kind) == (inference is not False)
    assert type(model.ghost1) is not Sliced


def test_a_mish_gate_is_left() -> None:
    model = timm_like(nn.Tanh())
    report = ghost_ops.report(ghost_ops.fuse(model, inference=True))
    assert [e.state for e in report.entries] == ["left", "fused", "fused"]
    assert "squeeze-and-excitation" in report.in_state("left")[0].detail


class Doubled(GhostModule):
    """The children of a Ghost module with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_forward_inside_is_run(native: str, when: str) -> None:
    plain = randomize(GhostBottleneck(8, 16, 8)).eval()
    fused = copy.deepcopy(plain)
    if when == "before":
        fused.ghost1.__class__ = Doubled
    report = ghost_ops.report(ghost_ops.fuse(fused, inference=True))
    plain.ghost1.__class__ = Doubled
    if when == "before":
        assert [e.name for e in report.in_state("left")] == ["(model)", "ghost1"]
    else:
        with torch.no_grad():
            fused(image(torch.float32))
        fused.ghost1 = randomize(Doubled(8, 16)).eval()
        fused.ghost1.load_state_dict(plain.ghost1.state_dict())
    x = image(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("part", ["ghost2", "shortcut"])  # for other parts PyTorch computes numbers
def test_parts_on_two_devices(native: str, part: str) -> None:
    """An error as in PyTorch, or no number; before and after a correct call."""
    fused, _ = (model.eval() for model in pair(BLOCKS[-1], torch.float32))
    x = image(torch.float32)
    with torch.no_grad():
        for called in (False, True):
            block = copy.deepcopy(fused)
            if called:
                block(x)
            block.get_submodule(part).to("meta")
            try:
                assert block(x).is_meta
            except RuntimeError as error:
                assert "meta" in str(error)


def test_a_different_sum_is_left() -> None:
    class Scaled(GhostBottleneck):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.99

    report = ghost_ops.report(ghost_ops.fuse(Scaled(8, 12, 8), inference=True))
    assert [e.state for e in report.entries] == ["left", "fused", "fused"]
    assert "does not end with a sum" in report.in_state("left")[0].detail
