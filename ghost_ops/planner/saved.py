"""The tensors that a training step saves for backward, and the work that backward repeats.

A fused part saves its input only. The input costs no extra memory if the part before saves it too
(as its output). Backward computes the other tensors again, which costs FLOPs. A Ghost module also
saves u, the result of the primary convolution, if u has at most a quarter of the input's bytes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments


@dataclass(frozen=True)
class SavedRow:
    """The saved tensors of all parts of one kind; bytes and FLOPs are sums over these parts.

    Attributes:
        part: the kind.
        times: the number of parts.
        keeps: the tensors that each part saves, in words.
        bytes_kept: bytes of the saved maps [N, C, H, W]. A map that several parts save counts only
            for the first of these parts.
        again: the tensors that backward computes again, in words.
        bytes_dropped: bytes of maps that PyTorch's layers would save and these parts do not.
        flops: multiplications and additions that backward repeats.
    """

    part: str
    times: int
    keeps: str
    bytes_kept: int
    again: str = ""
    bytes_dropped: int = 0
    flops: int = 0


@dataclass(frozen=True)
class SavedPlan:
    """The rows and their sums; ``str`` of a plan is a table.

    Attributes:
        rows: one for each kind of part.
        bytes_kept, bytes_dropped, flops: sums over the rows.
    """

    rows: tuple[SavedRow, ...]

    @property
    def bytes_kept(self) -> int:
        return sum(row.bytes_kept for row in self.rows)

    @property
    def bytes_dropped(self) -> int:
        return sum(row.bytes_dropped for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        times = sum(row.times for row in self.rows)
        total = SavedRow("all", times, "", self.bytes_kept, "", self.bytes_dropped, self.flops)
        cells = [("part", "times", "keeps", "MiB", "computes again", "MiB less", "GFLOP more")]
        for row in (*self.rows, total):
            kept, dropped = row.bytes_kept / 2**20, row.bytes_dropped / 2**20
            counts = f"{dropped:.1f}", f"{row.flops / 1e9:.2f}"
            cells.append((row.part, str(row.times), row.keeps, f"{kept:.1f}", row.again, *counts))
        widths = [max(len(row[i]) for row in cells) for i in range(7)]
        right = (1, 3, 5, 6)
        return "\n".join(
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        )


def explain_saved(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    channels_last: bool = False,
) -> SavedPlan:
    """The tensors that one training step saves for backward.

    A copy of the model runs its forward once, on zeros; the model itself does not change.

    Args:
        model: a model on the CPU, fused or not.
        input_shape: N, C, H, W of its input.
        dtype: of the input; None: the dtype of the model's first parameter.
        channels_last: memory format of the input.

    Returns:
        A plan with one row for each kind of part. Scalars, vectors and parameters do not count.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: input_shape is not four positive sizes.
        Any error of the model.
    """
    arguments.module("model", model)
    shape = arguments.image_shape("input_shape", input_shape)
    twin = copy.deepcopy(model).train()
    first = next(twin.parameters(), None)
    dtype = dtype or (torch.float32 if first is None else first.dtype)
    x = torch.zeros(shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        out = twin(x)
    parameters = {p.untyped_storage().data_ptr() for p in twin.parameters()}
    seen: set[int] = set()
    found: dict[str, list[SavedRow]] = {}
    for node in _nodes(out.grad_fn):
        maps: list[Tensor] = []
        weights: list[Tensor] = []
        for t in _saved(node):
            (weights if t.untyped_storage().data_ptr() in parameters else maps).append(t)
        new = {t.untyped_storage().data_ptr(): t for t in maps}
        new = {pointer: t for pointer, t in new.items() if pointer not in seen}
        seen |= set(new)
        kept = sum(t.numel() * t.element_size() for t in new.values())
        describe = _KINDS.get(type(node).__name__)
        if describe is not None:
            row = describe(node, maps, weights, kept)
        elif kept:
            row = SavedRow("PyTorch's layers", 1, "what they keep", kept)
        else:
            continue
        found.setdefault(row.part, []).append(row)
    return SavedPlan(tuple(_together(rows) for rows in found.values()))


def _nodes(root: Any) -> Iterator[Any]:
    """The nodes of an autograd graph, in the order of the forward."""
    order: list[Any] = []
    todo, seen = [root], {root}
    while todo:
        node = todo.pop()
        if node is None:
            continue
        order.append(node)
        for other, _ in node.next_functions:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return reversed(order)


def _saved(node: Any) -> list[Tensor]:
    """The maps and weights that a node saves: all 4-D tensors."""
    if hasattr(node, "saved_tensors"):
        tensors = list(node.saved_tensors)
    else:
        names = [name for name in dir(node) if name.startswith("_saved_")]
        tensors = [getattr(node, name) for name in names]
    return [t for t in tensors if isinstance(t, Tensor) and t.dim() == 4 and t.numel()]


def _together(rows: list[SavedRow]) -> SavedRow:
    """The sum of the rows of parts of one kind."""
    return replace(
        rows[0],
        times=len(rows),
        bytes_kept=sum(row.bytes_kept for row in rows),
        bytes_dropped=sum(row.bytes_dropped for row in rows),
        flops=sum(row.flops for row in rows),
    )


def _pixels(x: Tensor, kernel: Sequence[int], settings: Any) -> int:
    """Values per channel of a convolution's result, over all images."""
    count = x.size(0)
    for i in (0, 1):
        reach = settings.dilation[i] * (kernel[i] - 1) + 1
        count *= (x.size(2 + i) + 2 * settings.padding[i] - reach) // settings.stride[i] + 1
    return count


def _ghost(node: Any, maps: list[Tensor], weights: list[Tensor], kept: int) -> SavedRow:
    """The row of a Ghost module with m intrinsic and g ghost channels; g = 0 for a convolution."""
    x, s = maps[0], node.settings
    w1 = weights[0] if len(weights) > 1 or weights[0].size(1) > 1 else None
    w2 = weights[-1] if len(weights) > 1 or w1 is None else None
    m = x.size(1) if w1 is None else w1.size(0)
    pixels = x.numel() // x.size(1) if w1 is None else _pixels(x, w1.shape[2:], s)
    g = 0 if w2 is None else w2.size(0)
    keeps_u = len(maps) > 1
    again = 0 if w1 is None or keeps_u else 2 * pixels * w1.numel()
    again += 0 if w2 is None else 2 * pixels * w2.numel()
    # PyTorch's layers save u, y and v. For some activations they also save z, which is not counted.
    dropped = pixels * x.element_size() * ((0 if keeps_u else m) + (m if g else 0) + g)
    if g and keeps_u:
        part = "Ghost module that keeps u"
        return SavedRow(part, 1, "x, u", kept, "v, y, z", dropped, again)
    if g:
        return SavedRow("Ghost module", 1, "x", kept, "u, v, y, z", dropped, again)
    return SavedRow("convolution, norm, activation", 1, "x", kept, "u", dropped, again)


def _depthwise(node: Any, maps: list[Tensor], weights: list[Tensor], kept: int) -> SavedRow:
    x, weight, stride = maps[0], weights[0], node.settings.stride
    size = [math.ceil(x.size(i) / stride) for i in (2, 3)]
    values = x.size(0) * x.size(1) * size[0] * size[1]
    flops = 2 * values * weight.size(-1) ** 2
    dropped = values * x.element_size()
    return SavedRow("depthwise, norm", 1, "x", kept, "u", dropped, flops)


def _gate(node: Any, maps: list[Tensor], weights: list[Tensor], kept: int) -> SavedRow:
    return SavedRow("squeeze-excite", 1, "x and a few numbers an image", kept)


_KINDS: dict[str, Callable[..., SavedRow]] = {
    "GhostModuleFunctionBackward": _ghost,
    "DepthwiseFunctionBackward": _depthwise,
    "SqueezeExciteFunctionBackward": _gate,
}
