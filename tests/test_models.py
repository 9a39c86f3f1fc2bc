"""Promise: the networks have the paper's sizes and the plain modules' numbers; checkpoints load."""

from __future__ import annotations

import copy
import io
import types
import warnings

import pytest
import torch
from ghost_forms import randomize
from helpers import recorded
from torch import nn
from twins import unfused_copy

import ghost_ops
from ghost_ops import models
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


@pytest.mark.parametrize("name", NETWORKS)
def test_same_as_plain_modules(backend: str, name: str) -> None:
    make, shape = NETWORKS[name]
    fused = make().double()
    plain = unfused_copy(fused)
    kinds = {type(m).__module__ for m in plain.modules()}
    assert "ghost_ops.nn" not in kinds
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
        assert type(model) is models.GhostNet
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ghostnet(0), "width"),
        (lambda: ghostnet(num_classes=0), "num_classes"),
        (lambda: ghostnet(dropout=1.0), "dropout"),
        (lambda: ghostnet(in_chans=0), "in_chans"),
        (lambda: ghost_resnet(57), "depth"),
        (lambda: ghost_resnet(2), "depth"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore:.*dw_size=9")
def test_module_without_kernel() -> None:
    """A Ghost module that no kernel computes runs as PyTorch's operators inside a fused network."""
    model = randomize(ghostnet(0.5, num_classes=10)).double().eval()
    plain = models.GhostNet(0.5, num_classes=10).double().eval()
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
