"""Every operator of a fused network on a GPU, next to eager PyTorch's: launches, bytes, time.

Eager PyTorch's operators are the ATen operators of one run on the meta device (``trace``). The
fused operators follow from the shapes in this run. ``costs`` computes the cost of each operator. No
GPU is needed, and the model does not change.

The cost model ignores:

- Caching: every operator reads its input from DRAM and writes its output there, even if it would
  fit in L2.
- Time on the host. At small batches it is longer than eager PyTorch's kernels.
- Kernels inside an ATen operator: layout conversions and workspaces of cuDNN, the inverse standard
  deviation of a batch norm, split reductions. They would add to the cost of eager PyTorch.
- The lower speed of launches with too few blocks to fill the GPU, except in the plans of ghost_ops'
  kernels. It would add to the cost of eager PyTorch.
- Plain multiply-adds of depthwise convolutions outside Ghost modules, on both sides.
- Shifts, slopes and cheap weights that ``ghost_apply`` reads, and all packing at the first call.
- Single GPU kernels of composite functions: on the meta device such a function is several
  operators. An operator that reads a part of a tensor counts as reading all of it.
- Hooks, which do not run. A Ghost module that contains a hook is not fused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import activations, arguments, ops
from ..conventions import DTYPES
from ..fusion.bottleneck import Bottleneck
from ..fusion.branch import Branch
from ..fusion.ghost_parts import Ghost
from ..fusion.network import Network
from ..sync import NORMS
from .costs import Cost, Gpu, has_primary
from .machine import CUDA_DEVICES, compute_capability
from .trace import Call, Op, Shape, Unit, conv_shape, trace

# The kinds of rows. First, operators of ghost_ops on CUDA:
GHOST_APPLY = "ghost_apply"
GHOST_APPLY_GATED = "ghost_apply_gated"  # x times the gate [N, C] of a squeeze-and-excitation
GHOST_APPLY_POOLED = "ghost_apply_pooled"  # the last convolution and the mean over its pixels
DEPTHWISE_CONV = "depthwise_conv"
DEPTHWISE_CONV_SUMS = "depthwise_conv_sums"  # also sums each output map, for the next gate
SQUEEZE_EXCITE_GATE = "squeeze_excite_gate"
CONV_STEM = "conv_stem"
OWN_KINDS = (
    *(GHOST_APPLY, GHOST_APPLY_GATED, GHOST_APPLY_POOLED),
    *(DEPTHWISE_CONV, DEPTHWISE_CONV_SUMS, SQUEEZE_EXCITE_GATE, CONV_STEM),
)
# Second, operators of PyTorch:
LIBRARY_CONV = "library_conv"  # a primary convolution or stem without an operator of ghost_ops
GATE_PRODUCT = "gate_product"  # a map times its gate, in place, if ghost_apply cannot take the gate
MEAN, ADDMM, ACTIVATION = "mean", "addmm", "activation"
PLAIN = "plain"  # operators that the fused network runs as eager PyTorch does
KINDS = (*OWN_KINDS, LIBRARY_CONV, GATE_PRODUCT, MEAN, ADDMM, ACTIVATION, PLAIN)


# --- the result ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkRow:
    """One operator of the fused network, and the operators of eager PyTorch that it replaces.

    Attributes:
        name: path of the operator's module in the model; ``(model)`` for the model itself.
        kind: one of ``KINDS``.
        launches, dram_bytes, seconds: cost of the fused operator; bytes read and written.
        eager_launches, eager_bytes, eager_seconds: cost of the replaced operators.
    """

    name: str
    kind: str
    launches: int
    dram_bytes: int
    seconds: float
    eager_launches: int
    eager_bytes: int
    eager_seconds: float


def _total(name: str, doc: str) -> Any:
    return property(lambda plan: sum(getattr(row, name) for row in plan.rows), doc=doc)


@dataclass(frozen=True)
class NetworkPlan:
    """The operators of a fused network in eval mode on a GPU, in the order in which they run.

    All numbers are modelled (``ghost_ops.planner.network``), not measured.

    Attributes:
        model: name of the model's class.
        device: the architecture, such as ``"sm_90"``.
        input_shape, dtype, channels_last: of the input [N, C, H, W].
        rows: one for each operator of ghost_ops; operators that stay in PyTorch share rows.
        notes: decisions, and the modules that ``fuse`` cannot fuse, with the reasons.
    """

    model: str
    device: str
    input_shape: tuple[int, int, int, int]
    dtype: torch.dtype
    channels_last: bool
    rows: tuple[NetworkRow, ...]
    notes: tuple[str, ...]

    launches = _total("launches", "Kernel launches of the fused network.")
    dram_bytes = _total("dram_bytes", "Bytes that the fused network reads and writes.")
    seconds = _total("seconds", "The model's time of the fused network; not measured.")
    eager_launches = _total("eager_launches", "Kernel launches of eager PyTorch.")
    eager_bytes = _total("eager_bytes", "Bytes that eager PyTorch reads and writes.")
    eager_seconds = _total("eager_seconds", "The model's time of eager PyTorch's kernels.")

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        shape, dtype = list(self.input_shape), str(self.dtype).removeprefix("torch.")
        width = max(len(name) for name in ("operator", *(row.name for row in self.rows)))

        def line(name: str, kind: str, of: NetworkRow | NetworkPlan) -> str:
            return (
                f"{name:{width}}  {kind:19}  {of.launches:8}  {of.dram_bytes / 1e6:10,.3f}"
                f"  {of.seconds * 1e6:8,.1f}  {of.eager_launches:8}  {of.eager_bytes / 1e6:10,.3f}"
                f"  {of.eager_seconds * 1e6:8,.1f}"
            )

        lines = [line(row.name, row.kind, row) for row in self.rows]
        above = f"{'fused':>{width + 51}}{'eager':>30}"
        head = f"{'operator':{width}}  {'kind':19}" + f"  launches  {'MB':>10}  {'us':>8}" * 2
        rule = "-" * len(head)
        title = f"{self.model} on {self.device}, {shape} {dtype} {layout}, evaluation"
        end = "times: a model from data sheet figures, not measured; MB: 1e6 bytes of DRAM"
        total = line("sum", "", self)
        return "\n".join([title, above, head, rule, *lines, rule, total, *self.notes, end])


# --- the entry ----------------------------------------------------------------------------------


def explain_network(
    model: nn.Module,
    input_shape: Sequence[int],
    device: str = "sm_90",
    dtype: torch.dtype = torch.float16,
    *,
    channels_last: bool = True,
    training: bool = False,
) -> NetworkPlan:
    """The operators of a fused model on a GPU, next to eager PyTorch's.

    ``planner.explain(model, input_shape, ...)`` calls this function. No GPU is needed. The model is
    neither run nor changed, moved or fused. A plain model and the same model fused have the same
    plan: that of the model after ``fuse(model, inference=True)``.

    Args:
        model: any module that takes one tensor: a network, a bottleneck, a Ghost module.
        input_shape: N, C, H, W of its input.
        device: one of ``planner.CUDA_DEVICES``; ``"cuda"``, the architecture of the current GPU.
        dtype: of input and parameters: float32, float64, bfloat16 or float16. For float32, torch's
            TF32 switch decides whether products use TF32.
        channels_last: memory format of the input.
        training: must be False.

    Returns:
        A :class:`NetworkPlan`; ``str`` of it is a table.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; or the model cannot run on the meta device, because
            its forward needs the values of a tensor.
        RuntimeError: the native library is not loaded, or a kernel has no plan for a shape.
        Any other error of the model's forward.
    """
    arguments.module("model", model)
    shape = arguments.image_shape("input_shape", input_shape)
    if training:
        raise ValueError("training: a network is planned in evaluation mode only")
    if not isinstance(device, str):
        raise TypeError(f"device must be a str, got {type(device).__name__}: {device!r}")
    if device not in (allowed := ("cuda", *CUDA_DEVICES)):
        raise ValueError(
            f"device must be one of {', '.join(map(repr, allowed))} for a network, got {device!r}; "
            "on the CPU single Ghost modules are planned: explain(shape, out_channels)"
        )
    sm = compute_capability(device)
    if dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype must be one of {known}, got {dtype}")
    channels_last = bool(channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    plain = getattr(model, "_orig_mod", model)  # of torch.compile
    root, units, notes = trace(plain, shape, dtype, layout)
    assert sm is not None  # the device is not the CPU
    builder = _Builder(Gpu(sm, dtype, channels_last), units)
    rows = tuple(map(builder.row, builder.walk(root)))
    if builder.orders:
        count, (first, last) = len(builder.orders), map(sum, zip(*builder.orders, strict=True))
        order = (
            f"shortcuts ({count}): the 1x1 runs first and ghost2 adds its result, {first:,} bytes "
            f"of both; the other way round {last:,} bytes"
        )
        notes = [order, *notes]
    name = type(root.module).__name__
    return NetworkPlan(name, f"sm_{sm}", shape, dtype, channels_last, rows, tuple(notes))


# --- the rows -----------------------------------------------------------------------------------


@dataclass
class _Part:
    """An unfinished row.

    Attributes:
        name, kind: as in ``NetworkRow``.
        cost: of the fused operator; None: the fused network runs ``ops`` as eager PyTorch does.
        owns: the keys of ``Call.ops`` whose operators this row replaces: a module, or (module, name
            of an operator).
        ops: the replaced operators.
    """

    name: str
    kind: str
    cost: Cost | None
    owns: tuple[Any, ...] = ()
    ops: list[Op] = field(default_factory=list)


def _charge(call: Call, parts: list[_Part], outside: tuple[nn.Module, ...] = ()) -> list[_Part]:
    """Add each eager operator of a call to the part that owns it, or else to the last part."""
    owners = {call.module: parts[-1]} | {key: part for part in parts for key in part.owns}
    for part, op in call.ops(owners, outside):
        part.ops.append(op)
    return parts


class _Builder:
    """Makes the rows for a tree of calls.

    Attributes:
        orders: for each shortcut, the bytes of its 1x1 convolution and ghost2 together if the 1x1
            runs before ghost2, and if it runs after.
    """

    def __init__(self, gpu: Gpu, units: dict[nn.Module, Unit]) -> None:
        self.gpu, self.units = gpu, units
        self.orders: list[tuple[int, int]] = []

    def row(self, part: _Part) -> NetworkRow:
        """A finished row."""
        eager = self.gpu.eager(part.ops)
        return NetworkRow(part.name, part.kind, *(part.cost or eager), *eager)

    def walk(self, call: Call) -> list[_Part]:
        """The parts of a call. Together they have all eager operators of the call."""
        unit = self.units.get(call.module) if len(call.in_shape) == 4 else None
        if isinstance(unit, Network):
            return self.network(call, unit)
        if isinstance(unit, Bottleneck):
            return self.bottleneck(call, unit)
        if isinstance(unit, Ghost):
            return self.lone_ghost(call, unit)
        parts = []  # not fused: the operators between two inner calls share one row
        for is_op, items in itertools.groupby(call.items, lambda item: isinstance(item, Op)):
            some: list[Any] = list(items)
            if is_op:
                parts.append(_Part(call.path, PLAIN, None, ops=some))
            else:
                parts += itertools.chain.from_iterable(map(self.walk, some))
        return parts

    def lone_ghost(self, call: Call, unit: Ghost) -> list[_Part]:
        """The parts of a Ghost module outside of bottlenecks; its tail is a ``PLAIN`` part."""
        parts = _charge(call, self.ghost(call, call.module, unit, call.in_shape))
        if unit.tail:
            # ghost_apply replaces the operators up to the concatenation, or up to V2's product.
            name, ops = "cat" if unit.gate is None else "mul", parts[-1].ops
            end = next(i for i, op in enumerate(ops, 1) if op.name.startswith(name))
            parts.append(_Part(call.path, PLAIN, None, ops=ops[end:]))
            del ops[end:]
        return parts

    def ghost(
        self,
        call: Call,
        module: nn.Module,
        ghost: Ghost,
        shape: Shape,
        residual: bool = False,
        gated: bool = False,
    ) -> list[_Part]:
        """The parts of a Ghost module on x of ``shape``; the last is ``ghost_apply``."""
        names, parts, gate, conv = call.names, [], (0, 0), ghost.primary.conv
        if ghost.gate is not None:  # the gate has half the height and width of x
            owns = (ghost.gate, (module, "avg_pool2d"), (module, "sigmoid"))
            parts.append(_Part(names[ghost.gate], PLAIN, None, owns))
            gate = shape[2] // 2, shape[3] // 2
        if not has_primary(ghost):
            cost = self.gpu.conv(shape, ghost.primary)
            parts.append(_Part(names[conv], LIBRARY_CONV, cost, (conv,)))
        cost = self.gpu.ghost_apply(shape, ghost, residual, gated, gate)
        kind = GHOST_APPLY_GATED if gated else GHOST_APPLY
        return [*parts, _Part(names[module], kind, cost, (module,))]

    def bottleneck(self, call: Call, unit: Bottleneck) -> list[_Part]:
        """The parts of a Ghost bottleneck; the last adds the shortcut."""
        names, gpu, ghost2 = call.names, self.gpu, unit.ghost2
        parts = self.ghost(call, unit.ghosts[0], unit.ghost1, call.in_shape)
        n, _, *size = conv_shape(call.in_shape, unit.ghost1.primary)
        shape: Shape = (n, unit.ghost1.settings.out_channels, *size)
        splits, gated = 0, False
        if unit.dw is not None:
            cost, splits = gpu.depthwise(shape, unit.dw.conv, sums=unit.gate is not None)
            kind = DEPTHWISE_CONV_SUMS if splits else DEPTHWISE_CONV
            parts.append(_Part(names[unit.dw.conv], kind, cost, unit.dw.modules))
            shape = conv_shape(shape, unit.dw)
        if unit.gate is not None:
            module = unit.gate.modules[0]  # ``reduce`` if the gate has no module
            gated = has_primary(ghost2) and ghost2.primary.conv.stride == (1, 1)
            reduced, pixels = unit.gate.reduce.out_channels, math.prod(shape[2:])
            cost = gpu.gate(shape[0], shape[1], reduced, pixels, splits)
            parts.append(_Part(names[module], SQUEEZE_EXCITE_GATE, cost, unit.gate.modules))
            if not gated:
                cost = gpu.other(2 * math.prod(shape) + math.prod(shape[:2]))
                parts.append(_Part(names[module], GATE_PRODUCT, cost, ((module, "mul"),)))
        if unit.shortcut is not None:
            parts += self.shortcut(call, unit.shortcut, ghost2, shape, gated)
        parts += self.ghost(call, unit.ghosts[1], ghost2, shape, residual=True, gated=gated)
        return _charge(call, parts)

    def shortcut(
        self, call: Call, layers: tuple[Branch, Branch], ghost2: Ghost, inside: Shape, gated: bool
    ) -> list[_Part]:
        """The two parts of a shortcut; ``inside`` is the shape of ghost2's input."""
        dw, conv = layers
        apply, one = self.gpu.ghost_apply, _ghost_of(conv)
        first, _ = self.gpu.depthwise(call.in_shape, dw.conv)
        shape = conv_shape(call.in_shape, dw)
        last = apply(shape, one)
        before = last.bytes + apply(inside, ghost2, True, gated).bytes
        after = apply(shape, one, True).bytes + apply(inside, ghost2, False, gated).bytes
        self.orders.append((before, after))
        return [
            _Part(call.names[dw.conv], DEPTHWISE_CONV, first, dw.modules),
            _Part(call.names[conv.conv], GHOST_APPLY, last, conv.modules),
        ]

    def network(self, call: Call, unit: Network) -> list[_Part]:
        """The parts of a GhostNet."""
        names, gpu, n, conv = call.names, self.gpu, call.in_shape[0], unit.last.conv
        *blocks, last = call.calls((*unit.blocks, conv))
        one, shape = _ghost_of(unit.last), conv_shape(last.in_shape, unit.last)
        # The key call.module: the pooling's part also gets the operators that no part owns.
        if math.prod(shape[2:]) <= ops.MOST_POOLED:
            cost = gpu.ghost_apply(last.in_shape, one, pooled=True)
            owned = (*unit.last.modules, call.module)
            pooling = [_Part(names[conv], GHOST_APPLY_POOLED, cost, owned)]
        else:
            cost = gpu.ghost_apply(last.in_shape, one)
            moved = math.prod(shape) + math.prod(shape[:2])
            pool = unit.pools[-1] if unit.pools else call.module
            pooling = [
                _Part(names[conv], GHOST_APPLY, cost, unit.last.modules),
                _Part(names[pool], MEAN, gpu.other(moved), (call.module,)),
            ]
        stem, head, classifier = self.stem(call, unit.stem), unit.head, unit.classifier
        tail = [
            *pooling,
            _Part(names[head], ADDMM, gpu.linear(n, head), (head,)),
            *self.activation(call, unit.head_act[0], unit.head_modules[0], n * head.out_channels),
            _Part(names[classifier], ADDMM, gpu.linear(n, classifier), (classifier,)),
        ]
        _charge(call, [*stem, *tail], outside=unit.blocks)
        return [*stem, *itertools.chain.from_iterable(map(self.walk, blocks)), *tail]

    def stem(self, call: Call, stem: Branch) -> list[_Part]:
        """The parts of a network's first convolution."""
        conv, shape, gpu = stem.conv, call.in_shape, self.gpu
        if ops.has_stem(conv):
            return [_Part(call.names[conv], CONV_STEM, gpu.stem(shape, conv), stem.modules)]
        cost = gpu.conv(shape, stem, has_bias=True)
        elements = math.prod(conv_shape(shape, stem))
        return [
            _Part(call.names[conv], LIBRARY_CONV, cost, stem.modules),
            *self.activation(call, stem.act, stem.modules[0], elements),
        ]

    def activation(self, call: Call, act: int, module: nn.Module, elements: int) -> list[_Part]:
        """The part of an in-place activation; none for the identity.

        Args:
            act: code of the activation.
            module: the activation, or the layer before it if the activation is a function.
            elements: the number of values.
        """
        if act == activations.NONE:
            return []
        owns = () if isinstance(module, (nn.Conv2d, *NORMS)) else (module,)
        return [_Part(call.names[module], ACTIVATION, self.gpu.other(2 * elements), owns)]


def _ghost_of(branch: Branch) -> Ghost:
    """A 1x1 convolution as a Ghost module of ratio 1."""
    return Ghost(branch, None, branch.conv.out_channels)
