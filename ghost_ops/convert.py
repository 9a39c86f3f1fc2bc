"""``fuse`` and ``unfuse``: models that people already have, with their Ghost modules fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from . import convert_probe
from .bottleneck import BottleneckState, ConvertedBottleneck, FusedGhostBottleneck
from .bottleneck_parts import read_bottleneck
from .compiled import attach
from .convert_forward import Converted, ConvertedGhost, fused_class
from .convert_layouts import KNOWN_NAMES, Refusal, candidate, read
from .models import FusedGhostNet, GhostNet
from .network import ConvertedNetwork, read_ends
from .nn import FusedGhostModule
from .reference import GhostBottleneck, GhostModule

# Our own pairs have one set of attributes, so a module changes from one to the other as it is.
_PAIRS = {
    GhostModule: FusedGhostModule,
    GhostBottleneck: FusedGhostBottleneck,
    GhostNet: FusedGhostNet,
}
_PLAIN = {fused: plain for plain, fused in _PAIRS.items()}


@dataclass(frozen=True)
class Entry:
    """What became of one module.

    Attributes:
        name: its path in the model; ``(model)`` for the model itself.
        kind: its class before.
        action: ``swapped``, ``already`` (it was fused before), ``left`` or ``restored``.
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
                  for a in ("swapped", "restored", "already", "left")}  # fmt: skip
        total = ", ".join(f"{n} {a}" for a, n in counts.items() if n) or "nothing changed"
        return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *map(str.rstrip, lines[1:]),
                          f"{kind}: {total}"])  # fmt: skip


def fuse(model: nn.Module, inference: bool | None = None) -> Report:
    """Make every Ghost module in a model run as one fused operator, in place.

    The modules stay the objects that they are: parameters, buffers, state_dict keys, mode,
    requires_grad, hooks and attributes are untouched, only their class changes, to one derived from
    their own. They are found by structure, and what their forward computes is verified on a copy
    (``convert_probe``); what is not understood is left as it is, and the report says why.

    Known forms: the authors' and timm's GhostModule (also V2 with its attention gate, and V3 after
    its reparameterisation), Ultralytics' GhostConv (also after its own ``fuse()``), NanoDet's, and
    any other module of a primary and a depthwise convolution, each with or without batch norm and
    one of the activations of ``ghost_ops.activations``. A convolution's weights can change at any
    time, before and after; fusing twice changes nothing.

    Args:
        model: the model, or a Ghost module itself.
        inference: also let whole Ghost bottlenecks, and a GhostNet's stem and head, run as few
            operators with batch norms folded and weights packed once, whenever they are called in
            eval mode without gradients (training goes on as before). None: if the model is in eval
            mode now.

    Returns:
        The report; its ``model`` is the model, and its repr a table of what was done.

    Raises:
        TypeError: model is not a module.

    Example::

        model = timm.create_model("ghostnet_100").eval()
        print(ghost_ops.fuse(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    wants_bottlenecks = (not model.training) if inference is None else bool(inference)
    entries = {}
    for name, module in _named(model):
        entry = _fuse_module(name, module)
        if entry is not None:
            entries[name] = entry
    if wants_bottlenecks:
        for step in (_fuse_bottleneck, _fuse_network):
            for name, module in _named(model):
                entry = step(name, module)
                if entry is not None:
                    entries[name] = entry
    order = [name for name, _ in _named(model)]
    return Report(model, [entries[name] for name in order if name in entries])


def unfuse(model: nn.Module) -> Report:
    """Give every fused module of a model its plain form back, in place: same state, same keys.

    Undoes ``fuse``; a ``FusedGhostModule`` becomes a ``reference.GhostModule``, and a
    ``FusedGhostBottleneck`` a ``reference.GhostBottleneck``.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    entries = []
    for name, module in _named(model):
        kind = type(module)
        plain = getattr(kind, "_ghost_ops_base", None) or _PLAIN.get(kind)
        if plain is None:
            continue
        module.__class__ = plain
        for attribute in ("_ghost_ops", "_ghost_handle", "_packed", "_structure"):
            module.__dict__.pop(attribute, None)
        entries.append(Entry(name, kind.__name__, "restored", f"{plain.__name__}"))
    return Report(model, entries)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield name or "(model)", module


def _is_fused(module: nn.Module) -> bool:
    return hasattr(type(module), "_ghost_ops_base") or type(module) in _PLAIN


def _fuse_module(name: str, module: nn.Module) -> Entry | None:
    kind = type(module)
    if isinstance(module, FusedGhostModule):
        return Entry(name, kind.__name__, "already", "FusedGhostModule")
    if isinstance(module, ConvertedGhost):
        return Entry(name, kind._ghost_ops_base.__name__, "already", _description(module))
    names = candidate(module)
    if names is None:
        return None
    try:
        layout = read(module, names)
        out_channels = convert_probe.ghost(module, names)
    except Refusal as refusal:
        if names != KNOWN_NAMES and not convert_probe.concatenates(module, names):
            return None  # two convolutions in a row, say
        return Entry(name, kind.__name__, "left", str(refusal))
    if kind in _PAIRS:
        module.__class__ = _PAIRS[kind]
        module.reset_cache()
        attach(module)
        return Entry(name, kind.__name__, "swapped", _PAIRS[kind].__name__)
    module.__dict__["_ghost_ops"] = Converted(module, layout, out_channels)
    module.__class__ = fused_class(ConvertedGhost, kind)
    attach(module)
    return Entry(name, kind.__name__, "swapped", _description(module))


def _description(module: nn.Module) -> str:
    state: Converted = module.__dict__["_ghost_ops"]
    if state.layout is None:
        return f"unfused at the moment: {state.reason}"
    conv1, conv2 = state.layout.primary.conv, state.layout.cheap.conv
    k, d = conv1.kernel_size, conv2.kernel_size[0]
    text = f"{conv1.in_channels} -> {state.out_channels} channels"
    if k != (1, 1) or conv1.stride != (1, 1) or conv1.groups > 1:
        text += f", primary {k[0]}x{k[1]} stride {conv1.stride[0]}"
        text += f" groups {conv1.groups}" if conv1.groups > 1 else ""
    text += f", cheap {d}x{d}"
    if state.layout.primary.bn is None and state.layout.cheap.bn is None:
        text += ", no batch norm"
    acts = (branch.act for branch in (state.layout.primary, state.layout.cheap))
    if any(isinstance(act, nn.PReLU) for act in acts):
        text += ", PReLU (fused in inference only)"
    return text + (", attention gate" if state.layout.gate is not None else "")


def _fuse_bottleneck(name: str, module: nn.Module) -> Entry | None:
    kind = type(module)
    if isinstance(module, FusedGhostBottleneck):
        return Entry(name, kind.__name__, "already", "FusedGhostBottleneck")
    if isinstance(module, ConvertedBottleneck):
        return Entry(name, kind._ghost_ops_base.__name__, "already", "bottleneck")
    if _is_fused(module):
        return None
    try:
        parts = read_bottleneck(module)
        if parts is None:
            return None
        parts.verify(module)
    except Refusal as refusal:
        return Entry(name, kind.__name__, "left", f"bottleneck: {refusal}")
    if kind in _PAIRS:
        module.__class__ = _PAIRS[kind]
        module.reset_cache()
    else:
        module.__dict__["_ghost_ops"] = BottleneckState()
        module.__class__ = fused_class(ConvertedBottleneck, kind)
    attach(module)
    return Entry(name, kind.__name__, "swapped", f"bottleneck: {parts.description()}")


def _fuse_network(name: str, module: nn.Module) -> Entry | None:
    kind = type(module)
    if isinstance(module, ConvertedNetwork):
        return Entry(name, kind._ghost_ops_base.__name__, "already", "network")
    if _is_fused(module):
        return None
    try:
        ends = read_ends(module)
        if ends is None:
            return None
        ends.verify(module)
    except Refusal as refusal:
        return Entry(name, kind.__name__, "left", f"network: {refusal}")
    module.__class__ = _PAIRS.get(kind) or fused_class(ConvertedNetwork, kind)
    module.reset_cache()
    return Entry(name, kind.__name__, "swapped", "network: stem, last convolution and head folded")
