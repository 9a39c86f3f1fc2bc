"""The plan of the backward pass on a GPU: golden choices, and properties of every plan.

The golden lines are decisions, not measurements. A change of the model changes some of them: look
at each, then write the new ones down (``python tests/test_cuda_plan_backward.py`` prints them).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import native_module
from helpers import GHOSTNET

from ghost_ops import planner

pytestmark = pytest.mark.skipif(native_module() is None, reason="the native library is not built")

SMEM = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}  # KiB a block


def backward(
    device: str,
    shape: tuple[int, int, int, int],
    oup: int,
    dtype: torch.dtype = torch.float16,
    channels_last: bool = True,
    **settings: object,
) -> planner.CudaBackward:
    settings |= {"dtype": dtype, "channels_last": channels_last, "device": device}
    plan = planner.explain(shape, oup, training=True, **settings)
    assert isinstance(plan, planner.CudaPlan) and plan.backward is not None
    return plan.backward


def line(b: planner.CudaBackward) -> str:
    """The decisions of a plan in a line. (The first launch has the forward's planner.)"""
    grads = (
        f"grads {b.images} x {b.rows} x {b.cols}, {b.channels} x {b.channel_blocks} "
        f"channels, {b.workers} workers; "
    )
    if b.du_workers:
        u = "made" if b.makes_u else "read"
        return f"{grads}du {b.du_workers} x {b.du_slices}, {b.du_pixels} x {b.du_channels}, u {u}"
    return (
        f"{grads}dx {b.dx_blocks} x {b.dx_depth}; dw1 {b.dw1_blocks} in {b.dw1_splits} x "
        f"{b.dw1_pixels}"
    )


SHAPES: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "112": ((256, 16, 112, 112), 16),
    "56": ((256, 24, 56, 56), 72),
    "14": ((256, 80, 14, 14), 480),
    "14, wide": ((256, 112, 14, 14), 672),
    "7": ((256, 960, 7, 7), 160),
    "7, batch 1": ((1, 160, 7, 7), 960),
}
GOLDEN = {
    "112": ("grads 1 x 14 x 112, 8 x 1 channels, 256 workers; du 262 x 1, 256 x 16, u made"),
    "56": ("grads 1 x 28 x 56, 8 x 5 channels, 52 workers; du 262 x 1, 256 x 24, u made"),
    "14": ("grads 1 x 14 x 14, 48 x 5 channels, 52 workers; du 131 x 2, 32 x 40, u read"),
    "14, wide": (
        "grads 1 x 14 x 14, 56 x 6 channels, 43 workers; dx 131 x 128; dw1 132 in 22 x 64"
    ),
    "7": ("grads 2 x 7 x 7, 40 x 2 channels, 128 workers; du 33 x 8, 64 x 120, u read"),
    "7, batch 1": ("grads 1 x 4 x 7, 8 x 60 channels, 2 workers; dx 3 x 128; dw1 12 in 1 x 64"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_golden(name: str) -> None:
    assert line(backward("sm_90", *SHAPES[name])) == GOLDEN[name]


@pytest.mark.parametrize("device", SMEM)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_every_plan(device: str, dtype: torch.dtype, channels_last: bool) -> None:
    """At most four launches, tiles that cover the work, and blocks that fit the GPU."""
    for size, channels, oup, _ in GHOSTNET:
        for batch in (1, 256):
            shape = (batch, channels, size, size)
            b = backward(device, shape, oup, dtype, channels_last)
            limit = SMEM[device] * 1024
            assert 3 <= b.launches <= 4
            assert max(b.grads_smem_bytes, b.primary_smem_bytes) <= limit
            assert b.sums is None or b.sums.smem_bytes <= limit
            assert b.channels % 8 == 0 and b.channels * b.channel_blocks >= math.ceil(oup / 2)
            assert b.images * b.rows * b.cols * b.tiles >= batch * size * size
            assert 1 <= b.workers <= b.tiles
            assert (b.halo_rows, b.halo_cols) == (b.rows < size, b.cols < size)
            narrow = dtype.itemsize == 2 and channels_last and oup <= 512
            assert not b.du_workers or narrow
            assert b.du_workers or not narrow or SMEM[device] < 163
            if b.du_workers:
                assert b.du_slices * b.du_channels >= channels and b.du_channels % 8 == 0
                assert b.dw1_splits == b.du_workers and not b.dx_blocks and not b.dw1_blocks
                assert not b.makes_u or b.du_slices == 1
            else:
                assert b.dx_blocks >= 1 and b.dw1_blocks >= b.dw1_splits >= 1
            da1 = batch * size * size * math.ceil(oup / 2) * dtype.itemsize
            assert b.scratch_bytes >= da1 * (1 + b.stores_u)


@pytest.mark.parametrize("ratio,dw_size", [(1, 3), (2, 7), (5, 5)])
def test_settings(ratio: int, dw_size: int) -> None:
    """Without ghosts the first launch runs only if it has to store u."""
    b = backward("sm_80", (8, 24, 20, 20), 40, ratio=ratio, dw_size=dw_size)
    assert (b.sums is not None) == (b.stores_u or ratio > 1)
    assert b.launches == 3 + (b.sums is not None)
    assert str(b).startswith(f"backward, {b.launches} launches")


@pytest.mark.parametrize("device", SMEM)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_whatever_has_a_forward_has_a_backward(device: str, dtype: torch.dtype) -> None:
    """Thousands of channels on either side, and more ghosts a channel than a block has room for."""
    cases: list[tuple[int, int, dict[str, int]]] = [
        *((64, 2 * m, {}) for m in (1024, 4096, 8192, 16384)),
        *((c, 64, {}) for c in (4096, 8192, 16384)),
        (8192, 16384, {}),
        (64, 8192 * 5, {"ratio": 5, "dw_size": 7}),
        *((8, 24 * ratio, {"ratio": ratio, "dw_size": 7}) for ratio in (17, 65, 257)),
    ]
    for channels, oup, settings in cases:
        for channels_last in (False, True):
            shape = (2, channels, 7, 7)
            b = backward(device, shape, oup, dtype, channels_last, **settings)
            m = math.ceil(oup / settings.get("ratio", 2))
            assert b.launches <= 4
            assert b.channels * b.channel_blocks >= m


@pytest.mark.parametrize(
    ("changed", "one_block"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float32}, False),
        ({"channels_last": False}, False),
        ({"stride": 2}, False),
        ({"shape": (8, 44, 14, 14)}, False),  # rows of x that begin inside a vector
        ({"oup": 512}, True),
        ({"oup": 514}, False),
    ],
    ids=str,
)
def test_which_modules_have_one_block_for_both_products(
    changed: dict[str, Any], one_block: bool
) -> None:
    settings: dict[str, Any] = {"shape": (8, 40, 14, 14), "oup": 80, **changed}
    b = backward("sm_90", **settings)
    assert (b.du_workers > 0) == one_block
    assert ("ghost_backward_du" in str(b)) == one_block
    assert ("ghost_backward_primary" in str(b)) != one_block


@pytest.mark.parametrize(
    ("channels", "makes_u"), [(24, True), (96, True), (104, False), (520, False)]
)
def test_u_is_made_again_where_that_saves_bytes(channels: int, makes_u: bool) -> None:
    """If a block has all channels of x, and u is a large part of the bytes that it would read."""
    b = backward("sm_90", (8, channels, 14, 14), 48)
    assert b.makes_u == makes_u
    assert f"u {'made again' if makes_u else 'read'}" in str(b)


def test_eval_has_no_backward() -> None:
    plan = planner.explain((1, 16, 8, 8), 32, dtype=torch.float16, device="sm_90")
    assert isinstance(plan, planner.CudaPlan) and plan.backward is None


if __name__ == "__main__":
    for key, (shape, oup) in SHAPES.items():
        print(f"    {key!r}: (\n        {line(backward('sm_90', shape, oup))!r}\n    ),")
