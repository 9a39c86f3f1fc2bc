"""``Record``: everything that a module's forward read, as guards on a cached result.

A guard is one condition that must hold for a cached result to be valid: an attribute, a global
variable, a child, a hook or a tensor has not changed. A ``Record`` stores the guards as plain data:
paths below a module, types, names and values. It refers to no module, so ``Record.holds`` can check
it against any module of the same structure, such as a copy or a replica. ``Record.watch`` binds the
guards to one module; the resulting ``Watch`` checks them in C.
"""

from __future__ import annotations

import threading
import types
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from .. import backends
from ..sync import NORMS
from . import watch
from .watch import MISSING, Watch, same_value

Path = tuple[str, ...]

GLOBAL_HOOKS = (
    module_globals._global_forward_pre_hooks,
    module_globals._global_forward_hooks,
    module_globals._global_backward_pre_hooks,
    module_globals._global_backward_hooks,
)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# An item to watch: the name that ``use_backend`` sets.
REQUESTED_BACKEND = (backends.__dict__, "_requested")
# Attributes of a fused module that hold its state and its handle; no forward reads them.
STATE, HANDLE = "_ghost_ops", "_ghost_handle"
_CONSTANTS = (type(None), bool, int, float, str)


class _Count(threading.local):
    refusals = 0


refusal_count = _Count()  # refusals created so far, by thread


class Refusal(BaseException):
    """The fused ops cannot compute a module; the message says why.

    A forward that is being read must not swallow a refusal. Therefore ``Refusal`` is no subclass of
    ``Exception``, and refusals are counted: the reader compares the count with the number of
    refusals that it has caught.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        refusal_count.refusals += 1


class Method(NamedTuple):
    """A function stored on a module as a method bound to the same module."""

    function: types.FunctionType


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dictionaries of the hooks that a call of the module runs, in the order of ``HOOKS``."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def mark_fused(forward: Any) -> None:
    """Mark the ``forward`` of a fused class, for ``plain_kind``."""
    forward._ghost_ops_fused = True


def plain_kind(module: nn.Module) -> type[nn.Module]:
    """The module's class; for a fused module the class that it was fused from."""
    kind = type(module)
    fused = getattr(kind.forward, "_ghost_ops_fused", False)
    return kind._ghost_ops_base if fused else kind  # type: ignore[attr-defined]


def owner_kind(module: nn.Module) -> type[nn.Module]:
    """The class whose forward is read if ``module`` is the owner of the record.

    It differs from ``plain_kind`` for a subclass of a fused class that has its own forward: this
    forward may call the fused forward, which computes the forward of ``_ghost_ops_base``.
    """
    return getattr(type(module), "_ghost_ops_base", type(module))


def at(module: nn.Module, path: Path) -> nn.Module | None:
    """The module at a path below ``module``; None if the path leads to none."""
    found: nn.Module | None = module
    for name in path:
        if found is None or name not in found._modules:
            return None
        found = found._modules[name]
    return found


class ModuleRecord(NamedTuple):
    """The reads of one module by the forward of the owner: of the owner or of an inner module.

    Attributes:
        path: from the owner to the module; empty for the owner.
        kind: the module's class; for a fused module the class that it was fused from.
        children: names in the order of ``_modules``, each with the path under which the child is
            recorded.
        own: attributes found on the object, with their values.
        inherited: attributes found on the class, or on neither (``MISSING``), with their values.
        called: the forward called the module, so the module's forward and hooks were read too.
        hooked: the module has hooks.
        is_layer: the module was read as one operation that its attributes define.
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
        """Whether reading the module at this path below ``owner`` would give an equal record."""
        module = at(owner, self.path)
        if module is None or not self.has_same_structure(owner, module):
            return False
        for name, value in self.own:
            if isinstance(value, Method):
                bound = module.__dict__.get(name)
                if getattr(bound, "__func__", None) is not value.function:
                    return False
                if bound.__self__ is not module:
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
        """Whether class, children and hooks are the recorded ones. Dynamo can trace this."""
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
            # Dynamo guards a value only if it is used, and a dictionary look-up does not use it.
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
        """Whether attributes that are numbers, strings or None are as recorded.

        Dynamo can trace this.
        """
        for name, value in (*self.own, *self.inherited):
            if isinstance(value, _CONSTANTS) and not same_value(getattr(module, name, None), value):
                return False
        return True


class Record(NamedTuple):
    """Everything that a forward read.

    Attributes:
        modules: the reads of each module, the owner first.
        items: (dictionary, key, value) of global variables; value ``MISSING`` for an absent key.
        attributes: (object, name, value) of functions, cells and classes.
    """

    modules: tuple[ModuleRecord, ...]
    items: tuple[tuple[dict, str, Any], ...]
    attributes: tuple[tuple[Any, str, Any], ...]

    def joined(self, other: Record) -> Record:
        """Everything in either of two records."""
        return Record(
            self.modules + other.modules,
            self.items + other.items,
            self.attributes + other.attributes,
        )

    def with_mode(self, owner: nn.Module) -> Record:
        """This record of a module, with its present mode as one more guard."""
        first, *others = self.modules
        own = {**dict(first.own), "training": owner.training}
        return self._replace(modules=(first._replace(own=tuple(own.items())), *others))

    def holds(self, module: nn.Module) -> bool:
        """Whether every guard holds in ``module``: reading it would give an equal record."""
        return (
            not any(GLOBAL_HOOKS)
            and all(one.holds(module) for one in self.modules)
            and all(same_value(d.get(key, MISSING), value) for d, key, value in self.items)
            and all(
                same_value(getattr(thing, name, MISSING), value)
                for thing, name, value in self.attributes
            )
        )

    def holds_in_graph(self, module: nn.Module) -> bool:
        """``holds`` in terms that Dynamo can trace and guard.

        The attributes of layers are left out, because the graph reads them again.
        """
        for hooks in GLOBAL_HOOKS:
            if len(hooks):
                return False
        for one in self.modules:
            inner = at(module, one.path)
            if inner is None or not one.has_same_structure(module, inner):
                return False
            if not one.is_layer and not one.has_same_constants(inner):
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
        for one in self.modules:
            for name, value in one.own:
                if isinstance(value, Method):
                    inner = at(module, one.path)
                    bound = None if inner is None else inner.__dict__.get(name)
                    if getattr(bound, "__func__", None) is not value.function:
                        return False
        return True

    def gives_same_shape(self, module: nn.Module) -> bool:
        """Whether the attributes that may determine the output's shape are as recorded.

        Dynamo can trace this.

        These are the attributes of modules other than PyTorch's; the graph reads the geometry of
        layers again.
        """
        for one in self.modules:
            if not one.is_layer and not one.kind.__module__.startswith("torch.nn"):
                inner = at(module, one.path)
                if inner is None or not one.has_same_constants(inner):
                    return False
        return True

    def watch(
        self, module: nn.Module, layers: tuple[nn.Module, ...] = (), state: tuple = ()
    ) -> Watch | None:
        """A watch over every guard in ``module``; None if one of them cannot be watched.

        Its ``unchanged`` takes ``module.__dict__``; a watch that held the dictionary would be part
        of a reference cycle with the module.

        Args:
            layers: modules whose parameters and buffers are watched too, and the mode of batch
                norms.
            state: further pairs (dictionary, key) whose value must stay.
        """
        dicts: list[dict] = [*GLOBAL_HOOKS]
        items: list[tuple[dict | None, str]] = [(None, "_modules"), *state]
        absent: list[tuple[dict | None, str]] = []
        attributes: dict[tuple[int, str], tuple[Any, str]] = {}
        for one in self.modules:
            inner = at(module, one.path)
            assert inner is not None
            place = inner.__dict__ if one.path else None
            dicts.append(inner._modules)
            if one.path:
                items.append((place, "_modules"))
                attributes[id(inner), "__class__"] = inner, "__class__"
                if one.called:
                    dicts += hooks_of(inner)
                    items += [(place, name) for name in HOOKS]
                    if "forward" not in dict(one.own):
                        absent.append((place, "forward"))
            items += [(place, name) for name, _ in one.own]
            for name, value in one.inherited:
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
        pairs = tuple(items), tuple(absent)
        things = tuple(tensors), tuple(attributes.values())
        try:
            made = watch.make_watch(tuple(dicts), *pairs, *things, module.__dict__)
        except KeyError:  # an attribute is not in the module's dictionary, or changed meanwhile
            return None
        # The record may differ from the module: read in another mode, or changed meanwhile.
        return made if self.holds(module) else None


def watchable(layers: tuple[nn.Module, ...]) -> bool:
    """Whether a watch notices every change of the layers' parameters and buffers.

    A watch cannot observe a computed parameter (it is in no dictionary), an inference tensor (it
    has no version counter), or a tensor subclass (it may have no address).
    """
    for layer in layers:
        norm = isinstance(layer, NORMS)
        for group, names in (
            (layer._parameters, ("weight",) if isinstance(layer, nn.PReLU) else ("weight", "bias")),
            (layer._buffers, ("running_mean", "running_var") if norm else ()),
        ):
            # A property of the class computes the tensor, or hides the one in the dictionary.
            if any(name not in group or hasattr(type(layer), name) for name in names):
                return False
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        if not all(
            t is None or (type(t) in (Tensor, nn.Parameter) and not t.is_inference())
            for t in tensors
        ):
            return False
    return True
