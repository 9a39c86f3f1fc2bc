"""``fuse`` and ``unfuse``: fuse the Ghost modules of an existing model, undo it; ``report``."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from . import ops
from .fusion import check, timing
from .fusion.bottleneck import FusedBottleneck
from .fusion.expression import ExpressionForm, FusedExpression
from .fusion.fused import (
    Fused,
    attach,
    detach,
    forget,
    fused_class,
    is_made,
    match_as,
    name_of,
    read_as,
    state_of,
)
from .fusion.ghost import FusedGhost
from .fusion.guards import Record, Refusal
from .fusion.network import FusedNetwork
from .fusion.read import Failed
from .fusion.symbols import Node
from .reference import GhostModule

Model = TypeVar("Model", bound=nn.Module)

_KINDS: tuple[type[Fused], ...] = (FusedGhost, FusedBottleneck, FusedNetwork)
_MOST_CONVS = 8  # in a Ghost module; GhostModuleV2 has five
# A module with children of these names is reported if it cannot be fused.
_MARKS: dict[type[Fused], set[str]] = {
    FusedGhost: {"primary_conv", "cheap_operation"},
    FusedBottleneck: {"ghost1", "ghost2"},
    FusedNetwork: {"conv_stem", "blocks", "global_pool", "conv_head", "classifier"},
}
# A module whose forward ends with this operation is reported too.
_ENDS = {FusedGhost: "cat", FusedBottleneck: "add"}

_LOOKED_FOR = (
    "fuse looks for modules whose forward gives concat(y, act(norm(depthwise(y)))) with "
    "y = act(norm(conv(x))), such as the authors' and timm's GhostModule and Ultralytics' GhostConv"
)
STATES = ("fused", "fallback", "kept", "plain", "left")


class _Kept(NamedTuple):
    """Why ``fuse`` unfused a module again: the times, and the record of the forward then."""

    detail: str
    record: Record


# By module. A copy or a pickle of a model has no times.
_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


@dataclass(frozen=True)
class Entry:
    """The state of one module at the time of ``report``.

    Attributes:
        name: path in the model; ``(model)`` for the model itself.
        kind: the name of the module's plain class.
        state: one of

            - ``fused``: it is fused;
            - ``fallback``: it is fused, and runs its own forward, because it was changed;
            - ``kept``: it is plain, because it was faster on the ``example`` of ``fuse``;
            - ``plain``: it is plain, and ``fuse`` would fuse it;
            - ``left``: it looks like a Ghost module, and cannot be fused.
        detail: what it is fused as, or would be; the times of ``kept``; the reason of ``fallback``
            and ``left``.
    """

    name: str
    kind: str
    state: str
    detail: str


@dataclass(frozen=True)
class Report:
    """The modules of a model that are fused or could be; ``str`` and ``repr`` are a table.

    Attributes:
        model: the name of the model's plain class.
        entries: one for each Ghost module, Ghost bottleneck, module that looks like one, and fused
            module, in the order of ``model.named_modules()``.
    """

    model: str
    entries: tuple[Entry, ...]

    def in_state(self, state: str) -> list[Entry]:
        """The entries in one state.

        Args:
            state: as ``Entry.state``.

        Raises:
            ValueError: there is no such state.
        """
        if state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
        return [entry for entry in self.entries if entry.state == state]

    def __repr__(self) -> str:
        if not self.entries:
            return f"{self.model}: no Ghost modules"
        rows = [("module", "class", "state", "detail")]
        rows += [(e.name, e.kind, e.state, e.detail) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        head, *lines = (
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )
        counts = {state: len(self.in_state(state)) for state in STATES}
        total = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        rule = "-" * len(head)
        return "\n".join([head.rstrip(), rule, *map(str.rstrip, lines), f"{self.model}: {total}"])


def fuse(
    model: Model,
    inference: bool | None = None,
    example: Tensor | None = None,
    verbose: bool = False,
) -> Model:
    """Make every Ghost module in a model run as one fused operator, in place.

    A module stays the same object: parameters, buffers, state_dict keys, mode, requires_grad, hooks
    and attributes do not change. Only its class changes, to one derived from its own. ``fuse``
    recognises a Ghost module by following its forward (``fusion.read``), and then compares the
    fused result with the forward's on a copy. A module that cannot be followed is left unchanged;
    ``report`` says why.

    The model's mode does not matter: a module has a fused form for training and one for inference,
    and each is made at the first call that needs it.

    Known forms are the authors' and timm's GhostModule (also V2 with its attention gate, and V3
    after its reparameterisation), Ultralytics' GhostConv (also after its own ``fuse()``), NanoDet's
    GhostModule, and any other module with this formula::

        y   = act(norm(conv(x)))
        z   = act(norm(depthwise(y)))
        out = concat(y, z)[:, :out_channels]

    Each bias, norm and activation (one of ``ghost_ops.activations``) may be missing; each may be a
    module or a function; other layers may follow.

    If autograd records a call, a module whose primary convolution is not a plain 1x1 runs its own
    forward, because that is faster; its layers then save what they save unfused. There is one
    exception: on a CPU with native kernels, if the module's only batch norm follows the
    concatenation, the part after the convolution is fused. A ``reference.GhostModule`` becomes a
    ``FusedGhostModule``, which is fused in training for every primary convolution.

    Everything that a forward reads is compared before every call: a change of weights, children,
    attributes, modes or hooks takes effect at once. Fusing a model twice changes nothing.

    A model in which nothing can be fused stays as it is, with one ``UserWarning``: an exception
    would end a program that calls ``fuse`` on each of many models, and without a warning nobody
    would see that the call had no effect. There is no warning if some modules were fused and others
    left: ``verbose`` and ``report`` show these.

    Args:
        model: the model, or a Ghost module.
        inference: None or True: whole Ghost bottlenecks, and the stem and head of a GhostNet, run
            as few operators, with batch norms folded and weights packed once, in eval mode without
            gradients; training stays the same. If a Ghost module was fused, every module that
            consists of convolutions with batch norm and activation, Ghost modules, sums,
            concatenations and pooling runs as one operator too, on a CPU with native kernels: from
            one convolution to the whole model. False: only Ghost modules are fused.
        example: an input of the model, such as [N, C, H, W]. If given, the model runs on it once in
            eval mode, and each fused module is timed on its input in that run. A module that takes
            more than 5% longer than its plain form is unfused. Modes and buffers stay the same.
        verbose: print ``report(model)``.

    Returns:
        The model itself, changed in place.

    Raises:
        TypeError: model is not a module, or is compiled by torch.jit; inference is not None or a
            bool; example is not a tensor.
        RuntimeError: ``fuse`` is called inside torch.compile; or the model raises for the example,
            and then nothing has changed.

    Example::

        model = ghost_ops.fuse(timm.create_model("ghostnet_100").eval())
        print(ghost_ops.report(model))
    """
    _check_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be an nn.Module in Python, got a {type(model).__name__}, compiled by "
            "torch.jit: fuse the module that it was made of"
        )
    if inference is not None and not isinstance(inference, bool):
        raise TypeError(f"inference must be None, True or False, got {type(inference).__name__}")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(
            f"example must be a Tensor, an input of the model, got {type(example).__name__}"
        )
    if _is_compiling():
        raise RuntimeError(
            "fuse changes classes of modules: call it before torch.compile, not in it"
        )
    before = {id(module) for module in model.modules() if isinstance(module, Fused)}
    entries = fuse_modules(model, inference)
    new = {
        name: module
        for name, module in _named(model)
        if isinstance(module, Fused) and id(module) not in before
    }
    if example is not None:
        _keep_faster(model, new, example)
    if not before and not new:
        warnings.warn(_nothing_fused(model, entries), UserWarning, stacklevel=2)
    if verbose:
        print(report(model))
    return model


def fuse_modules(
    model: nn.Module, inference: bool | None = None, but: Set[nn.Module] = frozenset()
) -> list[Entry]:
    """``fuse`` without its warning: the entries of all modules that it found, fused or left.

    Args:
        model, inference: as in ``fuse``.
        but: modules that stay as they are.
    """
    entries: dict[str, Entry] = {}

    def add(kind: type[Fused], name: str, module: nn.Module) -> None:
        entry = None if module in but else _fuse(kind, name, module)
        if entry is not None:
            entries[name] = entry

    inference = inference or inference is None
    for kind in _KINDS if inference else _KINDS[:1]:
        for name, module in reversed(list(_named(model))):  # children first
            add(kind, name, module)
    if inference and _has_fused(model):
        for name, module in _outside_of_fused(model):
            add(FusedExpression, name, module)
    return [entries[name] for name, _ in _named(model) if name in entries]


def unfuse(model: Model) -> Model:
    """Give every fused module of a model its plain class back, in place.

    Parameters, buffers, state_dict keys, hooks and modes do not change. A model without fused
    modules stays as it is.

    A ``FusedGhostModule`` becomes a ``reference.GhostModule``, and a ``FusedGhostBottleneck`` a
    ``reference.GhostBottleneck``.

    Args:
        model: the model, or a fused module.

    Returns:
        The model itself, changed in place.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    for module in model.modules():
        _kept.pop(module, None)
        if isinstance(module, Fused) and is_made(type(module)):
            detach(module)
    return model


def report(model: nn.Module) -> Report:
    """The modules of a model that are fused now, that could be, and that cannot, with the reasons.

    It does what ``fuse`` would do on a copy that shares the model's tensors, so it shows the
    model's state at the time of the call, after whatever change. Neither the model nor its fused
    modules change. As for ``fuse``, the model's mode does not matter.

    Why a module was kept plain is remembered until it is fused again, ``unfuse`` is called, or its
    forward changes. Copies and pickles do not contain it: there the module is ``plain``.

    Args:
        model: the model, or a module.

    Returns:
        The report; ``str`` of it is a table.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    twins: dict[int, nn.Module] = {}
    twin = _twin(model, twins)
    found: dict[str, Entry] = {}
    kept: set[nn.Module] = set()
    for name, module in _named(model):
        other, memory = twins.get(id(module), module), _kept.get(module)
        if isinstance(module, Fused):
            found[name] = _entry(name, other)
        elif memory is not None and memory.record.holds(other):
            kept.add(other)
            found[name] = Entry(name, type(module).__name__, "kept", memory.detail)
    for entry in fuse_modules(twin, but=kept):
        plain = entry.state == "fused"  # the twin is fused, the module is not
        found.setdefault(
            entry.name,
            Entry(entry.name, entry.kind, "plain", f"can be fused: {entry.detail}")
            if plain
            else entry,
        )
    names = (name for name, _ in _named(model))
    return Report(
        _plain_class(model).__name__, tuple(found[name] for name in names if name in found)
    )


def reset_cache(model: nn.Module) -> None:
    """Drop the packed weights of every fused module in a model; the next call packs again.

    Needed after writes through ``parameter.data``, which PyTorch does not record.

    Args:
        model: the model, or a fused module.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    for _, module in _named(model):
        if isinstance(module, Fused):
            module.reset_cache()


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        is_class = isinstance(model, type)
        got = f"the class {model.__name__}" if is_class else type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {got}")


def _is_compiling() -> bool:
    """Whether torch.compile traces the caller now, or runs it after a graph break."""
    if torch.compiler.is_compiling():
        return True
    frames = getattr(torch._C._dynamo, "eval_frame", None)
    callback = getattr(frames, "get_eval_frame_callback", lambda: None)()
    return callable(callback)


def _has_fused(module: nn.Module) -> bool:
    """Whether a module is a fused Ghost module or contains one."""
    return any(isinstance(m, FusedGhost) for m in module.modules())


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield name or "(model)", module


def _outside_of_fused(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules outside of fused modules (``FusedExpression`` not counted), outer ones first."""
    inside: set[int] = set()
    for name, module in _named(model):
        if id(module) in inside:
            continue
        yield name, module
        if isinstance(module, Fused) and not isinstance(module, FusedExpression):
            inside |= {id(m) for m in module.modules()}


def _nothing_fused(model: nn.Module, entries: list[Entry]) -> str:
    """The warning for a model without a fused module."""
    kind = type(model).__name__
    if not entries:
        return f"fuse found no Ghost module in model, a {kind}, and changed nothing. {_LOOKED_FOR}."
    first, count = entries[0], len(entries)
    what = "1 module looks" if count == 1 else f"{count} modules look"
    return (
        f"fuse changed nothing in model, a {kind}: {what} like a Ghost module and cannot be fused. "
        f"{first.name}, a {first.kind}: {first.detail}."
        + (" ghost_ops.report(model) has the other reasons." if count > 1 else "")
    )


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A copy of the modules, without their states, in eval mode; the tensors are shared.

    Args:
        twins: the copies so far, by id of the module; the new ones are added.
    """
    if id(module) in twins:
        return twins[id(module)]
    if isinstance(module, torch.jit.ScriptModule):  # nothing inside can be fused
        return module
    twin: nn.Module = object.__new__(type(module))
    twins[id(module)] = twin
    values = twin.__dict__
    values.update(module.__dict__, training=False)
    forget(twin)
    for name, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            values[name] = types.MethodType(value.__func__, twin)
    values["_modules"] = {
        name: None if child is None else _twin(child, twins)
        for name, child in module._modules.items()
    }
    return twin


def _keep_faster(model: nn.Module, new: dict[str, Fused], example: Tensor) -> None:
    """Unfuse the new fused modules that run slower fused on an example; all if the model raises."""
    made = [m for m in model.modules() if isinstance(m, Fused) and is_made(type(m))]
    kinds = {name: _kind_of(module) for name, module in new.items()}
    try:
        slower = timing.slower(model, new, made, example)
    except Exception as error:
        for module in new.values():
            if isinstance(module, Fused):  # not yet unfused by ``slower``
                detach(module)
        p = next(model.parameters(), None)
        wants = "" if p is None else f" The model has {p.dtype} weights on {p.device}."
        raise RuntimeError(
            "example must be an input that the model takes in eval mode, got "
            f"{list(example.shape)} in {example.dtype} on {example.device}, for which the model "
            f"raises {type(error).__name__}: {error}.{wants}"
        ) from error
    for name, (fused, plain) in slower.items():
        detail = f"plain is faster here: {plain * 1e3:.3g} ms to {fused * 1e3:.3g}"
        _kept[new[name]] = _Kept(detail, read_as(kinds[name], new[name]).record)


def _kind_of(module: Fused) -> type[Fused]:
    return next(kind for kind in (*_KINDS, FusedExpression) if isinstance(module, kind))


def _fuse(kind: type[Fused], name: str, module: nn.Module) -> Entry | None:
    """Fuse one module as one of this kind; None if it does not look like one."""
    base = type(module)
    if isinstance(module, kind):
        return _entry(name, module)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        if kind is not FusedGhost or name != "(model)":
            return None
        what = "an FX graph" if isinstance(module, fx.GraphModule) else "compiled by torch.jit"
        return Entry(name, base.__name__, "left", f"it is {what}; fuse the module it was made of")
    if isinstance(module, Fused) or not _may_be(kind, module, is_model=name == "(model)"):
        return None
    try:
        reading = read_as(kind, module)
    except Failed as failed:
        return _left(kind, name, module, str(failed))
    try:
        form = match_as(kind, reading)
        parts = form.bind(module)
        if isinstance(form, ExpressionForm) and len(form.steps) == 1 and _has_fused(module):
            return None  # the module only calls a module that is already fused
        check.compare(kind, module, form, reading.record)
    except Refusal as refusal:
        return _left(kind, name, module, str(refusal), _last_op(reading.out))
    module.__class__ = fused_class(kind, base)
    attach(module)  # type: ignore[arg-type]
    _kept.pop(module, None)
    detail = "FusedGhostModule" if base is GhostModule else parts.description()
    return Entry(name, base.__name__, "fused", detail)


def _entry(name: str, module: Any) -> Entry:
    """The entry of a fused module."""
    kind, state = _plain_class(module), state_of(module)
    if state.parts is None:
        return Entry(name, kind.__name__, "fallback", state.reason)
    detail = "FusedGhostModule" if kind is GhostModule else state.parts.description()
    return Entry(name, kind.__name__, "fused", detail)


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``unfuse`` gives a module."""
    kind: Any = type(module)
    return kind._ghost_ops_base if is_made(kind) else kind


def _may_be(kind: type[Fused], module: nn.Module, is_model: bool) -> bool:
    """Whether a module's children allow it to be one of this kind."""
    inside = list(module.modules())
    if type(module) is nn.Sequential and not (is_model and kind is FusedExpression):
        return False
    if any(isinstance(m, (torch.jit.ScriptModule, fx.GraphModule)) for m in inside):
        return False
    if kind is FusedGhost:
        convs = [m for m in inside if isinstance(m, nn.modules.conv._ConvNd)]
        with_conv = [c for c in _children(module) if not {*convs}.isdisjoint(c.modules())]
        return (
            1 < len(convs) <= _MOST_CONVS
            and not any(isinstance(m, Fused) and not isinstance(m, FusedExpression) for m in inside)
            and len(with_conv) > 1
            and (_is_marked(kind, module) or any(1 < c.groups == c.in_channels for c in convs))
        )
    if kind is FusedBottleneck:
        ghosts = sum(isinstance(m, FusedGhost) for m in inside)
        bottlenecks = sum(isinstance(m, FusedBottleneck) for m in inside)
        return (ghosts == 2 or _is_marked(kind, module)) and ghosts <= 2 and not bottlenecks
    if kind is FusedExpression:
        has_conv = any(isinstance(m, nn.Conv2d) for m in inside)
        library = type(module).__module__.startswith("torch.nn.")
        return has_conv and _runs_convs(module) and (is_model or not library)
    return _is_marked(kind, module) and not any(isinstance(m, FusedNetwork) for m in inside)


def _runs_convs(module: nn.Module) -> bool:
    """Whether ``ghost_conv_apply`` has a kernel for the device of a module's parameters."""
    return ops.has_conv_kernel() and all(p.device.type == "cpu" for p in module.parameters())


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module; a ModuleList or ModuleDict is replaced by its modules."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child)
        else:
            yield child


def _is_marked(kind: type[Fused], module: nn.Module) -> bool:
    names = {name for name, child in module._modules.items() if child is not None}
    return kind in _MARKS and _MARKS[kind] <= names


def _last_op(node: Node) -> str:
    """The last operation before activations, norms, slices, products and whole modules.

    It is "cat" for a Ghost module and "add" for a bottleneck.
    """
    while node.op in ("act", "bn", "prelu", "module", "slice", "mul"):
        node = next((n for n in node.inputs if n.op in ("slice", "cat")), node.inputs[0])
    return node.op


def _left(
    kind: type[Fused], name: str, module: nn.Module, reason: str, last_op: str = ""
) -> Entry | None:
    """The entry of a module that cannot be fused; None if it does not look like one of the kind."""
    if not _is_marked(kind, module) and last_op != _ENDS.get(kind):
        return None
    if "primary_rpr_conv" in module._modules:
        reason += "; it still has the branches that it is trained with: reparameterize it first"
    prefix = "" if kind is FusedGhost else f"{name_of(kind)}: "
    return Entry(name, type(module).__name__, "left", prefix + reason)
