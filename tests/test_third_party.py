"""Promise: models of timm and Ultralytics keep their outputs and gradients when they are fused."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from types import ModuleType

import pytest
import torch
from ghost_forms import randomize
from helpers import assert_close
from torch import Tensor, nn

import ghost_ops

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def required(name: str, module: str = "") -> ModuleType:
    """The package, or a skip with the reason."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    from examples import third_party

    try:
        return third_party.timm() if name == "timm" else third_party.ultralytics(module)
    except ImportError as error:
        pytest.skip(f"{name} does not import here: {error}")


def compare(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Outputs in both modes and all gradients, in float64."""
    results = []
    for model in (fused, plain):
        leaf = x.clone().requires_grad_()
        out = model.train()(leaf)
        learnt = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.square().mean(), [leaf, *learnt])
        with torch.no_grad():
            results.append([out, *model.buffers(), model.eval()(x), model(x), *grads])
    # A gradient that a batch norm cancels is rounding error: allow an error of the largest one.
    largest = max(g.abs().max().item() for g in results[1][-len(grads) :])
    for got, want in zip(*results, strict=True):
        error = (got - want).abs().max().item()
        assert error <= 1e-7 * want.abs().max().item() + 1e-11 * largest


@pytest.mark.parametrize("name", ["ghostnet_100", "ghostnetv2_100", "ghostnetv3_100"])
def test_timm(native: str, name: str) -> None:
    model = required("timm").create_model(name, drop_rate=0.0)
    if name == "ghostnetv3_100":
        for module in list(model.modules()):
            if hasattr(module, "reparameterize"):
                module.reparameterize()
        for p in model.parameters():
            p.requires_grad_()
    plain = randomize(model).double()
    fused = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = ghost_ops.report(ghost_ops.fuse(fused, inference=True))
        ghosts = [e for e in report.entries if e.kind.startswith("GhostModule")]
        assert len(ghosts) == 32
        assert {e.state for e in report.entries} == {"fused"}, report
        compare(plain, fused, torch.randn(2, 3, 48, 48, dtype=torch.float64))
    assert list(fused.state_dict()) == list(plain.state_dict())
    ghost_ops.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


def test_timm_in_float32(native: str) -> None:
    """At 224 x 224, as near to float64 as PyTorch itself is."""
    plain = randomize(required("timm").create_model("ghostnet_100")).eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = copy.deepcopy(plain).double()(x.double())
        assert_close(fused(x), want, plain(x))


def test_timm_checkpoint_into_our_network(native: str) -> None:
    theirs = randomize(required("timm").create_model("ghostnet_100")).eval()
    ours = ghost_ops.models.ghostnet().eval()
    report = ghost_ops.models.load_checkpoint(ours, theirs.state_dict())
    assert report.complete
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-7, atol=1e-9)


def test_timm_features(native: str) -> None:
    """timm's feature extractor calls the bottlenecks without the network's forward."""
    model = required("timm").create_model("ghostnet_050", features_only=True)
    plain = randomize(model).eval()
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert not report.in_state("left")
    assert any("bottleneck" in e.detail for e in report.in_state("fused"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, want in zip(fused(x), plain(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


ULTRALYTICS = {
    "GhostConv": ("conv", (16, 24), {}),
    "GhostConv, odd": ("conv", (16, 25), {}),
    "GhostConv, k=3 s=2": ("conv", (16, 24, 3, 2), {}),
    "GhostConv, groups": ("conv", (16, 24, 1, 1, 4), {}),
    "GhostConv, linear": ("conv", (16, 24), {"act": False}),
    "C3Ghost": ("block", (16, 16), {"n": 2}),
    "GhostBottleneck": ("block", (16, 16), {}),
    "GhostBottleneck, stride 2": ("block", (16, 24, 3, 2), {}),
}


@pytest.mark.parametrize("name", ULTRALYTICS)
def test_ultralytics(native: str, name: str) -> None:
    where, arguments, options = ULTRALYTICS[name]
    module = required("ultralytics", f"nn.modules.{where}")
    plain = randomize(getattr(module, name.split(",")[0])(*arguments, **options)).double()
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused, inference=True))
    kinds = [e.kind for e in report.in_state("fused")]
    assert "GhostConv" in kinds
    assert not report.in_state("left")
    assert ("GhostBottleneck" in kinds) == (where == "block")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(plain, fused, torch.randn(2, 16, 9, 12, dtype=torch.float64))


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_ultralytics_own_fuse(native: str, order: str) -> None:
    """Ultralytics' fuse folds batch norms into convolutions, deletes them and replaces forwards."""
    conv = required("ultralytics", "nn.modules.conv")
    utils = required("ultralytics", "utils.torch_utils")
    plain = randomize(nn.Sequential(conv.GhostConv(16, 24), conv.GhostConv(24, 16, 3))).eval()
    fused = copy.deepcopy(plain)
    x = torch.randn(2, 16, 10, 9)

    def fold(model: nn.Module) -> None:
        for m in model.modules():
            if isinstance(m, conv.Conv) and hasattr(m, "bn"):
                m.conv = utils.fuse_conv_and_bn(m.conv, m.bn)
                delattr(m, "bn")
                m.forward = m.forward_fuse

    steps = [fold, ghost_ops.fuse] if order == "theirs first" else [ghost_ops.fuse, fold]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in steps:
            step(fused)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert all(type(m).__name__ == "FusedGhostConv" for m in fused)
