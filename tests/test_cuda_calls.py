"""Calls of the CUDA operators on the emulator: launch counts, gradients that are not needed, empty
and large batches, wrong arguments, running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import emulator
import pytest
import torch
from cuda_cases import (
    Training,
    World,
    backward,
    check_eval,
    check_train,
    make_slopes,
    norm_arguments,
    operands,
    train_forward,
)
from cuda_grids import EMPTY, MANY_IMAGES, STATISTICS
from cuda_statistics_cases import check_empty
from helpers import DTYPES, Case, check_update_running, same_bits
from torch import Tensor

from ghost_ops.conventions import NEEDS


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.or_skip(emulator.ops)


@pytest.fixture
def world(library: emulator.Library) -> Iterator[World]:
    yield World(torch.ops.ghost_emu, "cpu")
    library.configure()


def launches(library: emulator.Library, call: Any) -> int:
    before = library.launches()
    call()
    return library.launches() - before


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", [*STATISTICS, STATISTICS[3].replace(c=200)], ids=str)
def test_launch_counts(
    world: World, library: emulator.Library, case: Case, has_primary: bool
) -> None:
    """Eval is one launch, a training forward at most four, a backward at most four."""
    o = operands(case, has_primary)
    bn1, bn2 = norm_arguments(o)
    w2 = o.p.w2.detach()
    packed = world.pack(o.w1, *bn1, 1e-5, w2, *bn2, 1e-5)
    assert launches(library, lambda: world.pack(o.w1, *bn1, 1e-5, w2, *bn2, 1e-5)) == 1
    arguments = (o.x, packed, None, None, *o.shape, *o.acts, has_primary)
    assert launches(library, lambda: world.call("ghost_apply", *arguments)) == 1
    how = Training()
    assert launches(library, lambda: train_forward(world, o, how, False)) <= 4
    out, mean1, var1, mean2, var2, _ = train_forward(world, o, how, False)
    moments = [mean1, var1, mean2, var2]
    ones = torch.ones_like(out)
    assert launches(library, lambda: backward(world, o, how, ones, None, moments)) <= 4
    mean, var, count = bn1[2].float().clone(), bn1[3].float().clone(), torch.tensor(3)
    one = (mean, var, count, mean1.float(), var1.float(), 0.1)
    running = (*one, *(None, None, None), *one[3:], 9)
    assert launches(library, lambda: world.call("ghost_update_running_", *running)) == 1


NEEDED = {  # launches: sums, grads, the products, the last one
    "all": (NEEDS.ALL, 4),
    "all but dx": (NEEDS.ALL & ~NEEDS.DX, 4),
    "dx": (NEEDS.DX, 3),
    "dw1": (NEEDS.DW1, 4),
    "norm 2": (NEEDS.NORM2, 2),
    "slopes 2": (NEEDS.PRELU2, 2),
    "dw2": (NEEDS.DW2, 3),
    "norm 1": (NEEDS.NORM1, 3),
    "slopes 1": (NEEDS.PRELU1, 3),
    "dw2, dx": (NEEDS.DW2 | NEEDS.DX, 4),
    "all but dw2": (NEEDS.ALL & ~NEEDS.DW2, 4),
    "none": (0, 0),
}
PARTLY = [
    Case(2, 8, 7, 7, 12, dtype=torch.float16, layout="nhwc", act1="silu"),
    Case(2, 12, 9, 5, 21, ratio=3, d=5, stride=2),
]


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("case", PARTLY, ids=str)
def test_gradients_that_are_not_needed(
    world: World, library: emulator.Library, case: Case, name: str
) -> None:
    """They are empty and cost no launch; the others have the same bits as with all gradients."""
    o = operands(case)
    how = Training(slopes=make_slopes(o.case, (True, True)))
    out, *moments, _ = train_forward(world, o, how, False)
    arguments = (world, o, how, torch.ones_like(out), None, moments)
    want = backward(*arguments)
    needs, count = NEEDED[name]
    assert launches(library, lambda: backward(*arguments, needs)) == count
    for key, t in backward(*arguments, needs).items():
        assert same_bits(t, want[key]), key


def test_given_statistics_save_launches(world: World, library: emulator.Library) -> None:
    """Given statistics are not computed, nor are sums whose means are given."""
    case = Case(2, 8, 7, 7, 16, dtype=torch.float16, layout="nhwc")
    o = operands(case)
    counts = {(True, True): 3, (True, False): 2, (False, True): 2, (False, False): 1}
    for batch, count in counts.items():
        how = Training(batch)
        assert launches(library, lambda how=how: train_forward(world, o, how, False)) == count
    how = Training()
    out, *moments, u = train_forward(world, o, how, True)
    means = (torch.zeros(2, 8), torch.zeros(2, 8))
    arguments = (world, o, how, torch.ones_like(out), u, moments)
    # u is pixel-major: the first launch is not needed.
    assert launches(library, lambda: backward(*arguments, NEEDS.DX, means)) == 2
    assert launches(library, lambda: backward(*arguments, NEEDS.DX | NEEDS.NORM2, means)) == 4
    frozen = (world, o, Training((True, False)), *arguments[3:])
    assert launches(library, lambda: backward(*frozen, NEEDS.DX)) == 2


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_batch(world: World, case: Case, has_primary: bool) -> None:
    check_empty(world, case, has_primary)


@pytest.mark.parametrize("case", MANY_IMAGES, ids=str)
def test_more_images_than_a_grid_has_rows(world: World, case: Case) -> None:
    """A grid has at most 65,535 blocks along y and z."""
    small = case.replace(c=3, h=1, w=1, oup=4)
    check_eval(world, small)
    check_train(world, small)


@pytest.mark.slow
def test_more_channel_blocks_than_a_grid_has_rows(world: World, library: emulator.Library) -> None:
    """65,537 blocks of 8 channels in backward; the shared memory allows no larger ones."""
    m = 65_537 * 8
    x = torch.randn(2, m, 1, 1).half().as_strided((2, m, 1, 1), (m, 1, m, m))
    w2, none = torch.zeros(0, 1, 1, 1, dtype=x.dtype), torch.zeros(0)
    with library.as_device(emulator.Device(9, 0, 2, 5504, 5504 + 1024, 50 << 20)):
        norm1 = (None, None, torch.zeros(m), torch.ones(m), 0.0, None, None)
        norm2 = (None, None, none, none, 0.0, None, None)
        settings = (1, 0, 0.0, 0, 0.0, False, False, NEEDS.NORM1)
        grad = torch.ones_like(x)
        grads = world.call("ghost_backward", grad, x, None, None, *norm1, w2, *norm2, *settings)
    assert torch.equal(grads[2], x.float().sum((0, 2, 3)))
    assert torch.equal(grads[3], torch.full((m,), 2.0))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (emulator.Device(7, 5, 40, 64 << 10, 64 << 10, 4 << 20), "this device has 7.5"),
        (emulator.Device(8, 0, 108, 2 << 10, 164 << 10, 40 << 20), "shared memory"),
    ],
    ids=["too old", "too little shared memory"],
)
def test_devices_that_cannot_run_it(
    world: World, library: emulator.Library, device: emulator.Device, message: str
) -> None:
    with library.as_device(device), pytest.raises(RuntimeError, match=message):
        check_eval(world, Case(2, 40, 14, 14, 80, dtype=torch.float16, layout="nhwc"))


@pytest.mark.parametrize("count", [0, 1, 2, 84])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_running(world: World, dtype: torch.dtype, count: int) -> None:
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    check_update_running(torch.ops.ghost_emu.ghost_update_running_, dtype, stat, count)


@pytest.mark.parametrize("missing", ["statistics1", "statistics2", "batches1", "batches2"])
def test_update_running_of_some(world: World, missing: str) -> None:
    update = torch.ops.ghost_emu.ghost_update_running_
    check_update_running(update, torch.float32, torch.float32, 84, missing=missing)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (torch.ones(2, 12, 3), "gate must be"),
        (torch.ones(2, 11, 3, 3), "gate must be"),
        (torch.ones(1, 12, 3, 3), "gate must be"),
        (torch.ones(2, 12, 0, 3), "at least 1"),
        (torch.ones(2, 12, 3, 3, dtype=torch.float64), "of the dtype of x"),
    ],
    ids=["3-D", "channels", "batch", "empty", "dtype"],
)
def test_gate_of_the_wrong_kind(world: World, gate: Tensor, message: str) -> None:
    o = operands(Case(2, 8, 6, 6, 12))
    bn1, bn2 = norm_arguments(o)
    packed = world.pack(o.w1, *bn1, 1e-5, o.p.w2.detach(), *bn2, 1e-5)
    with pytest.raises(RuntimeError, match=message):
        world.call("ghost_apply", o.x, packed, None, gate, *o.shape, *o.acts, True)


def test_slopes_per_channel_belong_to_the_packed_parameters(world: World) -> None:
    o = operands(Case(2, 8, 6, 6, 12))
    bn1, bn2 = norm_arguments(o)
    arguments = (o.w1, *bn1, 1e-5, o.p.w2.detach(), *bn2, 1e-5)
    packed = world.pack(*arguments)
    with pytest.raises(RuntimeError, match="packed does not belong to this module"):
        world.call("ghost_apply", o.x, packed, None, None, *o.shape, 8, 0.0, 0, 0.0, True)
    with pytest.raises(RuntimeError, match="prelu1 must have 6 elements, got 1"):
        world.pack(*arguments, torch.ones(1), None)
    for slopes, code in ((None, 8), (torch.ones(6), 1)):
        forward = (o.x, o.w1, *bn1, 1e-5, slopes, o.p.w2.detach(), *bn2, 1e-5, None, 12, 1)
        with pytest.raises(
            RuntimeError, match="prelu1 must be given for a PReLU, and only for one"
        ):
            world.call("ghost_train_forward", *forward, code, 0.0, 0, 0.0, False)
