"""bfloat16 products on AMX tiles, by the processor and by an emulation of its instructions."""

from __future__ import annotations

import copy
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import native_module, running
from ghost_forms import randomize
from helpers import LAYOUTS, assert_close, covering, same_bits, with_layout
from operator_cases import ConvCase, row_id
from torch import Tensor

import ghost_ops
from ghost_ops import activations, ops
from ghost_ops.environment import EMULATED

LIBRARY = native_module()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")
HARDWARE = "avx512_amx"
HAS_AMX = LIBRARY is not None and HARDWARE in LIBRARY.available_isas()
NEEDS_AMX = pytest.mark.skipif(not HAS_AMX, reason="the processor, its kernel or the build: no AMX")

CASES = covering(
    {
        "shape": [(2, 16, 9, 7), (1, 34, 14, 14), (3, 2, 7, 7), (1, 72, 6, 19), (2, 100, 5, 5)],
        "k": [1, 3, 5],
        "stride": [1, 2],
        "padding": [0, 1, 2],
        "m": [4, 16, 50],
        "ghosts": [(1, 1), (2, 3), (3, 5)],
        "cut": [0, 1],
        "tail": [False, True],
        "residual": [False, True],
        "act": ["relu", "silu", "none"],
        "layout": list(LAYOUTS),
        "dtype": [torch.bfloat16],
    }
)


@pytest.fixture(params=[EMULATED, pytest.param(HARDWARE, marks=NEEDS_AMX)])
def tiles(request: pytest.FixtureRequest) -> Iterator[Any]:
    with running(f"native-{request.param}"):
        yield LIBRARY


@pytest.mark.parametrize("row", CASES, ids=row_id)
def test_operator(tiles: Any, small_caches: None, row: dict) -> None:
    given = ConvCase(row)
    packed = given.packed(ops.native)
    arguments = given.x, packed, given.residual, *given.numbers
    got = ops.native_ghost_conv_apply(*arguments)
    want = given.formula(torch.float64)
    assert_close(got, want, given.formula(torch.float32).to(torch.bfloat16))
    torch.set_num_threads(3)
    assert same_bits(ops.native_ghost_conv_apply(*arguments), got)


def product(x: Tensor, w: Tensor) -> Tensor:
    """The 1x1 convolution of x with w, by the Ghost operator with ratio 1."""
    none, m = (None,) * 4, w.size(0)
    packed = ops.native.ghost_pack(w, *none, 1e-5, w.new_empty(0, 1, 1, 1), *none, 1e-5)
    act, slope = activations.NONE, 0.0
    return ops.native.ghost_apply(
        x, packed, None, None, m, m, 1, 1, 1, act, slope, act, slope, True
    )


def random(*size: int, seed: int = 0) -> Tensor:
    made = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return with_layout(made.to(torch.bfloat16), "nhwc")


@NEEDS_AMX
@pytest.mark.parametrize("channels", [2, 30, 32, 34, 100])
def test_software_is_the_instruction(channels: int) -> None:
    """Bit for bit, also if sums cancel, overflow, are subnormal or not finite."""
    x, w = random(2, channels, 5, 7), random(37, channels, 1, 1, seed=1)
    x[0, :, 0] *= 1e-38
    x[0, :, 1] = x[0, :, 1] * 1e30
    w[:8] *= 1e10
    x[0, :, 2] *= 1e-20
    w[8:16] *= 1e-19
    x[1, 0, 0, 0], x[1, 1, 0, 1], w[20, 1] = float("inf"), float("nan"), float("inf")
    found = []
    for isa in (HARDWARE, EMULATED):
        with running(f"native-{isa}"):
            found.append(product(x, w))
    assert torch.equal(*(f.isnan() for f in found))
    assert same_bits(*(f.nan_to_num(nan=3.0, posinf=None, neginf=None) for f in found))
    assert not found[0].isfinite().all()


def test_subnormal_numbers_are_zero(tiles: Any) -> None:
    x, w = random(1, 32, 3, 3), random(16, 32, 1, 1, seed=1)
    tiny = torch.finfo(torch.bfloat16).tiny
    assert not product(torch.full_like(x, tiny / 2), w).any()
    assert not product(torch.full_like(x, tiny), torch.full_like(w, 1 / 128)).any()
    assert product(torch.full_like(x, tiny), torch.full_like(w, 1.0)).all()


def test_no_value_reaches_another_pixel_or_channel(tiles: Any) -> None:
    """Tiles reach beyond x and the weights; values there are not multiplied by zero."""
    x, w = random(1, 70, 3, 7), random(21, 70, 1, 1, seed=1)
    want = product(x, w)
    x[0, 69, 1, 2] = float("nan")
    got = product(x, w)
    assert got[0, :, 1, 2].isnan().all()
    got[0, :, 1, 2] = want[0, :, 1, 2]
    assert same_bits(got, want)
    w[5, 69] = float("inf")
    assert same_bits(product(random(1, 70, 3, 7), w)[:, 6:], want[:, 6:])


def test_weights_are_exact(tiles: Any) -> None:
    """Packed weights are those of the convolution: the batch norm scales the sums."""
    x, w = random(1, 64, 7, 7).abs(), random(16, 64, 1, 1, seed=1)
    gamma = torch.full((16,), 1.0 + 2.0**-9)
    norm = gamma, torch.zeros(16), torch.zeros(16), torch.ones(16)
    none = (None,) * 4
    packed = ops.native.ghost_pack(w, *norm, 0.0, w.new_empty(0, 1, 1, 1), *none, 1e-5)
    got = ops.native.ghost_apply(x, packed, None, None, 16, 16, 1, 1, 1, 0, 0.0, 0, 0.0, True)
    want = F.conv2d(x.double(), w.double()) * gamma.double()[:, None, None]
    torch.testing.assert_close(got.double(), want, rtol=2.0**-8, atol=1e-4)
    pairs = packed[-16 - 16 * 32 : -16].view(torch.bfloat16).view(32, 16, 2)
    assert same_bits(pairs.permute(1, 0, 2).reshape(16, 64), w.view(16, 64))
    assert torch.equal(packed[-16:], gamma)


@pytest.mark.parametrize("packed_by", [EMULATED, "generic"])
def test_other_kernels_read_what_was_packed(packed_by: str) -> None:
    """Kernels of one instruction set read the weights that those of another have packed."""
    row = {**CASES[0], "layout": "nhwc"}
    given = ConvCase(row)
    with running(f"native-{packed_by}"):
        packed = given.packed(ops.native)
    arguments = given.x, packed, given.residual, *given.numbers
    with running("native-generic"):
        plain = ops.native_ghost_conv_apply(*arguments)
        own = given.packed(ops.native)
        assert same_bits(plain, ops.native_ghost_conv_apply(given.x, own, *arguments[2:]))
    with running(f"native-{EMULATED}"):
        got = ops.native_ghost_conv_apply(*arguments)
    assert_close(got, given.formula(torch.float64), plain)
    with pytest.raises(RuntimeError, match="packed does not belong"):
        ops.native_ghost_conv_apply(given.x, packed[1:], *arguments[2:])
    with pytest.raises(RuntimeError, match=r"packed must be .* in the compute dtype"):
        ops.native_ghost_conv_apply(given.x, packed.double(), *arguments[2:])


def test_modules(tiles: Any) -> None:
    """Whole modules, some of whose kernels use tiles, against their layers one by one."""
    for module in (
        ghost_ops.FusedGhostBottleneck(16, 40, 24, stride=2, se_ratio=0.25),
        ghost_ops.FusedGhostModule(16, 20, activation="prelu"),
        ghost_ops.FusedGhostModule(16, 20, 3, dw_size=5, activation="silu"),
    ):
        randomize(module)
        fused = module.to(torch.bfloat16).eval()
        plain = copy.deepcopy(fused)
        ghost_ops.unfuse(plain)
        for layout in LAYOUTS:
            x = with_layout(random(2, 16, 9, 9), layout)
            with torch.no_grad():
                got, eager = fused(x), plain(x)
                exact = copy.deepcopy(plain).double()(x.double())
            assert_close(got, exact, eager, what=f"{type(fused).__name__} {layout}")


@NEEDS_AMX
def test_the_library_has_the_instructions() -> None:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    command = [objdump, "-d", "--no-show-raw-insn", str(pathlib.Path(LIBRARY.__file__))]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("tdpbf16ps", "tileloadd", "tilestored", "vcvtneps2bf16"):
        assert name in listing, name
