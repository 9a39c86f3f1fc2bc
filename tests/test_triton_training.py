"""Training and fine-tuning on the Triton kernels give the reference's statistics and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_cases import (
    Training,
    World,
    backward,
    check_train,
    make_slopes,
    operands,
    train_forward,
)
from helpers import (
    ACTIVATIONS,
    KINKS,
    LAYOUTS,
    Case,
    Params,
    assert_close,
    covering,
    expanded,
    make_input,
    make_module,
    oracle,
    other_format,
    plain,
    same_bits,
    sliced_channels,
)
from module_checks import check_training
from torch import Tensor
from triton_cases import SMALL_TILE, launches, planned

from ghost_ops.backends.triton import plan
from ghost_ops.conventions import NEEDS

# Every pair of these occurs; a second activation goes with each first one.
COVERING = [
    (
        Case(
            h=axes["hw"][0],
            w=axes["hw"][1],
            k=axes["primary"][0],
            stride=axes["primary"][1],
            act1=ACTIVATIONS[axes["act"]],
            act2=ACTIVATIONS[3 * axes["act"] % len(ACTIVATIONS)],
            **{name: axes[name] for name in ("c", "oup", "ratio", "d", "layout", "dtype")},
        ),
        axes["training"],
        {"tile": axes["tile"], "one_pass": axes["one_pass"]},
    )
    for axes in covering(
        {
            "c": (1, 5, 34),
            "hw": ((1, 9), (5, 7), (3, 8)),
            "oup": (1, 7, 33),
            "ratio": (1, 2, 3, 5),
            "d": (1, 3, 5),
            "primary": ((1, 1), (1, 2), (3, 1)),
            "act": range(len(ACTIVATIONS)),
            "layout": LAYOUTS,
            "dtype": (torch.float32, torch.bfloat16, torch.float16),
            "training": (True, False),
            "tile": (None, SMALL_TILE),
            "one_pass": (False, True),
        }
    )
]


@pytest.mark.parametrize(("case", "training", "how"), COVERING, ids=str)
def test_covering(
    triton_device: str,
    case: Case,
    training: bool,
    how: dict,
) -> None:
    with planned(**how):
        check_training(case, training, device=triton_device)


@pytest.mark.parametrize("d", [3, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_bit_offsets(triton_device: str, layout: str, d: int) -> None:
    with planned(wide=True, one_pass=layout == "nhwc", tile=SMALL_TILE):
        check_training(Case(ratio=3, d=d, stride=2, h=7, w=9, layout=layout), device=triton_device)


MIXED = covering(
    {
        "c": (5, 34),
        "hw": ((1, 9), (5, 7), (3, 8)),
        "oup": (7, 33),
        "ratio": (1, 2, 3),
        "d": (1, 3, 5),
        "stride": (1, 2),
        "layout": LAYOUTS,
        "dtype": (torch.float32, torch.bfloat16, torch.float16),
        "has_primary": (True, False),
        "keep_u": (False, True),
        "batch_stats": ((True, True), (True, False), (False, True), (False, False)),
        "prelu": ((False, False), (True, False), (False, True), (True, True)),
        "in_three": (False, True),
        "tile": (None, SMALL_TILE),
        "one_pass": (False, True),
    }
)
HOW = ("has_primary", "keep_u", "batch_stats", "prelu", "in_three")


@pytest.mark.parametrize("row", MIXED, ids=range(len(MIXED)))
def test_mixed_norms_and_slopes(triton_device: str, row: dict) -> None:
    """Norms of either kind, PReLUs, and the calls that several processes make."""
    sizes = {name: row[name] for name in ("c", "oup", "ratio", "d", "stride", "layout", "dtype")}
    case = Case(h=row["hw"][0], w=row["hw"][1], act1="silu", act2="gelu", **sizes)
    world = World(torch.ops.ghost_ops_triton, triton_device)
    with planned(tile=row["tile"], one_pass=row["one_pass"]):
        check_train(world, case, **{name: row[name] for name in HOW})


WANTED = {  # what is launched for a part of the gradients, in one pass and in two launches
    "norm 2": (NEEDS.NORM2, ["fused_sums"], ["primary", "cheap_sums"]),
    "slopes 2": (NEEDS.PRELU2, ["fused_sums"], ["primary", "cheap_sums"]),
    "dw2": (
        NEEDS.DW2,
        ["fused_sums", "cheap_gradient"],
        ["primary", "cheap_sums", "cheap_gradient"],
    ),
    "norm 1": (
        NEEDS.NORM1,
        ["fused_sums", "fused_gradient"],
        ["primary", "cheap_sums", "cheap_gradient", "intrinsic_gradient"],
    ),
    "dx": (
        NEEDS.DX,
        ["fused_sums", "fused_gradient", "primary_gradient"],
        ["primary", "cheap_sums", "cheap_gradient", "intrinsic_gradient", "primary_gradient"],
    ),
    "none": (0, [], []),
}


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two launches"])
@pytest.mark.parametrize("name", WANTED)
def test_gradients_that_are_not_wanted(triton_device: str, name: str, one_pass: bool) -> None:
    """They are empty and cost no launch; the others have the bits that they have with all."""
    o = operands(Case(2, 12, 5, 7, 21, ratio=3))
    world = World(torch.ops.ghost_ops_triton, triton_device)
    how = Training(slopes=make_slopes(o.case, (True, True)))
    needs, fused, apart = WANTED[name]
    with planned(one_pass=one_pass):
        out, *moments, _ = train_forward(world, o, how, False)
        arguments = (world, o, how, torch.ones_like(out), None, moments)
        want = backward(*arguments)
        with launches() as launched:
            got = backward(*arguments, needs)
    assert launched == [f"{kernel}_kernel" for kernel in (fused if one_pass else apart)]
    for key, t in got.items():
        assert same_bits(t, want[key]), key


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two launches"])
def test_launches_that_constants_replace(triton_device: str, one_pass: bool) -> None:
    """Statistics that are given are not computed, nor are sums whose means are given."""
    o = operands(Case(oup=16))
    world = World(torch.ops.ghost_ops_triton, triton_device)
    counts = {(True, True): (3, 4), (True, False): (2, 3), (False, True): (2, 3)}
    counts[False, False] = (1, 2)
    with planned(one_pass=one_pass):
        for batch, count in counts.items():
            with launches() as launched:
                train_forward(world, o, Training(batch), False)
            assert len(launched) == count[not one_pass], batch
        out, *moments, u = train_forward(world, o, Training(), True)
        means = (torch.zeros(2, 8), torch.zeros(2, 8))
        with launches() as launched:
            backward(world, o, Training(), torch.ones_like(out), u, moments, NEEDS.DX, means)
    assert not any("sums" in name for name in launched)


WIDE_X = Case(2, 64, 6, 7, 8, act1="silu", act2="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [5, 10, 64], ids=["recomputed", "stashed", "kept"])
def test_u_recomputed_stashed_and_kept(triton_device: str, c: int, layout: str) -> None:
    case = WIDE_X.replace(c=c, layout=layout)
    sizes = case.n, c, case.h, case.w, case.m, 2, case.oup, 3, 1
    p = plan.Problem(*sizes, 0, 0.0, 0, 0.0, layout == "nhwc", case.dtype, True)
    assert plan.stashes_u(p) == (c > 8)
    check_training(case, training=layout == "nchw" or c == 64, device=triton_device)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_batch_norms_around_half_precision(
    triton_device: str,
    layout: str,
    training: bool,
) -> None:
    case = Case(dtype=torch.bfloat16, bn_dtype=torch.float32, layout=layout, h=9, w=11)
    check_training(case, training, device=triton_device)


def run(module: torch.nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor | None]:
    """Fresh gradients of everything that wants one."""
    module.zero_grad()
    x.grad = None
    out = module(x)
    out.backward(grad)
    return {"out": out, "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize(
    "form", [expanded, other_format, sliced_channels], ids=lambda f: f.__name__
)
def test_gradient_of_any_strides(triton_device: str, form: object) -> None:
    case = Case(layout="nhwc", h=3, w=9, act1="silu")
    module = make_module(case).to(triton_device)
    x = make_input(case).to(triton_device).requires_grad_()
    grad = form(make_input(case.replace(c=8, layout="nchw"), extra_seed=3)).to(triton_device)
    want = run(module, x, grad.clone(memory_format=torch.contiguous_format))
    got = run(module, x, grad)
    assert all(same_bits(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("need_x", "need_w1"), [(False, True), (True, False), (False, False)])
def test_only_the_gradients_asked_for(
    triton_device: str,
    need_w1: bool,
    need_x: bool,
) -> None:
    case = Case(act1="silu", act2="gelu")
    full = make_module(case).to(triton_device)
    some = copy.deepcopy(full)
    x, grad = make_input(case).to(triton_device), torch.ones(2, 8, 6, 7, device=triton_device)
    want = run(full, x.clone().requires_grad_(), grad)
    some.primary_conv[0].weight.requires_grad_(need_w1)
    got = run(some, x.clone().requires_grad_(need_x), grad)
    for name, g in got.items():
        wanted = {"x": need_x, "primary_conv.0.weight": need_w1}.get(name, True)
        assert same_bits(g, want[name]) if wanted else g is None


@pytest.mark.parametrize("act", [*KINKS, "silu", "gelu", "gelu_tanh"])
def test_derivative_at_the_kinks(triton_device: str, act: str) -> None:
    """Exactly at a kink any slope would do; ours is PyTorch's. An identity leads up to it."""
    case = Case(1, 1, 1, 21, 1, ratio=1, act1=act)
    module = make_module(case).eval()
    values = [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 5.0, 6.0, 7.0, 9.0]
    x = torch.tensor([*values, *values[::-1][:10]]).view(1, 1, 1, 21)
    with torch.no_grad():
        module.primary_conv[0].weight.fill_(1.0)
        bn = module.primary_conv[1]
        bn.weight.fill_(1.0), bn.bias.zero_(), bn.running_mean.zero_(), bn.running_var.fill_(1.0)
        bn.eps = 0.0
    leaf = x.clone().requires_grad_()
    copy.deepcopy(module.primary_conv[2])(leaf).backward(torch.full_like(x, 2.0))
    moved = x.to(triton_device).requires_grad_()
    module.to(triton_device)(moved).backward(torch.full_like(moved, 2.0))
    torch.testing.assert_close(moved.grad.cpu(), leaf.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(triton_device: str, layout: str) -> None:
    case = Case(n=0, layout=layout)
    module = make_module(case).to(triton_device)
    before = {name: b.clone() for name, b in module.named_buffers()}
    x = make_input(case).to(triton_device).requires_grad_()
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    for p in module.parameters():
        assert p.grad is None or not p.grad.any()
    for name, b in module.named_buffers():
        assert "num_batches" in name or torch.equal(b, before[name])


@pytest.mark.parametrize("offset", [3e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean_does_not_cancel(triton_device: str, layout: str, offset: float) -> None:
    """Batch statistics by E[u^2] - E[u]^2 would have no digit left here."""
    case = Case(4, 3, 9, 7, 8, act1="silu", act2="silu", layout=layout)
    module, x = make_module(case), make_input(case) + offset
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    p = Params.of(module)
    with torch.no_grad(), planned(tile=SMALL_TILE):
        want = oracle(p.to(torch.float64), x.double(), case, True).out
        eager = plain(p, x, case, True)
        got = module.to(triton_device)(x.to(triton_device)).cpu()
        assert_close(got, want, eager, slack=4)


def test_the_same_bits_every_time(triton_device: str) -> None:
    case = Case(2, 20, 7, 5, 30, 3, act1="silu", layout="nhwc")
    grad = make_input(case.replace(c=case.oup), 3).to(triton_device)
    runs = []
    with planned(tile=SMALL_TILE):
        for _ in range(2):
            module = make_module(case).to(triton_device)
            x = make_input(case).to(triton_device).requires_grad_()
            runs.append({**run(module, x, grad), **dict(module.named_buffers())})
    for name, first in runs[0].items():
        assert same_bits(first, runs[1][name]), name


def test_output_may_be_overwritten(triton_device: str) -> None:
    grads = []
    for inplace in (True, False):
        case = Case(c=64, h=3)
        module = make_module(case).to(triton_device)
        x = make_input(case).to(triton_device).requires_grad_()
        out = module(x)
        out = out.relu_() if inplace else torch.relu(out)
        out.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)
