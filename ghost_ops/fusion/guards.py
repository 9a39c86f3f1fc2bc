"""What a module's forward was seen to read, and guards that tell whether it would read the same.

A ``Record`` is plain data: paths below a module, types, names and values. It says nothing of one
module's tensors, so it can be checked against another one of the same structure (``holds``), such
as a copy or a replica. ``Record.guard`` watches one module, in C.
"""

from __future__ import annotations

import threading
import types
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from ..sync import NORMS
from . import watch
from .watch import MISSING, same_value

Path = tuple[str, ...]

GLOBAL_HOOKS = (
    module_globals._global_forward_pre_hooks,
    module_globals._global_forward_hooks,
    module_globals._global_backward_pre_hooks,
    module_globals._global_backward_hooks,
)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CONSTANTS = (type(None), bool, int, float, str)


class _Count(threading.local):
    """How many refusals a thread has made."""

    refusals = 0


made = _Count()


class Refusal(BaseException):
    """Not what the fused ops can compute; the message says why.

    It is no ``Exception``, and counted, because a forward that is followed must not catch it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        made.refusals += 1


class Method(NamedTuple):
    """A function stored on a module as a method bound to this module."""

    function: types.FunctionType


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dictionaries of the hooks that run when the module does; in the order of ``HOOKS``."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def plain_kind(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a fused one the class that it was fused from."""
    kind = type(module)
    fused = getattr(kind.forward, "_ghost_ops_fused", False)
    return kind._ghost_ops_base if fused else kind  # type: ignore[attr-defined]


def owner_kind(module: nn.Module) -> type[nn.Module]:
    """The class whose forward a fused module computes, for one that is read itself.

    Not ``plain_kind``: the forward of a fused module may be called by that of a subclass.
    """
    return getattr(type(module), "_ghost_ops_base", type(module))


def at(module: nn.Module, path: Path) -> nn.Module | None:
    """The module at a path below ``module``; None if there is none."""
    found: nn.Module | None = module
    for name in path:
        if found is None or name not in found._modules:
            return None
        found = found._modules[name]
    return found


class Entry(NamedTuple):
    """What was read of one module.

    Attributes:
        path: from the owner to the module.
        kind: its class, of a fused module the one that it was fused from.
        children: names in the order of ``_modules``, and the path that each child is known by.
        own: attributes found on the object, with their values.
        inherited: attributes found on the class, or on neither (``MISSING``), with their values.
        called: it was called; its forward and its hooks are read as well.
        hooked: it has hooks.
        is_layer: it was read as one operation, by its attributes.
    """

    path: Path
    kind: type[nn.Module]
    children: tuple[tuple[str, Path | None], ...]
    own: tuple[tuple[str, Any], ...]
    inherited: tuple[tuple[str, Any], ...]
    called: bool
    hooked: bool
    is_layer: bool

    def holds(self, owner: nn.Module) -> bool:
        """Whether the module at this path would be read as it was."""
        module = at(owner, self.path)
        if module is None or not self.has_same_structure(owner, module):
            return False
        for name, value in self.own:
            if isinstance(value, Method):
                bound = module.__dict__.get(name)
                if getattr(bound, "__func__", None) is not value.function:
                    return False
                if bound.__self__ is not module:  # type: ignore[union-attr]
                    return False
            elif not same_value(module.__dict__.get(name, MISSING), value):
                return False
        for name, value in self.inherited:
            if name in module.__dict__ or (value is MISSING and hasattr(module, name)):
                return False
            if not same_value(getattr(type(module), name, MISSING), value):
                return False
        return True

    def has_same_structure(self, owner: nn.Module, module: nn.Module) -> bool:
        """Whether class, children and hooks are as they were. Dynamo can trace this."""
        kind = plain_kind(module) if self.path else owner_kind(module)
        if kind is not self.kind:
            return False
        if len(module._modules) != len(self.children):
            return False
        for name, path in self.children:
            child = module._modules.get(name)
            if child is not (None if path is None else at(owner, path)):
                return False
        for name, value in self.inherited:
            # Dynamo guards what is used: to look into the dictionary alone is not enough.
            method = isinstance(value, types.FunctionType)
            if method and (not callable(getattr(module, name)) or name in module.__dict__):
                return False
        if not self.path or not self.called:
            return True
        replaced = any(name == "forward" for name, _ in self.own)
        return (
            any(map(len, hooks_of(module))) == self.hooked
            and callable(module.forward)
            and ("forward" in module.__dict__) == replaced
        )

    def has_same_constants(self, module: nn.Module) -> bool:
        """Whether the numbers, strings and the like among its attributes are as they were.

        Dynamo can trace this.
        """
        for name, value in (*self.own, *self.inherited):
            if isinstance(value, _CONSTANTS) and not same_value(getattr(module, name, None), value):
                return False
        return True


class Record(NamedTuple):
    """All that a forward was seen to read.

    Attributes:
        entries: of the modules; the owner's first.
        items: (dictionary, key, value) of global variables; value ``MISSING``: a key not there.
        attributes: (object, name, value) of functions, cells and classes.
    """

    entries: tuple[Entry, ...]
    items: tuple[tuple[dict, str, Any], ...]
    attributes: tuple[tuple[Any, str, Any], ...]

    def with_that_of(self, other: Record) -> Record:
        """All that was read for either of two."""
        return Record(*(mine + others for mine, others in zip(self, other, strict=True)))

    def holds(self, module: nn.Module) -> bool:
        """Whether reading ``module`` would give the same."""
        return (
            not any(GLOBAL_HOOKS)
            and all(entry.holds(module) for entry in self.entries)
            and all(same_value(d.get(key, MISSING), value) for d, key, value in self.items)
            and all(
                same_value(getattr(thing, name, MISSING), value)
                for thing, name, value in self.attributes
            )
        )

    def holds_in_graph(self, module: nn.Module) -> bool:
        """As ``holds``, in terms that Dynamo can trace and guard.

        The attributes of layers are left out: they are read anew in the graph.
        """
        for hooks in GLOBAL_HOOKS:
            if len(hooks):
                return False
        for entry in self.entries:
            inner = at(module, entry.path)
            if inner is None or not entry.has_same_structure(module, inner):
                return False
            if not entry.is_layer and not entry.has_same_constants(inner):
                return False
        for values, key, value in self.items:
            if isinstance(value, _CONSTANTS) and not same_value(values.get(key), value):
                return False
            if isinstance(value, types.FunctionType) and values.get(key) is not value:
                return False
        for thing, name, value in self.attributes:
            function = isinstance(thing, type) and isinstance(value, types.FunctionType)
            if function and getattr(thing, name, None) is not value:
                return False
        for entry in self.entries:
            for name, value in entry.own:
                if isinstance(value, Method):
                    inner = at(module, entry.path)
                    bound = None if inner is None else inner.__dict__.get(name)
                    if getattr(bound, "__func__", None) is not value.function:
                        return False
        return True

    def gives_same_shape(self, module: nn.Module) -> bool:
        """Whether the attributes that may choose the output's shape hold. Dynamo can trace this.

        Those of modules other than PyTorch's own; the geometry of layers is read anew.
        """
        for entry in self.entries:
            if not entry.is_layer and not entry.kind.__module__.startswith("torch.nn"):
                inner = at(module, entry.path)
                if inner is None or not entry.has_same_constants(inner):
                    return False
        return True

    def guard(
        self, module: nn.Module, layers: tuple[nn.Module, ...] = (), state: tuple = ()
    ) -> watch.Watch | None:
        """A watch over all of it in ``module``; None if something cannot be watched.

        Its ``unchanged`` takes ``module.__dict__``: held by the watch, the module would be tied to
        itself.

        Args:
            layers: modules whose parameters, buffers and modes (of batch norms) are watched too.
            state: further pairs (dictionary, key) whose value must stay.
        """
        dicts: list[dict] = [*GLOBAL_HOOKS]
        items: list[tuple[dict | None, str]] = [(None, "_modules"), *state]
        absent: list[tuple[dict | None, str]] = []
        attributes: dict[tuple[int, str], tuple[Any, str]] = {}
        for entry in self.entries:
            inner = at(module, entry.path)
            assert inner is not None
            place = inner.__dict__ if entry.path else None
            dicts.append(inner._modules)
            if entry.path:
                items.append((place, "_modules"))
                attributes[id(inner), "__class__"] = inner, "__class__"
                if entry.called:
                    dicts += hooks_of(inner)
                    items += [(place, name) for name in HOOKS]
                    if "forward" not in dict(entry.own):
                        absent.append((place, "forward"))
            items += [(place, name) for name, _ in entry.own]
            for name, value in entry.inherited:
                absent.append((place, name))
                attributes[id(type(inner)), name] = type(inner), name
                if value is MISSING:
                    dicts += [inner._parameters, inner._buffers]
        for values, key, value in self.items:
            (absent if value is MISSING else items).append((values, key))
        attributes.update({(id(thing), name): (thing, name) for thing, name, _ in self.attributes})
        tensors: list[Tensor] = []
        for layer in layers:
            places = [d for d in (layer._parameters, layer._buffers) if d]
            items += [(layer.__dict__, name) for name in ("_parameters", "_buffers")]
            dicts += places
            tensors += [t for values in places for t in values.values() if t is not None]
            if isinstance(layer, NORMS):
                items.append((layer.__dict__, "training"))
        try:
            made = watch.make(
                tuple(dicts), tuple(items), tuple(absent), tuple(tensors),
                tuple(attributes.values()), module.__dict__,
            )  # fmt: skip
        except KeyError:  # an attribute that is kept elsewhere, or changed meanwhile
            return None
        # What was read may differ from what is there: read in another mode, or changed meanwhile.
        return made if self.holds(module) else None


def watchable(layers: tuple[nn.Module, ...]) -> bool:
    """Whether no change of the layers' parameters can go unnoticed.

    Computed parameters are in no dictionary, inference tensors have no version, and tensor
    subclasses may have no address.
    """
    for layer in layers:
        norm = isinstance(layer, NORMS)
        for group, names in (
            (layer._parameters, ("weight",) if isinstance(layer, nn.PReLU) else ("weight", "bias")),
            (layer._buffers, ("running_mean", "running_var") if norm else ()),
        ):
            # One that the class computes is in no group, or hides the one that is.
            if any(name not in group or hasattr(type(layer), name) for name in names):
                return False
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        if not all(
            t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_inference())
            for t in tensors
        ):
            return False
    return True
