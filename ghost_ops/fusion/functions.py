"""The functions that a forward runs while it is read, and the variables that they read.

A Python profile function receives every call. For each function of the user it records the code,
defaults, cells and global variables. It refuses a call whose result could differ the next time, and
a mutable value: a guard compares objects, and so does not detect a change inside of an object.
"""

from __future__ import annotations

import builtins
import enum
import gc
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .code import HERE, TORCH, codes_of, global_names, is_pure, is_users
from .guards import Refusal
from .stand_in import is_followed
from .symbols import Symbol
from .watch import MISSING

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, type),
    *(torch.dtype, torch.device, torch.memory_format, torch.Size),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
)
# Functions of PyTorch with a known result: a fused forward runs neither scripted nor traced. The
# __torch_function__ of a mode such as torch.device("meta") calls the function itself.
_PURE_FUNCTIONS = ("_assert", "is_scripting", "is_tracing", "__torch_function__")
_TORCH_FUNCTION = Symbol.__torch_function__.__func__.__code__  # type: ignore[attr-defined]


class FunctionReader:
    """Records functions and variables of one forward.

    Attributes:
        items: (dictionary, key, value) of global variables, by (id of the dictionary, key).
        attributes: (object, name, value) of functions, cells and classes, by (id of the object,
            name).
    """

    def __init__(self) -> None:
        self.items: dict[tuple[int, str], tuple[dict, str, Any]] = {}
        self.attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._functions: dict[types.CodeType, types.FunctionType] = {}  # found so far, by code
        self._read_codes: set[types.CodeType] = set()
        self._pending: Any = None  # the running C function, if it is not pure and got no symbol

    def add(self, function: types.FunctionType) -> None:
        """Allow calls of a function that was found in a guarded place."""
        self._functions[function.__code__] = function

    def add_attribute(self, thing: Any, name: str, value: Any) -> None:
        """Record an attribute of a function, cell or class."""
        self.attributes[id(thing), name] = thing, name, value

    def check_attribute(self, value: Any, place: str) -> None:
        """As ``check_constant``; also refuses classes and Python modules."""
        if isinstance(value, (type, types.ModuleType)):
            raise Refusal(f"its forward reads {place}, whose attributes cannot be followed")
        self.check_constant(value, place)

    def check_constant(self, value: Any, place: str) -> None:
        """Raise ``Refusal`` for a mutable value. Functions are allowed and added."""
        if isinstance(value, types.FunctionType):
            self.add(value)
        elif isinstance(value, (tuple, frozenset)):
            for item in value:
                self.check_constant(item, place)
        elif not isinstance(value, _CONSTANTS) or type(value).__name__ == "tensortype":
            raise Refusal(
                f"its forward reads {place}, a {type(value).__name__}, whose changes cannot be "
                "noticed"
            )

    @contextmanager
    def profiling(self) -> Iterator[None]:
        """Profile every call inside the block. A previous profile function is suspended."""
        previous: Any = sys.getprofile()
        suspended = previous is not None and not callable(previous)  # cProfile, up to Python 3.11
        if suspended:
            previous.disable()
        collects = gc.isenabled()
        gc.disable()  # a finalizer or callback would run as if the forward had called it
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None if suspended else previous)
            if collects:
                gc.enable()
            if suspended:
                previous.enable()

    def resume(self) -> None:
        """Continue after a caught ``Refusal``: Python drops a profile function that raises."""
        self._pending = None
        sys.setprofile(self._profile)

    def _profile(self, frame: types.FrameType, event: str, arg: Any) -> None:
        """The profile function. Its ``Refusal`` is raised inside the code that is read."""
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
        """A Python function is called."""
        code, caller = frame.f_code, frame.f_back
        from_here = caller is not None and caller.f_code.co_filename.startswith(HERE)
        if is_users(code):
            # Unknown code that this package calls is generated code, such as that of a NamedTuple.
            if not from_here or code in self._functions:
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
                followed and any(map(is_followed, frame.f_locals.values()))
            ):
                raise Refusal(f"its forward calls {code.co_name}, whose result can change")

    def _read_code(self, code: types.CodeType, frame: types.FrameType) -> None:
        """Record a user's function, and the variables outside of it that it reads."""
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
            self.add_attribute(function, name, getattr(function, name))
        for name, value in (function.__kwdefaults__ or {}).items():
            self.items[id(function.__kwdefaults__), name] = function.__kwdefaults__, name, value
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.check_constant(default, f"a default of {function.__name__}")
        cells: dict[str, Any] = {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            cells[name] = getattr(cell, "cell_contents", None)
            self.add_attribute(cell, "cell_contents", getattr(cell, "cell_contents", MISSING))
            self.check_constant(cells[name], name)
        for chain in global_names(code):
            if chain[0] in cells:
                self._read_chain(cells[chain[0]], chain, 1)
            else:
                self._read_global(function.__globals__, chain)

    def _of_super(self, code: types.CodeType, frame: types.FrameType) -> Any:
        """The method of a base class that has this code, called through ``super()``; or None."""
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        for base in type(owner).__mro__ if is_followed(owner) else ():
            function = base.__dict__.get(code.co_name)
            if isinstance(function, types.FunctionType) and function.__code__ is code:
                self.add_attribute(base, code.co_name, function)
                return function
        return None

    def _read_global(self, values: dict, chain: tuple[str, ...]) -> None:
        """Record a global variable and the chain of attributes read from it."""
        value = values.get(chain[0], MISSING)
        self.items[id(values), chain[0]] = values, chain[0], value
        if value is not MISSING:
            self.check_constant(value, chain[0])
            self._read_chain(value, chain, 1)
        elif not hasattr(builtins, chain[0]) or chain[0] == "type":
            raise Refusal(f"its forward reads {chain[0]}, which cannot be guarded")

    def _read_chain(self, value: Any, chain: tuple[str, ...], start: int) -> None:
        """Record the attributes ``chain[start:]``, each read from the one before it."""
        for name in chain[start:]:
            if isinstance(value, types.ModuleType):
                found = value.__dict__.get(name, MISSING)
                self.items[id(value.__dict__), name] = value.__dict__, name, found
            elif isinstance(value, (type, types.FunctionType)):
                found = getattr(value, name, MISSING)
                self.add_attribute(value, name, found)
            else:
                return  # an attribute of a constant, or of a local object
            if found is MISSING:
                raise Refusal(f"its forward reads {'.'.join(chain)}, which cannot be guarded")
            value = found
            self.check_constant(value, ".".join(chain))
        known = getattr(value, "__module__", "").partition(".")[0] in ("builtins", "torch")
        if isinstance(value, types.ModuleType) or (
            isinstance(value, type) and not known and chain != ("__class__",)
        ):
            raise Refusal(
                f"its forward uses {'.'.join(chain)}, whose attributes cannot be followed"
            )
