"""Every operator of a fused network on a GPU, beside those of eager PyTorch: launches, bytes, time.

Eager's numbers come from the ATen operators of one run on the meta device (``network_trace``), the
fused network's from the shapes that they work on. No GPU is needed, and the model is only read.

Bytes, time and launches of the operators of ghost_ops are those of the plans of their kernels
(``csrc/core/cuda_plan.cpp``, ``cuda_plan_layers.cpp``). The time of every other operator, on both
sides::

    seconds = max(bytes / (0.92 * DRAM bandwidth), FLOPs / (0.5 * tensor core peak))
              + 2e-6 * launches

with the rates of the plain units for float64, and for float32 without TF32.

What the model leaves out:

- Tensors that stay in L2 between two operators: each reads its input from DRAM and writes to it.
- Time on the host. At small batches it is longer than eager PyTorch's kernels.
- Kernels inside an ATen operator: layout conversions and workspaces of cuDNN, the inverse standard
  deviation of a batch norm, split reductions. These would add to eager's side.
- Launches of too few blocks to fill the GPU, by other operators than those of ghost_ops: they too
  would add to eager's side. The plans of our kernels count them.
- Plain multiply-adds of depthwise convolutions outside Ghost modules, on both sides.
- Shifts, slopes and cheap weights that ``ghost_apply`` reads, and all packing at first call.
- Composite functions with a kernel of their own on a GPU: on the meta device they are several
  operators. An operator that reads a part of a tensor counts as reading all of it.
- Hooks: they are not run. A hook inside a Ghost module keeps the module from being fused.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import activations, backends
from ..autograd.checks import is_fused_primary
from ..fusion.bottleneck import Bottleneck
from ..fusion.branch import Branch
from ..fusion.ghost import Ghost
from ..fusion.network import Network
from ..ops import layers as model_ops
from ..ops.ghost import allow_tf32
from ..sync import NORMS
from . import CUDA_DEVICES, compute_capability
from .trace import Call, Op, Shape, Unit, conv_shape, trace

# The kinds of rows: operators of ghost_ops on CUDA, then PyTorch's.
GHOST_APPLY = "ghost_apply"
GHOST_APPLY_GATED = "ghost_apply_gated"  # x times the gate [N, C] of a squeeze-and-excitation
GHOST_APPLY_POOLED = "ghost_apply_pooled"  # the last convolution and the mean over its pixels
DEPTHWISE_CONV = "depthwise_conv"
DEPTHWISE_CONV_SUMS = "depthwise_conv_sums"  # also sums every output map, for the gate behind it
SQUEEZE_EXCITE_GATE = "squeeze_excite_gate"
CONV_STEM = "conv_stem"
OWN_KINDS = (
    GHOST_APPLY, GHOST_APPLY_GATED, GHOST_APPLY_POOLED, DEPTHWISE_CONV, DEPTHWISE_CONV_SUMS,
    SQUEEZE_EXCITE_GATE, CONV_STEM,
)  # fmt: skip
LIBRARY_CONV = "library_conv"  # a primary convolution or stem that our operators do not compute
GATE_PRODUCT = "gate_product"  # a map times its gate, in place, where ghost_apply cannot take it
MEAN, ADDMM, ACTIVATION = "mean", "addmm", "activation"
PLAIN = "plain"  # PyTorch's operators, the same on both sides
KINDS = (*OWN_KINDS, LIBRARY_CONV, GATE_PRODUCT, MEAN, ADDMM, ACTIVATION, PLAIN)


# --- the result ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkRow:
    """One operator of the fused network, and what eager PyTorch runs in its place.

    Attributes:
        name: path of its module in the model; ``(model)`` for the model itself.
        kind: one of ``KINDS``.
        launches, dram_bytes, seconds: of the fused network; bytes read and written.
        eager_launches, eager_bytes, eager_seconds: of eager PyTorch.
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
    """The operators of a fused network in evaluation mode on a GPU, in the order that they run.

    Every number is a model's, see ``ghost_ops.planner.network``; nothing was measured.

    Attributes:
        model: class of the model.
        device: the architecture, such as ``"sm_90"``.
        input_shape, dtype, channels_last: of the input [N, C, H, W].
        rows: one for each operator; for plain PyTorch one for each layer.
        notes: decisions, and what ``fuse`` leaves as it is with the reason.
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
    """The operators that ``fuse`` makes of a model on a GPU, and eager PyTorch's.

    Called as ``planner.explain(model, input_shape, ...)``. Needs no GPU. The model is neither run
    nor changed, moved or fused. Plain and fused models give the same plan, which is that of
    ``fuse(model, inference=True)``.

    Args:
        model: any module that takes one tensor: a network, a bottleneck, a Ghost module.
        input_shape: N, C, H, W of its input.
        device: one of ``planner.CUDA_DEVICES``; ``"cuda"``, the architecture of the current GPU.
        dtype: of input and parameters: float32, float64, bfloat16 or float16. float32 follows
            torch's TF32 switch.
        channels_last: memory format of the input.
        training: must be False.

    Returns:
        A :class:`NetworkPlan`; its text is a table.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; or the model cannot run on the meta device, because
            its forward needs the values of a tensor. The model's own errors pass unchanged.
        RuntimeError: the native library is not there, or a kernel has no plan for a shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    shape = _checked_shape(input_shape)
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
    if dtype not in backends.native.DTYPES:
        known = ", ".join(map(str, backends.native.DTYPES))
        raise ValueError(f"dtype must be one of {known}, got {dtype}")
    channels_last = bool(channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    plain = getattr(model, "_orig_mod", model)  # of torch.compile
    root, units, notes = trace(plain, shape, dtype, layout)
    builder = _Builder(_Gpu(sm, dtype, channels_last), units)
    rows = tuple(map(builder.row, builder.walk(root)))
    if builder.orders:
        first, last = map(sum, zip(*builder.orders, strict=True))
        order = (
            f"shortcuts ({len(builder.orders)}): the 1x1 runs first and ghost2 adds its result, "
        )
        order += f"{first:,} bytes of both; the other way round {last:,} bytes"
        notes = [order, *notes]
    name = type(root.module).__name__
    return NetworkPlan(name, f"sm_{sm}", shape, dtype, channels_last, rows, tuple(notes))


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, int, int, int]:
    try:
        dims = tuple(operator.index(v) for v in input_shape)
    except TypeError:
        raise TypeError(f"input_shape must be four ints NCHW, got {input_shape!r}") from None
    if len(dims) != 4 or min(dims) < 1:
        raise ValueError(f"input_shape must be four positive sizes [N, C, H, W], got {dims}")
    return dims


# --- what operators cost ------------------------------------------------------------------------


class _Cost(NamedTuple):
    launches: int
    bytes: int
    seconds: float


class _Gpu:
    """What operators cost for inputs of ``shape``: ours by plans, others by the formula above."""

    def __init__(self, sm: int, dtype: torch.dtype, channels_last: bool) -> None:
        self.library = backends.native.library()
        self.element = dtype.itemsize
        self.target = {"dtype": backends.native.DTYPES.index(dtype), "sm": sm}
        self.layout = {**self.target, "channels_last": channels_last}
        arch = self.library.cuda_arch(sm)
        self.bandwidth = arch["dram_gb_s"] * 0.92e9
        # Multiply-adds a clock of a multiprocessor: tensor cores at half of their peak, and what
        # does not run on them, as in the Planner::estimate of csrc/core/cuda_plan.cpp.
        rate = arch["tensor_flops_clock"] / 2 / (self.element / 2) * 0.5
        if dtype is torch.float64 or (dtype is torch.float32 and not allow_tf32()):
            rate = 32 if dtype is torch.float64 else 64
        self.flops = 2 * rate * arch["multiprocessors"] * arch["clock_ghz"] * 1e9

    def ghost_apply(
        self, shape: Shape, ghost: Ghost, residual: bool = False, gated: bool = False,
        gate: tuple[int, int] = (0, 0), pooled: bool = False,
    ) -> _Cost:  # fmt: skip
        """``ghost_apply`` for x of ``shape``; it reads u where it has no primary convolution.

        Args:
            gated: x is multiplied by [N, C] as it is read.
            gate: height and width of what the output is multiplied by; 0: nothing.
            pooled: only the mean over the output's pixels is written.
        """
        conv, cheap, fused = ghost.primary.conv, ghost.cheap, _has_primary(ghost)
        found = self.library.cuda_plan(
            *(shape if fused else conv_shape(shape, ghost.primary)), intrinsic=conv.out_channels,
            out_channels=ghost.settings.out_channels,
            ratio=1 if cheap is None else cheap.conv.out_channels // conv.out_channels + 1,
            dw_size=ghost.dw_size, stride=conv.stride[0] if fused else 1, has_primary=fused,
            has_residual=residual, has_in_gate=gated, gate_height=gate[0], gate_width=gate[1],
            pooled=pooled, allow_tf32=allow_tf32(), **self.layout,
        )  # fmt: skip
        (one,) = found["passes"]
        # The tile plan leaves out the factors of x.
        factors = shape[0] * shape[1] * self.element if gated else 0
        return _Cost(1, one["dram_bytes"] + factors, one["seconds"] + factors / self.bandwidth)

    def depthwise(self, shape: Shape, conv: nn.Conv2d, sums: bool = False) -> tuple[_Cost, int]:
        """``depthwise_conv``; and in how many parts an image it sums its output, if it does."""
        sizes = *shape, conv.kernel_size[0], conv.stride[0]
        found = self.library.cuda_depthwise_plan(*sizes, sums=sums, **self.layout)
        return _of_plan(found), found["splits"] if sums else 0

    def conv(self, shape: Shape, branch: Branch, has_bias: bool = False) -> _Cost:
        """The convolution of a branch by PyTorch; the second launch adds a bias in place."""
        out, weights = math.prod(conv_shape(shape, branch)), branch.conv.weight.numel()
        channels = branch.conv.out_channels
        moved = math.prod(shape) + out + weights + has_bias * (2 * out + channels)
        return self.other(moved, 2 * out * weights // channels, 1 + has_bias)

    def linear(self, n: int, layer: nn.Conv2d | nn.Linear) -> _Cost:
        """A matrix product of n rows with a layer's weight, and its bias."""
        outs, ins = layer.weight.shape[:2]
        bias = 0 if layer.bias is None else outs
        return self.other(n * (ins + outs) + outs * ins + bias, 2 * n * outs * ins)

    def other(self, elements: int, flops: int = 0, launches: int = 1) -> _Cost:
        """An operator of PyTorch that reads and writes so many elements."""
        return self.eager([Op("", launches, elements * self.element, flops)])

    def eager(self, ops: Sequence[Op]) -> _Cost:
        """The sum of operators of PyTorch, by the formula at the top of this file."""
        seconds = sum(
            max(op.bytes / self.bandwidth, op.flops / self.flops) + 2e-6 * op.launches for op in ops
        )
        return _Cost(sum(op.launches for op in ops), sum(op.bytes for op in ops), seconds)


def _has_primary(ghost: Ghost) -> bool:
    """Whether ``ghost_apply`` also computes the primary convolution."""
    return is_fused_primary(ghost.primary.conv.weight, ghost.settings)


def _of_plan(found: dict[str, Any]) -> _Cost:
    return _Cost(found.get("launches", 1), found["dram_bytes"], found["seconds"])


# --- the rows -----------------------------------------------------------------------------------


@dataclass
class _Part:
    """A row in the making."""

    name: str
    kind: str
    cost: _Cost | None  # of the fused network; None: `ops` run there, too
    owns: tuple[Any, ...] = ()  # modules, or (module, operator), that it stands for
    ops: list[Op] = field(default_factory=list)  # eager PyTorch's in these


def _charge(call: Call, parts: list[_Part], outside: tuple[nn.Module, ...] = ()) -> list[_Part]:
    """Deal eager's operators out to the parts that own them; those of no part go to the last."""
    owners = {call.module: parts[-1]} | {key: part for part in parts for key in part.owns}
    for part, op in call.ops(owners, outside):
        part.ops.append(op)
    return parts


class _Builder:
    """Makes rows of a tree of calls."""

    def __init__(self, gpu: _Gpu, units: dict[nn.Module, Unit]) -> None:
        self.gpu, self.units = gpu, units
        self.orders: list[tuple[int, int]] = []  # bytes: shortcut first, ghost2 first

    def row(self, part: _Part) -> NetworkRow:
        """A finished row."""
        eager = self.gpu.eager(part.ops)
        return NetworkRow(part.name, part.kind, *(part.cost or eager), *eager)

    def walk(self, call: Call) -> list[_Part]:
        """The parts of a call, with all of eager's operators in it."""
        unit = self.units.get(call.module) if len(call.in_shape) == 4 else None
        if isinstance(unit, Network):
            return self.network(call, unit)
        if isinstance(unit, Bottleneck):
            return self.bottleneck(call, unit)
        if isinstance(unit, Ghost):
            return self.lone_ghost(call, unit)
        parts = []  # as it is: its own operators between two calls are one row
        for is_op, items in itertools.groupby(call.items, lambda item: isinstance(item, Op)):
            if is_op:
                parts.append(_Part(call.path, PLAIN, None, ops=list(items)))
            else:
                parts += itertools.chain.from_iterable(map(self.walk, items))
        return parts

    def lone_ghost(self, call: Call, unit: Ghost) -> list[_Part]:
        """The parts of a Ghost module outside a bottleneck; the layers of its tail are plain."""
        parts = _charge(call, self.ghost(call, call.module, unit, call.in_shape))
        if unit.tail:
            # ghost_apply replaces eager's operators up to the concatenation, or to V2's product.
            name, ops = "cat" if unit.gate is None else "mul", parts[-1].ops
            end = next(i for i, op in enumerate(ops, 1) if op.name.startswith(name))
            parts.append(_Part(call.path, PLAIN, None, ops=ops[end:]))
            del ops[end:]
        return parts

    def ghost(
        self, call: Call, module: nn.Module, ghost: Ghost, shape: Shape, residual: bool = False,
        gated: bool = False,
    ) -> list[_Part]:  # fmt: skip
        """The parts of a Ghost module on x of ``shape``; ``ghost_apply`` is the last."""
        names, parts, gate, conv = call.names, [], (0, 0), ghost.primary.conv
        if ghost.gate is not None:  # at half the height and width
            owns = (ghost.gate, (module, "avg_pool2d"), (module, "sigmoid"))
            parts.append(_Part(names[ghost.gate], PLAIN, None, owns))
            gate = shape[2] // 2, shape[3] // 2
        if not _has_primary(ghost):
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
            module = unit.gate.modules[0]  # the reduction if the gate is no module of its own
            gated = _has_primary(ghost2) and ghost2.primary.conv.stride == (1, 1)
            sizes = *shape[:2], unit.gate.reduce.out_channels, math.prod(shape[2:]), splits
            cost = _of_plan(gpu.library.cuda_gate_plan(*sizes, **gpu.target))
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
        """The two parts of a shortcut; ``inside`` is the shape of the input of ``ghost2``."""
        dw, conv = layers
        apply, one = self.gpu.ghost_apply, _ghost_of(conv)
        first, _ = self.gpu.depthwise(call.in_shape, dw.conv)
        shape = conv_shape(call.in_shape, dw)
        last = apply(shape, one)
        runs = last.bytes + apply(inside, ghost2, True, gated).bytes
        other = apply(shape, one, True).bytes + apply(inside, ghost2, False, gated).bytes
        self.orders.append((runs, other))
        return [
            _Part(call.names[dw.conv], DEPTHWISE_CONV, first, dw.modules),
            _Part(call.names[conv.conv], GHOST_APPLY, last, conv.modules),
        ]

    def network(self, call: Call, unit: Network) -> list[_Part]:
        """The parts of a GhostNet."""
        names, gpu, n, conv = call.names, self.gpu, call.in_shape[0], unit.last.conv
        *blocks, last = call.calls((*unit.blocks, conv))
        one, shape = _ghost_of(unit.last), conv_shape(last.in_shape, unit.last)
        # The part of the pooling also takes the operators that no part owns.
        if math.prod(shape[2:]) <= model_ops.MOST_POOLED:
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
        if model_ops.has_stem(conv):
            sizes = *shape, conv.stride[0], conv.out_channels
            cost = _of_plan(gpu.library.cuda_stem_plan(*sizes, **gpu.layout))
            return [_Part(call.names[conv], CONV_STEM, cost, stem.modules)]
        cost = gpu.conv(shape, stem, has_bias=True)
        elements = math.prod(conv_shape(shape, stem))
        return [
            _Part(call.names[conv], LIBRARY_CONV, cost, stem.modules),
            *self.activation(call, stem.act, stem.modules[0], elements),
        ]

    def activation(self, call: Call, act: int, module: nn.Module, elements: int) -> list[_Part]:
        """The part of an activation in place, unless it computes nothing.

        Args:
            act: code of the activation.
            module: of the activation; the layer before it if the activation is a function.
        """
        if act == activations.NONE:
            return []
        owns = () if isinstance(module, (nn.Conv2d, *NORMS)) else (module,)
        return [_Part(call.names[module], ACTIVATION, self.gpu.other(2 * elements), owns)]


def _ghost_of(branch: Branch) -> Ghost:
    """A 1x1 convolution as the Ghost module of ratio 1 that it runs as."""
    return Ghost(branch, None, branch.conv.out_channels)
