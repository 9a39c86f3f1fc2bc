"""Promise: ``ghost_conv_apply`` computes a Ghost module whose primary convolution is k x k."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_close, covering
from operator_cases import ConvCase, row_id

from ghost_ops import backends, ops
from ghost_ops.conventions import compute_dtype
from ghost_ops.ops import eager as eager_ops

CASES = covering(
    {
        "shape": [(2, 5, 9, 7), (1, 16, 14, 14), (3, 3, 7, 7), (1, 33, 6, 19)],
        "k": [1, 3, 5],
        "stride": [1, 2],
        "padding": [0, 1, 2],
        "m": [4, 13],
        "ghosts": [(1, 1), (2, 3), (3, 5), (2, 7)],
        "cut": [0, 1],
        "tail": [False, True],
        "residual": [False, True],
        "act": ["relu", "silu", "leaky_relu", "none"],
        "layout": list(LAYOUTS),
        "dtype": list(DTYPES),
    }
)


@pytest.mark.parametrize("row", CASES, ids=row_id)
def test_operator(every_isa: str, row: dict) -> None:
    given = ConvCase(row)
    packed = given.packed(eager_ops if every_isa == "eager" else ops.native)
    got = ops.ghost_conv_apply(given.x, packed, given.residual, *given.numbers)
    want = given.formula(torch.float64)
    eager = given.formula(compute_dtype(row["dtype"])).to(row["dtype"])
    assert got.dtype == row["dtype"]
    assert got.shape == want.shape
    fmt = torch.channels_last if row["layout"] == "nhwc" else torch.contiguous_format
    assert got.is_contiguous(memory_format=fmt)
    assert_close(got, want, eager, scale=want.abs().max() + 4)


@pytest.mark.parametrize("row", CASES[::9], ids=row_id)
def test_opcheck(row: dict) -> None:
    given = ConvCase(row)
    arguments = (given.x, given.packed(ops.native), given.residual, *given.numbers)
    torch.library.opcheck(torch.ops.ghost_ops.ghost_conv_apply.default, arguments)


def test_threads_change_no_bit(native: str) -> None:
    given = ConvCase({**CASES[0], "shape": (3, 16, 19, 17), "dtype": torch.float32})
    packed, results = given.packed(ops.native), []
    numbers = given.numbers
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.ghost_conv_apply(given.x, packed, None, *numbers))
    assert torch.equal(*results)


BAD = {
    "too few parameters": lambda x, packed, residual: (x, packed[:-1], residual),
    "residual of another shape": lambda x, packed, residual: (x, packed, residual[:, :1]),
    "residual of another dtype": lambda x, packed, residual: (x, packed, residual.double()),
    "smaller than the kernel": lambda x, packed, _: (x[..., :1, :1].contiguous(), packed, None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(backend: str, name: str) -> None:
    row = {**CASES[0], "shape": (2, 5, 9, 7), "k": 5, "padding": 1, "stride": 1, "residual": True}
    given = ConvCase({**row, "dtype": torch.float32})
    packed = given.packed(eager_ops if backend == "eager" else ops.native)
    with pytest.raises(RuntimeError):
        arguments = BAD[name](given.x, packed, given.residual)
        ops.ghost_conv_apply(*arguments, *given.numbers)


# --- modules ----------------------------------------------------------------------------------


def test_where_the_kernel_is_the_check_is_the_dispatchers(native: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key("ghost_ops::ghost_conv_apply", "CPU")
    assert ops.has_conv_kernel() == has
    assert backends.select("cpu", torch.float32) == "native"
