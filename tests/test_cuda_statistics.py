"""The statistics passes of the CUDA operators, on the emulator: precise, also far from zero."""

from __future__ import annotations

from collections.abc import Iterator

import emulator
import pytest
import torch
from cuda_cases import World
from cuda_grids import STATISTICS
from cuda_statistics_cases import check_far_statistics, check_statistics, moments
from helpers import LAYOUTS, Case


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.or_skip(emulator.ops)


@pytest.fixture
def world(library: emulator.Library) -> Iterator[World]:
    yield World(torch.ops.ghost_emu, "cpu")
    library.configure()


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_statistics(world: World, case: Case, has_primary: bool) -> None:
    check_statistics(world, case, has_primary)


FAR = [(0.0, 1.0), (1e4, 1.0), (1e4, 1e-2), (100.0, 1.0)]  # means and deviations


@pytest.mark.parametrize("kind", ["normal", "outliers", "drift"])
@pytest.mark.parametrize(("mean", "deviation"), FAR, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_statistics_far_from_zero(
    world: World,
    library: emulator.Library,
    dtype: torch.dtype,
    layout: str,
    mean: float,
    deviation: float,
    kind: str,
) -> None:
    with library.as_device(emulator.DEVICES["tiny sm_86"]):  # several tiles per block
        check_far_statistics(world, mean, deviation, kind, dtype, layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 3, 5), (2, 8, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_what_is_not_finite(
    world: World, layout: str, at: tuple[int, int, int], value: float
) -> None:
    """A channel's NaN or infinity reaches its mean and variance, and no other's."""
    x = torch.randn(3, 8, 9, 9, generator=torch.Generator().manual_seed(0)).half()
    x[at[0], 2, at[1], at[2]] = value
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    found = moments(world, x.contiguous(memory_format=fmt))
    want = torch.arange(8) != 2
    for name in ("u given", "cheap"):  # w1 would multiply it by 0
        mean, var = found[name]
        assert torch.equal(mean.isfinite(), want), name
        assert torch.equal(~var.isnan(), want), name
