"""Training computes the reference's outputs, statistics and gradients; so does fine-tuning with
frozen batch norms."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from conftest import machine
from helpers import (
    ACTIVATIONS,
    DTYPES,
    GHOSTNET,
    KINKS,
    LAYOUTS,
    Case,
    Params,
    assert_close,
    covering,
    make_input,
    make_module,
    make_smooth,
    oracle,
    plain,
    product,
    same_bits,
    sound,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ghost_ops.conventions import NEEDS

LOW = (torch.bfloat16, torch.float16)


def gradients(
    p: Params, x: Tensor, grad: Tensor, case: Case, training: bool, how: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of ``oracle`` or ``plain``."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = how(p, x, case, training)
    out = getattr(out, "out", out)
    named = {"x": x, **p.tensors()}
    if case.ratio == 1:
        named = {k: t for k, t in named.items() if k[-1] != "2"}
    got = torch.autograd.grad(out, list(named.values()), grad.to(out.dtype))
    return out.detach(), dict(zip(named, got, strict=True))


def check(
    case: Case, training: bool = True, rms: bool = False, slack: float = 1.0, device: str = "cpu"
) -> None:
    if rms:
        module, x = make_module(case), make_input(case)
    else:
        case, module, x = make_smooth(case, training)
    module.train(training)
    p = Params.of(module)
    with torch.no_grad():
        stats = oracle(p.to(torch.float64), x.double(), case, training)
    grad = make_input(
        case.replace(c=case.oup, h=stats.out.shape[2], w=stats.out.shape[3]), extra_seed=3
    )
    want_out, want = gradients(
        p.to(torch.float64), x.double(), grad.double(), case, training, oracle
    )
    eager_p = p.to() if case.bn_dtype is None else p.to(case.dtype)
    eager_out, eager = gradients(eager_p, x, grad, case, training, plain)
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    module, x = module.to(device), x.to(device).requires_grad_()
    out = module(x)
    assert out.dtype == x.dtype
    assert_close(out.cpu(), want_out, eager_out, rms=rms, slack=slack)
    out.backward(grad.to(device))
    module, p = module.cpu(), Params.of(module.cpu())

    got = {"x": x.grad.cpu(), **{name: t.grad for name, t in p.tensors().items()}}
    # Batch statistics make the terms of a gradient cancel, for a depthwise weight with d = 1 nearly
    # to nothing; with the same statistics held constant they do not.
    scale = want
    if training:
        frozen = p.to(torch.float64)
        frozen.bn1.mean, frozen.bn1.var = stats.mean1.detach(), stats.var1.detach()
        frozen.bn2.mean, frozen.bn2.var = stats.mean2.detach(), stats.var2.detach()
        _, scale = gradients(frozen, x.double(), grad.double(), case, False, oracle)
    # Sums over all pixels of terms of order one and of either sign: they cancel by chance, to the
    # square root of their number or less, and in a chain of additions each rounds once.
    count = grad[:, 0].numel()
    chance = torch.tensor(max(count**0.5, count / 32))
    scale = {name: chance if name[:-1] in ("gamma", "beta") and chance > t.abs().max() else t
             for name, t in scale.items()}  # fmt: skip
    # In low precision some pre-activation always falls on the other side of a kink.
    rms = rms or (case.dtype in LOW and not {case.act1, case.act2}.isdisjoint(KINKS))
    for name in want:
        assert got[name] is not None, f"no gradient for {name}"
        assert got[name].dtype == (x if name == "x" else p.tensors()[name]).dtype
        assert_close(
            got[name], want[name], eager[name], f"gradient of {name}", rms=rms, slack=4 * slack,
            scale=scale[name], dtype=case.dtype,
        )  # fmt: skip
    nhwc = case.layout == "nhwc" and not x.is_contiguous()
    fmt = torch.channels_last if nhwc else torch.contiguous_format
    assert x.grad.is_contiguous(memory_format=fmt)
    check_buffers(case, module, buffers, stats, training)


def check_buffers(case, module, before, stats, training) -> None:  # type: ignore[no-untyped-def]
    branches = [("primary_conv", stats.mean1, stats.var1)]
    if case.ratio > 1:
        branches.append(("cheap_operation", stats.mean2, stats.var2))
    else:  # takes no part, and does not count
        for key, old in module.cheap_operation[1].named_buffers():
            assert torch.equal(old, before[f"cheap_operation.1.{key}"])
    count = stats.out.shape[0] * stats.out.shape[2] * stats.out.shape[3]
    eps = torch.finfo(case.bn_dtype or case.dtype).eps
    rtol = 8 * torch.finfo(case.dtype).eps if case.dtype in LOW else 1e-5
    for name, mean, var in branches:
        now = {key: getattr(module, name)[1].get_buffer(key) for key in
               ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
        old = {key: before[f"{name}.1.{key}"] for key in now}
        if not training:
            assert all(torch.equal(now[key], old[key]) for key in now)
            continue
        assert now["num_batches_tracked"] == old["num_batches_tracked"] + 1
        want_mean = 0.9 * old["running_mean"].double() + 0.1 * mean
        want_var = 0.9 * old["running_var"].double() + 0.1 * var * count / (count - 1)
        for key, want in (("running_mean", want_mean), ("running_var", want_var)):
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(
                now[key].double(), want, rtol=0, atol=(rtol + eps) * scale, msg=f"{name} {key}"
            )


STRUCTURE = [
    Case(
        **axes,
        act1=ACTIVATIONS[i % 8],
        act2=ACTIVATIONS[(i // 8 + 3 * i) % 8],
        oup=11 if axes["ratio"] < 7 else 5,
    )
    for i, axes in enumerate(
        product(
            ratio=(1, 2, 3, 4, 5, 7), d=(1, 3, 5, 7), stride=(1, 2), layout=LAYOUTS, dtype=DTYPES
        )
    )
]


# Plain PyTorch, the fallback, has no code of its own for most of these: every third will do.
@pytest.mark.parametrize(
    ("backend", "case"),
    [("native", case) for case in STRUCTURE] + [("eager", case) for case in STRUCTURE[::3]],
    ids=str,
    indirect=["backend"],
)
def test_structure(backend: str, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", STRUCTURE[1::5], ids=str)
def test_structure_with_frozen_batch_norms(backend: str, case: Case) -> None:
    check(case, training=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("act1", ACTIVATIONS)
@pytest.mark.parametrize("act2", ACTIVATIONS)
def test_every_pair_of_activations(every_isa: str, act1: str, act2: str, training: bool) -> None:
    check(Case(act1=act1, act2=act2, c=9, oup=7, h=5, w=19), training)


COVERING = [
    sound(Case(h=hw[0], w=hw[1], k=primary[0], stride=primary[1], **axes))
    for axes in covering(
        {
            "n": (2, 3),
            "c": (2, 6, 16, 34),
            "hw": (
                (2, 2), (3, 5), (1, 9), (9, 1), (7, 7), (8, 8), (5, 16), (5, 17), (13, 31), (6, 33),
                (4, 63), (4, 65), (3, 112), (2, 113), (14, 14),
            ),
            "oup": (1, 2, 7, 16, 23, 26, 33),
            "ratio": (1, 2, 3, 5),
            "d": (1, 3, 5, 7),
            "primary": ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1)),
            "act1": ACTIVATIONS,
            "act2": ACTIVATIONS,
            "layout": LAYOUTS,
            "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        }
    )
    for hw, primary in [(axes.pop("hw"), axes.pop("primary"))]
]  # fmt: skip


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_covering(every_isa: str, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", COVERING[::2], ids=str)
def test_covering_with_frozen_batch_norms(every_isa: str, case: Case) -> None:
    check(case, training=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "inp", "oup", "relu"), GHOSTNET)
def test_ghostnet_shapes(
    backend: str, size: int, inp: int, oup: int, relu: bool, layout: str
) -> None:
    act = "relu" if relu else "none"
    small = min(size, 29)
    check(Case(2, inp, small, size, oup, act1=act, act2=act, layout=layout), rms=relu)


# Bands of rows, joined images, long reductions; activations without a kink where the largest
# error is asked for.
TILING = [
    Case(n, c, h, w, oup, r, d, act1="silu", act2="none", layout=layout)
    for (n, c, h, w, oup, r, d) in (
        (1, 16, 112, 112, 16, 2, 3),
        (2, 3, 56, 57, 20, 2, 5),
        (1, 7, 113, 41, 9, 2, 3),
        (1, 7, 41, 113, 9, 2, 7),
        (1, 4, 200, 17, 6, 3, 5),
        (1, 2, 9, 1030, 3, 2, 7),
        (5, 33, 7, 7, 26, 2, 3),
        (16, 40, 7, 7, 12, 2, 3),
        (33, 12, 1, 1, 24, 2, 3),
        (17, 5, 2, 3, 8, 4, 7),
        (3, 300, 14, 14, 60, 2, 3),
        (2, 513, 5, 5, 30, 3, 3),
        (3, 1, 14, 15, 1, 2, 3),
    )
    for layout in LAYOUTS
]


@pytest.mark.parametrize("case", TILING, ids=str)
def test_bands_and_joined_images(every_isa: str, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", TILING[::3], ids=str)
def test_bands_and_joined_images_on_two_threads(native: str, case: Case) -> None:
    torch.set_num_threads(2)
    check(case)


# Maps that a small L2 cuts into bands of rows or groups of images in either layout, and weight
# gradients whose wider operand is x or du, of whole and of partial blocks.
CACHED = [
    Case(n, c, h, w, oup, 2, d, act1="silu", act2="none", layout=layout)
    for (n, c, h, w, oup, d) in (
        (2, 12, 40, 31, 24, 1),
        (2, 12, 40, 31, 24, 3),
        (1, 12, 31, 40, 38, 5),
        (1, 5, 61, 33, 16, 7),
        (3, 9, 20, 20, 120, 3),
        (9, 20, 9, 16, 90, 3),
        (9, 70, 16, 9, 24, 3),
        (19, 40, 7, 7, 44, 3),
        (17, 37, 3, 5, 200, 3),
    )
    for layout in LAYOUTS
]


@pytest.mark.parametrize("case", CACHED, ids=str)
def test_bands_of_a_small_cache(every_isa: str, case: Case) -> None:
    if every_isa == "eager":
        return check(case)
    with machine(256 << 10):
        check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_float32_batch_norms_around_half_precision(
    backend: str, dtype: torch.dtype, training: bool, ratio: int, layout: str
) -> None:
    case = Case(dtype=dtype, bn_dtype=torch.float32, ratio=ratio, layout=layout, h=9, w=18)
    check(case, training)


def run(module: torch.nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor | None]:
    """Fresh gradients of everything that wants one."""
    module.zero_grad()
    x.grad = None
    module(x).backward(grad)
    return {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("act", [*KINKS, "silu", "gelu", "gelu_tanh"])
def test_derivative_at_the_kinks(every_isa: str, act: str, dtype: torch.dtype) -> None:
    """Exactly at a kink any slope would do; ours is PyTorch's. An identity leads up to it."""
    case = Case(1, 1, 1, 21, 1, ratio=1, act1=act, dtype=dtype)
    module = make_module(case).eval()
    values = [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 5.0, 6.0, 7.0, 9.0]
    x = torch.tensor([*values, *values[::-1][:10]], dtype=dtype).view(1, 1, 1, 21)
    with torch.no_grad():
        module.primary_conv[0].weight.fill_(1.0)
        bn = module.primary_conv[1]
        bn.weight.fill_(1.0), bn.bias.zero_(), bn.running_mean.zero_(), bn.running_var.fill_(1.0)
        bn.eps = 0.0
    grads = []
    for f in (module, module.primary_conv[2]):
        leaf = x.clone().requires_grad_()
        f(leaf).backward(torch.full_like(x, 2.0))
        grads.append(leaf.grad)
    exact = act in ("relu", "relu6", "leaky_relu")
    eps = 0.0 if exact else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(grads[0], grads[1], rtol=eps, atol=eps)


NAMES = ("x", *(f"{branch}.{child}" for branch in ("primary_conv", "cheap_operation")
                for child in ("0.weight", "1.weight", "1.bias")))  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "wanted",
    [*itertools.combinations(NAMES, 1), *itertools.combinations(NAMES, 2), NAMES[1:], NAMES[4:]],
    ids=lambda names: "+".join(name.replace("_conv", "").replace("_operation", "")
                               for name in names),
)  # fmt: skip
def test_only_the_gradients_asked_for(
    backend: str, wanted: tuple[str, ...], k: int, training: bool
) -> None:
    case = Case(k=k, dtype=torch.float64, act1="silu", act2="gelu")
    full = make_module(case).train(training)
    some = copy.deepcopy(full)
    x, grad = make_input(case), make_input(case.replace(c=8), extra_seed=3)
    want = run(full, x.clone().requires_grad_(), grad)
    for name, p in some.named_parameters():
        p.requires_grad_(name in wanted)
    got = run(some, x.clone().requires_grad_("x" in wanted), grad)
    for name in NAMES:
        if name in wanted:
            torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)
        else:
            assert got[name] is None


def test_nothing_to_differentiate(backend: str) -> None:
    module, x = make_module(Case()), make_input(Case())
    assert module(x).requires_grad
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        module(x)
        module.eval()(x)
        module.train()
    module.requires_grad_(False)
    assert not module(x).requires_grad


def expanded(grad: Tensor) -> Tensor:
    return grad[:1, :1, :1, :1].expand_as(grad)


def expanded_rows(grad: Tensor) -> Tensor:
    return grad[:, :, :1].expand_as(grad)


def other_format(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def sliced_channels(grad: Tensor) -> Tensor:
    n, c, h, w = grad.shape
    wide = torch.full((n, c + 3, h, w), float("nan"), dtype=grad.dtype)
    wide[:, 1 : c + 1] = grad
    return wide[:, 1 : c + 1]


def sliced_columns(grad: Tensor) -> Tensor:
    n, c, h, w = grad.shape
    wide = torch.full((n, c, h, 2 * w), float("nan"), dtype=grad.dtype)
    wide[..., ::2] = grad
    return wide[..., ::2]


def transposed(grad: Tensor) -> Tensor:
    return grad.transpose(2, 3).contiguous().transpose(2, 3)


def unaligned(grad: Tensor) -> Tensor:
    flat = torch.full((grad.numel() + 1,), float("nan"), dtype=grad.dtype)
    flat[1:] = grad.reshape(-1)
    return flat[1:].view_as(grad)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "form",
    [expanded, expanded_rows, other_format, sliced_channels, sliced_columns, transposed, unaligned],
    ids=lambda f: f.__name__,
)
def test_gradient_of_any_strides(
    backend: str, form: object, dtype: torch.dtype, layout: str, training: bool
) -> None:
    case = Case(dtype=dtype, layout=layout, w=19, act1="silu")
    module = make_module(case).train(training)
    x = make_input(case).requires_grad_()
    grad = form(make_input(case.replace(c=8, layout="nchw"), extra_seed=3))
    want = run(module, x, grad.clone(memory_format=torch.contiguous_format))
    got = run(module, x, grad)
    for name in NAMES:
        eps = torch.finfo(dtype).eps
        scale = want[name].abs().max().item()
        torch.testing.assert_close(
            got[name], want[name], rtol=4 * eps, atol=8 * eps * scale, msg=name
        )


def test_gradients_accumulate(backend: str) -> None:
    case = Case(dtype=torch.float64)
    module, x = make_module(case), make_input(case).requires_grad_()
    grad = make_input(case.replace(c=8), extra_seed=3)
    once = {name: g.clone() for name, g in run(module, x, grad).items()}
    module(x).backward(grad)
    for name, g in {"x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}.items():
        torch.testing.assert_close(g, 2 * once[name])


def test_backward_twice_over_one_graph(backend: str) -> None:
    case = Case()
    module, x = make_module(case), make_input(case).requires_grad_()
    out = module(x)
    grad = torch.ones_like(out)
    first = torch.autograd.grad(out, [x, *module.parameters()], grad, retain_graph=True)
    second = torch.autograd.grad(out, [x, *module.parameters()], grad)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


# --- batch norm's options ---------------------------------------------------------------------


def test_cumulative_average(backend: str) -> None:
    case = Case(dtype=torch.float64)
    module = make_module(case)
    for branch in (module.primary_conv, module.cheap_operation):
        branch[1].reset_running_stats()
        branch[1].momentum = None
    batches = [make_input(case, seed) for seed in range(1, 5)]
    stats = [oracle(Params.of(module).to(), x, case, True) for x in batches]
    for i, x in enumerate(batches, 1):
        module(x)
        assert module.primary_conv[1].num_batches_tracked == i
        assert module.cheap_operation[1].num_batches_tracked == i
        unbiased = 84 / 83  # 2 x 6 x 7 values per channel
        for name, key, factor in (
            ("mean", "running_mean", 1.0),
            ("var", "running_var", unbiased),
        ):
            for bn, which in ((module.primary_conv[1], "1"), (module.cheap_operation[1], "2")):
                want = sum(getattr(s, name + which) for s in stats[:i]) / i * factor
                torch.testing.assert_close(bn.get_buffer(key), want)


@pytest.mark.parametrize("momentum", [0.0, 0.01, 1.0])
def test_momentum(backend: str, momentum: float) -> None:
    case = Case(dtype=torch.float64)
    module, x = make_module(case), make_input(case)
    module.primary_conv[1].momentum = momentum
    module.cheap_operation[1].momentum = 1 - momentum
    p = Params.of(module).to()
    stats = oracle(p, x, case, True)
    module(x)
    for bn, old, mean, m in (
        (module.primary_conv[1], p.bn1.mean, stats.mean1, momentum),
        (module.cheap_operation[1], p.bn2.mean, stats.mean2, 1 - momentum),
    ):
        torch.testing.assert_close(bn.running_mean, (1 - m) * old + m * mean)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_eps(backend: str, training: bool, eps: float) -> None:
    case = Case(dtype=torch.float64, act1="silu")
    module, x = make_module(case).train(training), make_input(case)
    module.primary_conv[1].eps = eps
    module.cheap_operation[1].eps = eps / 3
    grad = torch.ones(2, 8, 6, 7, dtype=torch.float64)
    p = Params.of(module).to()
    want_out, want = gradients(p, x, grad, case, training, oracle)
    out = module(x)
    torch.testing.assert_close(out, want_out)
    out.backward(grad)
    for name, param in Params.of(module).tensors().items():
        torch.testing.assert_close(param.grad, want[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3])
def test_without_affine(backend: str, k: int, ratio: int, training: bool) -> None:
    case = Case(dtype=torch.float64, act1="silu", act2="silu", ratio=ratio, k=k)
    module, x = make_module(case).train(training), make_input(case)
    for branch in (module.primary_conv, module.cheap_operation):
        bn = torch.nn.BatchNorm2d(branch[1].num_features, affine=False, dtype=torch.float64)
        bn.running_mean.copy_(branch[1].running_mean)
        bn.running_var.copy_(branch[1].running_var)
        branch[1] = bn.train(training)
    x.requires_grad_()
    grad = make_input(case.replace(c=8), extra_seed=3)
    want_out, want = gradients(Params.of(module).to(), x, grad, case, training, oracle)
    out = module(x)
    torch.testing.assert_close(out, want_out)
    out.backward(grad)
    assert_gradients(module, x, want)


def assert_gradients(module: torch.nn.Module, x: Tensor, want: dict[str, Tensor]) -> None:
    got = {"x": x.grad, **{name: t.grad for name, t in Params.of(module).tensors().items()}}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("which", ["primary_conv", "cheap_operation", "both"])
def test_without_running_statistics(backend: str, which: str, training: bool) -> None:
    """Such a batch norm uses the batch's statistics in evaluation, too."""
    case = Case(dtype=torch.float64, act1="silu", act2="silu")
    module, x = make_module(case), make_input(case).requires_grad_()
    for name in ("primary_conv", "cheap_operation"):
        if which in (name, "both"):
            branch = getattr(module, name)
            bn = torch.nn.BatchNorm2d(
                branch[1].num_features, track_running_stats=False, dtype=torch.float64
            )
            bn.load_state_dict({"weight": branch[1].weight, "bias": branch[1].bias})
            branch[1] = bn
    module.train(training)
    grad = make_input(case.replace(c=8), extra_seed=3)
    copied = copy.deepcopy(module)
    want_x = x.detach().clone().requires_grad_()
    want = unfused(copied, want_x)
    want.backward(grad)
    out = module(x)
    torch.testing.assert_close(out, want)
    out.backward(grad)
    torch.testing.assert_close(x.grad, want_x.grad, rtol=1e-8, atol=1e-9)
    assert_same_state(module, copied)


def unfused(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The children, one after the other."""
    y = module.primary_conv(x)
    return torch.cat([y, module.cheap_operation(y)], 1)[:, : module.oup]


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9, msg=name)
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


KINDS = ("batch", "frozen", "untracked", "untracked later", "average", "none")


def set_norm(branch: torch.nn.Sequential, kind: str) -> None:
    """One batch norm of a training module made what fine-tuning recipes make of it."""
    bn = branch[1]
    if kind == "frozen":
        bn.eval()
    elif kind == "untracked":
        branch[1] = torch.nn.BatchNorm2d(
            bn.num_features, track_running_stats=False, dtype=bn.weight.dtype
        )
    elif kind == "untracked later":
        bn.track_running_stats = False
    elif kind == "average":
        bn.momentum = None
    elif kind == "none":
        branch[1] = torch.nn.Identity()


@pytest.mark.usefixtures("unsaid")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("cheap", KINDS)
@pytest.mark.parametrize("primary", KINDS)
def test_each_branch_has_a_norm_of_its_own(
    backend: str, primary: str, cheap: str, bias: bool
) -> None:
    """Two steps: outputs, gradients and running statistics of the layers, and no layer runs."""
    case = Case(dtype=torch.float64, act1="silu", act2="silu")
    module = make_module(case)
    for branch, kind in ((module.primary_conv, primary), (module.cheap_operation, cheap)):
        set_norm(branch, kind)
        if bias:
            branch[0].bias = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    copied, grad = copy.deepcopy(module), make_input(case.replace(c=8), extra_seed=3)
    for step in range(2):
        x = make_input(case, step).requires_grad_()
        want_x = x.detach().clone().requires_grad_()
        want = unfused(copied, want_x)
        want.backward(grad)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = module(x)
        torch.testing.assert_close(out, want)
        out.backward(grad)
        torch.testing.assert_close(x.grad, want_x.grad, rtol=1e-8, atol=1e-9)
        assert_same_state(module, copied)


class Backwards(TorchDispatchMode):
    """The calls of ``ghost_backward``: their masks, and what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[int] = []
        self.results: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.ghost_ops.ghost_backward.default:
            self.needs.append(args[-1])
            self.results.append(out)
        return out


FREEZE = {
    "norms": (("primary_conv.1", "cheap_operation.1"), NEEDS.DX | NEEDS.DW1 | NEEDS.DW2),
    "all but the second norm": (("primary_conv", "cheap_operation.0", "x"), NEEDS.NORM2),
    "the first convolution": (
        ("primary_conv.0", "x"), NEEDS.NORM1 | NEEDS.DW2 | NEEDS.NORM2
    ),
    "the parameters": (("primary_conv", "cheap_operation"), NEEDS.DX),
    "nothing": ((), NEEDS.ALL & ~(NEEDS.PRELU1 | NEEDS.PRELU2)),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen norms"])
@pytest.mark.parametrize("frozen", FREEZE)
def test_frozen_gradients_are_not_computed(native: str, frozen: str, training: bool) -> None:
    names, needs = FREEZE[frozen]
    module, x = make_module(Case()).train(training), make_input(Case())
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(names))
    x.requires_grad_("x" not in names)
    out = module(x)
    with Backwards() as seen:
        out.sum().backward()
    assert seen.needs == [needs]
    dx, dw1, dgamma1, dbeta1, _, dw2, dgamma2, dbeta2, _ = seen.results[0]
    wanted = {
        dx: NEEDS.DX, dw1: NEEDS.DW1, dgamma1: NEEDS.NORM1, dbeta1: NEEDS.NORM1,
        dw2: NEEDS.DW2, dgamma2: NEEDS.NORM2, dbeta2: NEEDS.NORM2,
    }  # fmt: skip
    for grad, bit in wanted.items():
        assert (grad.numel() > 0) == bool(needs & bit)
    for p in module.parameters():
        assert (p.grad is not None) == p.requires_grad


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(backend: str, layout: str, bias: bool) -> None:
    case = Case(n=0, layout=layout)
    module, x = make_module(case), make_input(case).requires_grad_()
    if bias:
        for branch in (module.primary_conv, module.cheap_operation):
            branch[0].bias = torch.nn.Parameter(torch.ones(4))
    copied = copy.deepcopy(module)
    want = unfused(copied, make_input(case))
    out = module(x)
    assert out.shape == want.shape == (0, 8, 6, 7)
    out.sum().backward()
    assert x.grad.shape == x.shape
    for p in module.parameters():
        assert p.grad is None or not p.grad.any()
    for (name, b), other in zip(module.named_buffers(), copied.buffers(), strict=True):
        assert torch.equal(b, other), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_over_many_pixels_keep_their_digits(every_isa: str, layout: str) -> None:
    """A gradient with a mean: one float32 sum of its 200704 values would be off by 2e-6 of it."""
    if every_isa == "eager" and layout == "nhwc":
        pytest.skip("PyTorch adds up channels_last in one chain")
    case = Case(16, 4, 112, 112, 4, act1="none", act2="none", layout=layout)
    module, x = make_module(case), make_input(case).requires_grad_()
    grad = make_input(case, 3) * 0.1 + 1.0
    p = Params.of(module)
    _, want = gradients(p.to(torch.float64), x.double(), grad.double(), case, True, oracle)
    _, eager = gradients(p.to(), x.contiguous(), grad.contiguous(), case, True, plain)
    module(x).backward(grad)
    for name, t in p.tensors().items():
        largest = want[name].abs().max()
        error, allowed = ((g - want[name]).abs().max() for g in (t.grad, eager[name]))
        assert error <= 2 * allowed + 2e-7 * largest, (name, error / largest, allowed / largest)


@pytest.mark.parametrize("offset", [100.0, 3e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean_does_not_cancel(every_isa: str, layout: str, offset: float) -> None:
    """Batch statistics by E[u^2] - E[u]^2 would have no digit left here."""
    case = Case(4, 3, 33, 31, 8, act1="silu", act2="silu", layout=layout)
    module, x = make_module(case), make_input(case) + offset
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    with torch.no_grad():
        p = Params.of(module)
        want = oracle(p.to(torch.float64), x.double(), case, True).out
        assert_close(module(x), want, plain(p, x, case, True), slack=4)
