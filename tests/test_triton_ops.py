"""The operators ``ghost_ops_triton`` as PyTorch sees them: schemas, fakes, errors, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
    Case,
    Params,
    check_update_running,
    make_input,
    make_module,
    oracle,
)
from operator_cases import samples, strides
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ghost_ops import ops
from ghost_ops.ops import eager as eager_ops

OPS = torch.ops.ghost_ops_triton
SAMPLES = [
    Case(2, 5, 3, 4, 8),
    Case(2, 16, 3, 5, 11, ratio=3, act1="silu", act2="gelu", layout="nhwc"),
    Case(1, 4, 3, 3, 3, stride=2, dtype=torch.bfloat16),
    Case(2, 4, 3, 3, 6, ratio=1),
    Case(0, 4, 5, 5, 6),
]
ALL = pytest.mark.parametrize(
    ("case", "has_primary", "name"),
    [
        pytest.param(case, primary, name, id=f"{name}-{case}-{'x' if primary else 'u'}")
        for i, case in enumerate(SAMPLES)
        for name in ops.NAMES
        for primary in ((True, False) if i == 0 else (True,))
        if primary or name != "ghost_primary_stats"
    ],
)


def arguments(case: Case, has_primary: bool, name: str, device: str) -> list[Any]:
    found = samples(case, has_primary, ops.triton if device == "cpu" else eager_ops)[name]
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in found]
    if device != "cpu" and name in ("ghost_apply", "ghost_cheap_stats"):
        pack = samples(case, has_primary, eager_ops)["ghost_pack"]
        if name == "ghost_cheap_stats":
            pack = (*pack[:7], None, None, None, None, 1e-5)
        pack = [a.to(device) if isinstance(a, Tensor) else a for a in pack]
        moved[1] = OPS.ghost_pack(*pack)
    return moved


@ALL
def test_fake_matches_real(triton_device: str, case: Case, has_primary: bool, name: str) -> None:
    """Shapes, strides and dtypes of the fake implementation are those of the kernels."""
    args = arguments(case, has_primary, name, triton_device)
    real = getattr(OPS, name)(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        fake = getattr(OPS, name)(*fakes)
    real, fake = (r if isinstance(r, (tuple, list)) else (r,) for r in (real, fake))
    for a, b in zip(real, fake, strict=True):
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            if a.numel():
                assert strides(a) == strides(b)


@pytest.mark.parametrize("name", ops.NAMES)
def test_opcheck(triton_device: str, name: str) -> None:
    args = tuple(arguments(SAMPLES[0], True, name, triton_device))
    torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics(triton_device: str, offset: float, layout: str) -> None:
    case = Case(3, 5, 7, 6, 11, ratio=3, d=5, act1="silu", layout=layout)
    x, p = make_input(case) + offset, Params.of(make_module(case))
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    want = oracle(p.to(torch.float64), x.double(), case, True)
    mean, var = OPS.ghost_primary_stats(x.to(triton_device), p.w1.detach().to(triton_device), 1)
    scale = 1 + offset
    torch.testing.assert_close(mean.cpu().double(), want.mean1, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(var.cpu().double(), want.var1, rtol=1e-5 + 3e-7 * offset, atol=1e-6)
    u = torch.nn.functional.conv2d(x, p.w1).detach().to(triton_device)
    mean, var = OPS.ghost_primary_stats(u, None, 1)
    torch.testing.assert_close(mean.cpu().double(), want.mean1, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(var.cpu().double(), want.var1, rtol=1e-5 + 3e-7 * offset, atol=1e-6)
    if offset:
        return
    frozen = oracle(p.to(torch.float64), x.double(), case, False)
    args = arguments(case, True, "ghost_cheap_stats", triton_device)
    mean, var = OPS.ghost_cheap_stats(*args)
    torch.testing.assert_close(mean.cpu().double(), frozen.mean2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.cpu().double(), frozen.var2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 84])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_running(triton_device: str, dtype: torch.dtype, count: int) -> None:
    check_update_running(
        OPS.ghost_update_running_, dtype, torch.float32, count, device=triton_device
    )


@pytest.mark.parametrize("missing", ["statistics1", "statistics2", "batches1", "batches2"])
def test_update_running_of_some(triton_device: str, missing: str) -> None:
    update, dtype = OPS.ghost_update_running_, torch.float32
    check_update_running(update, dtype, dtype, 84, missing=missing, device=triton_device)


def test_with_momentum_one_the_old_value_does_not_count(triton_device: str) -> None:
    old = torch.full((2, 3), float("nan"), device=triton_device)
    new = torch.rand(2, 3, device=triton_device)
    nothing = (None, None, None, new[0], new[1], 0.0)
    OPS.ghost_update_running_(old[0], old[1], None, new[0], new[1], 1.0, *nothing, 1)
    torch.testing.assert_close(old, new)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_as_one_graph(triton_device: str, training: bool) -> None:
    case = Case(2, 6, 4, 5, 8, act1="silu")
    module = make_module(case).train(training).to(triton_device)
    x = make_input(case).to(triton_device).requires_grad_(training)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        want, got = module(x), compiled(x)
    torch.testing.assert_close(got, want)
    if training:
        (wanted,) = torch.autograd.grad(want.square().sum(), x)
        (found,) = torch.autograd.grad(got.square().sum(), x)
        torch.testing.assert_close(found, wanted)


# (operator, position of the argument, a wrong value made of the right one, what the message names)
WRONG = [
    ("ghost_apply", 0, lambda x: x[0], "4-D"),
    ("ghost_apply", 0, lambda x: x[:, :, :, ::2], "dense"),
    ("ghost_apply", 0, lambda x: x.double(), "float64"),
    ("ghost_apply", 1, lambda packed: packed[:-1], "packed has"),
    ("ghost_apply", 2, lambda _: torch.zeros(1, 2, 3, 4), "residual"),
    ("ghost_apply", 3, lambda _: torch.zeros(2, 7, 3, 4), "gate"),
    ("ghost_apply", 3, lambda _: torch.zeros(2, 8, 0, 4), "gate"),
    ("ghost_apply", 3, lambda _: torch.zeros(2, 8, 1, 1).double(), "gate"),
    ("ghost_apply", 9, lambda _: 8, "packed has"),
    ("ghost_apply", 5, lambda _: 100, "out_channels"),
    ("ghost_apply", 7, lambda _: 2, "dw_size"),
    ("ghost_apply", 8, lambda _: 0, "stride"),
    ("ghost_apply", 9, lambda _: 9, "act1"),
    ("ghost_apply", 11, lambda _: -1, "act2"),
    ("ghost_train_forward", 1, lambda w1: w1[:, :3], "w1 must be"),
    ("ghost_train_forward", 17, lambda _: 9, "act1"),
    ("ghost_train_forward", 17, lambda _: 8, "prelu1"),
    ("ghost_train_forward", 7, lambda _: torch.zeros(4), "prelu1"),
    ("ghost_train_forward", 4, lambda _: torch.zeros(4), "mean1 and var1"),
    ("ghost_train_forward", 1, lambda w1: w1.double(), "w1 must be one of"),
    ("ghost_train_forward", 2, lambda gamma: gamma[1:], "gamma1"),
    ("ghost_train_forward", 8, lambda w2: w2[1:], "multiple"),
    ("ghost_train_forward", 8, lambda w2: w2.transpose(2, 3), "contiguous"),
    ("ghost_backward", 0, lambda grad: grad[1:], "grad_out must be"),
    ("ghost_backward", 6, lambda mean: mean.long(), "mean1"),
    ("ghost_backward", 10, lambda _: torch.zeros(2, 3), "means1"),
    ("ghost_update_running_", 0, lambda mean: mean[1:], "running_mean|mean"),
]


@pytest.mark.parametrize(
    ("name", "position", "change", "message"),
    [pytest.param(*wrong, id=f"{wrong[0]}-{wrong[1]}-{wrong[3]}") for wrong in WRONG],
)
def test_wrong_arguments_are_refused(
    triton_device: str, name: str, position: int, change: Any, message: str
) -> None:
    args = arguments(SAMPLES[0], True, name, triton_device)
    args[position] = change(args[position])
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, name)(*args)


@pytest.mark.parametrize("name", ["prelu1", "prelu2"])
def test_wrong_slopes_are_refused(triton_device: str, name: str) -> None:
    args = arguments(SAMPLES[0], True, "ghost_pack", triton_device)
    with pytest.raises(RuntimeError, match=name):
        OPS.ghost_pack(*args, **{name: torch.zeros(3, device=triton_device)})
