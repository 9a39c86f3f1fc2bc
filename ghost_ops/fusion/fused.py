"""``Fused``: the base class of all fused modules, with the paths of a call.

A fused module is the same object as before, with a class derived from its own (``fused_class``). A
call takes the first possible path:

1. the cached call: one operator with packed weights, after a check of every guard in C;
2. the packed operator, if autograd records nothing; weights are packed again if a guard failed;
3. ``run`` of the parts: fused operators with gradients;
4. the module's own forward (fallback); a warning says why, once.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import arguments
from ..announce import announce
from ..autograd.checks import backend_for
from ..conventions import LOW_PRECISION, dense
from ..modes import autocast_dtype, in_onnx_export, in_transform
from . import graph
from .guards import HANDLE, STATE, Refusal, mark_fused, watchable
from .read import Reading, read
from .state import RESETS, Form, Packed, Parts, State

Kind = TypeVar("Kind", bound="Fused")

_named_classes: dict[type, type[Fused]] = {}  # the fused class of each plain class, by ``named``
_made_classes: dict[tuple[type, type], type] = {}  # made by ``fused_class``, by (mixin, base)


class Fused(nn.Module):
    """A fused module. This class precedes the module's plain class in the method resolution order.

    Each kind of module has a subclass, which reads and matches the forward. The names begin with
    ``_ghost`` because they share the namespace of the user's class. The files of the package
    ``fusion`` call them; other code calls the functions at the end of this file.
    """

    _ghost_ops_base: type[nn.Module]  # the class whose forward is computed
    _ghost_backends: ClassVar[tuple[str, ...]] = ("native",)  # backends with a packed form
    _ghost_in_graph = True  # in inference it is one operator of a compiled graph
    _ghost_kind = "Ghost module"
    _ghost_made = False  # True in classes that ``fused_class`` makes

    @classmethod
    def _ghost_match(cls, reading: Reading) -> Form:
        """The form of a module. Raises ``Refusal`` if it is not of this kind."""
        raise NotImplementedError

    @classmethod
    def _ghost_read(cls, module: nn.Module, training: bool | None = None) -> Reading:
        """Read the forward of a module; ``training`` as in ``read``."""
        return read(module, training)

    def _ghost_state(self) -> State:
        """The last state if its guards hold, else a new state."""
        state: State | None = self.__dict__.get(STATE)
        if (
            state is not None
            and state.kind is type(self)
            and state.watch is not None
            and state.watch.unchanged(self.__dict__)
        ):
            return state
        state = self.__dict__[STATE] = State(self, state)
        return state

    def _ghost_infer(self, state: State, x: Tensor) -> Tensor | None:
        """The output of the packed operator; None if the operator cannot compute this call."""
        parts = state.parts
        assert parts is not None
        if in_transform() or (torch.is_grad_enabled() and _records(parts, x)):
            return None
        to = autocast_dtype(x.device.type)
        if to is not None and x.dtype is not torch.float64:
            if not parts.alone:
                return None
            x = x.to(to)
        backend = backend_for(x, parts.dw_size)
        if backend not in self._ghost_backends or (backend == "eager" and x.dtype in LOW_PRECISION):
            return None
        packed = self._ghost_packed(state, backend, x)
        if packed is None:
            return None
        if to is not None:
            parts.check(x)
        elif not packed.fits(x):
            return None
        return packed.operator(dense(x), *packed.arguments)

    def _ghost_packed(self, state: State, backend: str, x: Tensor) -> Packed | None:
        """The packed weights, packed again if a guard failed; None if they cannot be packed.

        x is checked before packing.
        """
        packed, parts = state.packed, state.parts
        assert parts is not None
        if packed is None or not packed.is_current(self, backend):
            if not watchable(parts.layers) or parts.why_not_packed():
                return None
            parts.check(x)
            state.packed = packed = Packed(self, state, parts, backend)
        return packed

    def _ghost_plain(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, unfused."""
        return self._ghost_ops_base.forward(self, *args, **kwargs)

    def _ghost_prefers_plain(self, parts: Any, x: Tensor) -> bool:
        """Whether, in the present grad mode, the module's own forward is faster for x."""
        return False

    def _ghost_warn(self, reason: str) -> None:
        kind = type(self)
        name = (self._ghost_ops_base if "_ghost_made" in kind.__dict__ else kind).__name__
        announce(f"{name} runs its own forward, unfused: {reason}.")

    def _ghost_call(self, args: tuple, kwargs: dict) -> Any:
        """The forward after a cache miss."""
        x = _input(self._ghost_ops_base, args, kwargs)
        if type(x) not in (Tensor, nn.Parameter):
            if kwargs or len(args) != 1:
                self._ghost_warn("it is called with arguments other than one tensor")
            return self._ghost_plain(*args, **kwargs)
        if torch.jit.is_tracing():
            if not in_onnx_export():
                self._ghost_warn("torch.jit traces it")
            return self._ghost_plain(*args, **kwargs)
        if x.dim() != 4:
            return self._ghost_plain(*args, **kwargs)
        arguments.dense("x", x)
        out = self._ghost_eager(x)
        return self._ghost_plain(*args, **kwargs) if isinstance(out, str) else out

    def _ghost_eager(self, x: Tensor) -> Tensor | str:
        """The output for x [N, C, H, W]; or the reason for a fallback, as ``Parts.run``."""
        state = self._ghost_state()
        if state.parts is None:
            self._ghost_warn(state.reason)
            return state.reason
        out: Tensor | str | None = self._ghost_infer(state, x)
        if out is None:
            if self._ghost_prefers_plain(state.parts, x) and _records(state.parts, x):
                return ""
            out = state.parts.run(x)
            if isinstance(out, str) and out:
                self._ghost_warn(out)
        return out

    def _ghost_traced(self, args: tuple, kwargs: dict) -> Any:
        """The forward while a graph is traced. The compiler guards everything that is read here."""
        x = _input(self._ghost_ops_base, args, kwargs)
        state: State | None = self.__dict__.get(STATE)
        if x is None or state is None or state.known is None or x.dim() != 4 or in_onnx_export():
            return self._ghost_plain(*args, **kwargs)
        record, form = state.known
        out: Any = None
        if not torch.compiler.is_dynamo_compiling():
            # torch.export runs this code in Python, with replacements for the modules inside.
            parts, watch = state.parts, state.watch
            known = parts is not None and watch is not None and watch.unchanged(self.__dict__)
            out = parts.run(x) if known and not self._ghost_prefers_plain(parts, x) else None
        else:
            if self._ghost_in_graph and record.gives_same_shape(self):
                out = graph.call(self, x, form)
            if out is None and record.holds_in_graph(self):
                with suppress(Refusal):
                    parts = form.bind(self)
                    out = None if self._ghost_prefers_plain(parts, x) else parts.run(x)
        if out is not None and not isinstance(out, str):
            return out
        return self._ghost_plain(*args, **kwargs)

    def reset_cache(self) -> None:
        """Drop the packed weights of this module and of modules inside; the next call packs again.

        Needed after writes through ``parameter.data``, which PyTorch does not record. Modules that
        contain this module pack again too.
        """
        RESETS["count"] += 1
        for module in self.modules():
            if isinstance(module, Fused):
                module._ghost_forget()

    def _ghost_forget(self) -> None:
        state: State | None = self.__dict__.get(STATE)
        if state is not None:
            state.packed = None
        handle: graph.Handle | None = self.__dict__.get(HANDLE)
        if handle is not None:
            handle.forget()

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; drops the packed weights."""
        self._ghost_forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ghost_forget()
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        if not kind.__dict__.get("_ghost_made"):  # a class that can be imported by its name
            return super().__reduce_ex__(protocol)
        return _rebuild, (kind.__bases__[0], self._ghost_ops_base), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles do not contain the state: it is valid for this module only.
        return {k: v for k, v in self.__dict__.items() if k not in (STATE, HANDLE)}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        attach(self)

    def extra_repr(self) -> str:
        parts = (super().extra_repr(), "fused by ghost_ops")
        return ", ".join(part for part in parts if part)


class FusedInference(Fused):
    """A module that is fused in eval mode without gradients; otherwise its own forward runs."""

    _ghost_in_graph = False
    _ghost_device = ""  # the only device type on which modules are fused; empty: all

    def _ghost_eager(self, x: Tensor) -> Tensor | str:
        if self.training or torch.is_grad_enabled():
            return ""
        if self._ghost_device and x.device.type != self._ghost_device:
            return ""
        return super()._ghost_eager(x)

    def _ghost_traced(self, args: tuple, kwargs: dict) -> Any:
        return self._ghost_plain(*args, **kwargs)


def fused_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a fused class, with the signature and source of ``plain``.

    Args:
        plain: the forward of the class that is fused.
    """
    # Local variables, because the globals of the result are those of ``plain``.
    compiling, state_name = torch.compiler.is_compiling, STATE

    def forward(self: Fused, *args: Any, **kwargs: Any) -> Any:
        if compiling():
            return self._ghost_traced(args, kwargs)
        if not kwargs and len(args) == 1:
            state = self.__dict__.get(state_name)
            if state is not None and state.kind is type(self):
                packed = state.packed
                if packed is not None:
                    out = packed.run(args[0], self.__dict__)
                    if out is not None:
                        return out
        return self._ghost_call(args, kwargs)

    # torch.jit.script compiles the source of ``plain`` with the globals of the result. Each class
    # has its own copy of the code object, because Dynamo counts recompilations by code object.
    made = types.FunctionType(
        forward.__code__.replace(), plain.__globals__, "forward", None, forward.__closure__
    )
    functools.update_wrapper(made, plain)
    mark_fused(made)
    return made


def _input(base: type[nn.Module], args: tuple, kwargs: dict) -> Any:
    """The only argument of a forward; None if there is none or more than one."""
    if len(args) == 1 and not kwargs:
        return args[0]
    code = base.forward.__code__
    if not args and len(kwargs) == 1 and code.co_argcount > 1 and code.co_posonlyargcount < 2:
        return kwargs.get(code.co_varnames[1])
    return None


def _records(parts: Parts, x: Tensor) -> bool:
    """Whether autograd would record the packed operator, given that grad mode is on."""
    return (
        not parts.alone
        or x.requires_grad
        or any(
            t is not None and t.requires_grad
            for layer in parts.layers
            for t in layer._parameters.values()
        )
    )


def named(kind: type[Kind]) -> type[Kind]:
    """Decorator: ``fused_class`` returns the decorated class for its ``_ghost_ops_base``."""
    _named_classes[kind._ghost_ops_base] = kind
    return kind


def is_named(kind: type) -> bool:
    """Whether a class is decorated with ``named``."""
    return kind in _named_classes.values()


def is_made(kind: type) -> bool:
    """Whether ``fused_class`` returns this class, so that ``detach`` can undo it."""
    return "_ghost_made" in kind.__dict__ or is_named(kind)


def fused_class(mixin: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """The class for modules of class ``base`` that are fused as kind ``mixin``.

    A class decorated with ``named`` if there is one for both; else a class derived from both.
    """
    kind = _named_classes.get(base)
    if kind is None or not issubclass(kind, mixin):
        kind = _made_classes.get((mixin, base))
    if kind is None:
        attributes = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "_ghost_ops_base": base,
            "_ghost_made": True,
            "forward": fused_forward(base.forward),
        }
        kind = type(f"Fused{base.__name__}", (mixin, base), attributes)
        _made_classes[mixin, base] = kind
    return kind


def _rebuild(mixin: type[Fused], base: type[nn.Module]) -> nn.Module:
    kind = fused_class(mixin, base)
    return kind.__new__(kind)


def attach(module: Fused) -> None:
    """Read a new fused module, and give it a handle for the operator of compiled graphs."""
    if not module._ghost_in_graph:
        return  # the first call reads the module
    module.__dict__[HANDLE] = graph.Handle(module)
    with suppress(Exception):  # incomplete during unpickling: then the first call reads the module
        module._ghost_state()


def detach(module: Fused) -> None:
    """Give a fused module its plain class back."""
    module.__class__ = module._ghost_ops_base  # type: ignore[assignment]
    forget(module)


def forget(module: nn.Module) -> None:
    """Remove the state of a fused module."""
    for attribute in (STATE, HANDLE):
        module.__dict__.pop(attribute, None)


def state_of(module: Fused) -> State:
    """The present state of a fused module."""
    return module._ghost_state()


def read_as(kind: type[Fused], module: nn.Module) -> Reading:
    """The reading of a module's forward in eval mode, to be matched by ``match_as``.

    Raises:
        Failed: as ``read``.
    """
    return kind._ghost_read(module, training=False)


def match_as(kind: type[Fused], reading: Reading) -> Form:
    """The form of a module of this kind. Raises ``Refusal`` if the module is not of this kind."""
    return kind._ghost_match(reading)


def name_of(kind: type[Fused]) -> str:
    """The kind of module that a fused class is for, in words."""
    return kind._ghost_kind


def backends_of(kind: type[Fused]) -> tuple[str, ...]:
    """The backends for which modules of a fused class have a packed form."""
    return kind._ghost_backends


def plain_forward(module: Fused) -> Callable[..., Any]:
    """A fused module's own forward, unfused."""
    return module._ghost_plain
