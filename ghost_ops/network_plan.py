"""Every operator of a fused network on a GPU, beside those of eager PyTorch: launches, bytes, time.

``explain_network`` copies the model to the meta device, where tensors have shapes and no data.
``fuse`` on the copy decides which modules are fused. Then the plain forward of the copy runs once:
eager's numbers come from the ATen operators that it dispatches, the fused network's from the shapes
that they work on. No GPU is needed, and the model is only read.

Bytes are what an operator reads from and writes to device memory. An ATen operator reads its input
tensors and writes its results. A view moves nothing, an expanded dimension counts once, and an
in-place operator reads and writes. A convolution with a bias is two launches in eager PyTorch: the
second adds the bias in place. Bytes and time of ``ghost_apply`` are those of its tile plan
(``csrc/core/cuda_plan.cpp``). The time of every other operator, on both sides::

    seconds = max(bytes / (0.92 * DRAM bandwidth), FLOPs / (0.5 * tensor core peak))
              + 2e-6 * launches

with the rates of the plain units for float64, and for float32 without TF32.

What the model leaves out:

- Tensors that stay in L2 between two operators: each reads its input from DRAM and writes to it.
- Time on the host. At small batches it is longer than eager PyTorch's kernels.
- Kernels inside an ATen operator: layout conversions and workspaces of cuDNN, the inverse standard
  deviation of a batch norm, split reductions. These would add to eager's side.
- Plain multiply-adds of depthwise convolutions outside Ghost modules, which run on no tensor core,
  and launches of too few blocks to fill the GPU. Both are in the tile plans of Ghost modules only.
- Shifts, biases and slopes per channel that fused operators read, and their packing at first call.
- Composite functions with a kernel of their own on a GPU: on the meta device they are several
  operators. An operator that reads a part of a tensor counts as reading all of it.
- Hooks: they are not run. A hook inside a Ghost module keeps the module from being fused.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import activations, backends, convert
from .autograd import is_fused_primary
from .bottleneck import ConvertedBottleneck, FusedGhostBottleneck
from .bottleneck_parts import Gate, Parts, layout_of, read_bottleneck
from .convert_forward import ConvertedGhost
from .convert_layouts import Branch, Refusal, settings_of
from .convert_probe import small_gate, uses_batch_stats
from .network import ConvertedNetwork, Ends, read_ends
from .nn import FusedGhostModule
from .ops import allow_tf32
from .planner import CUDA_DEVICES, compute_capability

# The kinds of rows: operators of ghost_ops on CUDA, then PyTorch's.
GHOST_APPLY = "ghost_apply"
GHOST_APPLY_GATED = "ghost_apply_gated"  # x times the gate [N, C] of a squeeze-and-excitation
DEPTHWISE_CONV = "depthwise_conv"
DEPTHWISE_CONV_SUMS = "depthwise_conv_sums"  # also sums every output map, for the gate behind it
SQUEEZE_EXCITE_GATE = "squeeze_excite_gate"
CONV_STEM = "conv_stem"
LIBRARY_CONV = "library_conv"  # a primary convolution that is not a plain 1x1
MEAN = "mean"
ADDMM = "addmm"
ACTIVATION = "activation"
PLAIN = "plain"  # what fuse leaves as it is: the same on both sides
KINDS = (
    GHOST_APPLY, GHOST_APPLY_GATED, DEPTHWISE_CONV, DEPTHWISE_CONV_SUMS, SQUEEZE_EXCITE_GATE,
    CONV_STEM, LIBRARY_CONV, MEAN, ADDMM, ACTIVATION, PLAIN,
)  # fmt: skip

_ROOT = "(model)"
_DW_SIZES = (1, 3, 5, 7)  # cheap kernels that ghost_apply has
_LAUNCH_SECONDS = 2e-6
_SUM_BYTES = 4  # of a float32 sum over a map
Shape = tuple[int, ...]


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


@dataclass(frozen=True)
class NetworkPlan:
    """The operators of a fused network in evaluation mode on a GPU, in the order that they run.

    Every number is a model's, see ``ghost_ops.network_plan``; nothing was measured.

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

    @property
    def launches(self) -> int:
        """Kernel launches of the fused network."""
        return sum(row.launches for row in self.rows)

    @property
    def dram_bytes(self) -> int:
        """Bytes that the fused network reads and writes."""
        return sum(row.dram_bytes for row in self.rows)

    @property
    def seconds(self) -> float:
        """The model's time of the fused network; not measured."""
        return sum(row.seconds for row in self.rows)

    @property
    def eager_launches(self) -> int:
        """Kernel launches of eager PyTorch."""
        return sum(row.eager_launches for row in self.rows)

    @property
    def eager_bytes(self) -> int:
        """Bytes that eager PyTorch reads and writes."""
        return sum(row.eager_bytes for row in self.rows)

    @property
    def eager_seconds(self) -> float:
        """The model's time of eager PyTorch's kernels, without the host's; not measured."""
        return sum(row.eager_seconds for row in self.rows)

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        shape, dtype = list(self.input_shape), str(self.dtype).removeprefix("torch.")
        table = [("operator", "kind", *("launches", "MB", "us") * 2)]
        table += [_cells(row.name, row.kind, row) for row in self.rows]
        table.append(_cells("sum", "", self))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [_line(row, widths) for row in table]
        above = " " * (widths[0] + widths[1] + 4)
        half = sum(widths[2:5]) + 4
        heads = f"{above}{'fused'.rjust(half)}  {'eager'.rjust(sum(widths[5:]) + 4)}"
        rule = "-" * len(lines[0])
        title = f"{self.model} on {self.device}, {shape} {dtype} {layout}, evaluation"
        parts = [title, heads, lines[0], rule, *lines[1:-1], rule, lines[-1], *self.notes]
        parts.append("times: a model from data sheet figures, not measured; MB: 1e6 bytes of DRAM")
        return "\n".join(parts)


def _cells(name: str, kind: str, row: NetworkRow | NetworkPlan) -> tuple[str, ...]:
    fused = f"{row.launches}", f"{row.dram_bytes / 1e6:,.3f}", f"{row.seconds * 1e6:,.1f}"
    eager = row.eager_launches, row.eager_bytes / 1e6, row.eager_seconds * 1e6
    return name, kind, *fused, f"{eager[0]}", f"{eager[1]:,.3f}", f"{eager[2]:,.1f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [c.ljust(w) if i < 2 else c.rjust(w)
              for i, (c, w) in enumerate(zip(cells, widths, strict=True))]  # fmt: skip
    return "  ".join(padded)


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
        RuntimeError: the native library is not there; the message says why.
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
    assert sm is not None
    if dtype not in backends.native.DTYPES:
        known = ", ".join(map(str, backends.native.DTYPES))
        raise ValueError(f"dtype must be one of {known}, got {dtype}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    twin = _twin(model, dtype)
    units, notes = _read_units(twin)
    builder = _Builder(sm, dtype, bool(channels_last), units, _shared_modules(twin))
    builder.walk(_record(twin, builder.empty(shape)))
    return NetworkPlan(
        type(twin).__name__, f"sm_{sm}", shape, dtype, bool(channels_last),
        tuple(builder.rows), (*builder.notes(), *notes),
    )  # fmt: skip


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, int, int, int]:
    try:
        dims = tuple(operator.index(v) for v in input_shape)
    except TypeError:
        raise TypeError(
            f"input_shape must be four ints [N, C, H, W], got {input_shape!r}"
        ) from None
    if len(dims) != 4 or min(dims) < 1:
        raise ValueError(f"input_shape must be four positive sizes [N, C, H, W], got {dims}")
    return dims


# --- a copy without data ------------------------------------------------------------------------


def _twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model on the meta device in eval mode, its parameters in ``dtype``.

    The parameters are replaced while they are copied, so that no memory is taken on any device.
    Hooks are shared: a bound method would bring its object into the copy.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: a scripted model has no Python forward to follow")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers, module.__dict__):
            for t in place.values():
                if isinstance(t, Tensor) and id(t) not in memo:
                    memo[id(t)] = _meta(t, dtype)
        for hooks in _hook_dicts(module):
            memo[id(hooks)] = hooks.copy()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"model: it cannot be copied: {kind}: {error}") from error
    return twin.eval()


def _meta(t: Tensor, dtype: torch.dtype) -> Tensor:
    if is_lazy(t):
        raise ValueError("model: a lazy layer has no shape yet; run the model on an input once")
    made = torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(t, nn.Parameter) else made


_HOOK_DICTS = tuple(k for k, v in vars(nn.Module()).items() if "hook" in k and isinstance(v, dict))


def _hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    return [module.__dict__[name] for name in _HOOK_DICTS if name in module.__dict__]


def _shared_modules(twin: nn.Module) -> set[nn.Module]:
    """Modules in more than one place, such as the one activation of all of Ultralytics' layers."""
    places = Counter(module for _, module in twin.named_modules(remove_duplicate=False))
    return {module for module, count in places.items() if count > 1}


# --- what fuse makes of it ----------------------------------------------------------------------


class _Ghost(NamedTuple):
    """A Ghost module as it is fused; or a 1x1 convolution with its batch norm, of ratio 1."""

    conv: nn.Conv2d
    cheap: nn.Conv2d | None
    short_conv: nn.Module | None  # GhostModuleV2's attention, by PyTorch
    out_channels: int
    has_primary: bool  # ghost_apply computes the primary convolution, too


_Unit = _Ghost | Parts | Ends


def _read_units(twin: nn.Module) -> tuple[dict[nn.Module, _Unit], list[str]]:
    """The modules of a copy that run as operators of ours, and notes on what does not.

    Leaves the copy unfused and without hooks.
    """
    convert.unfuse(twin)
    reasons: dict[str, list[str]] = {}
    for entry in convert.fuse(twin, inference=True).left:
        reasons.setdefault(entry.detail, []).append(entry.name)
    units: dict[nn.Module, _Unit] = {}
    kinds: tuple[tuple[tuple[type, ...], Callable[..., _Unit]], ...] = (
        ((FusedGhostModule, ConvertedGhost), _read_ghost),
        ((FusedGhostBottleneck, ConvertedBottleneck), _read_bottleneck),
        ((ConvertedNetwork,), _read_network),
    )
    for classes, read in kinds:
        for name, module in twin.named_modules():
            if not isinstance(module, classes):
                continue
            try:
                units[module] = read(module, units)
            except Refusal as refusal:
                reasons.setdefault(str(refusal), []).append(name or _ROOT)
    convert.unfuse(twin)
    for module in twin.modules():
        for hooks in _hook_dicts(module):
            hooks.clear()
    notes = [f"not fused: {', '.join(names[:3])}{', ...' if names[3:] else ''} ({len(names)}): "
             f"{reason}" for reason, names in reasons.items()]  # fmt: skip
    return units, notes


def _read_ghost(module: nn.Module, _: dict[nn.Module, _Unit]) -> _Ghost:
    layout, out_channels = layout_of(module)
    if (d := layout.cheap.conv.kernel_size[0]) not in _DW_SIZES:
        raise Refusal(f"there is no fused kernel for a cheap convolution of size {d}")
    if uses_batch_stats(layout.primary) or uses_batch_stats(layout.cheap):
        raise Refusal("a batch norm has no running statistics, so that it runs as in training")
    conv, settings = layout.primary.conv, settings_of(layout, out_channels)
    has_primary = is_fused_primary(conv.weight, settings)
    return _Ghost(conv, layout.cheap.conv, layout.gate, out_channels, has_primary)


def _read_bottleneck(module: nn.Module, units: dict[nn.Module, _Unit]) -> Parts:
    parts = read_bottleneck(module)
    if parts is None or not {parts.ghost1, parts.ghost2} <= units.keys():
        raise Refusal("its Ghost modules are not fused")
    _check_statistics(parts.modules())
    ghost2 = units[parts.ghost2]
    assert isinstance(ghost2, _Ghost)
    if parts.gate is not None and not (ghost2.has_primary and ghost2.conv.stride == (1, 1)):
        raise Refusal("its gate stands before a primary convolution other than 1x1 of stride 1")
    return parts


def _read_network(module: nn.Module, _: dict[nn.Module, _Unit]) -> Ends:
    ends = read_ends(module)
    if ends is None:
        raise Refusal("no GhostNet")
    _check_statistics(ends.modules())
    return ends


def _check_statistics(modules: Iterable[nn.Module]) -> None:
    if any(isinstance(m, nn.BatchNorm2d) and m.running_mean is None for m in modules):
        raise Refusal("a batch norm has no running statistics")


# --- one run on the meta device -----------------------------------------------------------------


class _Op(NamedTuple):
    """One ATen operator."""

    name: str
    launches: int
    bytes: int
    flops: int


@dataclass
class _Call:
    """One call of a module, with the operators and calls inside it in their order."""

    module: nn.Module | None
    path: str
    in_shape: Shape
    out_shape: Shape = ()
    items: list[_Op | _Call] = field(default_factory=list)

    def ops(
        self, outside: Iterable[nn.Module] = (), above: tuple[nn.Module | None, ...] = ()
    ) -> Iterator[tuple[tuple[nn.Module | None, ...], _Op]]:
        """Every operator, with the modules that it is in, innermost first.

        Args:
            outside: modules whose calls are left out.
        """
        chain = (self.module, *above)
        for item in self.items:
            if isinstance(item, _Op):
                yield chain, item
            elif item.module not in outside:
                yield from item.ops(outside, chain)

    def calls(self, wanted: Iterable[nn.Module]) -> Iterator[_Call]:
        """The calls of these modules inside, in their order."""
        for item in self.items:
            if isinstance(item, _Call):
                if item.module in wanted:
                    yield item
                else:
                    yield from item.calls(wanted)


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run, in the tree of the calls of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = [_Call(None, "", ())]
        self.names: dict[nn.Module, dict[nn.Module, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        op = _op_of(func, args, kwargs or {}, out)
        if op is not None:
            self.stack[-1].items.append(op)
        return out

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        parent = self.stack[-1]
        call = _Call(module, self._path(parent, module), _shape_of((args, kwargs)))
        parent.items.append(call)
        self.stack.append(call)

    def leave(self, module: nn.Module, args: tuple, out: Any) -> None:
        """A forward hook."""
        while (call := self.stack.pop()).module is not module:
            pass  # a forward inside raised, and the model caught it
        call.out_shape = _shape_of(out)

    def _path(self, parent: _Call, module: nn.Module) -> str:
        """The path below the caller: a module in several places is named by where it is called."""
        if parent.module is None:
            return ""
        names = self.names.get(parent.module)
        if names is None:
            names = {m: name for name, m in parent.module.named_modules()}
            self.names[parent.module] = names
        return _join(parent.path, names.get(module, type(module).__name__))


def _record(twin: nn.Module, x: Tensor) -> _Call:
    """The tree of calls of a forward on x, both on the meta device."""
    recorder = _Recorder()
    for module in twin.modules():
        module.register_forward_pre_hook(recorder.enter, with_kwargs=True)
        module.register_forward_hook(recorder.leave)
    _run(lambda: twin(x), recorder)
    for module in twin.modules():
        for hooks in _hook_dicts(module):
            hooks.clear()
    (call,) = recorder.stack[0].items
    assert isinstance(call, _Call)
    return call


def _run(forward: Callable[[], Any], recorder: _Recorder) -> None:
    try:
        with torch.no_grad(), torch.device("meta"), recorder:
            forward()
    except Exception as error:
        # An error for want of a tensor's values, or for a second device, names the meta device.
        if not isinstance(error, NotImplementedError) and "meta" not in str(error).lower():
            raise
        raise ValueError(
            "model: its forward does not run on shapes alone, without the values of tensors: "
            f"{type(error).__name__}: {error}"
        ) from error


def _op_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> _Op | None:
    """What an operator moves; None for a view, or one that only allocates."""
    name = func._schema.name.removeprefix("aten::")
    if func.is_view or name in _NO_MEMORY:
        return None
    given = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    results = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
    if not results:  # an operator that changes its arguments and returns nothing
        changed = zip(func._schema.arguments, args, strict=False)
        results = {id(t): t for a, t in changed if a.is_write and isinstance(t, Tensor)}
    if name in _OVERWRITE:
        given.pop(id(args[0]), None)
    written = sum(map(_bytes, results.values()))
    if not written:
        return None
    moved, launches = sum(map(_bytes, given.values())) + written, 1
    if name == "convolution" and args[2] is not None:
        moved, launches = moved + 2 * written, 2  # the bias is added in place
    count = flop_registry.get(func._overloadpacket)
    return _Op(name, launches, moved, 0 if count is None else count(*args, **kwargs, out_val=out))


_NO_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
              "_unsafe_view"}  # fmt: skip
_OVERWRITE = {"copy_", "fill_", "zero_"}  # their first argument is written, not read


def _bytes(t: Tensor) -> int:
    """Bytes of memory behind a tensor; an expanded dimension has one."""
    sizes = zip(t.shape, t.stride(), strict=True)
    return math.prod(size if stride else min(size, 1) for size, stride in sizes) * t.element_size()


def _shape_of(values: Any) -> Shape:
    """The shape of the first tensor."""
    return next((tuple(t.shape) for t in tree_leaves(values) if isinstance(t, Tensor)), ())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _conv_shape(shape: Shape, conv: nn.Conv2d) -> Shape:
    """The shape of a convolution's output."""
    geometry = zip(
        shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
    )
    sizes = ((v + 2 * int(p) - d * (k - 1) - 1) // s + 1 for v, k, s, p, d in geometry)
    return (shape[0], conv.out_channels, *sizes)


# --- the rows -----------------------------------------------------------------------------------


@dataclass
class _Part:
    """A row in the making.

    Attributes:
        owns: modules whose operators in eager PyTorch it stands for, or (module, operator).
    """

    name: str
    kind: str
    launches: int
    bytes: int
    seconds: float
    owns: tuple[Any, ...] = ()
    ops: list[_Op] = field(default_factory=list)


class _Builder:
    """Makes rows of a tree of calls."""

    def __init__(
        self, sm: int, dtype: torch.dtype, channels_last: bool, units: dict[nn.Module, _Unit],
        shared: set[nn.Module],
    ) -> None:  # fmt: skip
        self.library = backends.native.library()
        self.sm, self.dtype, self.channels_last = sm, dtype, channels_last
        self.units, self.shared = units, shared
        self.element = dtype.itemsize
        arch = self.library.cuda_arch(sm)
        self.bandwidth = arch["dram_gb_s"] * 0.92e9
        # Multiply-adds a clock of a multiprocessor: tensor cores at half of their peak, and what
        # does not run on them, as in the Planner::estimate of csrc/core/cuda_plan.cpp.
        rate = arch["tensor_flops_clock"] / 2 / (self.element / 2) * 0.5
        if dtype is torch.float64 or (dtype is torch.float32 and not allow_tf32()):
            rate = 32 if dtype is torch.float64 else 64
        self.flops = 2 * rate * arch["multiprocessors"] * arch["clock_ghz"] * 1e9
        self.rows: list[NetworkRow] = []
        self.orders: list[tuple[int, int]] = []  # bytes: shortcut first, second Ghost module first

    def empty(self, shape: Shape) -> Tensor:
        """A tensor on the meta device."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=self.dtype, device="meta", memory_format=layout)

    def notes(self) -> list[str]:
        """The decision on the order of shortcuts, if there are any."""
        if not self.orders:
            return []
        first, last = (sum(column) for column in zip(*self.orders, strict=True))
        return [
            f"shortcuts ({len(self.orders)}): the 1x1 runs first and ghost2 adds its result, "
            f"{first:,} bytes of both; the other way round {last:,} bytes"
        ]

    # Walking.

    def walk(self, call: _Call) -> None:
        """Add the rows of a call."""
        unit = self.units.get(call.module) if call.module is not None else None
        if unit is not None and len(call.in_shape) == 4:
            if isinstance(unit, _Ghost):
                parts = self.ghost(call.path, call.module, unit, call.in_shape)
                self.charge(parts, parts[-1], call.ops())
                self.add(parts)
            elif isinstance(unit, Parts):
                self.bottleneck(call, unit)
            else:
                self.network(call, unit)
            return
        ops: list[_Op] = []
        for item in (*call.items, None):
            if isinstance(item, _Op):
                ops.append(item)
                continue
            if ops:
                self.add([self.plain(call.path, ops)])
                ops = []
            if item is not None:
                self.walk(item)

    def charge(self, parts: list[_Part], default: _Part, ops: Iterable[Any]) -> None:
        """Deal eager's operators out to the parts that stand for them; the rest to ``default``."""
        owner: dict[Any, _Part] = {}
        for part in parts:
            for key in part.owns:
                if key not in self.shared:  # found by the module around it
                    owner.setdefault(key, part)
        for chain, op in ops:
            keys = (key for module in chain for key in ((module, op.name), module))
            part = next((owner[key] for key in keys if key in owner), default)
            part.ops.append(op)

    def add(self, parts: Iterable[_Part]) -> None:
        """Finish rows."""
        for p in parts:
            eager = [self.seconds(op.bytes, op.flops, op.launches) for op in p.ops]
            self.rows.append(
                NetworkRow(
                    p.name or _ROOT, p.kind, p.launches, p.bytes, p.seconds,
                    sum(op.launches for op in p.ops), sum(op.bytes for op in p.ops), sum(eager),
                )
            )  # fmt: skip

    # Parts.

    def seconds(self, moved: int, flops: int = 0, launches: int = 1) -> float:
        """The time of an operator without a tile plan, see this file's docstring."""
        return max(moved / self.bandwidth, flops / self.flops) + _LAUNCH_SECONDS * launches

    def part(
        self, name: str, kind: str, moved: int, flops: int = 0, owns: tuple[Any, ...] = ()
    ) -> _Part:
        """One launch of an operator without a tile plan."""
        return _Part(name, kind, 1, moved, self.seconds(moved, flops), owns)

    def plain(self, name: str, ops: list[_Op]) -> _Part:
        """PyTorch's own operators."""
        seconds = sum(self.seconds(op.bytes, op.flops, op.launches) for op in ops)
        launches, moved = sum(op.launches for op in ops), sum(op.bytes for op in ops)
        return _Part(name, PLAIN, launches, moved, seconds, ops=ops)

    def conv(
        self, name: str, kind: str, shape: Shape, conv: nn.Conv2d, owns: tuple[Any, ...]
    ) -> _Part:
        """A convolution of x of ``shape`` with what is folded into it: in, out and weights."""
        out, weights = math.prod(_conv_shape(shape, conv)), conv.weight.numel()
        moved = (math.prod(shape) + out + weights) * self.element
        return self.part(name, kind, moved, 2 * out * weights // conv.out_channels, owns)

    def apply(
        self, shape: Shape, unit: _Ghost, *, residual: bool = False, gated: bool = False,
        gate: tuple[int, int] = (0, 0),
    ) -> tuple[int, float]:  # fmt: skip
        """Bytes and seconds of ``ghost_apply`` on x, or on u, of ``shape``; from its tile plan.

        Args:
            gated: x is multiplied by [N, C] as it is read.
            gate: height and width of what the output is multiplied by; 0: nothing.
        """
        m, cheap = unit.conv.out_channels, unit.cheap
        found = self.library.cuda_plan(
            *shape, intrinsic=m, out_channels=unit.out_channels,
            ratio=1 if cheap is None else cheap.out_channels // m + 1,
            dw_size=1 if cheap is None else cheap.kernel_size[0],
            stride=unit.conv.stride[0] if unit.has_primary else 1,
            dtype=backends.native.DTYPES.index(self.dtype), channels_last=self.channels_last,
            has_primary=unit.has_primary, has_residual=residual, has_in_gate=gated,
            gate_height=gate[0], gate_width=gate[1], sm=self.sm, allow_tf32=allow_tf32(),
        )  # fmt: skip
        (one,) = found["passes"]
        factors = (
            shape[0] * shape[1] * self.element if gated else 0
        )  # the tile plan leaves them out
        return one["dram_bytes"] + factors, one["seconds"] + factors / self.bandwidth

    def ghost(
        self, path: str, module: nn.Module, unit: _Ghost, shape: Shape, residual: bool = False,
        gated: bool = False,
    ) -> list[_Part]:  # fmt: skip
        """The parts of a Ghost module on x of ``shape``; ``ghost_apply`` is the last."""
        names = {m: name for name, m in module.named_modules()}
        conv, size = unit.conv, (0, 0)
        parts: list[_Part] = []
        if unit.short_conv is not None:
            name = _join(path, names[unit.short_conv])
            parts.append(self.attention(name, module, unit.short_conv, self.empty(shape)))
            size = shape[2] // 2, shape[3] // 2
        if not unit.has_primary:
            parts.append(self.conv(_join(path, names[conv]), LIBRARY_CONV, shape, conv, (conv,)))
            shape = _conv_shape(shape, conv)
        moved, seconds = self.apply(shape, unit, residual=residual, gated=gated, gate=size)
        kind = GHOST_APPLY_GATED if gated else GHOST_APPLY
        return [*parts, _Part(path, kind, 1, moved, seconds, tuple(module.modules()))]

    def attention(self, name: str, module: nn.Module, short_conv: nn.Module, x: Tensor) -> _Part:
        """The gate of a GhostModuleV2, which PyTorch computes at half the height and width."""
        recorder = _Recorder()
        _run(lambda: small_gate(x, short_conv), recorder)
        part = self.plain(name, [op for _, op in recorder.stack[0].ops()])
        owns = (*short_conv.modules(), module._modules["gate_fn"], (module, "avg_pool2d"))
        return replace(part, owns=owns, ops=[])

    def gate(self, name: str, gate: Gate, shape: Shape, has_sums: bool) -> _Part:
        """``squeeze_excite_gate`` of a map of ``shape``."""
        n, c = shape[:2]
        source = n * c * _SUM_BYTES if has_sums else math.prod(shape) * self.element
        weights = 2 * c * gate.reduce.out_channels
        moved = source + (weights + n * c) * self.element
        owns = tuple(gate.module.modules())
        return self.part(name, SQUEEZE_EXCITE_GATE, moved, 2 * n * weights, owns)

    def bottleneck(self, call: _Call, unit: Parts) -> None:
        """The rows of a Ghost bottleneck."""
        assert call.module is not None
        names = {m: _join(call.path, name) for name, m in call.module.named_modules()}
        ghosts = self.units[unit.ghost1], self.units[unit.ghost2]
        assert isinstance(ghosts[0], _Ghost) and isinstance(ghosts[1], _Ghost)
        gated = unit.gate is not None
        parts = self.ghost(names[unit.ghost1], unit.ghost1, ghosts[0], call.in_shape)
        inside = _conv_shape(call.in_shape, ghosts[0].conv)
        shape: Shape = (inside[0], ghosts[0].out_channels, *inside[2:])
        if unit.dw is not None:
            conv = unit.dw.conv
            kind = DEPTHWISE_CONV if unit.gate is None else DEPTHWISE_CONV_SUMS
            dw = self.conv(names[conv], kind, shape, conv, unit.dw.modules)
            if unit.gate is not None:
                sums = shape[0] * shape[1] * _SUM_BYTES
                dw.bytes, dw.seconds = dw.bytes + sums, dw.seconds + sums / self.bandwidth
            parts.append(dw)
            shape = _conv_shape(shape, conv)
        if unit.gate is not None:
            name = names[unit.gate.module]
            parts.append(self.gate(name, unit.gate, shape, unit.dw is not None))
        if unit.shortcut is not None:
            layers = unit.shortcut
            parts += self.shortcut(names, call.in_shape, layers, ghosts[1], shape, gated)
        parts += self.ghost(names[unit.ghost2], unit.ghost2, ghosts[1], shape, True, gated)
        self.charge(parts, parts[-1], call.ops())  # what is left over is the sum with the shortcut
        self.add(parts)

    def shortcut(
        self, names: dict[nn.Module, str], shape: Shape, layers: tuple[Branch, Branch],
        ghost2: _Ghost, inside: Shape, gated: bool,
    ) -> list[_Part]:  # fmt: skip
        """The two parts of a shortcut on x of ``shape``; ``inside`` is the input of ``ghost2``."""
        dw, conv = layers
        owns = tuple(m for m in dw.modules if m not in conv.modules)
        first = self.conv(names[dw.conv], DEPTHWISE_CONV, shape, dw.conv, owns)
        shape = _conv_shape(shape, dw.conv)
        if not ghost2.has_primary:
            inside = _conv_shape(inside, ghost2.conv)
        last = _alone(conv.conv)
        moved, seconds = self.apply(shape, last)
        runs = moved + self.apply(inside, ghost2, residual=True, gated=gated)[0]
        other = self.apply(shape, last, residual=True)[0]
        self.orders.append((runs, other + self.apply(inside, ghost2, gated=gated)[0]))
        name = names[conv.conv]
        return [first, _Part(name, GHOST_APPLY, 1, moved, seconds, conv.modules)]

    def network(self, call: _Call, unit: Ends) -> None:
        """The rows of a GhostNet."""
        assert call.module is not None
        names = {m: _join(call.path, name) for name, m in call.module.named_modules()}
        stem = self.conv(names[unit.stem.conv], CONV_STEM, call.in_shape, unit.stem.conv,
                         unit.stem.modules)  # fmt: skip
        stages = tuple(unit.stages[:-1])
        inside = list(call.calls(stages))
        before = inside[-1].out_shape if inside else _conv_shape(call.in_shape, unit.stem.conv)
        pool, tail = self.tail(call.module, names, unit, before)
        self.charge([stem, *tail], pool, call.ops(stages))
        self.add([stem])
        for stage in inside:
            self.walk(stage)
        self.add(tail)

    def tail(
        self, module: nn.Module, names: dict[nn.Module, str], unit: Ends, shape: Shape
    ) -> tuple[_Part, list[_Part]]:
        """The parts behind the stages; the pooling alone, too."""
        n, e = shape[0], self.element
        moved, seconds = self.apply(shape, _alone(unit.last.conv))
        last = _Part(names[unit.last.conv], GHOST_APPLY, 1, moved, seconds, unit.last.modules)
        maps = _conv_shape(shape, unit.last.conv)
        pooling = module._modules["global_pool"]
        pool = self.part(names[pooling], MEAN, (math.prod(maps) + n * maps[1]) * e,
                         owns=tuple(pooling.modules()))  # fmt: skip
        head = self.addmm(names[unit.head], n, unit.head)
        parts = [last, pool, head]
        known = activations.of_module(unit.head_act)
        if known is not None and known[0] != activations.NONE:
            moved = 2 * n * unit.head.out_channels * e
            owns = (unit.head_act,)
            parts.append(self.part(names[unit.head_act], ACTIVATION, moved, owns=owns))
        return pool, [*parts, self.addmm(names[unit.classifier], n, unit.classifier)]

    def addmm(self, name: str, n: int, layer: nn.Conv2d | nn.Linear) -> _Part:
        """A matrix product of n rows with a layer's weight, and its bias."""
        outs, ins = layer.weight.shape[:2]
        bias = 0 if layer.bias is None else outs
        moved = (n * (ins + outs) + outs * ins + bias) * self.element
        return self.part(name, ADDMM, moved, 2 * n * outs * ins, (layer,))


def _alone(conv: nn.Conv2d) -> _Ghost:
    """A 1x1 convolution with its batch norm, as ``bottleneck.packed_conv`` runs it."""
    return _Ghost(conv, None, None, conv.out_channels, True)
