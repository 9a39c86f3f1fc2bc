"""Static analysis of a function's bytecode: its origin, the globals it reads, its stores."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

import torch

from .guards import Refusal

_PURE_BUILTINS = frozenset(
    "abs all any callable divmod getattr hasattr isinstance issubclass iter len max min next round "
    "sorted sum".split()
)
_CONTAINERS = (str, tuple, list, dict, set, frozenset, range)

_STANDARD = tuple(
    os.path.abspath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")
)
HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


@functools.cache
def is_users(code: types.CodeType) -> bool:
    """Whether code belongs to neither PyTorch, nor Python's standard library, nor this package."""
    name = code.co_filename
    if name.startswith((HERE, TORCH)):
        return False
    return not name.startswith(_STANDARD) or "site-packages" in name or "dist-packages" in name


def is_pure(function: Any) -> bool:
    """Whether a C function has no side effect and its result depends on its arguments only."""
    if getattr(function, "__module__", None) == "builtins":
        return function.__name__ in _PURE_BUILTINS
    if getattr(function, "__module__", None) == "math":
        return True
    return isinstance(getattr(function, "__self__", None), _CONTAINERS)


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and the code of all functions nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_FORBIDDEN = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR", "IMPORT_NAME")


def _is_method(instruction: dis.Instruction) -> bool:
    """Whether an attribute is loaded for an immediate call."""
    if sys.version_info < (3, 12):
        return instruction.opname == "LOAD_METHOD"
    return bool(instruction.arg and instruction.arg & 1)


@functools.cache
def global_names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Chains (name, attribute, attribute, ...) that a function reads, from a global or a cell on.

    ``torch.nn.functional.relu(x)`` reads the chain ("torch", "nn", "functional", "relu").

    Raises:
        Refusal: the function imports, or stores something outside of its local variables.
    """
    chains: dict[tuple[str, ...], None] = {}
    for inner in codes_of(code):
        chain: tuple[str, ...] = ()
        of_super = False
        for instruction in dis.get_instructions(inner):
            of_super = of_super or instruction.argval == "super"
            if of_super and instruction.opname in _ATTRIBUTES:
                if not _is_method(instruction):
                    raise Refusal("its forward reads an attribute of super(), which is not guarded")
                of_super = False
            outer = instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
            if outer or instruction.opname.startswith(_FORBIDDEN):
                raise Refusal(f"its forward has a {instruction.opname}, whose effect would be lost")
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
                if chain:
                    chains[chain] = None
                chain = (instruction.argval,)
            elif chain and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                chain = (*chain, instruction.argval)
            elif chain and instruction.opname not in ("CACHE", "PUSH_NULL"):
                chains[chain] = None
                chain = ()
        if chain:
            chains[chain] = None
    return tuple(chains)
