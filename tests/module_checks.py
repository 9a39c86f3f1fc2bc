"""Checks of a whole Ghost module against the oracle, in evaluation and in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import (
    ACTIVATIONS,
    DTYPES,
    KINKS,
    LAYOUTS,
    LOW,
    Case,
    Params,
    Result,
    assert_close,
    make_input,
    make_module,
    make_smooth,
    oracle,
    plain,
    product,
)
from torch import Tensor, nn

# The full grid of the settings that change the structure of a kernel; activations take turns. With
# ratio 7 there are fewer outputs than ghost maps of one channel.
STRUCTURE = [
    Case(
        **axes,
        act1=ACTIVATIONS[i % len(ACTIVATIONS)],
        act2=ACTIVATIONS[(i // len(ACTIVATIONS) + 3 * i) % len(ACTIVATIONS)],
        oup=11 if axes["ratio"] < 7 else 5,
    )
    for i, axes in enumerate(
        product(
            ratio=(1, 2, 3, 4, 5, 7), d=(1, 3, 5, 7), stride=(1, 2), layout=LAYOUTS, dtype=DTYPES
        )
    )
]


def function_arguments(p: Params) -> dict[str, Tensor | None]:
    """The batch norms as arguments of ``ghost_ops.ghost_module``."""
    named = {}
    for branch, bn in (("primary", p.bn1), ("cheap", p.bn2)):
        named |= {f"{branch}_bn_weight": bn.gamma, f"{branch}_bn_bias": bn.beta}
        named |= {f"{branch}_running_mean": bn.mean, f"{branch}_running_var": bn.var}
    return named


def check_forward(case: Case, rms: bool = False, device: str = "cpu") -> None:
    """The output in evaluation mode: its dtype, layout and numbers."""
    module, x = make_module(case).eval(), make_input(case)
    p = Params.of(module)
    with torch.no_grad():
        want = oracle(p.to(torch.float64), x.double(), case, training=False).out
        eager_p = p.to() if case.bn_dtype is None else p.to(case.dtype)
        eager = plain(eager_p, x, case, training=False)
        got = module.to(device)(x.to(device)).cpu()
    assert got.dtype == x.dtype
    if got.numel():
        nhwc = case.layout == "nhwc" and not x.is_contiguous()
        fmt = torch.channels_last if nhwc else torch.contiguous_format
        assert got.is_contiguous(memory_format=fmt)
    assert_close(got, want, eager, rms=rms)


def gradients(
    p: Params,
    x: Tensor,
    grad: Tensor,
    case: Case,
    training: bool,
    how: Callable[..., Tensor | Result],
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


def check_training(
    case: Case, training: bool = True, rms: bool = False, slack: float = 1.0, device: str = "cpu"
) -> None:
    """One training step, or one with frozen batch norms: output, gradients, running statistics."""
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
    # to zero. The size of the terms is that of the gradient with the same statistics held constant.
    scale = want
    if training:
        frozen = p.to(torch.float64)
        frozen.bn1.mean, frozen.bn1.var = stats.mean1.detach(), stats.var1.detach()
        frozen.bn2.mean, frozen.bn2.var = stats.mean2.detach(), stats.var2.detach()
        _, scale = gradients(frozen, x.double(), grad.double(), case, False, oracle)
    # dgamma and dbeta are sums over all pixels of terms of order one and of either sign. They may
    # cancel to the square root of the number of terms or less, but each addition rounds once.
    count = grad[:, 0].numel()
    chance = torch.tensor(max(count**0.5, count / 32))
    for name, t in scale.items():
        if name[:-1] in ("gamma", "beta") and chance > t.abs().max():
            scale = {**scale, name: chance}
    # In low precision some pre-activation always rounds to the other side of a kink.
    rms = rms or (case.dtype in LOW and not {case.act1, case.act2}.isdisjoint(KINKS))
    for name in want:
        assert got[name] is not None, f"no gradient for {name}"
        assert got[name].dtype == (x if name == "x" else p.tensors()[name]).dtype
        rule = {"rms": rms, "slack": 4 * slack, "scale": scale[name], "dtype": case.dtype}
        assert_close(got[name], want[name], eager[name], f"gradient of {name}", **rule)
    nhwc = case.layout == "nhwc" and not x.is_contiguous()
    fmt = torch.channels_last if nhwc else torch.contiguous_format
    assert x.grad.is_contiguous(memory_format=fmt)
    check_buffers(case, module, buffers, stats, training)


def check_buffers(
    case: Case, module: nn.Module, before: dict[str, Tensor], stats: Result, training: bool
) -> None:
    """Running statistics and counters move in training by one batch, else not at all."""
    keys = ("running_mean", "running_var", "num_batches_tracked")
    branches = [("primary_conv", stats.mean1, stats.var1)]
    if case.ratio > 1:
        branches.append(("cheap_operation", stats.mean2, stats.var2))
    else:  # with ratio 1 the cheap operation does not run
        for key, old in module.cheap_operation[1].named_buffers():
            assert torch.equal(old, before[f"cheap_operation.1.{key}"])
    count = stats.out.shape[0] * stats.out.shape[2] * stats.out.shape[3]
    eps = torch.finfo(case.bn_dtype or case.dtype).eps
    rtol = 8 * torch.finfo(case.dtype).eps if case.dtype in LOW else 1e-5
    for name, mean, var in branches:
        now = {key: getattr(module, name)[1].get_buffer(key) for key in keys}
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
