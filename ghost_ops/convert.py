"""``fuse`` and ``unfuse``: fuse the Ghost modules of an existing model, and undo it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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
    fused_class,
    is_made,
    is_named,
    match_as,
    name_of,
    read_as,
    state_of,
)
from .fusion.ghost import FusedGhost
from .fusion.guards import Refusal, owner_kind
from .fusion.network import FusedNetwork
from .fusion.read import Failed
from .fusion.symbols import Node
from .nn import FusedGhostModule
from .reference import GhostModule

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


@dataclass(frozen=True)
class Entry:
    """What ``fuse`` or ``unfuse`` did to one module.

    Attributes:
        name: path in the model; ``(model)`` for the model itself.
        kind: the name of the module's class before the call.
        action: ``swapped`` (fused), ``already`` (fused before), ``left`` (cannot be fused),
            ``kept`` (the plain module is faster) or ``restored`` (unfused).
        detail: a description of the module after the call, or the reason for ``left`` and ``kept``.
    """

    name: str
    kind: str
    action: str
    detail: str


@dataclass
class Report:
    """What ``fuse`` or ``unfuse`` did to a model; ``repr`` of a report is a table.

    Attributes:
        model: the model, changed in place.
        entries: one for each Ghost module, Ghost bottleneck, and module that looks like one.
    """

    model: nn.Module = field(repr=False)
    entries: list[Entry]

    @property
    def swapped(self) -> list[Entry]:
        """The entries of the modules that were fused or unfused."""
        return [e for e in self.entries if e.action in ("swapped", "restored")]

    @property
    def left(self) -> list[Entry]:
        """The entries of modules that look like Ghost modules and cannot be fused."""
        return [e for e in self.entries if e.action == "left"]

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        if not self.entries:
            return f"{kind}: no Ghost modules found, nothing changed"
        rows = [("module", "class", "action", "detail")]
        rows += [(e.name, e.kind, e.action, e.detail) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        head, *lines = (
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )
        actions = [e.action for e in self.entries]
        counts = {a: actions.count(a) for a in ("swapped", "restored", "already", "kept", "left")}
        total = ", ".join(f"{n} {a}" for a, n in counts.items() if n) or "nothing changed"
        rule = "-" * len(head)
        return "\n".join([head.rstrip(), rule, *map(str.rstrip, lines), f"{kind}: {total}"])


def fuse(model: nn.Module, inference: bool | None = None, example: Tensor | None = None) -> Report:
    """Make every Ghost module in a model run as one fused operator, in place.

    A module stays the same object: parameters, buffers, state_dict keys, mode, requires_grad, hooks
    and attributes do not change. Only its class changes, to one derived from its own. ``fuse``
    recognises a Ghost module by following its forward (``fusion.read``), and then compares the
    fused result with the forward's on a copy. A module that cannot be followed is left unchanged,
    and the report says why. The model's mode does not matter.

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

    Returns:
        The report; ``repr`` of it is a table.

    Raises:
        TypeError: model is not a module.
        RuntimeError: ``fuse`` is called inside torch.compile.
        Any error of the model on the example.

    Example::

        model = timm.create_model("ghostnet_100").eval()
        print(ghost_ops.fuse(model))
    """
    _check_model(model)
    if _is_compiling():
        raise RuntimeError(
            "fuse changes classes of modules: call it before torch.compile, not in it"
        )
    entries: dict[str, Entry] = {}
    inference = inference or inference is None
    for kind in _KINDS if inference else _KINDS[:1]:
        for name, module in reversed(list(_named(model))):  # children first
            entry = _fuse(kind, name, module)
            if entry is not None:
                entries[name] = entry
    if inference and _has_fused(model):
        for name, module in _outside_of_fused(model):
            entry = _fuse(FusedExpression, name, module)
            if entry is not None:
                entries[name] = entry
    if example is not None:
        entries |= _keep_faster(model, entries, example)
    order = [name for name, _ in _named(model)]
    return Report(model, [entries[name] for name in order if name in entries])


def unfuse(model: nn.Module) -> Report:
    """Give every fused module of a model its plain class back, in place.

    Parameters, buffers, state_dict keys, hooks and modes do not change.

    A ``FusedGhostModule`` becomes a ``reference.GhostModule``, and a ``FusedGhostBottleneck`` a
    ``reference.GhostBottleneck``.

    Args:
        model: the model, or a fused module.

    Returns:
        The report, with an entry for each restored module.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    entries = []
    for name, module in _named(model):
        kind = type(module)
        if isinstance(module, Fused) and is_made(kind):
            detach(module)
            entries.append(Entry(name, kind.__name__, "restored", type(module).__name__))
    return Report(model, entries)


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


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


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


def _keep_faster(model: nn.Module, entries: dict[str, Entry], example: Tensor) -> dict[str, Entry]:
    """Unfuse the swapped modules that run slower fused on an example; returns their new entries."""
    named = [(name, module) for name, module in _named(model) if isinstance(module, Fused)]
    swapped = {n: m for n, m in named if n in entries and entries[n].action == "swapped"}
    made = [module for _, module in named if is_made(type(module))]
    kept = {}
    for name, (fused, plain) in timing.slower(model, swapped, made, example).items():
        detail = f"plain is faster here: {plain * 1e3:.3g} ms to {fused * 1e3:.3g}"
        kept[name] = Entry(name, entries[name].kind, "kept", detail)
    return kept


def _fuse(kind: type[Fused], name: str, module: nn.Module) -> Entry | None:
    """Fuse one module as one of this kind; None if it does not look like one."""
    base = type(module)
    if isinstance(module, kind):
        plain = base if is_named(base) else owner_kind(module)
        return Entry(name, plain.__name__, "already", _description(module))
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
    detail = "FusedGhostModule" if base is GhostModule else parts.description()
    return Entry(name, base.__name__, "swapped", detail)


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


def _description(module: nn.Module) -> str:
    if type(module) is FusedGhostModule:
        return "FusedGhostModule"
    assert isinstance(module, Fused)
    state = state_of(module)
    if state.parts is None:
        return f"unfused at the moment: {state.reason}"
    return state.parts.description()
