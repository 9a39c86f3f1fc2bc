"""``fuse`` and ``unfuse``: models that people already have, with their Ghost modules fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from .fusion import check, timing
from .fusion.bottleneck import FusedBottleneck
from .fusion.expression import ExpressionForm, FusedExpression
from .fusion.fused import Fused, attach, detach, fused_class
from .fusion.ghost import FusedGhost
from .fusion.guards import Refusal
from .fusion.network import FusedNetwork
from .fusion.read import Failed
from .fusion.symbols import Node
from .models import FusedGhostNet, GhostNet
from .nn import FusedGhostBottleneck, FusedGhostModule
from .ops import layers as model_ops
from .reference import GhostBottleneck, GhostModule

# Our own classes, fused and not.
_PAIRS: dict[type[nn.Module], type[Fused]] = {
    GhostModule: FusedGhostModule,
    GhostBottleneck: FusedGhostBottleneck,
    GhostNet: FusedGhostNet,
}
_KINDS: tuple[type[Fused], ...] = (FusedGhost, FusedBottleneck, FusedNetwork)
_MOST_CONVS = 8  # in a Ghost module: V2 has five
# Children that make a module one that is reported where it cannot be fused.
_MARKS: dict[type[Fused], tuple[set[str], ...]] = {
    FusedGhost: ({"primary_conv", "cheap_operation"},),
    FusedBottleneck: ({"ghost1", "ghost2"},),
    FusedNetwork: ({"conv_stem", "blocks", "global_pool", "conv_head", "classifier"},),
}
# The operation at the end of the forward of a module that is like one of the kind.
_ENDS = {FusedGhost: ("cat",), FusedBottleneck: ("add",)}


@dataclass(frozen=True)
class Entry:
    """What became of one module.

    Attributes:
        name: its path in the model; ``(model)`` for the model itself.
        kind: its class before.
        action: ``swapped``, ``already`` (it was fused before), ``left``, ``kept`` (the plain
            module is faster) or ``restored``.
        detail: what it is now, or why it was left as it is.
    """

    name: str
    kind: str
    action: str
    detail: str


@dataclass
class Report:
    """What ``fuse`` or ``unfuse`` did to a model. Its repr is a table.

    Attributes:
        model: the model, changed in place.
        entries: one for each Ghost module, Ghost bottleneck, and module that looks like one.
    """

    model: nn.Module = field(repr=False)
    entries: list[Entry]

    @property
    def swapped(self) -> list[Entry]:
        """What was changed."""
        return [e for e in self.entries if e.action in ("swapped", "restored")]

    @property
    def left(self) -> list[Entry]:
        """What looks like a Ghost module and was left as it is."""
        return [e for e in self.entries if e.action == "left"]

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        if not self.entries:
            return f"{kind}: no Ghost modules found, nothing changed"
        rows = [("module", "class", "action", "detail")]
        rows += [(e.name, e.kind, e.action, e.detail) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
                 for row in rows]  # fmt: skip
        counts = {a: sum(e.action == a for e in self.entries)
                  for a in ("swapped", "restored", "already", "kept", "left")}  # fmt: skip
        total = ", ".join(f"{n} {a}" for a, n in counts.items() if n) or "nothing changed"
        return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *map(str.rstrip, lines[1:]),
                          f"{kind}: {total}"])  # fmt: skip


def fuse(model: nn.Module, inference: bool | None = None, example: Tensor | None = None) -> Report:
    """Make every Ghost module in a model run as one fused operator, in place.

    The modules stay the objects that they are: parameters, buffers, state_dict keys, mode,
    requires_grad, hooks and attributes are untouched, only their class changes, to one derived from
    their own. They are recognised by following what their forward does (``fusion.read``), and the
    result is compared with it on a copy; what cannot be followed is left as it is, and the report
    says why. The model's mode does not matter.

    Known forms: the authors' and timm's GhostModule (also V2 with its attention gate, and V3 after
    its reparameterisation), Ultralytics' GhostConv (also after its own ``fuse()``), NanoDet's, and
    any other module whose forward is a convolution, a depthwise convolution of its result, and
    their concatenation, each with or without bias, batch norm and one of the activations of
    ``ghost_ops.activations``, as modules or as functions; other layers may follow.

    Where gradients are recorded, a module whose primary convolution is not a plain 1x1 runs its own
    forward, which is faster there, and saves what its layers save; on a CPU with native kernels it
    is fused behind the convolution if its only batch norm follows the concatenation. A
    ``reference.GhostModule`` becomes a ``FusedGhostModule``, which is fused in training as well.

    Whatever forward was seen to read is compared before every call: a change of weights, children,
    attributes, modes or hooks takes effect at once. Fusing twice changes nothing.

    Args:
        model: the model, or a Ghost module itself.
        inference: also let whole Ghost bottlenecks, and a GhostNet's stem and head, run as few
            operators with batch norms folded and weights packed once, whenever they are called in
            eval mode without gradients (training goes on as before). None: yes. On a CPU with
            native kernels also, where a Ghost module was fused, every module that is a convolution
            with batch norm and activation, or that is made of such convolutions, Ghost modules,
            sums, concatenations and pooling, up to the whole model.
        example: an input of the model. If given, the model runs once on it, in eval mode, and each
            module that was fused is timed on the input that it gets then: if it loses more than 5%
            to its plain form, it gets that back. Modes and buffers stay as they are.

    Returns:
        The report; its ``model`` is the model, and its repr a table of what was done.

    Raises:
        TypeError: model is not a module.
        RuntimeError: it is called inside torch.compile.
        Whatever the model raises on the example.

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
    """Give every fused module of a model its plain form back, in place: same state, same keys.

    Undoes ``fuse``; a ``FusedGhostModule`` becomes a ``reference.GhostModule``, and a
    ``FusedGhostBottleneck`` a ``reference.GhostBottleneck``.

    Raises:
        TypeError: model is not a module.
    """
    _check_model(model)
    entries = []
    for name, module in _named(model):
        kind = type(module)
        if not isinstance(module, Fused) or not _is_made(kind):
            continue
        plain = kind._ghost_ops_base
        detach(module)
        entries.append(Entry(name, kind.__name__, "restored", f"{plain.__name__}"))
    return Report(model, entries)


def reset_cache(model: nn.Module) -> None:
    """Forget the packed weights of every fused module in a model; the next call packs anew.

    Needed after writes through ``parameter.data``, which PyTorch does not record.

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
    """Whether the caller is compiled: traced now, or run because it could not be traced."""
    if torch.compiler.is_compiling():
        return True
    frames = getattr(torch._C._dynamo, "eval_frame", None)
    callback = getattr(frames, "get_eval_frame_callback", lambda: None)()
    return callable(callback)


def _has_fused(module: nn.Module) -> bool:
    """Whether a Ghost module that is fused is inside, or it is one."""
    return any(isinstance(m, FusedGhost) for m in module.modules())


def _is_made(kind: type) -> bool:
    """Whether ``fuse`` gives modules this class."""
    return "_ghost_made" in kind.__dict__ or kind in _PAIRS.values()


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield name or "(model)", module


def _outside_of_fused(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are not inside of a fused one, but for expressions; outer ones first."""
    inside: set[int] = set()
    for name, module in _named(model):
        if id(module) in inside:
            continue
        yield name, module
        if isinstance(module, Fused) and not isinstance(module, FusedExpression):
            inside |= {id(m) for m in module.modules()}


def _keep_faster(model: nn.Module, entries: dict[str, Entry], example: Tensor) -> dict[str, Entry]:
    """Give swapped modules that lose on an example their plain form back; their new entries."""
    named = [(name, module) for name, module in _named(model) if isinstance(module, Fused)]
    swapped = {n: m for n, m in named if n in entries and entries[n].action == "swapped"}
    made = [module for _, module in named if _is_made(type(module))]
    kept = {}
    for name, (fused, plain) in timing.slower(model, swapped, made, example).items():
        detail = f"plain is faster here: {plain * 1e3:.3g} ms to {fused * 1e3:.3g}"
        kept[name] = Entry(name, entries[name].kind, "kept", detail)
    return kept


def _fuse(kind: type[Fused], name: str, module: nn.Module) -> Entry | None:
    base = type(module)
    if isinstance(module, kind):
        plain = base.__name__ if base in _PAIRS.values() else module._ghost_ops_base.__name__
        return Entry(name, plain, "already", _description(module))
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        if kind is not FusedGhost or name != "(model)":
            return None
        what = "an FX graph" if isinstance(module, fx.GraphModule) else "compiled by torch.jit"
        return Entry(name, base.__name__, "left", f"it is {what}; fuse the module it was made of")
    if isinstance(module, Fused) or not _may_be(kind, module, is_model=name == "(model)"):
        return None
    try:
        reading = kind._ghost_read(module, training=False)
    except Failed as failed:
        return _left(kind, name, module, str(failed), marked=False)
    try:
        form = kind._ghost_match(reading)
        parts = form.bind(module)
        if isinstance(form, ExpressionForm) and len(form.steps) == 1 and _has_fused(module):
            return None  # it only calls a module that is fused
        check.compare(kind, module, form, reading.record)
    except Refusal as refusal:
        return _left(kind, name, module, str(refusal), _ends(reading.out) in _ENDS.get(kind, ()))
    module.__class__ = _PAIRS.get(base) or fused_class(kind, base)
    attach(module)  # type: ignore[arg-type]
    detail = "FusedGhostModule" if base is GhostModule else parts.description()
    return Entry(name, base.__name__, "swapped", detail)


def _may_be(kind: type[Fused], module: nn.Module, is_model: bool) -> bool:
    """Whether a module can be one of a kind, by what it is made of."""
    inside = list(module.modules())
    if type(module) is nn.Sequential and not (is_model and kind is FusedExpression):
        return False
    if any(isinstance(m, (torch.jit.ScriptModule, fx.GraphModule)) for m in inside):
        return False
    if kind is FusedGhost:
        convs = [m for m in inside if isinstance(m, nn.modules.conv._ConvNd)]
        return (
            1 < len(convs) <= _MOST_CONVS
            and not any(isinstance(m, Fused) and not isinstance(m, FusedExpression) for m in inside)
            and sum(any(isinstance(m, nn.modules.conv._ConvNd) for m in child.modules())
                    for child in _children(module)) > 1
            and (_is_marked(kind, module) or any(1 < c.groups == c.in_channels for c in convs))
        )  # fmt: skip
    if kind is FusedBottleneck:
        ghosts = sum(isinstance(m, FusedGhost) for m in inside)
        bottlenecks = sum(isinstance(m, FusedBottleneck) for m in inside)
        return (ghosts == 2 or _is_marked(kind, module)) and ghosts <= 2 and not bottlenecks
    if kind is FusedExpression:
        convs = any(isinstance(m, nn.Conv2d) for m in inside)
        library = type(module).__module__.startswith("torch.nn.")
        return convs and _runs_convs(module) and (is_model or not library)
    return _is_marked(kind, module) and not any(isinstance(m, FusedNetwork) for m in inside)


def _runs_convs(module: nn.Module) -> bool:
    """Whether there is a kernel of ``ghost_conv_apply`` for where a module's parameters are."""
    return model_ops.has_conv_kernel() and all(p.device.type == "cpu" for p in module.parameters())


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, those in its lists and dictionaries of modules in their place."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child)
        else:
            yield child


def _is_marked(kind: type[Fused], module: nn.Module) -> bool:
    names = {name for name, child in module._modules.items() if child is not None}
    return any(marks <= names for marks in _MARKS.get(kind, ()))


def _ends(node: Node) -> str:
    """The operation that decides what kind of module a result is of."""
    while node.op in ("act", "bn", "prelu", "module", "slice", "mul"):
        node = next((n for n in node.inputs if n.op in ("slice", "cat")), node.inputs[0])
    return node.op


def _left(
    kind: type[Fused], name: str, module: nn.Module, reason: str, marked: bool
) -> Entry | None:
    if not marked and not _is_marked(kind, module):
        return None
    if "primary_rpr_conv" in module._modules:
        reason += "; it still has the branches that it is trained with: reparameterize it first"
    prefix = "" if kind is FusedGhost else f"{kind._ghost_kind}: "
    return Entry(name, type(module).__name__, "left", prefix + reason)


def _description(module: nn.Module) -> str:
    if type(module) is FusedGhostModule:
        return "FusedGhostModule"
    assert isinstance(module, Fused)
    state = module._ghost_state()
    if state.parts is None:
        return f"unfused at the moment: {state.reason}"
    return state.parts.description()
