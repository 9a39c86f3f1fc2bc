"""``trace``: the modules that ``fuse`` can fuse in a model, and the operators of one plain run.

``trace`` copies a model to the meta device, where tensors have shapes and no data. The units are
the modules of the copy that ``fuse`` turns into operators of ghost_ops. Then the copy is unfused,
its forward runs once, and the operators that PyTorch dispatches are recorded in a tree of module
calls.

The bytes of an operator are the bytes that it reads from and writes to device memory. An ATen
operator reads its input tensors and writes its results. A view moves no bytes, an expanded
dimension counts as one element, and an in-place operator reads and writes its tensor. In eager
PyTorch a convolution with a bias is two launches: the second adds the bias in place.
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

from .. import convert
from ..fusion.bottleneck import Bottleneck
from ..fusion.branch import Branch
from ..fusion.fused import Fused, state_of
from ..fusion.ghost_parts import Ghost
from ..fusion.guards import watchable
from ..fusion.network import Network
from ..sync import NORMS

Shape = tuple[int, ...]
Unit = Ghost | Bottleneck | Network  # the parts of a fused module
Owner = TypeVar("Owner")
_ROOT = "(model)"  # the name of the model itself

_DW_SIZES = (1, 3, 5, 7)  # sizes of cheap convolutions that ghost_apply has kernels for
_HOOK_DICTS = tuple(k for k, v in vars(nn.Module()).items() if "hook" in k and isinstance(v, dict))
# Operators that move no data.
_ALLOCATE = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided _unsafe_view".split()
)
_OVERWRITE = {"copy_", "fill_", "zero_"}  # operators that write their first argument only


# --- the run as a tree, and the units -----------------------------------------------------------


class Op(NamedTuple):
    """One run of an ATen operator; bytes of device memory, read and written."""

    name: str
    launches: int
    bytes: int
    flops: int


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        module: the called module.
        path: the module's name in the model; of several names, the one below the calling module.
        in_shape: shape of the first tensor among the arguments; () without a tensor.
        items: the operators and calls inside this call, in the order in which they ran.
    """

    module: nn.Module
    path: str
    in_shape: Shape
    items: list[Op | Call] = field(default_factory=list)

    @cached_property
    def names(self) -> dict[nn.Module, str]:
        """The path of this module and of every module inside it."""
        prefix = "" if self.path == _ROOT else f"{self.path}."
        named = self.module.named_modules()
        return {m: prefix + name if name else self.path for name, m in named}

    def ops(
        self, owners: Mapping[Any, Owner], outside: Container[nn.Module] = ()
    ) -> Iterator[tuple[Owner, Op]]:
        """Pairs (owner, operator) of all operators inside this call.

        The owner of an operator is that of the innermost enclosing module that ``owners`` contains.
        A module with several names in the model has no owner; for example, Ultralytics' layers
        share one activation module.

        Args:
            owners: the owner of a module, under the key ``module``; or of one kind of operator in
                a module, under the key (module, operator name). Must contain this call's module.
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
        """Every operator, with the modules around it, innermost first."""
        chain = (self.module, *above)
        for item in self.items:
            if isinstance(item, Op):
                yield chain, item
            elif item.module not in outside:
                yield from item._chains(outside, chain)

    def calls(self, wanted: Container[nn.Module]) -> Iterator[Call]:
        """The outermost calls of ``wanted`` modules inside this call, in the order of the run."""
        for item in self.items:
            if isinstance(item, Call):
                if item.module in wanted:
                    yield item
                else:
                    yield from item.calls(wanted)


class Trace(NamedTuple):
    """The fused modules of a model, and one run of the unfused model.

    Attributes:
        root: the call of the model.
        units: the parts of each module that runs fused.
        left: notes on the modules that are not fused, with the reasons.
    """

    root: Call
    units: dict[nn.Module, Unit]
    left: list[str]


def trace(
    model: nn.Module, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> Trace:
    """The units of a model, and its run on an x of ``shape``. The model does not change.

    Args:
        shape: N, C, H, W of x.
        dtype, memory_format: of x; dtype also of the parameters.

    Raises:
        ValueError: the model cannot be copied, has a lazy layer, or needs the values of a tensor.
        Any other error of the model's forward.
    """
    twin = _copy(model, dtype)
    units, left = _read_units(twin)
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    return Trace(_record(twin, x), units, left)


# --- a copy without data, and what fuse makes of it ---------------------------------------------


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model on the meta device in eval mode, with parameters in ``dtype``.

    The deep copy replaces every tensor by one without data, so the copy takes no device memory. The
    copy has the hooks of the model, not copies of them: a copy of a hook that is a bound method
    would copy the method's object too.
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
    """The units of a copy, and notes on the other modules. Leaves the copy unfused."""
    convert.unfuse(twin)
    reasons: dict[str, list[str]] = {}
    for entry in convert.fuse_modules(twin):
        if entry.state == "left":
            reasons.setdefault(entry.detail, []).append(entry.name)
    units: dict[nn.Module, Unit] = {}
    for name, module in twin.named_modules():
        if isinstance(module, Fused):
            state = state_of(module)
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
    """Why a module in eval mode does not run as operators of ghost_ops; empty if it does."""
    if parts.dw_size not in _DW_SIZES:
        return f"there is no fused kernel for a cheap convolution of size {parts.dw_size}"
    norms = [m for m in parts.layers if isinstance(m, NORMS)]
    if any(bn.training or bn.running_mean is None for bn in norms):
        return "a batch norm has no running statistics, so that it runs as in training"
    if isinstance(parts, Ghost):  # runs as ghost_apply even if its packed weights cannot be cached
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
        # If a forward reads values of a tensor or uses a second device, the error of PyTorch names
        # the meta device.
        if not isinstance(error, NotImplementedError) and "meta" not in str(error).lower():
            raise
        raise ValueError(
            "model: its forward does not run on shapes alone, without the values of tensors: "
            f"{type(error).__name__}: {error}"
        ) from error
    return root


class _Recorder(TorchDispatchMode):
    """Records the operators that run, in the tree of module calls."""

    def __init__(self, root: Call) -> None:
        from torch.utils.flop_counter import flop_registry  # late, because it imports Triton

        super().__init__()
        self.root, self.stack = root, [root]
        self.flop_counts: dict[Any, Any] = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = self.flop_counts.get(func._overloadpacket)
        op = _op_of(func, args, kwargs or {}, out, count)
        if op is not None:
            self.stack[-1].items.append(op)
        return out

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The forward pre-hook of every module."""
        parent = self.stack[-1]
        path = parent.names.get(module) or self.root.names[module]
        shape = next((tuple(t.shape) for t in _tensors((args, kwargs))), ())
        call = Call(module, path, shape)
        parent.items.append(call)
        self.stack.append(call)

    def leave(self, module: nn.Module, args: tuple, out: Any) -> None:
        """The forward hook of every module."""
        while self.stack.pop().module is not module:
            pass  # a call raised an error that the model caught, so its hook did not run


def _op_of(
    func: Any, args: tuple, kwargs: dict[str, Any], out: Any, count: Any | None
) -> Op | None:
    """One run of an operator; None if it is a view or only allocates.

    Args:
        func: the operator; args, kwargs, out: its arguments and result.
        count: the function that counts its FLOPs, or None.
    """
    name = func._schema.name.removeprefix("aten::")
    if func.is_view or name in _ALLOCATE:
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
    return Op(name, launches, moved, 0 if count is None else count(*args, **kwargs, out_val=out))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))


def _bytes(t: Tensor) -> int:
    """Bytes of a tensor in memory; an expanded dimension counts as one element."""
    sizes = zip(t.shape, t.stride(), strict=True)
    return math.prod(size if stride else min(size, 1) for size, stride in sizes) * t.element_size()
