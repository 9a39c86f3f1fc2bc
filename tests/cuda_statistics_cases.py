"""Checks of the statistics passes of the CUDA operators, and of all operators on an empty batch.

As in ``cuda_cases``: a check takes a ``World`` and a case.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from cuda_cases import (
    Training,
    World,
    backward,
    layers,
    make_slopes,
    near,
    norm_arguments,
    operands,
    tf32,
    train_forward,
)
from helpers import Case, make_input, oracle, with_layout
from torch import Tensor


def check_statistics(world: World, case: Case, has_primary: bool = True) -> None:
    """``ghost_primary_stats`` and ``ghost_cheap_stats`` against the oracle."""
    o = operands(case, has_primary)
    bn1, _ = norm_arguments(o)
    reference = o.p.to(torch.float64)
    with torch.no_grad(), tf32(False):
        live = oracle(reference, o.x.double(), o.case, training=True)
        frozen = oracle(reference, o.x.double(), o.case, training=False)
        mean, var = world.call("ghost_primary_stats", o.x, o.w1, o.stride)
        near(mean, live.mean1, case.dtype, "mean1", live.var1.sqrt())
        near(var, live.var1, case.dtype, "var1")
        for prelu in (False, True):
            how = Training((False, False), make_slopes(case, (prelu, False)))
            if prelu:
                frozen = layers(reference, o.x.double(), o.case, how)
            none = (None, None, None, None)
            packed = world.pack(o.w1, *bn1, 1e-5, o.p.w2.detach(), *none, 1e-5, how.slopes[0])
            settings = (case.m, case.ratio, case.d, o.stride, *how.codes(o)[:2], has_primary)
            mean, var = world.call("ghost_cheap_stats", o.x, packed, *settings)
            near(mean, frozen.mean2, case.dtype, "mean2", frozen.var2.sqrt())
            near(var, frozen.var2, case.dtype, "var2")


def moments(world: World, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of x from each pass, with identities as w1 and w2."""
    c = x.size(1)
    w1 = torch.eye(c, dtype=x.dtype)[:, :, None, None]
    w2, gamma = torch.zeros(c, 1, 3, 3, dtype=x.dtype), torch.ones(c, dtype=x.dtype)
    w2[:, 0, 1, 1] = 1
    none = (None, None, None)
    with tf32(False):
        packed = world.pack(None, gamma, *none, 0.0, w2, *none, None, 0.0)
        norm = (None, None, None, None, 0.0, None)
        given = (x, None, *norm, w2, *norm, 2 * c, 1, 0, 0.0, 0, 0.0, False)
        return {
            "primary": world.call("ghost_primary_stats", x, w1, 1),
            "x is u": world.call("ghost_primary_stats", x, None, 1),
            "u given": world.call("ghost_train_forward", *given)[1:3],
            "cheap": world.call("ghost_cheap_stats", x, packed, c, 2, 3, 1, 0, 0.0, False),
        }


def welford(x: Tensor) -> Tensor:
    """Variance in float32 by the algorithm of PyTorch's CUDA batch norm, 32 threads per channel."""
    v = x.transpose(0, 1).flatten(1).float()
    v = v[:, : v.size(1) // 32 * 32].unflatten(1, (-1, 32))
    mean, m2 = v[:, 0], torch.zeros_like(v[:, 0])
    for i in range(1, v.size(1)):
        d = v[:, i] - mean
        mean = mean + d / (i + 1)
        m2 = m2 + d * (v[:, i] - mean)
    count = v.size(1)
    while mean.size(1) > 1:
        half = mean.size(1) // 2
        d = mean[:, half:] - mean[:, :half]
        mean, m2 = mean[:, :half] + d / 2, m2[:, :half] + m2[:, half:] + d * d * count / 2
        count *= 2
    return m2[:, 0].double() / count


def check_far_statistics(
    world: World, mean: float, deviation: float, kind: str, dtype: torch.dtype, layout: str
) -> None:
    """Statistics as precise as PyTorch's in float32, where E[u^2] - E[u]^2 has no digits. ``kind``:
    "normal", "outliers" (the first value of every image) or "drift" (of the images' means). The
    last channel is constant."""
    x = torch.randn(5, 8, 15, 16, generator=torch.Generator().manual_seed(0)).double()
    if kind == "outliers":
        x[:, :, 0, 0] = 300
    elif kind == "drift":
        x += 20 * torch.arange(5).view(5, 1, 1, 1)
    x = x * deviation + mean
    x[:, -1] = mean
    x = with_layout(x.to(dtype), layout)
    want, exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    varies, eager = exact > 0, welford(x)
    usual = 2 * ((eager - exact)[varies] / exact[varies]).abs().max() + 1e-6 if any(varies) else 0
    for name, (got, var) in moments(world, x).items():
        near = exact.sqrt() * 1e-6 + want.abs() * 1.2e-7
        assert bool(((got.double() - want).abs() <= near).all()), name
        assert not var[~varies].any(), name
        error = ((var.double() - exact).abs() / exact)[varies]
        assert bool((error <= usual).all()), (name, error, usual)


def check_empty(world: World, case: Case, has_primary: bool = True) -> None:
    """All operators on a batch without images, as in PyTorch: outputs are empty, statistics and
    gradients of parameters are zero, running statistics do not change."""
    o = operands(case, has_primary)
    case, (bn1, bn2), w2 = o.case, norm_arguments(o), o.p.w2.detach()
    assert o.x.numel() == 0
    size = (case.n, case.oup, *(-(-n // o.stride) for n in (case.h, case.w)))

    def zero(tensors: Any) -> None:
        for t in tensors:
            assert torch.equal(t, torch.zeros_like(t))

    packed = world.pack(o.w1, *bn1, 1e-5, w2, *bn2, 1e-5)
    maps = make_input(case.replace(c=case.oup, h=size[2], w=size[3]))
    gate = make_input(case.replace(c=case.oup, h=1, w=1))
    for extras in ((None, None), (maps, gate)):
        out = world.call("ghost_apply", o.x, packed, *extras, *o.shape, *o.acts, has_primary)
        assert out.shape == size
    zero(world.call("ghost_primary_stats", o.x, o.w1, o.stride))
    shape = (case.m, case.ratio, case.d, o.stride)
    zero(world.call("ghost_cheap_stats", o.x, packed, *shape, *o.acts[:2], has_primary))
    for keep_u, batch in itertools.product((False, True), repeat=2):
        how = Training((batch, batch), make_slopes(case, (batch, not batch)))
        out, *found, u = train_forward(world, o, how, keep_u)
        assert out.shape == size
        zero(found)
        absent = [not batch or (case.ratio == 1 and i > 1) for i in range(4)]
        assert [t.numel() == 0 for t in found] == absent
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        moments = [t.to(wide) for t in (*bn1[2:], *bn2[2:])]
        grads = backward(world, o, how, out, u, moments)
        assert grads.pop("x").shape == o.x.shape
        zero(grads.values())
    # Not through World.call: the operator changes its arguments.
    running = [world.move(t.to(moments[0].dtype).clone()) for t in (*bn1[2:], *bn2[2:])]
    before, counts = [t.cpu() for t in running], [world.move(torch.tensor(3)) for _ in range(2)]
    moments = [world.move(t) for t in moments]
    world.ops.ghost_update_running_(
        *running[:2], counts[0], *moments[:2], 0.1, *running[2:], counts[1], *moments[2:], None, 0
    )
    for old, new in zip(before, running, strict=True):
        assert torch.equal(old, new.cpu())
    assert [int(t) for t in counts] == [4, 4]
