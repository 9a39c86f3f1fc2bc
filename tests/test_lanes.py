"""Promise: the kernels with channels along the lanes give the same numbers in every tiling.

Also ``run_program``, which runs several of these operators as one.
"""

from __future__ import annotations

import pytest
import torch
from conftest import native_module
from helpers import DTYPES, LAYOUTS, assert_close, covering, same_bits
from operator_cases import ConvCase, row_id

from ghost_ops import ops, planner
from ghost_ops.fusion.program import Program

pytestmark = pytest.mark.skipif(native_module() is None, reason="the native library is not built")

CASES = covering(
    {
        "shape": [(2, 5, 23, 11), (1, 16, 40, 33), (3, 19, 17, 24), (1, 3, 61, 5)],
        "k": [1, 3],
        "stride": [1, 2],
        "padding": [0, 1],
        "m": [5, 16, 20, 37],
        "ghosts": [(1, 1), (2, 3), (3, 5), (2, 7), (4, 3)],
        "cut": [0, 3],
        "tail": [False, True],
        "residual": [False, True],
        "act": ["relu", "silu", "none"],
        "layout": list(LAYOUTS),
        "dtype": list(DTYPES),
    }
)


@pytest.mark.parametrize("row", CASES, ids=row_id)
def test_bands(native: str, small_caches: None, row: dict) -> None:
    given = ConvCase(row)
    packed = given.packed(ops.native)
    arguments = given.x, packed, given.residual, *given.numbers
    got = ops.native_ghost_conv_apply(*arguments)
    exact = given.formula(torch.float64)
    assert_close(got, exact, given.formula(row["dtype"]))
    assert planner.cpu_machine().l2_bytes == 64 << 10
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(ops.native_ghost_conv_apply(*arguments), got), threads


@pytest.mark.parametrize("m", [5, 12, 20, 36, 40])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_stores_past_the_caches(native: str, small_caches: None, m: int, act: str) -> None:
    """Streaming stores of a large output, and numbers of channels that end in half a vector."""
    row = {"shape": (6, 4, 40, 33), "k": 1, "stride": 1, "padding": 0, "m": m, "ghosts": (2, 3)}
    row |= {"cut": 1, "tail": False, "residual": False, "act": act, "layout": "nhwc"}
    row["dtype"] = torch.float32
    given = ConvCase(row)
    assert planner.explain(row["shape"], 2 * m - 1, channels_last=True).stream
    got = ops.native_ghost_conv_apply(
        given.x, given.packed(ops.native), given.residual, *given.numbers
    )
    assert_close(got, given.formula(torch.float64), given.formula(torch.float32))


def weights(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_program_is_its_operators(native: str, layout: str) -> None:
    """A program gives the bits of its operators, and does not change x."""
    x = weights(2, 6, 9, 8)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    norm = (None, None, torch.zeros(5), torch.ones(5), 1e-5)
    packed = ops.native.ghost_pack(weights(5, 6, 1, 1), *norm, weights(5, 1, 3, 3), *norm)
    ghost = (None, 5, 10, 2, 3, 1, 1, 0.0, 0, 0.0, True)
    w, shift = weights(10, 1, 3, 3), weights(10)
    taps_first = w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    gate = weights(4, 10), weights(4), weights(4, 10), weights(10)

    y = ops.native.ghost_apply(x, packed, None, *ghost)
    z = ops.depthwise_conv(y, w, shift, 1, 1, 0.0)
    ops.squeeze_excite_(z, *gate)
    want = z + 0

    program = Program()
    v = program.ghost(0, packed, ghost[1:], None, is_conv=False)
    v = program.depthwise(v, w, taps_first, shift, (1, 1, 0.0))
    program.excite(v, gate, (1, 0.01, 0))
    operator, arguments = program.packed()
    before = x.clone()
    assert same_bits(operator(x, *arguments), want)
    assert same_bits(x, before)


@pytest.mark.parametrize(
    "code",
    [
        [],
        [8, 1, 0],
        [-1, 1, 0],
        [0, 0],
        [0, 40, 0],
        [5, 2, -1, 0],
        [5, 1, 0],
        [5, 2, 0, 1],
        [5, 3, 1, 1, 0],
        [7, 3, 0, 0, 2],
        [1, 9, 0, 0, 0, 0, 0, 3, 1, 0, 0],
    ],
    ids=str,
)
def test_no_program(native: str, code: list[int]) -> None:
    if not code:  # a program without instructions returns x
        got = ops.native_run_program(torch.ones(1, 2, 3, 4), [], torch.tensor([], dtype=int))
        assert torch.equal(got, torch.ones(1, 2, 3, 4))
        return
    with pytest.raises(RuntimeError, match="program: no"):
        ops.native_run_program(torch.ones(1, 2, 3, 4), [], torch.tensor(code))


def test_values_of_other_shapes(native: str) -> None:
    x = torch.ones(2, 3, 4, 5)
    for join, message in (("sum", "terms of a sum"), ("concat", "what is concatenated")):
        program = Program()
        y = program.mean(0)
        if join == "sum":
            program.sum(0, y, (0, 0.0), in_place=False)
        else:
            program.concat((0, y))
        operator, arguments = program.packed()
        with pytest.raises(RuntimeError, match=message):
            operator(x, *arguments)


def test_code_of_another_type(native: str) -> None:
    with pytest.raises(RuntimeError, match="code must be"):
        ops.native_run_program(torch.ones(1, 2, 3, 4), [], torch.tensor([1.0]))
