"""Stand-ins: objects that replace modules while a forward is read.

A stand-in has the module's attributes, and a class derived from the module's class. The derived
class reports every attribute that the forward reads, and every call, to the reader.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .code import is_users
from .guards import Refusal
from .symbols import Symbol

READER = "_ghost_ops_reader"  # attribute of a stand-in: (reader, path of the module, module)

# Attributes of every module that are guarded as a whole, or that reading leaves out.
_PLUMBING = frozenset(nn.Module().__dict__) - {"training"}


def stand_in_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class derived from a module's class that reports attributes and calls to the reader."""

    def __getattribute__(self: Any, name: str) -> Any:
        if name in _PLUMBING or name.startswith("__"):
            values = object.__getattribute__(self, "__dict__")
            if READER in values:  # reading a dictionary of the module reads its children
                reader, path, module = values[READER]
                reader.note(path, module)
            if name in ("__dict__", "__class__") and is_users(sys._getframe(1).f_code):
                raise Refusal(f"its forward reads {name}, whose changes cannot be noticed")
            return kind.__getattribute__(self, name)
        values = object.__getattribute__(self, "__dict__")
        if name != READER and name not in _groups(values):
            values[READER][0].saw(self, name)
        return kind.__getattribute__(self, name)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "__dict__")[READER][0].call(self, args, kwargs)

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
            READER: None,
        },
    )


def _groups(values: dict) -> set[str]:
    """Names of a module's parameters, buffers and children; their dictionaries are guarded."""
    return {*values["_parameters"], *values["_buffers"], *values["_modules"]}


def is_followed(value: Any) -> bool:
    """Whether a value is a symbol or a stand-in, or a tuple or list with one."""
    if type(value) in (tuple, list):
        return any(map(is_followed, value))
    return type(value) is Symbol or READER in type(value).__dict__
