"""Promise: the networks have the paper's sizes and the plain networks' numbers; checkpoints load.

``models`` builds what ``fuse`` makes of the plain network of the same name in ``reference``."""

from __future__ import annotations

import copy
import inspect
import io
import math
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from ghost_forms import randomize
from helpers import recorded
from torch import nn
from twins import unfused_copy

import ghost_ops
from ghost_ops import models, reference
from ghost_ops.models import count_macs, ghost_resnet, ghost_vgg16, ghostnet, load_checkpoint
from ghost_ops.reference import GhostBottleneck, GhostModule


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Network, input, millions of parameters, millions of MACs, tolerance. From tables 6, 7 and 8 of the
# paper and the abstract of the published code. The paper's numbers for Ghost-ResNet-56 do not count
# the depthwise convolutions, which add 3.6%.
SIZES = {
    "GhostNet 0.5": (lambda: ghostnet(0.5), (1, 3, 224, 224), 2.6, 42, 0.01),
    "GhostNet 1.0": (lambda: ghostnet(1.0), (1, 3, 224, 224), 5.18, 141, 0.005),
    "GhostNet 1.3": (lambda: ghostnet(1.3), (1, 3, 224, 224), 7.3, 226, 0.01),
    "Ghost-VGG-16": (ghost_vgg16, (1, 3, 32, 32), 7.7, 158, 0.01),
    "Ghost-ResNet-56": (ghost_resnet, (1, 3, 32, 32), 0.43, 63, 0.04),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    make, shape, millions, macs, tolerance = SIZES[name]
    model = make()
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=tolerance)
    assert count_macs(model, shape) / 1e6 == pytest.approx(macs, rel=tolerance)


def test_ratio_halves_the_work() -> None:
    macs = [count_macs(ghost_vgg16(ratio), (1, 3, 32, 32)) for ratio in (1, 2, 4)]
    assert macs[0] / macs[1] == pytest.approx(2, rel=0.02)
    assert macs[0] / macs[2] == pytest.approx(4, rel=0.05)


def test_macs_of_any_dtype() -> None:
    model = ghostnet(0.5)
    macs = count_macs(model, (1, 3, 64, 64))
    assert all(count_macs(model.to(t), (1, 3, 64, 64)) == macs for t in (torch.half, torch.double))


def test_counting_changes_nothing() -> None:
    model = ghostnet(0.5)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    count_macs(model, (1, 3, 64, 64))
    assert type(model.blocks[0][0]) is ghost_ops.FusedGhostBottleneck
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def small_ghostnet() -> nn.Module:
    return randomize(ghostnet(0.5, num_classes=10, dropout=0.0, in_chans=1))


NETWORKS = {
    "ghostnet": (small_ghostnet, (2, 1, 64, 40)),
    "ghost_resnet": (lambda: randomize(ghost_resnet(8)), (2, 3, 16, 16)),
    "ghost_vgg16": (lambda: randomize(ghost_vgg16()), (2, 3, 32, 32)),
}


# --- the two names of a network: fused in ``models``, plain in ``reference`` -------------------

PAIRS = ("ghostnet", "ghost_resnet", "ghost_vgg16")


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """The fused and the plain network of one name, built with default arguments and one seed."""
    made = []
    for module in (models, reference):
        torch.manual_seed(3)
        made.append(getattr(module, name)())
        made.append(torch.rand(1))
    fused, after, plain, after_plain = made
    assert torch.equal(after, after_plain)
    return fused, plain


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def is_fused(kind: type) -> bool:
    return kind.__name__.startswith("Fused")


def numbers(model: nn.Module, size: int) -> tuple[list[torch.Tensor], list[str]]:
    """The outputs of two calls in eval mode, and the operators of the second."""
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model.eval()(x)
        with recorded() as names:
            second = model(x)
    return [first, second], names


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_of_both(name: str) -> None:
    fused, plain = (
        inspect.signature(getattr(module, name)).parameters for module in (models, reference)
    )
    shared = {key: p for key, p in plain.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(fused) == list(shared)
    assert [p.default for p in fused.values()] == [p.default for p in shared.values()]


@pytest.mark.parametrize("name", PAIRS)
def test_keys_and_draws_of_both(name: str) -> None:
    fused, plain = (model.state_dict() for model in both(name))
    assert list(fused) == list(plain)
    assert all(torch.equal(t, plain[key]) for key, t in fused.items())


@pytest.mark.parametrize("name", PAIRS)
def test_fuse_makes_one_of_the_other(native: str, name: str) -> None:
    """The same types, numbers and operators, whichever of the two was built."""
    fused, plain = both(name)
    assert any(map(is_fused, kinds(fused).values()))
    assert not any(map(is_fused, kinds(plain).values()))
    plain_kinds, size = kinds(plain), 64 if name == "ghostnet" else 32
    unfused = copy.deepcopy(fused)
    ghost_ops.unfuse(unfused)
    assert kinds(unfused) == plain_kinds
    want, names = numbers(plain, size)
    got, unfused_names = numbers(unfused, size)
    assert unfused_names == names
    assert all(map(torch.equal, got, want))
    assert not any(n.startswith("ghost_ops::") for n in names)

    made = copy.deepcopy(plain.train())
    ghost_ops.fuse(made)
    assert kinds(made) == kinds(fused)
    want, names = numbers(fused, size)
    got, made_names = numbers(made, size)
    assert made_names == names
    assert all(map(torch.equal, got, want))
    assert any(n.startswith("ghost_ops::") for n in names)


def test_no_plain_name_is_fused() -> None:
    """A class or function of ``models`` is named like one of ``reference`` only as a pair."""
    plain = {name for name in reference.__all__ if inspect.isclass(getattr(reference, name))}
    assert not plain & set(vars(models))
    assert set(PAIRS) <= {*models.__all__} & {*reference.__all__}
    assert is_fused(models.FusedGhostNet)
    for name in plain:
        assert not issubclass(getattr(reference, name), ghost_ops.fusion.fused.Fused), name


@pytest.mark.parametrize("name", PAIRS)
def test_construction_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape[0] == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_same_as_plain_modules(backend: str, name: str) -> None:
    make, shape = NETWORKS[name]
    fused = make().double()
    plain = unfused_copy(fused)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for model in (fused, plain):
        out = model.train()(x)
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            results.append([out, *grads, model.eval()(x), model(x)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_unfuse_and_fuse_again() -> None:
    model = small_ghostnet().eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        want = model(x)
        ghost_ops.unfuse(model)
        assert type(model) is reference.GhostNet
        assert type(model.blocks[0][0]) is GhostBottleneck
        assert type(model.blocks[0][0].ghost1) is GhostModule
        plain = model(x)
        ghost_ops.fuse(model)
        assert type(model) is models.FusedGhostNet
        assert torch.equal(model(x), want)
        torch.testing.assert_close(plain, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["stem", "norm", "head", "classifier", "hook", "mode"])
def test_network_notices_changes(native: str, change: str) -> None:
    fused = small_ghostnet().double().eval()
    plain = unfused_copy(fused)
    x = torch.randn(2, 1, 40, 40, dtype=torch.float64)
    calls: list[int] = []
    with torch.no_grad():
        fused(x)
        for model in (fused, plain):
            if change == "stem":
                model.conv_stem.weight.mul_(1.5)
            elif change == "norm":
                model.blocks[-1][0].bn1.running_mean.add_(0.5)
            elif change == "head":
                model.conv_head.bias.add_(0.5)
            elif change == "classifier":
                model.classifier = randomize(nn.Linear(1280, 3)).double()
                nn.init.constant_(model.classifier.weight, 0.01)
                nn.init.zeros_(model.classifier.bias)
            elif change == "hook":
                model.act2.register_forward_hook(lambda *_: calls.append(1))
            else:
                model.train()(x * 2)
                model.eval()
        for _ in range(2):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-8, atol=1e-9)
    assert len(calls) == (4 if change == "hook" else 0)


def triple(module: nn.Module, name: str) -> None:
    """Make the forward of this one object return three times its output."""
    forward = type(module).forward
    patched = types.MethodType(lambda self, x: forward(self, x) * 3, module)
    setattr(module, name, patched)


INSIDE = {
    "weight": lambda stages: stages[2][-1].ghost1.primary_conv[0].weight.mul_(3),
    "eps": lambda stages: setattr(stages[1][0].ghost2.cheap_operation[1], "eps", 0.5),
    "hook of a stage": lambda stages: stages[3].register_forward_hook(lambda m, x, out: out * 3),
    "hook of a bottleneck": lambda stages: stages[3][0].register_forward_pre_hook(
        lambda m, x: (x[0] * 3,)
    ),
    "hook of a convolution": lambda stages: (
        stages[3][0].ghost1.primary_conv[0].register_forward_hook(lambda m, x, out: out * 3)
    ),
    "forward": lambda stages: triple(stages[1][0], "forward"),
    "another bottleneck": lambda stages: stages[2].append(copy.deepcopy(stages[2][-1])),
    "a layer more": lambda stages: stages[2].append(nn.ReLU()),
    "mode of a norm": lambda stages: stages[1][0].ghost1.primary_conv[1].train(),
    "data": lambda stages: stages[1][0].ghost1.primary_conv[0].weight.data.mul_(3),
}


@pytest.mark.parametrize("change", INSIDE)
def test_bottlenecks_together_notice_changes(native: str, change: str) -> None:
    """The bottlenecks run as one operator until one of them changes or gets a hook."""
    fused = small_ghostnet().double().eval()
    plain = unfused_copy(fused)
    x = torch.randn(2, 1, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        fused(x)
        with recorded() as names:
            before = fused(x)
        assert names.count("ghost_ops::run_program") == 1, names
        for model in (fused, plain):
            INSIDE[change](model.blocks)
        if change == "data":
            ghost_ops.reset_cache(fused.blocks[1][0])
        # Norms that use the batch's statistics move their running ones at every call.
        for _ in range(3):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-8, atol=1e-9)
        assert not torch.allclose(plain(x), before, rtol=1e-6, atol=1e-7)


WRONG: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("ghostnet", {"width": "1.0"}, TypeError, r"width must be a number, got str: '1\.0'"),
    ("ghostnet", {"width": None}, TypeError, "width must be a number, got NoneType"),
    ("ghostnet", {"width": True}, TypeError, "width must be a number, got bool"),
    ("ghostnet", {"width": 1j}, TypeError, "width must be a number, got complex"),
    ("ghostnet", {"width": math.nan}, ValueError, "width must be positive and finite, got nan"),
    ("ghostnet", {"width": math.inf}, ValueError, "width must be positive and finite, got inf"),
    ("ghostnet", {"width": 0}, ValueError, "width must be positive and finite, got 0"),
    ("ghostnet", {"width": -1}, ValueError, "width must be positive and finite, got -1"),
    ("ghostnet", {"dropout": 1.0}, ValueError, r"dropout must be from 0 to below 1, got 1\.0"),
    ("ghostnet", {"dropout": -0.1}, ValueError, r"dropout.*-0\.1"),
    ("ghostnet", {"dropout": math.nan}, ValueError, "dropout.*nan"),
    ("ghostnet", {"dropout": "0.2"}, TypeError, r"dropout must be a number, got str: '0\.2'"),
    ("ghost_resnet", {"depth": 57}, ValueError, r"depth must be 6 n \+ 2 .*57"),
    ("ghost_resnet", {"depth": 2}, ValueError, r"depth must be 6 n \+ 2 .*2"),
    ("ghost_resnet", {"depth": "56"}, TypeError, "depth must be an int, got str: '56'"),
    ("ghost_resnet", {"depth": 56.0}, TypeError, r"depth must be an int, got float: 56\.0"),
    ("ghost_resnet", {"ratio": 0}, ValueError, "ratio must be at least 1, got 0"),
    ("ghost_vgg16", {"ratio": "2"}, TypeError, "ratio must be an int, got str"),
    ("ghost_vgg16", {"dw_size": 2}, ValueError, "dw_size must be odd, got 2"),
    *(
        (name, {argument: value}, kind, rf"{argument} must be .*got .*{value}")
        for name in PAIRS
        for argument in ("num_classes", "in_chans")
        for value, kind in ((0, ValueError), (-3, ValueError), (2.5, TypeError), ("9", TypeError))
    ),
]


@pytest.mark.parametrize("module", [models, reference], ids=["models", "reference"])
@pytest.mark.parametrize(("name", "given", "kind", "message"), WRONG, ids=str)
def test_bad_arguments(
    module: types.ModuleType,
    name: str,
    given: dict[str, object],
    kind: type[Exception],
    message: str,
) -> None:
    build: Callable[..., nn.Module] = getattr(module, name)
    with pytest.raises(kind, match=message):
        build(**given)


@pytest.mark.filterwarnings("ignore:.*dw_size=9")
def test_module_without_kernel() -> None:
    """A Ghost module that no kernel computes runs as PyTorch's operators inside a fused network."""
    model = randomize(ghostnet(0.5, num_classes=10)).double().eval()
    plain = reference.ghostnet(0.5, num_classes=10).double().eval()
    for net in (model, plain):
        block = net.blocks[0][0]
        conv = block.ghost1.primary_conv[0]
        block.ghost1 = GhostModule(conv.in_channels, block.ghost1.oup, dw_size=9).double().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        want = unfused_copy(plain)(x)
        torch.testing.assert_close(model(x), want)
        report = ghost_ops.report(ghost_ops.fuse(plain))
        assert {e.state for e in report.entries} <= {"fused", "left"}
        torch.testing.assert_close(plain(x), want)


def test_dropout_is_in_training_only() -> None:
    model = randomize(ghostnet(0.5, 10, dropout=0.5)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        assert not torch.equal(model(x), model(x))


# --- checkpoints ------------------------------------------------------------------------------


def published() -> dict[str, torch.Tensor]:
    return {key: t.clone() for key, t in randomize(ghostnet(0.5), 8).state_dict().items()}


def test_published_keys() -> None:
    keys = list(ghostnet().state_dict())
    for key in (
        *("conv_stem.weight", "bn1.running_var", "conv_head.bias", "classifier.weight"),
        *("blocks.0.0.ghost1.primary_conv.0.weight", "blocks.6.3.shortcut.3.running_mean"),
        *("blocks.1.0.conv_dw.weight", "blocks.1.0.bn_dw.bias"),
        *("blocks.3.0.se.conv_reduce.bias", "blocks.3.0.se.conv_expand.weight"),
        *("blocks.9.0.conv.weight", "blocks.9.0.bn1.weight"),
    ):
        assert key in keys
    assert len(keys) == 512


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "module.", "twice", "no counts"])
def test_loading(wrap: str) -> None:
    state = published()
    checkpoint: dict = state
    if wrap in ("state_dict", "model"):
        checkpoint = {wrap: state, "epoch": 3}
    elif wrap == "module.":
        checkpoint = {"state_dict": {f"module.{key}": t for key, t in state.items()}}
    elif wrap == "twice":
        checkpoint = {f"module._orig_mod.{key}": t for key, t in state.items()}
    elif wrap == "no counts":
        checkpoint = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    model = ghostnet(0.5)
    report = load_checkpoint(model, torch.load(file, weights_only=True))
    assert report.complete
    assert "512 of 512" in repr(report) or wrap == "no counts"
    for key, t in model.state_dict().items():
        assert torch.equal(t, state[key]) or key.endswith("num_batches_tracked")


def test_half_a_checkpoint() -> None:
    model = ghostnet(0.5)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    state = published()
    for key in list(state):
        if key.startswith(("blocks.3.", "classifier")):
            state[key.replace("blocks.3", "stages.3")] = state.pop(key)
    with pytest.raises(RuntimeError, match=r"blocks\.3\.0\.ghost1(.|\n)*stages\.3\.0\.ghost1"):
        load_checkpoint(model, state)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    report = load_checkpoint(model, state, strict=False)
    assert not report.complete
    assert {key.split(".")[0] for key in report.unexpected} == {"stages"}
    assert all(key.startswith("blocks.3.") for key in report.missing)
    assert torch.equal(model.conv_stem.weight, state["conv_stem.weight"])
    assert torch.equal(model.blocks[3][0].conv_dw.weight, before["blocks.3.0.conv_dw.weight"])


def test_wrong_checkpoint() -> None:
    model = ghostnet(0.5)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="of another shape") as error:
        load_checkpoint(model, ghostnet(1.0).state_dict())
    assert "conv_stem.weight: [16, 3, 3, 3] in the checkpoint, [8, 3, 3, 3] in the model" in str(
        error.value
    )
    with pytest.raises(RuntimeError, match="unexpected"):
        load_checkpoint(model, nn.Linear(3, 4).state_dict())
    for wrong in (None, [1, 2], "file.pth"):
        with pytest.raises(TypeError, match="mapping"):
            load_checkpoint(model, wrong)
    with pytest.raises(TypeError, match="no tensors"):
        load_checkpoint(model, {"epoch": 3})
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
