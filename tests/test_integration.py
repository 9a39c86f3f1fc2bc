"""Promise: a fused module, and a network of them, works with what PyTorch offers for modules.

Autocast, torch.func, copies and pickles, state dicts, dtypes and layouts, threads, checkpointing,
parametrised weights and averages of models. Compilers and exporters are in ``test_tracing``.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import GhostConv, Sliced, randomize
from helpers import (
    LAYOUTS,
    Case,
    Params,
    close,
    make_input,
    make_module,
    oracle,
    plain,
    reference_like,
    same_bits,
)
from module_checks import function_arguments
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from twins import all_close, images, small_network, training_step, unfused_copy

import ghost_ops
from ghost_ops import FusedGhostModule
from ghost_ops.reference import GhostBottleneck, GhostModule

CASE = Case(act2="silu")


# --- autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
@pytest.mark.parametrize("k", [1, 3])
def test_autocast(backend: str, k: int, mode: str, dtype: torch.dtype) -> None:
    case = CASE.replace(k=k, act1="silu")
    module, x = make_module(case).train(mode == "train"), make_input(case)
    other = copy.deepcopy(module)
    if mode == "eval":
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            got, want = module(x), reference_like(other)(x)
        assert got.dtype == want.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
        return
    grads = []
    for m, f in ((module, module), (other, reference_like(other))):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = f(leaf)
        assert out.dtype == dtype
        out.float().square().mean().backward()
        grads.append([leaf.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * (0.1 + b.abs().max().item()))
    for a, b in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_autocast_switched_off_inside(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    with torch.no_grad():
        outside = [module(x), module(x)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = [module(x), module(x)]
            with torch.autocast("cpu", enabled=False):
                inside = module(x)
        again = module(x)
    assert {t.dtype for t in low} == {torch.bfloat16}
    # Weights that were packed for one dtype are not used for another.
    assert all(same_bits(t, outside[0]) for t in (outside[1], inside, again))


# --- functional calls, copies, state ----------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call(backend: str, training: bool) -> None:
    module = make_module(CASE).train(training)
    other, x = make_module(CASE.replace(seed=9)).train(training), make_input(CASE)
    before = copy.deepcopy(module.state_dict())
    state = {name: t.clone() for name, t in other.state_dict().items()}
    with torch.no_grad():
        close(functional_call(module, state, (x,)), other(x))
        close(functional_call(module, state, (x,)), other(x))
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_functional_gradients(backend: str) -> None:
    """Gradients through functional_call are those of backward."""
    module, x = make_module(CASE).eval(), make_input(CASE)
    params = {name: p.detach() for name, p in module.named_parameters()}
    module(x).square().sum().backward()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    out = functional_call(module, leaves, (x,)).square().sum()
    for (name, p), g in zip(
        module.named_parameters(), torch.autograd.grad(out, list(leaves.values())), strict=True
    ):
        close(g, p.grad, name)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("transform", ["grad", "vmap", "per-sample grad", "jacrev"])
def test_function_transforms(backend: str, transform: str, k: int) -> None:
    """torch.func gives for the module what it gives for its children."""
    case = CASE.replace(n=3, h=4, w=5, k=k, act1="silu", dtype=torch.float64)
    module, x = make_module(case).eval(), make_input(case)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def run(forward: Callable[..., Tensor]) -> dict[str, Tensor]:
        def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
            return forward(p, image[None]).square().sum()

        if transform == "grad":
            return torch.func.grad(lambda p: forward(p, x).square().sum())(params)
        if transform == "per-sample grad":
            return torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
        one = functools.partial(forward, params)
        if transform == "jacrev":
            return {"x": torch.func.jacrev(one)(x[:1])}
        return {"x": torch.func.vmap(lambda image: one(image[None])[0])(x)}

    def unfused(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(Unfused(module), {f"m.{name}": t for name, t in p.items()}, (image,))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of operators without a batching rule
        got = run(lambda p, image: functional_call(module, p, (image,)))
    for name, want in run(unfused).items():
        close(got[name], want, name)


class Unfused(nn.Module):
    """A module that runs the children of another one by one."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return reference_like(self.m)(x)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_copies(backend: str, training: bool, how: str) -> None:
    module, x = make_module(CASE).train(training), make_input(CASE)
    with torch.no_grad():
        module(x)  # fills the caches
        if how == "deepcopy":
            other = copy.deepcopy(module)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(module))
        else:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert other.training == training
        assert same_bits(other(x), module(x))
        other.primary_conv[0].weight.zero_()
        other.eval(), module.eval()
        close(module(x), reference_like(module)(x), "the copy shares something")
        close(other(x), reference_like(other)(x), "the copy kept a cache")


def test_pickle_carries_no_cache(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    before = len(pickle.dumps(module))
    with torch.no_grad():
        module(x)
    assert len(pickle.dumps(module)) <= before + 64
    assert list(module.state_dict()) == list(GhostModule(5, 8).state_dict())


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_state_dict_to_and_from_the_reference(backend: str, training: bool, ratio: int) -> None:
    case = CASE.replace(ratio=ratio, act1="relu", act2="relu")
    ours, x = make_module(case).train(training), make_input(case)
    reference = GhostModule(5, 8, ratio=ratio).train(training)
    reference.load_state_dict(ours.state_dict())
    with torch.no_grad():
        close(ours(x), reference(x))
        again = FusedGhostModule(5, 8, ratio=ratio).train(training)
        again.load_state_dict(reference.state_dict())
        close(again(x), reference(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_reference(backend: str, training: bool) -> None:
    reference = make_module(CASE, GhostModule).train(training)
    fused, x = FusedGhostModule.from_reference(reference), make_input(CASE)
    assert isinstance(fused, FusedGhostModule)
    assert fused.training == training
    assert fused.oup == reference.oup
    for name, p in reference.named_parameters():
        assert fused.get_parameter(name) is p
    for name, b in reference.named_buffers():
        assert fused.get_buffer(name) is b
    with torch.no_grad():
        other = copy.deepcopy(reference)
        close(fused(x), other(x))
        for name, b in other.named_buffers():
            close(reference.get_buffer(name), b, name)
        reference.primary_conv[0].weight.mul_(2)
        close(fused.eval()(x), reference.eval()(x), "shared weights")


def test_from_reference_that_is_none() -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        FusedGhostModule.from_reference(nn.Linear(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversion_to_another_dtype(backend: str, dtype: torch.dtype) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    with torch.no_grad():
        module(x)
        module.to(dtype)
        got = module(x.to(dtype))
        assert got.dtype == dtype
        tolerance = 16 * torch.finfo(dtype).eps
        want = reference_like(module)(x.to(dtype))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        module.float()
        close(module(x), reference_like(module)(x), "and back")


def test_created_in_dtype_and_on_device() -> None:
    module = FusedGhostModule(5, 8, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in module.parameters())
    module = FusedGhostModule(5, 8, device="meta")
    assert all(p.is_meta for p in module.parameters())
    out = module(torch.randn(2, 5, 6, 7, device="meta"))
    assert out.is_meta
    assert out.shape == (2, 8, 6, 7)


def test_channels_last_module(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE.replace(layout="nhwc"))
    with torch.no_grad():
        want = module(x)
        module.to(memory_format=torch.channels_last)
        close(module(x), want)


# --- threads, repr, training, the function ----------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_many_threads_use_one_module(backend: str, training: bool) -> None:
    case = Case(2, 8, 17, 19, 12)
    module = make_module(case).eval()
    inputs = [make_input(case, seed) for seed in range(16)]

    def work(x: Tensor) -> Tensor:
        if training:  # gradients in evaluation mode: no thread writes shared tensors
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(module(leaf).sum(), leaf)[0]
        with torch.no_grad():
            return module(x)

    want = [work(x) for x in inputs]
    fresh = copy.deepcopy(module)  # without caches: the threads fill them
    module = fresh
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for got, expected in zip(pool.map(work, inputs), want, strict=True):
                assert same_bits(got, expected)


def test_repr_names_the_backend(backend: str) -> None:
    text = repr(make_module(CASE))
    assert text.startswith("FusedGhostModule(")
    assert backend in text
    assert "Conv2d" in text
    assert "BatchNorm2d" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_the_same_way(backend: str, layout: str) -> None:
    """12 steps of SGD of a small network: fused and reference have the same losses and outputs."""

    def network(fused: bool) -> nn.Module:
        torch.manual_seed(5)
        net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            GhostBottleneck(8, 16, 8),
            GhostBottleneck(8, 24, 12, stride=2, se_ratio=0.25),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
        ).double()
        if fused:
            for block in net:
                if isinstance(block, GhostBottleneck):
                    block.ghost1 = FusedGhostModule.from_reference(block.ghost1)
                    block.ghost2 = FusedGhostModule.from_reference(block.ghost2)
        return net

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 14, 14, generator=gen, dtype=torch.float64)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.arange(16) % 4
    curves = []
    for fused in (False, True):
        net = network(fused)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        losses = []
        for _ in range(12):
            loss = nn.functional.cross_entropy(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        net.eval()
        with torch.no_grad():
            losses += net(x).flatten().tolist()
        curves.append(torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-6, atol=1e-8)
    assert curves[0][11] < curves[0][0]


def test_gradient_checkpointing(backend: str) -> None:
    module, x = make_module(CASE).double(), make_input(CASE).double().requires_grad_()
    want = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_gives_what_the_module_gives(backend: str) -> None:
    module, x = make_module(CASE).eval(), make_input(CASE)
    p = Params.of(module)
    with torch.no_grad():
        acts = {"activation": "relu", "cheap_activation": "silu"}
        got = ghost_ops.ghost_module(x, p.w1, p.w2, **function_arguments(p), **acts)
        close(got, plain(p, x, CASE, False))
        want = oracle(p.to(torch.float64), x.double(), CASE, False).out
        close(got.double(), want)


# --- networks ---------------------------------------------------------------------------------


def test_autocast_and_grad_scaler(native: str) -> None:
    """Six steps in bfloat16 with a scaled loss: the losses of the unfused network."""
    losses = []
    model = small_network()
    for net in (model, unfused_copy(model)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        curve = []
        for i in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(images(8))
            loss = F.cross_entropy(logits.float(), torch.arange(8) % 4)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            curve.append(loss.item())
            assert scaler.get_scale() == 2.0**10, f"step {i} was skipped"
        losses.append(torch.tensor(curve))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.05)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_network(native: str, reentrant: bool) -> None:
    model = small_network().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0  # the recomputed forward would move the statistics again
    x = images(dtype=torch.float64).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    out = torch.utils.checkpoint.checkpoint_sequential(model, 3, x, use_reentrant=reentrant)
    out.square().sum().backward()
    all_close([x.grad, *(p.grad for p in model.parameters())], list(want))


def test_running_statistics_under_checkpointing(native: str) -> None:
    """With early stop the last module is not recomputed: its saved tensors are inputs only."""
    counts = []
    for early, fuse in ((True, True), (False, True), (True, False)):
        model = nn.Sequential(Sliced(3, 8), Sliced(8, 8))
        if fuse:
            ghost_ops.fuse(model)
        with torch.utils.checkpoint.set_checkpoint_early_stop(early):
            out = torch.utils.checkpoint.checkpoint(model, images(), use_reentrant=False)
            out.sum().backward()
        norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        counts.append([int(bn.num_batches_tracked) for bn in norms])
    assert counts == [[2, 2, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]]


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.transpose(-1, -2)) / 2


def test_parametrised_weights(native: str) -> None:
    model = randomize(nn.Sequential(GhostConv(3, 8), Sliced(8, 8))).double()
    parametrize.register_parametrization(model[0].cv2.conv, "weight", Symmetric())
    torch.nn.utils.parametrizations.weight_norm(model[1].primary_conv[0])
    fused = copy.deepcopy(model)
    assert {"0", "1"} <= {e.name for e in ghost_ops.report(ghost_ops.fuse(fused)).in_state("fused")}
    x = images(dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_close(training_step(fused, x, fused), training_step(model, x, model), 1e-8)
        with torch.no_grad():
            for net in (fused.eval(), model.eval()):
                net(x)
                net[0].cv2.conv.parametrizations.weight.original.mul_(1.5)
            all_close([fused(x)], [model(x)])


def test_parametrised_after_fuse(native: str) -> None:
    model = randomize(nn.Sequential(GhostConv(3, 8))).double().eval()
    fused = copy.deepcopy(model)
    ghost_ops.fuse(fused)
    x = images(dtype=torch.float64)
    with torch.no_grad():
        fused(x)
        for net in (fused, model):
            parametrize.register_parametrization(net[0].cv2.conv, "weight", Symmetric())
        all_close([fused(x)], [model(x)])


def test_moving_average_of_a_model(native: str) -> None:
    model = small_network().double()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(3):
        model(images(4 + i, torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        with torch.no_grad():
            x = images(2, torch.float64)
            twin = unfused_copy(average.module).eval()
            all_close([average.eval()(x)], [twin(x)])
    with torch.no_grad():
        assert (average(x) - model.eval()(x)).abs().max() > 1e-6


def test_state_dict_files(native: str) -> None:
    model, file = small_network(), io.BytesIO()
    model(images())
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh, unfused = small_network(), unfused_copy(small_network())
    for net in (fresh, unfused):
        assert not any(net.load_state_dict(state))
    with torch.no_grad():
        x = images(2)
        assert same_bits(fresh.eval()(x), model.eval()(x))
        all_close([unfused.eval()(x)], [model(x)], 1e-4)


def test_threads_share_a_model(native: str) -> None:
    model = small_network().eval()
    inputs = [images(n) for n in range(1, 9)]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    fresh = copy.deepcopy(model)  # without caches: the threads fill them

    def work(x: Tensor) -> Tensor:
        with torch.no_grad():
            return fresh(x)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(work, inputs), want, strict=True):
                assert same_bits(got, expected)


@pytest.mark.slow
def test_more_elements_than_int32(native: str) -> None:
    """An output of more than 2^31 elements: its first and last images are those computed alone."""
    module = randomize(FusedGhostModule(1, 4)).to(torch.bfloat16).eval()
    n = 2**31 // (4 * 512 * 512) + 1
    one = torch.randn(1, 1, 512, 512).bfloat16()
    try:
        x = torch.zeros(n, 1, 512, 512, dtype=torch.bfloat16)
        x[-1:] = one
        with torch.no_grad():
            out = module(x)
    except RuntimeError as error:
        if "memory" in str(error):
            pytest.skip(f"not enough memory: {error}")
        raise
    assert out.numel() > 2**31
    with torch.no_grad():
        assert same_bits(out[-1:], module(one))
        assert same_bits(out[:1], module(x[:1]))
