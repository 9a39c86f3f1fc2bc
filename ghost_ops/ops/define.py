"""Definition of an operator of ``torch.ops.ghost_ops``: schema, fake and eager implementation.

The decorator ``operator`` of the eager implementation registers all three. The native
libraries add kernels for their devices; a device without a kernel runs the eager implementation.
No operator is differentiable: ``autograd`` has the autograd functions.

To add an argument to an operator, change four places: its definition (schema, fake and eager
implementation, side by side), the call in ``autograd``, the C++ function that registers against the
schema, and the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
Fake = Callable[[Any], Any]  # takes the arguments of the operator as attributes of one object

library = torch.library.Library("ghost_ops", "DEF")
SCHEMAS: dict[str, str] = {}  # of the operators with an eager implementation, by name
FAKES: dict[str, Fake] = {}
_EAGER: dict[str, Callable[..., Any]] = {}


# The operators, called through the dispatcher, by name. Each attribute is an overload, because its
# look-up at each call would take longer than a small call.
native: Any = type("native", (), {})


def operator(schema: str, fake: Fake) -> Callable[[Function], Function]:
    """Define the operator of a schema in ``ghost_ops``; decorates its eager implementation.

    Args:
        schema: as ``torch.library.Library.define`` takes it.
        fake: the results for fake tensors, from an object with the arguments as attributes.

    Returns:
        A decorator that returns the eager implementation unchanged.
    """

    def decorate(eager: Function) -> Function:
        name = schema.partition("(")[0]
        SCHEMAS[name], FAKES[name], _EAGER[name] = schema, fake, eager
        implement(library, schema, eager, fake)
        setattr(native, name, overload("ghost_ops", name))
        return eager

    return decorate


def implement(
    library: torch.library.Library, schema: str, function: Callable[..., Any], fake: Fake
) -> None:
    """Define an operator in a library, with one implementation for every device and a fake."""
    name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, torch.no_grad()(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", _by_name(schema, fake), lib=library)


def declare(schema: str) -> Any:
    """Define an operator that only the native CPU library implements and that is never traced.

    Returns:
        Its overload.
    """
    return overload("ghost_ops", library.define(schema))


def overload(namespace: str, name: str) -> Any:
    """The only overload of an operator."""
    return getattr(getattr(torch.ops, namespace), name).default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators of ghost_ops as functions of PyTorch's own operators.

    Returns:
        A table for ``ExportedProgram.run_decompositions``, after which a program that was exported
        in eval mode holds no operator of ghost_ops.
    """
    return {overload("ghost_ops", name): function for name, function in _EAGER.items()}


def _by_name(schema: str, fake: Fake) -> Callable[..., Any]:
    """The fake as a function with the arguments of the schema."""

    def call(*given: Any, **named: Any) -> Any:
        names, defaults = _arguments(schema)
        bound = dict(zip(names, given, strict=False))
        return fake(SimpleNamespace(**{**defaults, **bound, **named}))

    return call


@functools.cache
def _arguments(schema: str) -> tuple[list[str], dict[str, Any]]:
    """The names of a schema's arguments, and the defaults by name."""
    arguments = torch._C.parse_schema(schema).arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return [a.name for a in arguments], defaults
