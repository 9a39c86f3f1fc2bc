"""Rows of the tests of the CUDA operators, on the emulator (test_cuda_kernels) and on a GPU
(test_cuda_gpu)."""

from __future__ import annotations

from typing import Any

import torch
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, Case, covering


def identity(row: dict[str, Any]) -> str:
    flags = [name for name, value in row.items() if value is True and name != "case"]
    others = [str(row[name]) for name in ("grad_style",) if name in row]
    return "-".join([str(row["case"]), *others, *flags])


def grid(axes: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows in which every pair of values of two axes occurs, with the fields of a Case joined."""
    fields = set(Case.__dataclass_fields__)
    rows = []
    for row in covering(axes):
        row["h"], row["w"] = row.pop("hw")
        case = Case(**{k: v for k, v in row.items() if k in fields})
        rows.append({"case": case, **{k: v for k, v in row.items() if k not in fields}})
    return rows


# Sizes around the tiles: one pixel, less than a strip, whole small images, several bands; channels
# around the blocks of 8, 16, 32 and 64, odd ones, one.
AXES: dict[str, Any] = {
    "n": (1, 2, 5),
    "c": (1, 3, 8, 17, 40, 72),
    "hw": ((1, 1), (1, 9), (9, 2), (3, 5), (7, 7), (8, 16), (14, 14), (5, 33), (21, 12)),
    "oup": (1, 2, 7, 16, 24, 35, 70),
    "ratio": (1, 2, 3, 5),
    "d": (1, 3, 5, 7),
    "stride": (1, 2),
    "act1": ACTIVATIONS,
    "act2": ACTIVATIONS,
    "layout": LAYOUTS,
    "dtype": DTYPES,
    "has_primary": (True, True, False),
}
EVAL = grid({**AXES, "residual": (False, True), "use_tf32": (False, True)})
# Batch statistics of one value have zero variance.
TRAIN_AXES = {
    **AXES,
    "n": (2, 3, 6),
    "hw": ((2, 2), (1, 9), (9, 2), (3, 5), (7, 7), (8, 16), (14, 14), (5, 33)),
    "keep_u": (False, True),
    "grad_style": ("dense", "expanded", "other layout", "sliced"),
}
TRAIN = grid(TRAIN_AXES)
FROZEN = grid(TRAIN_AXES)[::4]
# Batch and given statistics mixed, PReLUs, and the calls of several processes.
MIXED = grid(
    {
        "n": (2, 5),
        "c": (3, 8, 40),
        "hw": ((1, 9), (7, 7), (9, 14), (5, 33)),
        "oup": (7, 16, 35),
        "ratio": (1, 2, 3),
        "d": (1, 3, 5),
        "stride": (1, 2),
        "act1": ("silu",),
        "act2": ("gelu",),
        "layout": LAYOUTS,
        "dtype": DTYPES,
        "has_primary": (True, True, False),
        "keep_u": (False, True),
        "batch_stats": ((True, True), (True, False), (False, True), (False, False)),
        "prelu": ((False, False), (True, False), (False, True), (True, True)),
        "in_three": (False, True),
    }
)
# Gates whose size divides that of the output, does not, is larger, and is one number per map.
EXTRAS = grid(
    {
        "n": (1, 2, 5),
        "c": (1, 8, 17, 40),
        "hw": ((1, 1), (3, 5), (7, 7), (9, 14), (5, 33), (28, 12)),
        "oup": (1, 7, 16, 35, 70),
        "ratio": (1, 2, 3),
        "d": (1, 3, 5),
        "stride": (1, 2),
        "act1": ("none", "relu"),
        "act2": ("none", "silu"),
        "layout": LAYOUTS,
        "dtype": DTYPES,
        "has_primary": (True, True, False),
        "residual": (False, True),
        "prelu": ((False, False), (True, False), (False, True), (True, True)),
        "gate": (None, (1, 1), (2, 3), (7, 7), (4, 11), (31, 40)),
        "gate_layout": (None, "nchw", "nhwc"),
        "use_tf32": (False, True),
    }
)
STATISTICS = [
    Case(2, 16, 9, 17, 11, ratio=3, d=5, act1="silu", layout="nhwc"),
    Case(3, 4, 5, 15, 13, stride=2, act1="hardswish"),
    Case(2, 8, 9, 18, 12, dtype=torch.bfloat16, act1="silu"),
    Case(2, 40, 9, 18, 12, dtype=torch.float16, layout="nhwc"),
    Case(2, 5, 6, 7, 8, dtype=torch.float64),
]
EMPTY = [
    *(Case(0, 4, 5, 5, 6, ratio=r, layout=layout) for r in (1, 2) for layout in LAYOUTS),
    Case(0, 40, 7, 6, 24, stride=2, layout="nhwc", dtype=torch.float16),
]
MANY_IMAGES = [
    Case(70_000, 16, 2, 2, 24, layout="nhwc", dtype=torch.float16, act1="silu", act2="silu"),
    Case(70_000, 7, 2, 2, 10, layout="nchw", dtype=torch.float32, act1="silu", act2="silu"),
]
