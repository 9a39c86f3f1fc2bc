"""Ghost modules and convolutions of k x k as one operator, ``ghost_conv_apply``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, activation, assert_close, covering, with_layout
from torch import Tensor

from ghost_ops import activations, backends
from ghost_ops.conventions import compute_dtype
from ghost_ops.ops import eager as eager_ops
from ghost_ops.ops import ghost as ops
from ghost_ops.ops import layers as model_ops

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
)  # fmt: skip


def ids(row: dict) -> str:
    return "-".join(str(v).replace("torch.", "") for v in row.values())


class Given:
    """Tensors for one row, and the operator's arguments."""

    def __init__(self, row: dict) -> None:
        gen = torch.Generator().manual_seed(1)
        dtype, wide = row["dtype"], compute_dtype(row["dtype"])
        n, c, h, w = row["shape"]
        k, m, (ratio, d) = row["k"], row["m"], row["ghosts"]
        self.row, self.g = row, m * (ratio - 1)
        tail = row["tail"] and ratio > 1
        self.out = m + self.g - (row["cut"] if ratio > 1 else 0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=gen, dtype=torch.float64)

        self.x = with_layout(random(n, c, h, w).to(dtype), row["layout"])
        self.w1 = (random(m, c, k, k) * (c * k * k) ** -0.5).to(dtype)
        self.w2 = (random(self.g, 1, d, d) * d**-1.0).to(dtype)
        self.norms = [
            t.to(wide)
            for size in (m, self.g)
            for t in (random(size), random(size), random(size), random(size).abs() + 0.5)
        ]
        self.ends = (random(m).to(wide), random(m).to(wide)) if tail else ()
        p, s = row["padding"], row["stride"]
        size = [(v + 2 * p - k) // s + 1 for v in (h, w)]
        self.residual = None
        if row["residual"]:
            self.residual = with_layout(random(n, self.out, *size).to(dtype), row["layout"])
        self.acts = ("none" if tail else row["act"]), row["act"]
        codes = (activations.CODES[act] for act in self.acts)
        (act1, act2), slope = codes, activations.DEFAULT_SLOPE
        self.numbers = (
            k, p, tail, m, self.out, ratio, d if self.g else 1, s, act1, slope, act2, slope,
        )  # fmt: skip

    def packed(self, functions: Any) -> Tensor:
        rows = self.w1.permute(0, 2, 3, 1).reshape(self.w1.size(0), -1, 1, 1)
        w2 = self.w2 if self.g else self.w2.new_empty(0, 1, 1, 1)
        n = self.norms
        made = functions.ghost_pack(rows, *n[:4], 1e-3, w2, *n[4:], 1e-3)
        return torch.cat([made, *self.ends])

    def formula(self, dtype: torch.dtype) -> Tensor:
        x, w1, w2 = (t.to(dtype) for t in (self.x, self.w1, self.w2))
        n = [t.to(dtype) for t in self.norms]
        row = self.row

        def norm(u: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return F.batch_norm(u, mean, var, gamma, beta, False, 0.0, 1e-3)

        u = F.conv2d(x, w1, None, row["stride"], row["padding"])
        y = activation(self.acts[0], norm(u, *n[:4]))
        out = y
        if self.ends:
            scale, shift = (t.to(dtype).view(-1, 1, 1) for t in self.ends)
            out = activation(self.acts[1], y * scale + shift)
        if self.g:
            v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
            out = torch.cat([out, activation(self.acts[1], norm(v, *n[4:]))], 1)
        out = out[:, : self.out]
        return out if self.residual is None else out + self.residual.to(dtype)


@pytest.mark.parametrize("row", CASES, ids=ids)
def test_operator(every_isa: str, row: dict) -> None:
    given = Given(row)
    packed = given.packed(eager_ops if every_isa == "eager" else ops.native)
    got = model_ops.ghost_conv_apply(given.x, packed, given.residual, *given.numbers)
    want = given.formula(torch.float64)
    eager = given.formula(compute_dtype(row["dtype"])).to(row["dtype"])
    assert got.dtype == row["dtype"]
    assert got.shape == want.shape
    fmt = torch.channels_last if row["layout"] == "nhwc" else torch.contiguous_format
    assert got.is_contiguous(memory_format=fmt)
    assert_close(got, want, eager, scale=want.abs().max() + 4)


@pytest.mark.parametrize("row", CASES[::9], ids=ids)
def test_opcheck(row: dict) -> None:
    given = Given(row)
    arguments = (given.x, given.packed(ops.native), given.residual, *given.numbers)
    torch.library.opcheck(torch.ops.ghost_ops.ghost_conv_apply.default, arguments)


def test_threads_change_no_bit(native: str) -> None:
    given = Given({**CASES[0], "shape": (3, 16, 19, 17), "dtype": torch.float32})
    packed, results = given.packed(ops.native), []
    numbers = given.numbers
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(model_ops.ghost_conv_apply(given.x, packed, None, *numbers))
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
    given = Given({**row, "dtype": torch.float32})
    packed = given.packed(eager_ops if backend == "eager" else ops.native)
    with pytest.raises(RuntimeError):
        arguments = BAD[name](given.x, packed, given.residual)
        model_ops.ghost_conv_apply(*arguments, *given.numbers)


# --- modules ----------------------------------------------------------------------------------


def test_where_the_kernel_is_the_check_is_the_dispatchers(native: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key("ghost_ops::ghost_conv_apply", "CPU")
    assert model_ops.has_conv_kernel() == has
    assert backends.select("cpu", torch.float32) == "native"
