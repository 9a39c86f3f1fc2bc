"""What a training step of a model keeps between forward and backward, and what it computes again.

Called as ``planner.explain_saved(model, input_shape)``. The choice is by bytes: of all that allows
backward to compute a part again the smallest is kept, which is its input, since its neighbour keeps
that as well; the price is in FLOPs. u of a Ghost module (the primary convolution's result) is kept
too where it is a quarter of its input or less.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SavedRow:
    """All parts of one kind.

    Attributes:
        part: what they are.
        times: how many.
        keeps: what is kept of each.
        bytes_kept: of the maps [N, C, H, W] that are kept, each counted once, in the first row
            that has it.
        again: what backward computes again.
        bytes_dropped: of the maps that PyTorch's layers keep in these parts, and these do not.
        flops: multiplications and additions that backward does again.
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
    """The rows, and their sums. Its str is a table."""

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
        rows = [*self.rows, SavedRow("all", sum(r.times for r in self.rows), "", self.bytes_kept,
                                     "", self.bytes_dropped, self.flops)]  # fmt: skip
        cells = [("part", "times", "keeps", "MiB", "computes again", "MiB less", "GFLOP more")]
        cells += [
            (r.part, str(r.times), r.keeps, f"{r.bytes_kept / 2**20:.1f}", r.again,
             f"{r.bytes_dropped / 2**20:.1f}", f"{r.flops / 1e9:.2f}")
            for r in rows
        ]  # fmt: skip
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
    """What one training step keeps for backward, by running the forward of a copy of the model.

    Args:
        model: fused or not, on the CPU.
        input_shape: [N, C, H, W].
        dtype: of the input; that of the model's first parameter by default.
        channels_last: memory format of the input.

    Returns:
        A row for each kind of part. Single values, vectors and parameters do not count.

    Raises:
        Whatever the model raises.
    """
    twin = copy.deepcopy(model).train()
    first = next(twin.parameters(), None)
    dtype = dtype or (torch.float32 if first is None else first.dtype)
    x = torch.zeros(tuple(input_shape), dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        out = twin(x)
    parameters = {p.untyped_storage().data_ptr() for p in twin.parameters()}
    seen: set[int] = set()
    found: dict[str, list[SavedRow]] = {}
    for node in _nodes(out.grad_fn):
        maps, weights = [], []
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
    """The nodes of an autograd graph, from the first that ran on."""
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
    """The maps and weights that a node keeps: all 4-D tensors."""
    if hasattr(node, "saved_tensors"):
        tensors = list(node.saved_tensors)
    else:
        names = [name for name in dir(node) if name.startswith("_saved_")]
        tensors = [getattr(node, name) for name in names]
    return [t for t in tensors if isinstance(t, Tensor) and t.dim() == 4 and t.numel()]


def _together(rows: list[SavedRow]) -> SavedRow:
    return SavedRow(
        rows[0].part, len(rows), rows[0].keeps, sum(r.bytes_kept for r in rows), rows[0].again,
        sum(r.bytes_dropped for r in rows), sum(r.flops for r in rows),
    )  # fmt: skip


def _pixels(x: Tensor, kernel: Sequence[int], settings: Any) -> int:
    """Values per channel of a convolution's result, all images together."""
    count = x.size(0)
    for i in (0, 1):
        reach = settings.dilation[i] * (kernel[i] - 1) + 1
        count *= (x.size(2 + i) + 2 * settings.padding[i] - reach) // settings.stride[i] + 1
    return count


def _ghost(node: Any, maps: list[Tensor], weights: list[Tensor], kept: int) -> SavedRow:
    x, s = maps[0], node.settings
    w1 = weights[0] if len(weights) > 1 or weights[0].size(1) > 1 else None
    w2 = weights[-1] if len(weights) > 1 or w1 is None else None
    m = x.size(1) if w1 is None else w1.size(0)
    pixels = x.numel() // x.size(1) if w1 is None else _pixels(x, w1.shape[2:], s)
    g = 0 if w2 is None else w2.size(0)
    keeps_u = len(maps) > 1
    again = 0 if w1 is None or keeps_u else 2 * pixels * w1.numel()
    again += 0 if w2 is None else 2 * pixels * w2.numel()
    # Layers keep u and y, v, and z where an activation needs it.
    dropped = pixels * x.element_size() * ((0 if keeps_u else m) + (m if g else 0) + g)
    if g:
        ending = ", u" if keeps_u else ""
        what = "v, y, z" if keeps_u else "u, v, y, z"
        return SavedRow(f"Ghost module{' that keeps u' if keeps_u else ''}", 1, f"x{ending}", kept,
                        what, dropped, again)  # fmt: skip
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
