"""Promise: ``fuse`` keeps outputs, gradients, state and hooks of an existing model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from ghost_forms import FORMS, GhostConv, RawConvs, Sliced, randomize
from helpers import LAYOUTS, same_bits, with_layout
from torch import Tensor, nn

import ghost_ops
from ghost_ops import FusedGhostModule, reference


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A fused model with one module of the form, and the same model unfused."""
    plain = nn.Sequential(nn.Identity(), randomize(FORMS[name]()).to(dtype))
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert [(e.name, e.state) for e in report.entries] == [("1", "fused")]
    return fused, plain


def image(layout: str = "nchw", dtype: torch.dtype = torch.float64) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    return with_layout(torch.randn(3, 6, 8, 7, generator=gen, dtype=torch.float64), layout).to(
        dtype
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMS)
def test_training(backend: str, name: str, layout: str) -> None:
    results = []
    for model in pair(name):
        x = image(layout).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a fallback would warn
            out = model(x)
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        results.append([out, x.grad, *grads, *(b.double() for b in model.buffers())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mode", ["frozen", "no_grad", "inference_mode"])
def test_evaluation(backend: str, name: str, mode: str) -> None:
    fused, plain = (model.eval() for model in pair(name))
    x = image()
    if mode == "frozen":
        results = []
        for model in (fused, plain):
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            learnt = [leaf, *(p for p in model.parameters() if p.requires_grad)]
            results.append([out, *torch.autograd.grad(out.sum(), learnt)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
        return
    with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
        for _ in range(2):  # the first call packs, the second is a cache hit
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)
        # Every changed parameter is noticed, in place or not.
    for index in range(len(list(plain.parameters()))):
        for model in (fused, plain):
            p = list(model.parameters())[index]
            with torch.no_grad():
                p.mul_(1.25).add_(0.1)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FORMS)
def test_everything_else_stays(name: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(randomize(FORMS[name]()))
    module = model[0]
    module.anything = "kept"
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    next(module.parameters()).requires_grad_(False)
    before = dict(model.state_dict(keep_vars=True))
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.eval().modules()]
    random_state = torch.get_rng_state()
    statistics = [b.clone() for b in model.buffers()]
    kind = type(module)

    ghost_ops.fuse(model)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[0] is module
    assert isinstance(module, kind)
    assert type(module) is not kind
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(map(torch.equal, model.buffers(), statistics))
    assert not calls
    model(image(dtype=torch.float32).requires_grad_()).sum().backward()
    assert calls == ["forward", "backward"]
    assert module.anything == "kept"

    assert ghost_ops.unfuse(model) is model
    assert [e.state for e in ghost_ops.report(model).entries] == ["plain"]
    assert type(module) is kind
    assert not {"_ghost_ops", "_packed"} & module.__dict__.keys()
    assert all(model.state_dict(keep_vars=True)[key] is before[key] for key in before)


@pytest.mark.parametrize("name", ["authors", "Ultralytics", "GhostModuleV2"])
def test_twice_is_once(name: str) -> None:
    fused, _ = pair(name)
    kind = type(fused[1])
    report = ghost_ops.report(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ghost_ops.fuse(fused) is fused
    assert ghost_ops.report(fused) == report
    assert type(fused[1]) is kind


@pytest.mark.parametrize("name", ["authors", "Ultralytics", "Ultralytics, folded", "GhostModuleV2"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(backend: str, name: str, how: str) -> None:
    fused, plain = (model.eval() for model in pair(name))
    x = image()
    with torch.no_grad():
        want = fused(x)
        other = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
        assert type(other[1]) is type(fused[1])
        assert same_bits(other(x), want)
        for p in other.parameters():
            p.mul_(0.5)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)
        ghost_ops.unfuse(other)
        changed = other(x)
        ghost_ops.fuse(other)
        torch.testing.assert_close(other(x), changed, rtol=1e-9, atol=1e-10)


def test_the_model_is_the_module() -> None:
    module = randomize(GhostConv(6, 8))
    assert ghost_ops.fuse(module) is module
    report = ghost_ops.report(module)
    assert report.model == "GhostConv"
    assert [(e.name, e.kind) for e in report.entries] == [("(model)", "GhostConv")]
    assert type(module).__name__ == "FusedGhostConv"


def test_reference_modules_become_our_own() -> None:
    block = randomize(reference.GhostBottleneck(6, 12, 8, stride=2, se_ratio=0.25)).eval()
    other = copy.deepcopy(block)
    ghost_ops.fuse(block)
    assert type(block) is ghost_ops.FusedGhostBottleneck
    assert type(block.ghost1) is type(block.ghost2) is FusedGhostModule
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(block(x), other(x))
    ghost_ops.unfuse(block)
    assert type(block) is reference.GhostBottleneck
    assert type(block.ghost1) is reference.GhostModule


def test_module_used_twice() -> None:
    module = randomize(Sliced(6, 6))
    model = nn.Sequential(module, module).eval()
    plain = copy.deepcopy(model)
    report = ghost_ops.report(ghost_ops.fuse(model))
    assert [e.name for e in report.in_state("fused") if e.name != "(model)"] == ["0"]
    with torch.no_grad():
        torch.testing.assert_close(model(image().float()), plain(image().float()))


def test_one_line_for_a_user(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Sliced(6, 8), GhostConv(8, 8), nn.ReLU())
    assert ghost_ops.fuse(model, inference=False, verbose=True) is model
    text = capsys.readouterr().out
    assert text == f"{ghost_ops.report(model)}\n"
    lines = text.splitlines()
    assert lines[0].split() == ["module", "class", "state", "detail"]
    assert lines[-3].split()[:3] == ["1", "Sliced", "fused"]
    assert lines[-2].split()[:3] == ["2", "GhostConv", "fused"]
    assert lines[-1].startswith("Sequential: 2 fused")


# --- changes afterwards -----------------------------------------------------------------------


def test_ultralytics_own_fuse_afterwards(backend: str) -> None:
    """Its own ``fuse()`` deletes batch norms and replaces the forward of the branches."""
    fused, plain = (model.eval() for model in pair("Ultralytics"))
    x = image()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(x)
        for model in (fused, plain):
            model[1].cv1.fold()
            model[1].cv2.fold()
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("unsaid")
def test_hooks_inside_come_and_go() -> None:
    fused, plain = (model.eval() for model in pair("authors"))
    x, calls = image(), []
    with torch.no_grad():
        fused(x)
        handle = fused[1].primary_conv.register_forward_hook(lambda *_: calls.append(1))
        with pytest.warns(UserWarning, match="hooks"):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)
        assert calls == [1]
        handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-10)
        assert calls == [1]


@pytest.mark.parametrize("change", ["batch norm", "activation", "slope", "eps", "dropout"])
def test_children_replaced_afterwards(backend: str, change: str) -> None:
    models = [model.eval() for model in pair("NanoDet")]
    x = image()
    with torch.no_grad():
        models[0](x)
        for model in models:
            branch = model[1].cheap_operation
            if change == "batch norm":
                branch[1] = randomize(nn.Sequential(nn.BatchNorm2d(4)), 7)[0].double().eval()
            elif change == "activation":
                branch[2] = nn.Hardswish()
            elif change == "slope":
                branch[2].negative_slope = 0.4
            elif change == "eps":
                branch[1].eps = 0.5
            else:
                branch.append(nn.Dropout(0.5))
                branch.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if change == "dropout" else "error")
            for _ in range(2):
                torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("unsaid")
def test_only_one_norm_in_training() -> None:
    fused, plain = pair("authors")
    for model in (fused, plain):
        model[1].primary_conv[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = fused(image())
    torch.testing.assert_close(got, plain(image()), rtol=1e-9, atol=1e-10)
    assert got.grad_fn is not None and "GhostModuleFunction" in got.grad_fn.name()


def test_dtype_and_autocast(backend: str) -> None:
    fused, plain = (model.eval() for model in pair("Ultralytics", torch.float32))
    x = image(dtype=torch.float32)
    with torch.no_grad():
        fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = fused(x), plain(x)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
        fused.to(torch.bfloat16), plain.to(torch.bfloat16)
        got, want = fused(x.bfloat16()), plain(x.bfloat16())
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_bad_input_raises_as_torch_does() -> None:
    fused, _ = (model.eval() for model in pair("authors", torch.float32))
    with torch.no_grad():
        fused(image(dtype=torch.float32))
        for bad in (torch.randn(1, 5, 4, 4), torch.randn(6), image()):
            with pytest.raises(RuntimeError):
                fused(bad)


def test_raw_convs_under_other_names_are_found() -> None:
    model = nn.ModuleDict({"a": RawConvs(6, 4, True)})
    assert [e.name for e in ghost_ops.report(ghost_ops.fuse(model)).in_state("fused")] == ["a"]
