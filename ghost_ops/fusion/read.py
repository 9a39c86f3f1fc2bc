"""``read``: follows a module's forward, and returns its expression and the record of its reads.

The forward runs once, as Python, on a stand-in of the module (``stand_in``) with a ``Symbol`` as
its input. The stand-in reports each attribute that the forward reads and each module that it calls
to the reader in this file: a layer becomes a ``Node``, and the forward of any other module is
followed in turn. ``functions`` records the functions that run during this. The expression depends
on nothing that the ``Record`` does not contain.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..sync import NORMS
from .functions import FunctionReader
from .guards import (
    GLOBAL_HOOKS,
    HANDLE,
    STATE,
    Method,
    ModuleRecord,
    Path,
    Record,
    Refusal,
    hooks_of,
    owner_kind,
    plain_kind,
    refusal_count,
)
from .stand_in import READER, stand_in_class
from .symbols import Node, Symbol
from .watch import MISSING

# Forward pre-hooks that only compute a parameter from other parameters. Fused code may call these
# hooks without calling the module.
PARAMETER_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)

_CONV_ATTRIBUTES = tuple(
    "stride padding dilation groups padding_mode in_channels out_channels kernel_size".split()
)
# Layers that are one operation in every mode, and the attributes that define the operation.
_LAYERS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Conv2d: ("conv", _CONV_ATTRIBUTES),
    **dict.fromkeys(NORMS, ("bn", ("eps",))),
    nn.PReLU: ("prelu", ()),
    nn.Linear: ("linear", ()),
}
_FORWARD_METHODS = (
    "forward",
    "_conv_forward",
    "_check_input_dim",
    "_check_non_zero_input_channels",
)
_METHODS = {(b, n): getattr(b, n, None) for b in _LAYERS for n in _FORWARD_METHODS}


class Call(NamedTuple):
    """A call of a module with one tensor: the module's path and the node of its input."""

    path: Path
    x: Node


class Reading(NamedTuple):
    """The expression of a forward.

    Attributes:
        out: the node of the forward's result.
        calls: for each node, the module calls that returned it, the outermost call last.
        record: everything that the forward read.
    """

    out: Node
    calls: dict[Node, list[Call]]
    record: Record


class Failed(Refusal):
    """A ``Refusal`` of ``read``, with the record of everything that was read before it."""

    def __init__(self, reason: str, record: Record) -> None:
        super().__init__(reason)
        self.record = record


def read(
    module: nn.Module, training: bool | None = None, whole: tuple[type[nn.Module], ...] = ()
) -> Reading:
    """Read ``module.forward(x)``.

    Args:
        training: the mode in which the module and its children are read; None: their own modes.
        whole: modules of these classes become one node; their forward is not followed.

    Raises:
        Failed: the forward cannot be followed, or something that it reads cannot be guarded.
    """
    reader = _Reader(module, training, whole)
    reason = ""
    try:
        out = reader.run()
    except Refusal as refusal:
        reason = str(refusal)
    except RecursionError:
        reason = "its forward calls itself"
    except Exception as error:
        reason = f"its forward raises {type(error).__name__} when it is followed: {error}"
    if reason:
        raise Failed(reason, reader.record())
    return Reading(out, reader.calls, reader.record())


class _Reader:
    """Reads one forward. ``note``, ``saw`` and ``call`` are called by the stand-ins."""

    def __init__(
        self, module: nn.Module, training: bool | None, whole: tuple[type[nn.Module], ...]
    ) -> None:
        self.module, self.training, self.whole = module, training, whole
        self.calls: dict[Node, list[Call]] = {}
        # Refusals before this reading, plus those that ``call`` has caught. If the final count is
        # higher, the forward itself has caught a refusal.
        self._refusals = refusal_count.refusals
        self._notes: dict[Path, _Notes] = {}
        self._functions = FunctionReader()
        self._effects: list[Node] = []  # layers and modules whose call may change their state
        self._stand_ins: dict[int, nn.Module] = {}
        self._paths: dict[int, Path] = {}
        self._classes: dict[type, type] = {}  # the class of stand-ins, by the module's class

    def run(self) -> Node:
        """The node of the forward's result."""
        module = self.module
        notes = self.note((), module, called=True)
        if "forward" in module.__dict__:
            notes.own["forward"] = module.__dict__["forward"]
            raise Refusal("its forward is replaced on the object")
        if any(GLOBAL_HOOKS):
            raise Refusal("there are hooks on all modules, which would not run for those inside")
        stand_in = self._stand_in((), module)
        x = Symbol(Node("input"), outside=True)
        with self._functions.profiling():
            out = self._follow(module, stand_in, x)
        if refusal_count.refusals != self._refusals:
            raise Refusal("its forward catches every exception, those of its reader too")
        if type(out) is not Symbol:
            raise Refusal(f"its forward gives a {type(out).__name__}, not a tensor")
        used = _nodes_of(out.value())
        for node in self._effects:
            if node not in used:
                raise Refusal(f"its forward does not use the result of {'.'.join(node.args[0])}")
        return out.value()

    def record(self) -> Record:
        """Everything that was read so far."""
        modules = tuple(notes.finish(path, self._paths) for path, notes in self._notes.items())
        functions = self._functions
        return Record(
            modules, tuple(functions.items.values()), tuple(functions.attributes.values())
        )

    def note(self, path: Path, module: nn.Module, called: bool = False) -> _Notes:
        """The notes on a module; made at the first read. ``called``: the forward called it."""
        notes = self._notes.setdefault(path, _Notes(module))
        notes.called = notes.called or called
        return notes

    def saw(self, stand_in: nn.Module, name: str) -> None:
        """Record that the forward read the attribute ``name`` of a stand-in."""
        _, path, module = stand_in.__dict__[READER]
        notes = self.note(path, module)
        place = f"{'.'.join(path) or 'self'}.{name}"
        if name in module.__dict__:
            raw = module.__dict__[name]
            if isinstance(raw, Tensor):
                return
            notes.own[name] = stand_in.__dict__["training"] if name == "training" else raw
            if isinstance(raw, types.MethodType) and raw.__self__ is module:
                self._functions.add(raw.__func__)  # type: ignore[arg-type]
            else:
                self._functions.check_attribute(raw, place)
            return
        raw = inspect.getattr_static(type(module), name, MISSING)
        notes.inherited[name] = getattr(type(module), name, MISSING)
        if isinstance(raw, staticmethod):
            raw = raw.__func__
        if isinstance(raw, property) and isinstance(raw.fget, types.FunctionType):
            raw = raw.fget
        self._functions.check_attribute(None if raw is MISSING else raw, place)

    def call(self, stand_in: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The result of a stand-in that the forward called with ``args`` and ``kwargs``."""
        _, path, module = stand_in.__dict__[READER]
        if module is self.module:
            raise Refusal("it contains itself")
        notes = self.note(path, module, called=True)
        # nn.Module.__call__ is not compared: the tracers of torch.fx and torch.export replace it.
        if any("__call__" in base.__dict__ for base in _classes_of(module)):
            raise Refusal(f"a {type(module).__name__} inside it has a __call__ of its own")
        x = args[0] if len(args) == 1 and not kwargs and type(args[0]) is Symbol else None
        if x is None:
            self._check_hooks(module)
            return self._follow(module, stand_in, *args, **kwargs)
        before = x.value()
        if self.whole and isinstance(module, self.whole):
            out = Symbol(Node("module", (before,), (path, "")))
        else:
            try:
                out = self._layer(path, module, notes, x)
                if out is None:
                    self._check_hooks(module)
                    out = self._follow(module, stand_in, x)
                    if type(out) is Symbol and out.value().op == "dropout":
                        raise Refusal("it drops values at random")
            except Refusal as refusal:
                # The module becomes one node, called as a whole. The module may change its input in
                # place, so the value of the input is unknown after this call.
                self._refusals += 1
                self._functions.resume()
                reason = f"{'.'.join(path)}, a {type(module).__name__}: {refusal}"
                node = Node("module", (before,), (path, reason))
                self._effects.append(node)
                out = Symbol(node)
                x.lose(reason)
        if type(out) is Symbol:
            self.calls.setdefault(out.value(), []).append(Call(path, before))
        return out

    def _stand_in(self, path: Path, module: nn.Module) -> nn.Module:
        """The stand-in for a module, with stand-ins for all modules inside it."""
        found = self._stand_ins.get(id(module))
        if found is not None:
            if found.__dict__["_modules"] is None:
                raise Refusal("it contains itself")
            return found
        kind = type(module)
        made = self._classes.get(kind)
        if made is None:
            made = self._classes[kind] = stand_in_class(kind)
        stand_in: nn.Module = object.__new__(made)
        self._stand_ins[id(module)] = stand_in
        self._paths[id(module)] = path
        values = stand_in.__dict__
        values.update(module.__dict__)
        for name in (STATE, HANDLE):
            values.pop(name, None)
        values[READER] = self, path, module
        values["_modules"] = None  # until all modules inside have a stand-in
        if self.training is not None:
            values["training"] = self.training
        for group in ("_parameters", "_buffers"):
            values[group] = {
                name: None if t is None else Symbol(Node("tensor", (), (path, name)), True)
                for name, t in module.__dict__[group].items()
            }
        values["_modules"] = {
            name: None if child is None else self._stand_in((*path, name), child)
            for name, child in module._modules.items()
        }
        for name, value in module.__dict__.items():
            if isinstance(value, types.MethodType) and value.__self__ is module:
                values[name] = types.MethodType(value.__func__, stand_in)
            elif isinstance(value, Tensor):
                values[name] = Symbol(Node("tensor", (), (path, name)), outside=True)
        return stand_in

    def _check_hooks(self, module: nn.Module) -> None:
        if any(hooks_of(module)):
            raise Refusal("it has hooks, which run only if it is called itself")

    def _layer(self, path: Path, module: nn.Module, notes: _Notes, x: Symbol) -> Symbol | None:
        """The result of a module that is one operation; None for any other module."""
        base = next((b for b in _LAYERS if isinstance(module, b)), None)
        if base is None or (base is nn.PReLU and type(module) is not base):
            return None
        for name in _FORWARD_METHODS:
            method = getattr(type(module), name, None)
            if method is not _METHODS[base, name] or name in module.__dict__:
                return None
            if method is not None and name != "forward":
                notes.inherited[name] = method
        self._functions.add_attribute(type(module), "forward", _METHODS[base, "forward"])
        hooks = list(module._forward_pre_hooks.values())
        known = base is not nn.Linear and all(isinstance(h, PARAMETER_HOOKS) for h in hooks)
        if not known or sum(map(len, hooks_of(module))) != len(hooks):
            self._check_hooks(module)
        op, names = _LAYERS[base]
        notes.is_layer = True
        for name in names:
            notes.own[name] = getattr(module, name)
        node = Node(op, (x.value(),), (path,))
        self._effects.append(node)
        return Symbol(node)

    def _follow(self, module: nn.Module, stand_in: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The result of a module's own forward, run on the stand-in."""
        method = module.__dict__.get("forward")
        if method is not None:
            notes = self.note(self._paths[id(module)], module)
            notes.own["forward"] = method
            if not isinstance(method, types.MethodType) or method.__self__ is not module:
                raise Refusal(f"the forward of a {type(module).__name__} inside it is replaced")
            function: Any = method.__func__
        else:
            kind = owner_kind(module) if module is self.module else plain_kind(module)
            function = kind.forward
            self._functions.add_attribute(kind, "forward", function)
        if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
            raise Refusal("its forward is decorated, or no Python function")
        self._functions.add(function)
        return function(stand_in, *args, **kwargs)


def _classes_of(module: nn.Module) -> list[type]:
    """The classes of a module that precede nn.Module in the method resolution order."""
    mro = type(module).__mro__
    return list(mro[: mro.index(nn.Module)])


def _nodes_of(out: Node) -> set[Node]:
    """A node and all nodes that it is computed from."""
    found: set[Node] = set()
    waiting = [out]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.inputs
    return found


class _Notes:
    """The reads of one module so far; ``finish`` turns them into a ``ModuleRecord``."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.called, self.is_layer = module, False, False
        self.own: dict[str, Any] = {}
        self.inherited: dict[str, Any] = {}

    def finish(self, path: Path, paths: dict[int, Path]) -> ModuleRecord:
        """The record of the module at ``path``; ``paths``: the paths of all modules, by id."""
        module, children = self.module, self.module._modules.items()
        own = {
            name: Method(value.__func__)  # type: ignore[arg-type]
            if isinstance(value, types.MethodType) and value.__self__ is module
            else value
            for name, value in self.own.items()
        }
        return ModuleRecord(
            path=path,
            kind=plain_kind(module) if path else owner_kind(module),
            children=tuple((n, None if c is None else paths.get(id(c))) for n, c in children),
            own=tuple(own.items()),
            inherited=tuple(self.inherited.items()),
            called=self.called,
            hooked=any(map(len, hooks_of(module))),
            is_layer=self.is_layer,
        )
