"""Promise: a gate is multiplied with the output while it is stored, without a pass over memory.

GhostModuleV2's attention is computed at half the size and enlarged by nearest neighbours, the same
ones that ``F.interpolate`` takes.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import running
from ghost_forms import Gated, randomize
from helpers import (
    DTYPES,
    LAYOUTS,
    Case,
    Params,
    assert_close,
    covering,
    make_input,
    make_module,
    ops_of,
    oracle,
    plain,
    recorded,
    same_bits,
    with_layout,
)
from operator_cases import apply_packed
from torch import Tensor, nn

import ghost_ops
from ghost_ops.reference import GhostBottleneck

# Ragged rows, joined images, bands, rows and channels divided among threads, and outputs large
# enough for streaming stores, with rows that are aligned for them and rows that are not.
SHAPES = {
    "ragged": Case(2, 5, 6, 7, 8, act1="hardswish"),
    "joined": Case(9, 40, 7, 7, 30),
    "wide rows": Case(1, 6, 30, 56, 12, d=5, act2="silu"),
    "ratio 3": Case(2, 9, 14, 14, 23, ratio=3, act1="none", act2="none"),
    "strided": Case(2, 9, 21, 20, 22, stride=2),
    "one pixel": Case(2, 7, 1, 1, 4),
    "streamed": Case(2, 3, 64, 64, 130),
    "bands": Case(1, 3, 66, 66, 130),
}


def apply(
    backend: str, case: Case, x: Tensor, gate: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    p = Params.of(make_module(case))
    return apply_packed(backend, case, p, x, residual=residual, gate=gate)


def output_size(case: Case) -> tuple[int, int]:
    return -(-case.h // case.stride), -(-case.w // case.stride)


def gate_for(case: Case, kind: str, layout: str) -> Tensor:
    h, w = output_size(case)
    size = {
        "half": (max(h // 2, 1), max(w // 2, 1)),
        "one": (1, 1),
        "equal": (h, w),
        "uneven": (max(h * 3 // 5, 1), max(w * 2 // 7, 1)),
        "larger": (2 * h + 1, 3 * w + 2),
    }[kind]
    gen = torch.Generator().manual_seed(3)
    gate = torch.rand(case.n, case.oup, *size, generator=gen, dtype=torch.float64)
    return with_layout(gate.to(case.dtype), layout)


GRID = covering(
    {
        "shape": list(SHAPES),
        "kind": ["half", "one", "equal", "uneven", "larger"],
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "gate_layout": LAYOUTS,
        "residual": [False, True],
    }
)


@pytest.mark.parametrize("row", GRID, ids=lambda row: "-".join(map(str, row.values())))
def test_operator(every_isa: str, row: dict) -> None:
    case = SHAPES[row["shape"]].replace(dtype=row["dtype"], layout=row["layout"])
    x, gate = make_input(case), gate_for(case, row["kind"], row["gate_layout"])
    h, w = output_size(case)
    residual = None
    if row["residual"]:
        residual = make_input(case.replace(c=case.oup, h=h, w=w, layout="nchw"), extra_seed=2)
    p = Params.of(make_module(case))

    def wanted(out: Tensor, dtype: torch.dtype) -> Tensor:
        out = out * F.interpolate(gate.to(dtype), (h, w), mode="nearest")
        return out if residual is None else out + residual.to(dtype)

    with torch.no_grad():
        got = apply(every_isa, case, x, gate, residual)
        want = oracle(p.to(torch.float64), x.double(), case, False).out
        eager = wanted(plain(p, x, case, False), case.dtype)
        assert_close(got, wanted(want, torch.float64), eager)
    fmt = torch.channels_last if row["layout"] == "nhwc" else torch.contiguous_format
    assert got.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_neighbour_is_the_one_that_interpolate_takes(every_isa: str, layout: str) -> None:
    """In float32, i * (in / out) can fall below an integer, as in 5 * (3 / 5)."""
    for size in (*range(1, 41), 49, 57, 63, 100, 111, 113):
        for small in {1, 2, 3, size // 3, size // 2, size * 3 // 5, size - 1, size, size + 3}:
            if small < 1:
                continue
            case = Case(1, 2, 3, size, 2, ratio=1, d=1, layout=layout)
            gate = torch.arange(2.0 * 2 * small).view(1, 2, 2, small) + 1
            x = with_layout(torch.ones(1, 2, 3, size), layout)
            got = through_identity(every_isa, case, x, with_layout(gate, layout))
            want = F.interpolate(gate, (3, size), mode="nearest")
            assert torch.equal(got, want), (small, size)


def through_identity(backend: str, case: Case, x: Tensor, gate: Tensor) -> Tensor:
    ops, one = ops_of(backend), torch.ones(case.m)
    packed = ops.ghost_pack(
        None, one, one * 0, None, None, 0.0, torch.ones(0, 1, 1, 1), None, None, None, None, 0.0
    )
    numbers = (case.m, case.m, 1, 1, 1, 0, 0.0, 0, 0.0, False)
    return ops.ghost_apply(x, packed, None, gate, *numbers)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["joined", "wide rows", "streamed", "bands"])
def test_bits_do_not_depend_on_threads(native: str, name: str, layout: str, threads: int) -> None:
    case = SHAPES[name].replace(layout=layout)
    x, gate = make_input(case), gate_for(case, "half", layout)
    with torch.no_grad():
        one = apply("native", case, x, gate)
        torch.set_num_threads(threads)
        assert same_bits(apply("native", case, x, gate), one)


BAD = {
    "channels": (lambda g: g[:, 1:], r"gate must be \[2, 8, Hg, Wg\]"),
    "images": (lambda g: g[:1], r"gate must be \[2, 8, Hg, Wg\]"),
    "rank": (lambda g: g[0], r"gate must be \[2, 8, Hg, Wg\]"),
    "dtype": (lambda g: g.double(), "dtype of x"),
    "nothing in it": (lambda g: g[:, :, :0], "gate must be|greater than 0|non-empty|non-zero"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_gates(backend: str, name: str) -> None:
    change, message = BAD[name]
    case = SHAPES["ragged"]
    with pytest.raises(RuntimeError, match=message):
        apply(backend, case, make_input(case), change(gate_for(case, "half", "nchw")))


# --- modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_applied_in_the_epilogue(native: str, layout: str) -> None:
    plain_module = randomize(Gated(6, 8)).eval()
    fused = copy.deepcopy(plain_module)
    ghost_ops.fuse(fused)
    x = make_input(Case(2, 6, 15, 18, layout=layout))
    with torch.no_grad():
        fused(x)
        with recorded() as names:
            got = fused(x)
        torch.testing.assert_close(got, plain_module(x), rtol=1e-5, atol=1e-5)
    assert "ghost_ops::ghost_apply" in names
    assert not [n for n in names if n.startswith(("aten::upsample", "aten::mul"))], names


class GatedBottleneck(GhostBottleneck):
    """As in GhostNetV2: attention in the first Ghost module."""

    def __init__(self) -> None:
        super().__init__(6, 12, 8, stride=2, se_ratio=0.25)
        self.ghost1 = Gated(6, 12)


def test_bottleneck_with_attention(backend: str) -> None:
    before = randomize(GatedBottleneck()).eval()
    fused = copy.deepcopy(before)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert "left" not in {e.state for e in report.entries}
    x = torch.randn(2, 6, 14, 14)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), before(x), rtol=1e-5, atol=1e-5)
        for model in (fused, before):
            model.ghost1.short_conv[0].weight.mul_(2)
        torch.testing.assert_close(fused(x), before(x), rtol=1e-5, atol=1e-5)


def test_changes_in_the_layers_of_the_gate(native: str) -> None:
    """The gate's layers run unfused: hooks in them run and changes of them take effect."""
    before = randomize(Gated(6, 8)).eval()
    fused = copy.deepcopy(before)
    ghost_ops.fuse(fused)
    x, seen = torch.randn(2, 6, 10, 10), []
    with torch.no_grad():
        fused(x)
        fused.short_conv.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(fused(x), before(x), rtol=1e-5, atol=1e-5)
        assert seen == [1]
        for model in (fused, before):
            model.short_conv[1] = nn.Identity()
        torch.testing.assert_close(fused(x), before(x), rtol=1e-5, atol=1e-5)


def test_gate_on_bands() -> None:
    """An output of several bands, gated while it is stored, is the output times the gate."""
    with running("native"):
        case = SHAPES["bands"]
        x, gate = make_input(case), gate_for(case, "half", "nchw")
        with torch.no_grad():
            gated = apply("native", case, x, gate)
            by_hand = apply("native", case, x, None) * F.interpolate(gate, gated.shape[2:])
        torch.testing.assert_close(gated, by_hand, rtol=1e-6, atol=1e-6)
