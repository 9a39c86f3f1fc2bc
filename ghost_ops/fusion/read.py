"""Follows a module's forward: what it computes, as an expression, and all that it reads.

The forward runs once, as Python, on a stand-in of the module with a ``Symbol`` for its input. The
stand-in has the module's attributes, of a class derived from the module's own that records each
attribute read, and whose calls come here: a layer becomes a ``Node``; any other module's forward is
followed in turn. A profile function sees what else runs: functions whose globals and closures are
recorded, and calls whose result could differ next time, which are refused. What is left follows
from the ``Record`` alone.
"""

from __future__ import annotations

import builtins
import enum
import gc
import inspect
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..sync import NORMS
from .code import HERE, TORCH, codes_of, global_names, is_pure, is_users
from .guards import (
    GLOBAL_HOOKS,
    MISSING,
    Entry,
    Method,
    Path,
    Record,
    Refusal,
    hooks_of,
    made,
    owner_kind,
    plain_kind,
)
from .symbols import Node, Symbol

# Forward pre-hooks that only compute a parameter from others: they can be run without the module.
PARAMETER_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)

# Layers that are read as one operation in all modes, and the attributes that define it.
_LAYERS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Conv2d: (
        "conv",
        (
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
            "in_channels",
            "out_channels",
            "kernel_size",
        ),
    ),
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

# Attributes of every module that are guarded as a whole, or that reading leaves out.
_PLUMBING = frozenset(nn.Module().__dict__) - {"training"}
_STATE = ("_ghost_ops", "_ghost_handle")  # of fused modules
_READER = "_ghost_ops_reader"

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, type, torch.dtype, torch.device,
    torch.memory_format, torch.Size, types.FunctionType, types.BuiltinFunctionType,
    types.ModuleType,
)  # fmt: skip
# Fused forwards run neither scripted nor traced. A mode, such as torch.device("meta"), passes on.
_PURE_FUNCTIONS = ("_assert", "is_scripting", "is_tracing", "__torch_function__")
_TORCH_FUNCTION = Symbol.__torch_function__.__func__.__code__  # type: ignore[attr-defined]


class Call(NamedTuple):
    """A module that a forward called with one tensor."""

    path: Path
    x: Node


class Reading(NamedTuple):
    """What a forward computes.

    Attributes:
        out: its result.
        calls: by result, the modules that were called for it; the outermost one last.
        record: all that was read.
    """

    out: Node
    calls: dict[Node, list[Call]]
    record: Record


class Failed(Refusal):
    """As ``Refusal``, with the record of what was read before."""

    def __init__(self, reason: str, record: Record) -> None:
        super().__init__(reason)
        self.record = record


def read(
    module: nn.Module, training: bool | None = None, whole: tuple[type[nn.Module], ...] = ()
) -> Reading:
    """Follow ``module.forward(x)``.

    Args:
        training: read it in this mode, in place of the one that it is in.
        whole: classes whose modules are not followed, but called as they are.

    Raises:
        Failed: it cannot be followed, or what it reads cannot be guarded.
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
    def __init__(
        self, module: nn.Module, training: bool | None, whole: tuple[type[nn.Module], ...]
    ) -> None:
        self.module, self.training, self.whole = module, training, whole
        self.calls: dict[Node, list[Call]] = {}
        # Refusals that no ``call`` has caught; others than these, the forward has caught.
        self._refusals = made.refusals
        self._notes: dict[Path, _Notes] = {}
        self._items: dict[tuple[int, str], tuple[dict, str, Any]] = {}
        self._attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._functions: dict[types.CodeType, types.FunctionType] = {}
        self._read_codes: set[types.CodeType] = set()
        self._effects: list[Node] = []  # results of layers and modules that may have state
        self._pending: Any = None  # a C function that has not been seen to get a symbol
        self._stands: dict[int, nn.Module] = {}
        self._paths: dict[int, Path] = {}
        self._recorders: dict[type, type] = {}

    def run(self) -> Node:
        module = self.module
        notes = self.note((), module, called=True)
        if "forward" in module.__dict__:
            notes.own["forward"] = module.__dict__["forward"]
            raise Refusal("its forward is replaced on the object")
        if any(GLOBAL_HOOKS):
            raise Refusal("there are hooks on all modules, which would not run for those inside")
        stand = self._stand((), module)
        x = Symbol(Node("input"), outside=True)
        with self._profiling():
            out = self._follow(module, stand, x)
        if made.refusals != self._refusals:
            raise Refusal("its forward catches every exception, those of its reader too")
        if type(out) is not Symbol:
            raise Refusal(f"its forward gives a {type(out).__name__}, not a tensor")
        used = _nodes_of(out.value())
        for node in self._effects:
            if node not in used:
                raise Refusal(f"its forward does not use the result of {'.'.join(node.args[0])}")
        return out.value()

    @contextmanager
    def _profiling(self) -> Iterator[None]:
        """Calls ``_profile`` in the place of the profile function that is there."""
        previous: Any = sys.getprofile()
        suspended = previous is not None and not callable(previous)  # cProfile, up to Python 3.11
        if suspended:
            previous.disable()
        collects = gc.isenabled()
        gc.disable()  # a finalizer or callback would run as if forward had called it
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None if suspended else previous)
            if collects:
                gc.enable()
            if suspended:
                previous.enable()

    def record(self) -> Record:
        """All that was read so far."""
        entries = [notes.entry(path, self._paths) for path, notes in self._notes.items()]
        return Record(tuple(entries), tuple(self._items.values()), tuple(self._attributes.values()))

    # Modules

    def note(self, path: Path, module: nn.Module, called: bool = False) -> _Notes:
        """What was read of a module so far."""
        notes = self._notes.setdefault(path, _Notes(module))
        notes.called = notes.called or called
        return notes

    def _stand(self, path: Path, module: nn.Module) -> nn.Module:
        """What the forward sees in the place of a module."""
        found = self._stands.get(id(module))
        if found is not None:
            if found.__dict__["_modules"] is None:
                raise Refusal("it contains itself")
            return found
        kind = type(module)
        recorder = self._recorders.get(kind)
        if recorder is None:
            recorder = self._recorders[kind] = _recorder(kind)
        stand = self._stands[id(module)] = object.__new__(recorder)
        self._paths[id(module)] = path
        values = stand.__dict__
        values.update(module.__dict__)
        for name in _STATE:
            values.pop(name, None)
        values[_READER] = self, path, module
        values["_modules"] = None  # until it is complete
        if self.training is not None:
            values["training"] = self.training
        for group in ("_parameters", "_buffers"):
            values[group] = {
                name: None if t is None else Symbol(Node("tensor", (), (path, name)), True)
                for name, t in module.__dict__[group].items()
            }
        values["_modules"] = {
            name: None if child is None else self._stand((*path, name), child)
            for name, child in module._modules.items()
        }
        for name, value in module.__dict__.items():
            if isinstance(value, types.MethodType) and value.__self__ is module:
                values[name] = types.MethodType(value.__func__, stand)
            elif isinstance(value, Tensor):
                values[name] = Symbol(Node("tensor", (), (path, name)), outside=True)
        return stand

    def call(self, stand: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The result of a module that the forward calls."""
        _, path, module = stand.__dict__[_READER]
        if module is self.module:
            raise Refusal("it contains itself")
        notes = self.note(path, module, called=True)
        # nn.Module's own is replaced by the tracers of torch.fx and torch.export, for a while.
        if any("__call__" in base.__dict__ for base in _classes_of(module)):
            raise Refusal(f"a {type(module).__name__} inside it has a __call__ of its own")
        x = args[0] if len(args) == 1 and not kwargs and type(args[0]) is Symbol else None
        if x is None:
            self._check_hooks(module)
            return self._follow(module, stand, *args, **kwargs)
        before = x.value()
        if self.whole and isinstance(module, self.whole):
            out = Symbol(Node("module", (before,), (path, "")))
        else:
            try:
                out = self._layer(path, module, notes, x)
                if out is None:
                    self._check_hooks(module)
                    out = self._follow(module, stand, x)
                    if type(out) is Symbol and out.value().op == "dropout":
                        raise Refusal("it drops values at random")
            except Refusal as refusal:
                # It can still be called as it is. Whether it changes its input then is not known.
                self._refusals, self._pending = self._refusals + 1, None
                sys.setprofile(self._profile)  # which Python drops when it raises
                reason = f"{'.'.join(path)}, a {type(module).__name__}: {refusal}"
                node = Node("module", (before,), (path, reason))
                self._effects.append(node)
                out = Symbol(node)
                x.lose(reason)
        if type(out) is Symbol:
            self.calls.setdefault(out.value(), []).append(Call(path, before))
        return out

    def _check_hooks(self, module: nn.Module) -> None:
        if any(hooks_of(module)):
            raise Refusal("it has hooks, which run only if it is called itself")

    def _layer(self, path: Path, module: nn.Module, notes: _Notes, x: Symbol) -> Symbol | None:
        """The result of a module that is one operation; None if it is not."""
        base = next((b for b in _LAYERS if isinstance(module, b)), None)
        if base is None or (base is nn.PReLU and type(module) is not base):
            return None
        for name in _FORWARD_METHODS:
            method = getattr(type(module), name, None)
            if method is not _METHODS[base, name] or name in module.__dict__:
                return None
            if method is not None and name != "forward":
                notes.inherited[name] = method
        self._attribute(type(module), "forward", _METHODS[base, "forward"])
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

    def _follow(self, module: nn.Module, stand: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The result of a module's own forward."""
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
            self._attribute(kind, "forward", function)
        if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
            raise Refusal("its forward is decorated, or no Python function")
        self._functions[function.__code__] = function
        return function(stand, *args, **kwargs)

    def saw(self, stand: nn.Module, name: str) -> None:
        """An attribute was read from a module's stand-in."""
        _, path, module = stand.__dict__[_READER]
        notes = self.note(path, module)
        place = f"{'.'.join(path) or 'self'}.{name}"
        if name in module.__dict__:
            raw = module.__dict__[name]
            if isinstance(raw, Tensor):
                return
            notes.own[name] = stand.__dict__["training"] if name == "training" else raw
            if isinstance(raw, types.MethodType) and raw.__self__ is module:
                self._functions[raw.__func__.__code__] = raw.__func__
            else:
                self._check_attribute(raw, place)
            return
        raw = inspect.getattr_static(type(module), name, MISSING)
        notes.inherited[name] = getattr(type(module), name, MISSING)
        if isinstance(raw, staticmethod):
            raw = raw.__func__
        if isinstance(raw, property) and isinstance(raw.fget, types.FunctionType):
            raw = raw.fget
        self._check_attribute(None if raw is MISSING else raw, place)

    # Functions, and what they read

    def _check_attribute(self, value: Any, place: str) -> None:
        """As ``_check_constant``, and no class or file, whose attributes forward may read."""
        if isinstance(value, (type, types.ModuleType)):
            raise Refusal(f"its forward reads {place}, whose attributes cannot be followed")
        self._check_constant(value, place)

    def _check_constant(self, value: Any, place: str) -> None:
        """Refuse a value that can change without another object taking its place."""
        if isinstance(value, types.FunctionType):
            self._functions[value.__code__] = value
        elif isinstance(value, (tuple, frozenset)):
            for item in value:
                self._check_constant(item, place)
        elif not isinstance(value, _CONSTANTS) or type(value).__name__ == "tensortype":
            raise Refusal(
                f"its forward reads {place}, a {type(value).__name__}, whose changes cannot be "
                "noticed"
            )

    def _profile(self, frame: types.FrameType, event: str, arg: Any) -> None:
        """The profile function. A ``Refusal`` is raised in the code that is followed."""
        if event == "call":
            self._enter(frame)
        elif frame.f_code not in self._read_codes:
            return
        elif event == "c_call":
            self._pending = None if is_pure(arg) else arg
        elif event == "c_return" and self._pending is not None:
            name = getattr(self._pending, "__name__", self._pending)
            raise Refusal(f"its forward calls {name}, whose result can change")

    def _enter(self, frame: types.FrameType) -> None:
        code, caller = frame.f_code, frame.f_back
        from_here = caller is not None and caller.f_code.co_filename.startswith(HERE)
        if is_users(code):
            if not from_here or code in self._functions:  # else generated, of a NamedTuple say
                self._read_code(code, frame)
        elif code is _TORCH_FUNCTION:
            self._pending = None
        elif (
            caller is not None
            and caller.f_code in self._read_codes
            and not code.co_filename.startswith(HERE)
        ):
            followed = code.co_filename.startswith((TORCH + "nn" + os.sep, TORCH + "functional"))
            if code.co_name not in _PURE_FUNCTIONS and not (
                followed and any(map(_is_followed, frame.f_locals.values()))
            ):
                raise Refusal(f"its forward calls {code.co_name}, whose result can change")

    def _read_code(self, code: types.CodeType, frame: types.FrameType) -> None:
        if code in self._read_codes:
            return
        function = self._functions.get(code) or self._of_super(code, frame)
        if function is None:
            raise Refusal(
                f"its forward calls {code.co_name}, which is not an attribute of a module, a class "
                "or a file"
            )
        self._read_codes.update(codes_of(code))
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._attribute(function, name, getattr(function, name))
        for name, value in (function.__kwdefaults__ or {}).items():
            self._items[id(function.__kwdefaults__), name] = function.__kwdefaults__, name, value
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._check_constant(default, f"a default of {function.__name__}")
        cells: dict[str, Any] = {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            cells[name] = getattr(cell, "cell_contents", None)
            self._attribute(cell, "cell_contents", getattr(cell, "cell_contents", MISSING))
            self._check_constant(cells[name], name)
        for chain in global_names(code):
            if chain[0] in cells:
                self._read_chain(cells[chain[0]], chain, 1)
            else:
                self._read_global(function.__globals__, chain)

    def _of_super(self, code: types.CodeType, frame: types.FrameType) -> Any:
        """The method with this code of a base class, which ``super()`` calls."""
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        for base in type(owner).__mro__ if _is_followed(owner) else ():
            function = base.__dict__.get(code.co_name)
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                self._attribute(base, code.co_name, function)
                return function
        return None

    def _read_global(self, values: dict, chain: tuple[str, ...]) -> None:
        """A global variable, and the attributes that are taken of it."""
        value = values.get(chain[0], MISSING)
        self._items[id(values), chain[0]] = values, chain[0], value
        if value is not MISSING:
            self._check_constant(value, chain[0])
            self._read_chain(value, chain, 1)
        elif not hasattr(builtins, chain[0]) or chain[0] == "type":
            raise Refusal(f"its forward reads {chain[0]}, which cannot be guarded")

    def _read_chain(self, value: Any, chain: tuple[str, ...], start: int) -> None:
        """The attributes that are taken of a value, one of the other, from ``chain[start]`` on."""
        for name in chain[start:]:
            if isinstance(value, types.ModuleType):
                found = value.__dict__.get(name, MISSING)
                self._items[id(value.__dict__), name] = value.__dict__, name, found
            elif isinstance(value, (type, types.FunctionType)):
                found = getattr(value, name, MISSING)
                self._attribute(value, name, found)
            else:
                return  # of a constant, or of what is local to the function
            if found is MISSING:
                raise Refusal(f"its forward reads {'.'.join(chain)}, which cannot be guarded")
            value = found
            self._check_constant(value, ".".join(chain))
        known = getattr(value, "__module__", "").partition(".")[0] in ("builtins", "torch")
        if isinstance(value, types.ModuleType) or (
            isinstance(value, type) and not known and chain != ("__class__",)
        ):
            raise Refusal(
                f"its forward uses {'.'.join(chain)}, whose attributes cannot be followed"
            )

    def _attribute(self, thing: Any, name: str, value: Any) -> None:
        self._attributes[id(thing), name] = thing, name, value


def _classes_of(module: nn.Module) -> list[type]:
    """The classes that a module's own derives from, before nn.Module."""
    mro = type(module).__mro__
    return list(mro[: mro.index(nn.Module)])


def _nodes_of(out: Node) -> set[Node]:
    """A node and all that it is made from."""
    found: set[Node] = set()
    waiting = [out]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.inputs
    return found


class _Notes:
    """What was read of one module; becomes an ``Entry``."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.called, self.is_layer = module, False, False
        self.own: dict[str, Any] = {}
        self.inherited: dict[str, Any] = {}

    def entry(self, path: Path, paths: dict[int, Path]) -> Entry:
        module = self.module
        own = {
            name: Method(value.__func__)
            if isinstance(value, types.MethodType) and value.__self__ is module
            else value
            for name, value in self.own.items()
        }
        return Entry(
            path, plain_kind(module) if path else owner_kind(module),
            tuple((n, None if c is None else paths.get(id(c))) for n, c in module._modules.items()),
            tuple(own.items()), tuple(self.inherited.items()), self.called,
            any(map(len, hooks_of(module))), self.is_layer,
        )  # fmt: skip


def _recorder(kind: type[nn.Module]) -> type[nn.Module]:
    """A class derived from a module's that tells the reader of every attribute and call."""

    def __getattribute__(self: Any, name: str) -> Any:
        if name in _PLUMBING or name.startswith("__"):
            values = object.__getattribute__(self, "__dict__")
            if _READER in values:  # children are read through the dictionaries of a module
                reader, path, module = values[_READER]
                reader.note(path, module)
            if name in ("__dict__", "__class__") and is_users(sys._getframe(1).f_code):
                raise Refusal(f"its forward reads {name}, whose changes cannot be noticed")
            return kind.__getattribute__(self, name)
        values = object.__getattribute__(self, "__dict__")
        if name != _READER and name not in _groups(values):
            values[_READER][0].saw(self, name)
        return kind.__getattribute__(self, name)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "__dict__")[_READER][0].call(self, args, kwargs)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        raise Refusal(f"its forward sets {name}")

    def __delattr__(self: Any, name: str) -> None:
        raise Refusal(f"its forward deletes {name}")

    return type(
        kind.__name__,
        (kind,),
        {
            "__getattribute__": __getattribute__,
            "__call__": __call__,
            "__setattr__": __setattr__,
            "__delattr__": __delattr__,
            "__module__": kind.__module__,
            _READER: None,
        },
    )


def _groups(values: dict) -> set[str]:
    """Names of a module's parameters, buffers and children: guarded by their dictionaries."""
    return {*values["_parameters"], *values["_buffers"], *values["_modules"]}


def _is_followed(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_is_followed, value))
    return type(value) is Symbol or _READER in type(value).__dict__
