"""What ``fuse`` makes of a model, and one run of it on shapes alone.

``trace`` copies a model to the meta device, where tensors have shapes and no data. ``fuse`` on the
copy decides which modules run as operators of ours: the units. Then the plain forward of the copy
runs once, and the operators that PyTorch dispatches are recorded in the tree of the module calls.

Bytes are what an operator reads from and writes to device memory. An ATen operator reads its input
tensors and writes its results. A view moves nothing, an expanded dimension counts once, and an
in-place operator reads and writes. A convolution with a bias is two launches in eager PyTorch: the
second adds the bias in place.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import convert
from ..fusion.bottleneck import Bottleneck
from ..fusion.branch import Branch
from ..fusion.fused import Fused
from ..fusion.ghost import Ghost
from ..fusion.guards import watchable
from ..fusion.network import Network
from ..sync import NORMS

Shape = tuple[int, ...]
Unit = Ghost | Bottleneck | Network  # the parts of a fused module
Owner = TypeVar("Owner")
_ROOT = "(model)"  # the name of the model itself

_DW_SIZES = (1, 3, 5, 7)  # cheap kernels that ghost_apply has
_HOOK_DICTS = tuple(k for k, v in vars(nn.Module()).items() if "hook" in k and isinstance(v, dict))
_NO_MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
              "_unsafe_view"}  # fmt: skip
_OVERWRITE = {"copy_", "fill_", "zero_"}  # their first argument is written, not read


# --- the run as a tree, and the units -----------------------------------------------------------


class Op(NamedTuple):
    """One ATen operator."""

    name: str
    launches: int
    bytes: int
    flops: int


@dataclass(eq=False)
class Call:
    """One call of a module, with the operators and calls inside it in their order.

    Attributes:
        path: the module's name in the model; in several places, the place that it is called in.
        in_shape: of the first tensor among the arguments; () without one.
    """

    module: nn.Module
    path: str
    in_shape: Shape
    items: list[Op | Call] = field(default_factory=list)

    @cached_property
    def names(self) -> dict[nn.Module, str]:
        """The path of every module inside, and of this one."""
        prefix = "" if self.path == _ROOT else f"{self.path}."
        named = self.module.named_modules()
        return {m: prefix + name if name else self.path for name, m in named}

    def ops(
        self, owners: Mapping[Any, Owner], outside: Container[nn.Module] = ()
    ) -> Iterator[tuple[Owner, Op]]:
        """Every operator, with the owner of the innermost module around it that has one.

        A module in several places inside, such as the one activation of all of Ultralytics' layers,
        has no owner of its own.

        Args:
            owners: of a module, or of one operator in it by the key (module, operator's name); at
                least of this call's module.
            outside: modules whose calls are left out.
        """
        places = Counter(m for _, m in self.module.named_modules(remove_duplicate=False))
        known = {key: owner for key, owner in owners.items() if places[key] < 2}
        for chain, op in self._chains(outside, ()):
            keys = (key for module in chain for key in ((module, op.name), module))
            yield next(known[key] for key in keys if key in known), op

    def _chains(
        self, outside: Container[nn.Module], above: tuple[nn.Module, ...]
    ) -> Iterator[tuple[tuple[nn.Module, ...], Op]]:
        """Every operator, with the modules that it is in, innermost first."""
        chain = (self.module, *above)
        for item in self.items:
            if isinstance(item, Op):
                yield chain, item
            elif item.module not in outside:
                yield from item._chains(outside, chain)

    def calls(self, wanted: Container[nn.Module]) -> Iterator[Call]:
        """The calls of these modules inside, in their order."""
        for item in self.items:
            if isinstance(item, Call):
                if item.module in wanted:
                    yield item
                else:
                    yield from item.calls(wanted)


class Trace(NamedTuple):
    """A model as it is fused, and as it runs in eager PyTorch.

    Attributes:
        left: what ``fuse`` leaves as it is, with the reason; for people.
    """

    root: Call
    units: dict[nn.Module, Unit]
    left: list[str]


def trace(
    model: nn.Module, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> Trace:
    """The units of a model, and its run on x of ``shape``. The model itself is only read.

    Raises:
        ValueError: the model cannot be copied, has a lazy layer or needs the values of a tensor.
            Other errors of the model pass.
    """
    twin = _copy(model, dtype)
    units, left = _read_units(twin)
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    return Trace(_record(twin, x), units, left)


# --- a copy without data, and what fuse makes of it ---------------------------------------------


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
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
                    memo[id(t)] = _without_data(t, dtype)
        for hooks in _hook_dicts(module):
            memo[id(hooks)] = hooks.copy()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"model: it cannot be copied: {kind}: {error}") from error
    return twin.eval()


def _without_data(t: Tensor, dtype: torch.dtype) -> Tensor:
    if is_lazy(t):
        raise ValueError("model: a lazy layer has no shape yet; run the model on an input once")
    made = torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(t, nn.Parameter) else made


def _hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    return [module.__dict__[name] for name in _HOOK_DICTS if name in module.__dict__]


def _read_units(twin: nn.Module) -> tuple[dict[nn.Module, Unit], list[str]]:
    """The modules of a copy that run as operators of ours, and notes on the others.

    Leaves the copy unfused.
    """
    convert.unfuse(twin)
    reasons: dict[str, list[str]] = {}
    for entry in convert.fuse(twin, inference=True).left:
        reasons.setdefault(entry.detail, []).append(entry.name)
    units: dict[nn.Module, Unit] = {}
    for name, module in twin.named_modules():
        if isinstance(module, Fused):
            state = module._ghost_state()
            parts: Any = state.parts
            reason = state.reason if parts is None else _why_not_fused(parts)
            if reason:
                reasons.setdefault(reason, []).append(name or _ROOT)
            else:
                units[module] = parts
    convert.unfuse(twin)
    return units, [
        f"not fused: {', '.join(names[:3])}{', ...' if names[3:] else ''} ({len(names)}): {reason}"
        for reason, names in reasons.items()
    ]


def _why_not_fused(parts: Unit) -> str:
    """Why a module in eval mode does not run as operators of ours; empty if it does."""
    if parts.dw_size not in _DW_SIZES:
        return f"there is no fused kernel for a cheap convolution of size {parts.dw_size}"
    norms = [m for m in parts.layers if isinstance(m, NORMS)]
    if any(bn.training or bn.running_mean is None for bn in norms):
        return "a batch norm has no running statistics, so that it runs as in training"
    if isinstance(parts, Ghost):  # runs as ghost_apply even if its weights are not packed once
        return parts.why_not_fused() or parts.why_not_shapes(*parts.weights())
    computed = "" if watchable(parts.layers) else "its weights are computed at every call"
    return parts.why_not_packed() or computed


def conv_shape(shape: Shape, branch: Branch) -> Shape:
    """The shape of a branch's output for x of ``shape``."""
    conv = branch.conv
    geometry = zip(
        shape[2:], conv.kernel_size, conv.stride, branch.padding, conv.dilation, strict=True
    )
    sizes = ((v + 2 * p - d * (k - 1) - 1) // s + 1 for v, k, s, p, d in geometry)
    return (shape[0], conv.out_channels, *sizes)


# --- one run on the meta device -----------------------------------------------------------------


def _record(model: nn.Module, x: Tensor) -> Call:
    """The tree of calls of one forward on x, both on the meta device. The model loses its hooks."""
    root = Call(model, _ROOT, tuple(x.shape))
    recorder = _Recorder(root)
    for module in model.modules():
        for hooks in _hook_dicts(module):
            hooks.clear()
        if module is not model:
            module.register_forward_pre_hook(recorder.enter, with_kwargs=True)
            module.register_forward_hook(recorder.leave)
    try:
        with torch.no_grad(), torch.device("meta"), recorder:
            model(x)
    except Exception as error:
        # An error for want of a tensor's values, or for a second device, names the meta device.
        if not isinstance(error, NotImplementedError) and "meta" not in str(error).lower():
            raise
        raise ValueError(
            "model: its forward does not run on shapes alone, without the values of tensors: "
            f"{type(error).__name__}: {error}"
        ) from error
    return root


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run, in the tree of the calls of modules."""

    def __init__(self, root: Call) -> None:
        super().__init__()
        self.root, self.stack = root, [root]

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
        path = parent.names.get(module) or self.root.names[module]
        shape = next((tuple(t.shape) for t in _tensors((args, kwargs))), ())
        call = Call(module, path, shape)
        parent.items.append(call)
        self.stack.append(call)

    def leave(self, module: nn.Module, args: tuple, out: Any) -> None:
        """A forward hook."""
        while self.stack.pop().module is not module:
            pass  # a forward inside raised, and the model caught it


def _op_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Op | None:
    """What an operator moves; None for a view, or one that only allocates."""
    name = func._schema.name.removeprefix("aten::")
    if func.is_view or name in _NO_MEMORY:
        return None
    given = {id(t): t for t in _tensors((args, kwargs))}
    results = {id(t): t for t in _tensors(out)}
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
    return Op(name, launches, moved, 0 if count is None else count(*args, **kwargs, out_val=out))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))


def _bytes(t: Tensor) -> int:
    """Bytes of memory behind a tensor; an expanded dimension has one."""
    sizes = zip(t.shape, t.stride(), strict=True)
    return math.prod(size if stride else min(size, 1) for size, stride in sizes) * t.element_size()
