"""Promise: every operator has a correct schema and fake, and computes its formula.

Operators of bottlenecks are in ``test_network_ops``, ``ghost_conv_apply`` in ``test_convs``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import running
from helpers import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    Case,
    Params,
    check_update_running,
    make_input,
    make_module,
    ops_of,
    oracle,
)
from operator_cases import extended, samples, strides
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ghost_ops.ops  # noqa: F401  (registers the ops)
from ghost_ops import activations, conventions, planner
from ghost_ops.conventions import NEEDS, compute_dtype
from ghost_ops.ops.ghost import NAMES, packs_pairs
from ghost_ops.reference import GhostModule

OPS = torch.ops.ghost_ops
SAMPLES = [
    Case(2, 5, 6, 7, 8),
    Case(2, 16, 9, 17, 11, ratio=3, d=5, act1="silu", act2="gelu", layout="nhwc"),
    Case(1, 4, 5, 5, 3, stride=2, dtype=torch.bfloat16),
    Case(2, 4, 5, 5, 6, ratio=1, dtype=torch.float64),
    Case(0, 4, 5, 5, 6),
]
CASES = pytest.mark.parametrize("case", SAMPLES, ids=str)
PRIMARY = pytest.mark.parametrize("has_primary", [True, False], ids=["x", "u given"])


def packed_numel(m: int, c: int, g: int, d: int, has_primary: bool, has_pairs: bool) -> int:
    padded = math.ceil(m / 16) * 16
    numel = (padded * c + padded if has_primary else 2 * m) + 2 * g * d * d + g
    return math.ceil(numel / 16) * 16 + padded * c // 2 + padded if has_pairs else numel


def each_sample(*ops: str) -> pytest.MarkDecorator:
    rows = [
        pytest.param(op, case, primary, id=f"{op}-{case}-{'x' if primary else 'u'}")
        for case in SAMPLES
        for primary in (True, False)
        for op in ops
        if primary or op != "ghost_primary_stats"
    ]
    return pytest.mark.parametrize(("op", "case", "has_primary"), rows)


ALL_SAMPLES = each_sample(*NAMES)
EXTENDED = each_sample("ghost_cheap_stats", "ghost_train_forward", "ghost_backward")


@ALL_SAMPLES
def test_opcheck(op: str, case: Case, has_primary: bool) -> None:
    torch.library.opcheck(getattr(OPS, op).default, samples(case, has_primary)[op])


@pytest.mark.parametrize("keep_u", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck_of_options(residual: bool, keep_u: bool) -> None:
    case = SAMPLES[1]
    args = samples(case, True)
    x, packed, _, *rest = args["ghost_apply"]
    extra = make_input(case.replace(c=case.oup), 5) if residual else None
    torch.library.opcheck(OPS.ghost_apply.default, (x, packed, extra, *rest))
    forward = (*args["ghost_train_forward"][:-1], keep_u)
    torch.library.opcheck(OPS.ghost_train_forward.default, forward)
    u = OPS.ghost_train_forward(*forward)[5] if keep_u else None
    flags_of = ((True, True, 126), (False, True, NEEDS.DW1), (True, False, 85), (False, False, 0))
    for flags in flags_of:
        backward = args["ghost_backward"]
        torch.library.opcheck(
            OPS.ghost_backward.default, (*backward[:2], u, *backward[3:-3], *flags)
        )


@EXTENDED
def test_opcheck_of_extended(op: str, case: Case, has_primary: bool) -> None:
    torch.library.opcheck(getattr(OPS, op).default, extended(case, has_primary)[op])


@CASES
def test_opcheck_of_statistics_of_u(case: Case) -> None:
    torch.library.opcheck(OPS.ghost_primary_stats.default, (make_input(case), None, 1))


@pytest.mark.parametrize("needs", [0, *(1 << i for i in range(7)), NEEDS.ALL - 1, 85, 42])
@PRIMARY
def test_fake_of_some_gradients(needs: int, has_primary: bool) -> None:
    for kind in (samples, extended):
        assert_fake_matches(
            "ghost_backward", (*kind(SAMPLES[1], has_primary)["ghost_backward"][:-1], needs)
        )


@ALL_SAMPLES
def test_fake_matches_real(op: str, case: Case, has_primary: bool) -> None:
    """Shapes, strides and dtypes of the fake implementation are those of the kernel."""
    assert_fake_matches(op, samples(case, has_primary)[op])


@EXTENDED
def test_fake_of_extended_matches_real(op: str, case: Case, has_primary: bool) -> None:
    assert_fake_matches(op, extended(case, has_primary)[op])


def assert_fake_matches(op: str, args: tuple[Any, ...]) -> None:
    real = getattr(OPS, op)(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        fake = getattr(OPS, op)(*fakes)
    real, fake = (r if isinstance(r, (tuple, list)) else (r,) for r in (real, fake))
    for a, b in zip(real, fake, strict=True):
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            if a.numel():  # the stride of a dimension of size 1 means nothing
                assert strides(a) == strides(b)


@CASES
@PRIMARY
def test_packed_size(case: Case, has_primary: bool) -> None:
    args = samples(case, has_primary)["ghost_pack"]
    packed = OPS.ghost_pack(*args)
    pairs = packs_pairs(args[0], args[6])
    assert packed.shape == (packed_numel(case.m, case.c, case.g, case.d, has_primary, pairs),)
    assert packed.dtype == compute_dtype(case.dtype)


@pytest.mark.parametrize("layout", [*LAYOUTS, "1x1 pixels", "one channel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_format(dtype: torch.dtype, layout: str) -> None:
    """channels_last if x is channels_last and not contiguous as well."""
    case = Case(dtype=dtype, layout=layout if layout in LAYOUTS else "nhwc")
    if layout == "1x1 pixels":
        case = case.replace(h=1, w=1)
    if layout == "one channel":
        case = case.replace(c=1)
    x, *rest = samples(case, True)["ghost_apply"]
    out = OPS.ghost_apply(x, *rest)
    assert out.dtype == dtype
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert out.is_contiguous(memory_format=fmt)
    args = samples(case, True)["ghost_train_forward"]
    out, *stats, u = OPS.ghost_train_forward(x, *args[1:-1], True)
    assert out.is_contiguous(memory_format=fmt)
    assert u.dtype == dtype
    assert all(s.dtype == compute_dtype(case.dtype) for s in stats)


# --- arithmetic -------------------------------------------------------------------------------

NUMERIC = [
    Case(2, 5, 6, 7, 8, dtype=torch.float64),
    Case(2, 16, 9, 17, 11, ratio=3, d=5, act1="silu", act2="gelu", layout="nhwc"),
    Case(3, 4, 5, 15, 13, stride=2, act1="hardswish"),
    Case(2, 8, 9, 18, 12, dtype=torch.bfloat16, act1="silu", act2="silu"),
    Case(2, 8, 9, 18, 12, dtype=torch.float16, layout="nhwc"),
]


def near(got: Tensor, want: Tensor, case: Case) -> None:
    eps = torch.finfo(case.dtype).eps
    scale = want.abs().max().item()
    torch.testing.assert_close(
        got.double(), want.double(), rtol=0, atol=max(16 * eps, 1e-6 * (eps > 1e-10)) * scale
    )


@pytest.mark.parametrize("case", NUMERIC, ids=str)
def test_statistics(every_isa: str, case: Case) -> None:
    ops = ops_of(every_isa)
    p = Params.of(make_module(case, GhostModule))
    x = make_input(case)
    ref = p.to(torch.float64)
    r = oracle(ref, x.double(), case, True)
    args = samples(case, True, ops)
    mean1, var1 = ops.ghost_primary_stats(*args["ghost_primary_stats"])
    near(mean1, r.mean1.detach(), case)
    near(var1, r.var1.detach(), case)
    # The cheap statistics of a module whose first batch norm is the running one.
    frozen = oracle(ref, x.double(), case, False)
    mean2, var2 = ops.ghost_cheap_stats(*args["ghost_cheap_stats"])
    near(mean2, frozen.mean2.detach(), case)
    near(var2, frozen.var2.detach(), case)
    assert mean1.dtype == var1.dtype == mean2.dtype == var2.dtype == compute_dtype(case.dtype)
    # The training forward gives the same statistics, and u if ``keep_u`` is set.
    out, *stats, u = ops.ghost_train_forward(*args["ghost_train_forward"][:-1], True)
    for got, want in zip(stats, (r.mean1, r.var1, r.mean2, r.var2), strict=True):
        near(got, want.detach(), case)
    near(out, r.out.detach(), case)
    near(u, torch.nn.functional.conv2d(x.double(), ref.w1, stride=case.stride).detach(), case)
    assert ops.ghost_train_forward(*args["ghost_train_forward"])[5].numel() == 0


# The bit of ``needs`` for each result of ``ghost_backward``.
NEEDED_BY = (
    *(NEEDS.DX, NEEDS.DW1, NEEDS.NORM1, NEEDS.NORM1, NEEDS.PRELU1),
    *(NEEDS.DW2, NEEDS.NORM2, NEEDS.NORM2, NEEDS.PRELU2),
)


@pytest.mark.parametrize("needs", [0, *(1 << i for i in range(7)), 96, 126, 84, 3, 41])
@pytest.mark.parametrize("batch", ["both", "first", "second", "neither"])
@pytest.mark.parametrize("case", [NUMERIC[0], NUMERIC[1], NUMERIC[4]], ids=str)
def test_only_the_gradients_that_are_needed(
    every_isa: str, case: Case, batch: str, needs: int
) -> None:
    """A needed gradient has the bits that it has if all are needed; the others are empty."""
    ops = ops_of(every_isa)
    for kind in (samples, extended):
        arguments = kind(case, True, ops)["ghost_backward"][:-3]
        flags = batch in ("both", "first"), batch in ("both", "second")
        every = ops.ghost_backward(*arguments, *flags, NEEDS.ALL)
        some = ops.ghost_backward(*arguments, *flags, needs)
        for bit, want, got in zip(NEEDED_BY, every, some, strict=True):
            assert torch.equal(got, want) if needs & bit else got.numel() == 0


@pytest.mark.parametrize("case", NUMERIC, ids=str)
def test_means_of_the_batch_itself_change_nothing(every_isa: str, case: Case) -> None:
    """Given this batch's own mean gradients, dx is the one without given means."""
    ops = ops_of(every_isa)
    args = list(extended(case, True, ops)["ghost_backward"])
    args[10] = args[18] = None
    want = ops.ghost_backward(*args)
    count = args[0][:, 0].numel()
    args[10] = torch.stack([want[3], want[2]]) / count
    args[18] = torch.stack([want[7], want[6]]) / count
    for got, expected in zip(ops.ghost_backward(*args), want, strict=True):
        near(got, expected, case)


@pytest.mark.parametrize("case", NUMERIC, ids=str)
def test_statistics_behind_a_prelu(every_isa: str, case: Case) -> None:
    ops = ops_of(every_isa)
    args = extended(case, True, ops)
    x, w1, gamma, beta, mean, var, eps, slopes, w2 = args["ghost_train_forward"][:9]
    wide = [t.double() for t in (x, w1, gamma, beta, mean, var)]
    u = torch.nn.functional.conv2d(*wide[:2], stride=case.stride)
    y = torch.nn.functional.batch_norm(u, *wide[4:], *wide[2:4], False, 0.0, eps)
    y = torch.nn.functional.prelu(y, slopes.double())
    v = torch.nn.functional.conv2d(y, w2.double(), padding=case.d // 2, groups=case.m)
    got = ops.ghost_cheap_stats(*args["ghost_cheap_stats"])
    near(got[0], v.mean((0, 2, 3)), case)
    near(got[1], v.var((0, 2, 3), correction=0), case)
    for a, b in zip(
        ops.ghost_primary_stats(u.to(case.dtype), None, 1),
        (u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0)),
        strict=True,
    ):
        near(a, b, case)


def test_one_of_two_given_statistics(backend: str) -> None:
    args = list(samples(SAMPLES[0], True)["ghost_train_forward"])
    args[4] = torch.zeros(SAMPLES[0].m)
    with pytest.raises(RuntimeError, match="must both be given"):
        ops_of(backend).ghost_train_forward(*args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_statistics_far_from_zero(every_isa: str, offset: float, layout: str) -> None:
    """Mean 1e4, deviation 1: E[u^2] - E[u]^2 in float32 would have an error of several units."""
    ops = ops_of(every_isa)
    rtol = 1e-5 if every_isa == "eager" else 1e-6  # PyTorch sums channels_last in one chain
    case = Case(4, 1, 61, 63, 4, act1="none", act2="none")
    x = (make_input(case) + offset).to(memory_format=torch.preserve_format)
    if layout == "nhwc":  # one channel is contiguous in both layouts: add a channel of zeros
        x = torch.cat([x, torch.zeros_like(x)], 1).contiguous(memory_format=torch.channels_last)
    w1 = torch.zeros(2, x.shape[1], 1, 1)
    w1[:, 0] = 1.0
    mean, var = ops.ghost_primary_stats(x, w1, 1)
    want = x[:, 0].double()
    torch.testing.assert_close(mean.double(), want.mean().expand(2), rtol=rtol, atol=0)
    torch.testing.assert_close(
        var.double(), want.var(correction=0).expand(2), rtol=2e-7 * offset + 1e-5, atol=0
    )
    ones = torch.ones(2)
    packed = ops.ghost_pack(
        w1, ones, 0 * ones, 0 * ones, ones, 0.0, torch.ones(2, 1, 1, 1), None, None, None, None, 0.0
    )
    mean, var = ops.ghost_cheap_stats(x, packed, 2, 2, 1, 1, 0, 0.0, True)
    torch.testing.assert_close(mean.double(), want.mean().expand(2), rtol=rtol, atol=0)
    torch.testing.assert_close(
        var.double(), want.var(correction=0).expand(2), rtol=2e-7 * offset + 1e-5, atol=0
    )


@pytest.mark.parametrize("missing", ["gamma and beta", "beta", "gamma", "mean and var"])
@PRIMARY
def test_pack_without_some_parameters(every_isa: str, has_primary: bool, missing: str) -> None:
    ops = ops_of(every_isa)
    case = Case(dtype=torch.float64, act1="silu", act2="silu", c=4)
    p = Params.of(make_module(case, GhostModule)).to()
    x = make_input(case)
    if not has_primary:
        p.w1 = torch.eye(4, dtype=torch.float64)[:, :, None, None]
    args = []
    for bn in (p.bn1, p.bn2):
        if "gamma" in missing:
            bn.gamma = None
        if "beta" in missing:
            bn.beta = None
        if "mean" in missing:
            bn.mean = bn.var = None
        args.append([bn.gamma, bn.beta, bn.mean, bn.var, bn.eps])
        if "mean" in missing:
            bn.mean, bn.var, bn.eps = bn.gamma.new_zeros(4), bn.gamma.new_ones(4), 0.0
    with torch.no_grad():
        packed = ops.ghost_pack(p.w1 if has_primary else None, *args[0], p.w2, *args[1])
        got = ops.ghost_apply(x, packed, None, None, 4, 8, 2, 3, 1, 4, 0.01, 4, 0.01, has_primary)
        torch.testing.assert_close(got, oracle(p, x, case, False).out)


@pytest.mark.parametrize("count", [0, 1, 84, 10**9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_running(backend: str, dtype: torch.dtype, count: int) -> None:
    update = ops_of(backend).ghost_update_running_
    check_update_running(update, dtype, compute_dtype(dtype), count)


@pytest.mark.parametrize("missing", ["statistics1", "statistics2", "batches1", "batches2"])
def test_update_running_of_some(backend: str, missing: str) -> None:
    update = ops_of(backend).ghost_update_running_
    check_update_running(update, torch.float32, torch.float32, 84, missing=missing)


def test_update_running_needs_a_counter_for_the_average(backend: str) -> None:
    running, stats = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="momentum of None needs the counter"):
        ops_of(backend).ghost_update_running_(
            *running, None, *stats, None, None, None, None, *stats, 0.0, 4
        )
    assert not running.any()


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", NUMERIC, ids=str)
def test_backends_agree(case: Case, has_primary: bool) -> None:
    """The eager and the native operators give the same results."""
    results = []
    for name in ("eager", "native"):
        with running(name):
            ops = ops_of(name)
            args = samples(case, has_primary, ops)
            results.append(
                [
                    ops.ghost_apply(*args["ghost_apply"]),
                    *ops.ghost_cheap_stats(*args["ghost_cheap_stats"]),
                    *ops.ghost_train_forward(*args["ghost_train_forward"]),
                    *ops.ghost_backward(*args["ghost_backward"]),
                ]
            )
    for a, b in zip(*results, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.numel():
            eps = torch.finfo(case.dtype).eps
            atol = max(32 * eps, 1e-5 * (eps > 1e-10)) * (1 + a.abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_every_activation_is_tested() -> None:
    """The oracle and the grids of the tests have the activations of the library."""
    assert ACTIVATIONS == activations.NAMES


def test_every_dtype_is_tested_and_planned(native: str) -> None:
    assert conventions.DTYPES == DTYPES
    for dtype in DTYPES:
        assert planner.explain((2, 8, 6, 7), 8, dtype=dtype)


def test_out_of_range_codes_are_refused(native: str) -> None:
    ops = ops_of(native)
    x, packed, residual, gate, *rest = samples(SAMPLES[0], True, ops)["ghost_apply"]
    rest[5] = activations.PRELU + 1
    with pytest.raises(RuntimeError, match="act1"):
        ops.ghost_apply(x, packed, residual, gate, *rest)


@pytest.mark.parametrize("op", ["ghost_apply", "ghost_train_forward", "ghost_primary_stats"])
def test_meta_tensors(op: str) -> None:
    args = samples(SAMPLES[0], True)[op]
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    out = getattr(torch.ops.ghost_ops, op)(*meta)
    first = out if isinstance(out, Tensor) else out[0]
    assert first.is_meta
