"""What all fused modules share: their class, their state, and the order of their paths.

A fused module is the object that it was, of a class derived from its own (``fused_class``). A call
takes the first of these paths that can be taken:

1. the cached call: one operator with packed weights, after one check of all guards, in C;
2. the packed operator, made anew if a parameter has changed, where autograd records nothing;
3. ``run`` of its parts: fused operators with gradients;
4. its own forward, as it was before it was fused; a warning says why, once.

Its ``State`` holds what was read (``read``), bound to its children, and the guards of it. Where a
guard fails the state is made anew: from the same ``Record`` if that holds, else by reading again.
States are never changed but for the packed weights, and hold no reference to their module: a
replica that shares one finds the guards failing, and makes its own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import backends
from ..announce import announce
from ..autograd.checks import backend_for
from ..conventions import LOW_PRECISION, dense
from ..modes import autocast_dtype, in_transform
from . import cached_call, graph
from .guards import Record, Refusal, watchable
from .read import Failed, Reading, read

_classes: dict[tuple[type, type], type] = {}
_resets = {"count": 0}  # calls of ``reset_cache``: of a module inside, packed with its parents
_GUARDED_MODES = (
    (forward_ad.__dict__, "_current_level"),
    (backends.__dict__, "_requested"),
    (_resets, "count"),
)
_GUARDS: tuple[cached_call.Guard, ...] = (
    (torch.is_grad_enabled, ()),
    (torch._C._are_functorch_transforms_active, ()),
    (torch._C._is_tracing, ()),
)


class Form(Protocol):
    """Where the parts of a fused module are: paths and numbers, no modules."""

    def bind(self, module: nn.Module) -> Parts:
        """The parts in ``module``. Raises ``Refusal`` if the fused ops cannot compute them.

        Dynamo can trace this.
        """
        ...

    def shape(self, module: nn.Module) -> graph.OutputShape | None:
        """What the shape of the output follows from now; None if that is not known.

        Raises ``Refusal`` as ``bind``. Dynamo can trace this.
        """
        ...


class Parts(Protocol):
    """The parts of a fused module.

    Attributes:
        layers: modules with parameters that the packed operator computes in the place of.
        first: the convolution that x goes to.
        dw_size: of the largest cheap convolution.
        alone: the packed operator calls no modules, and x may be cast for it, as autocast does.
    """

    layers: tuple[nn.Module, ...]
    first: nn.Conv2d
    dw_size: int
    alone: bool

    def run(self, x: Tensor) -> Tensor | str:
        """The output, differentiable; or why it has to be the module's own forward."""
        ...

    def why_not_packed(self) -> str:
        """Why the parts cannot be packed in the modes that they are in; empty if they can."""
        ...

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        """An operator, and its arguments after a dense x that fits."""
        ...

    def check(self, x: Tensor) -> None:
        """Raise what the module raises for an x that does not fit."""
        ...


class State:
    """What a fused module knows of itself.

    Attributes:
        kind: the module's class.
        record: what was read.
        form, parts: what it computes; None where the fused ops cannot compute it.
        reason: why they cannot.
        guard: over all of ``record``; None: it has to be read anew at every call.
        cached: packed weights.
        known: record and form of the last time that there was a form; for compiled graphs.
    """

    def __init__(self, module: Fused, old: State | None = None) -> None:
        self.kind = type(module)
        self.form: Form | None = None
        self.parts: Parts | None = None
        self.reason = ""
        self.cached: Cached | None = None
        self.known: tuple[Record, Form] | None = None if old is None else old.known
        try:
            if old is not None and old.form is not None and old.record.holds(module):
                self.record, self.form = old.record, old.form
            else:
                reading = module._ghost_read(module)
                self.record = reading.record
                self.form = module._ghost_match(reading)
            self.parts = self.form.bind(module)
            self.known = self.record, self.form
        except Failed as failed:
            self.record, self.reason = failed.record, str(failed)
        except Refusal as refusal:
            self.form, self.reason = None, str(refusal)
        self.guard = self.record.guard(module)


class Cached:
    """Packed weights, and a watch over all that they were made from."""

    def __init__(self, module: Fused, state: State, parts: Parts, backend: str) -> None:
        self.backend = backend
        first = parts.first.weight
        self.dtype, self.device = first.dtype, first.device
        self.channels = parts.first.in_channels
        # Keeps the memory, so that nothing else comes to a watched address.
        self.alive = [
            t.detach()
            for layer in parts.layers
            for t in (*layer._parameters.values(), *layer._buffers.values())
            if t is not None
        ]
        # Before packing: a change in the meantime, by another thread, is then noticed.
        self.watch = state.record.guard(module, parts.layers, _GUARDED_MODES)
        with torch.no_grad():
            self.operator, self.arguments = parts.pack(backend)
        self.run: Callable[[Any, dict], Tensor | None] = _never
        if self.watch is not None:
            guards = _GUARDS
            if first.device.type != "meta":  # which autocast does not know, and raises
                guards += ((torch.is_autocast_enabled, (first.device.type,)),)
            self.run = cached_call.make(
                watch=self.watch, guards=guards, tensor_type=Tensor, dtype=self.dtype,
                device=self.device, channels_last=torch.channels_last, channels=self.channels,
                operator=self.operator, arguments=self.arguments,
            ).run  # fmt: skip

    def is_current(self, module: Fused, backend: str) -> bool:
        """Whether packing now would give the same."""
        watch = self.watch
        return backend == self.backend and watch is not None and watch.unchanged(module.__dict__)

    def fits(self, x: Tensor) -> bool:
        """Whether the operator computes on x."""
        return (
            x.dim() == 4
            and x.dtype is self.dtype
            and x.device == self.device
            and x.size(1) == self.channels
            and x.numel() > 0
        )


def _never(x: Any, own: dict) -> None:
    return None


class Fused(nn.Module):
    """A fused module; stands before its own class in the order of lookup.

    The classes for each kind say how it is read and matched. Its names begin with ``_ghost`` so
    that they do not meet those of the module's own class.
    """

    _ghost_ops_base: type[nn.Module]
    _ghost_backends: ClassVar[tuple[str, ...]] = ("native",)  # that it can be packed for
    _ghost_in_graph = True  # one operator of a compiled graph in inference
    _ghost_kind = "Ghost module"
    _ghost_made = False  # whether ``fuse`` made its class

    @classmethod
    def _ghost_match(cls, reading: Reading) -> Form:
        """The form of a module. Raises ``Refusal`` if it is not of this kind."""
        raise NotImplementedError

    @classmethod
    def _ghost_read(cls, module: nn.Module, training: bool | None = None) -> Reading:
        return read(module, training)

    def _ghost_state(self) -> State:
        """What is true of the module now."""
        state: State | None = self.__dict__.get("_ghost_ops")
        if (
            state is not None
            and state.kind is type(self)
            and state.guard is not None
            and state.guard.unchanged(self.__dict__)
        ):
            return state
        state = self.__dict__["_ghost_ops"] = State(self, state)
        return state

    def _ghost_infer(self, state: State, x: Tensor) -> Tensor | None:
        """The output by packed weights, kept or new; None where these cannot be."""
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
        cached = self._ghost_cached(state, backend, x)
        if cached is None:
            return None
        if to is not None:
            parts.check(x)
        if to is None and not cached.fits(x):
            return None
        return cached.operator(dense(x), *cached.arguments)

    def _ghost_cached(self, state: State, backend: str, x: Tensor | None) -> Cached | None:
        """Packed weights, kept or new; None where these cannot be. x is checked before packing."""
        cached, parts = state.cached, state.parts
        assert parts is not None
        if cached is None or not cached.is_current(self, backend):
            if not watchable(parts.layers) or parts.why_not_packed():
                return None
            if x is not None:
                parts.check(x)
            state.cached = cached = Cached(self, state, parts, backend)
        return cached

    def _ghost_plain(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module as it was before it was fused."""
        return self._ghost_ops_base.forward(self, *args, **kwargs)

    def _ghost_learns(self, parts: Any, x: Tensor) -> bool:
        """Whether gradients may be recorded, and its own forward is the faster one then."""
        return False

    def _ghost_say(self, reason: str) -> None:
        kind = type(self)
        name = (self._ghost_ops_base if "_ghost_made" in kind.__dict__ else kind).__name__
        announce(f"{name} runs its own forward, unfused: {reason}.")

    def _ghost_call(self, args: tuple, kwargs: dict) -> Any:
        """Forward, where the cached call does not answer."""
        x = _input(self._ghost_ops_base, args, kwargs)
        if type(x) not in (Tensor, nn.Parameter):
            if kwargs or len(args) != 1:
                self._ghost_say("it is called with arguments other than one tensor")
            return self._ghost_plain(*args, **kwargs)
        if torch.jit.is_tracing():
            self._ghost_say("torch.jit traces it")
            return self._ghost_plain(*args, **kwargs)
        if x.dim() != 4:
            return self._ghost_plain(*args, **kwargs)
        out = self._ghost_eager(x)
        return self._ghost_plain(*args, **kwargs) if isinstance(out, str) else out

    def _ghost_eager(self, x: Tensor) -> Tensor | str:
        """The output for one tensor; or why it has to be that of its own forward."""
        state = self._ghost_state()
        if state.parts is None:
            self._ghost_say(state.reason)
            return state.reason
        out: Tensor | str | None = self._ghost_infer(state, x)
        if out is None:
            if self._ghost_learns(state.parts, x) and _records(state.parts, x):
                return ""
            out = state.parts.run(x)
            if isinstance(out, str) and out:
                self._ghost_say(out)
        return out

    def _ghost_traced(self, args: tuple, kwargs: dict) -> Any:
        """Forward, while a graph is traced. All that is read here is guarded by the compiler."""
        x = _input(self._ghost_ops_base, args, kwargs)
        state: State | None = self.__dict__.get("_ghost_ops")
        if x is None or state is None or state.known is None or x.dim() != 4:
            return self._ghost_plain(*args, **kwargs)
        record, form = state.known
        out: Any = None
        if not torch.compiler.is_dynamo_compiling():
            # torch.export runs this code as it is, on stand-ins for the modules inside.
            parts, guard = state.parts, state.guard
            known = parts is not None and guard is not None and guard.unchanged(self.__dict__)
            out = parts.run(x) if known and not self._ghost_learns(parts, x) else None
        else:
            if self._ghost_in_graph and record.gives_same_shape(self):
                out = graph.call(self, x, form)
            if out is None and record.holds_in_graph(self):
                with suppress(Refusal):
                    parts = form.bind(self)
                    out = None if self._ghost_learns(parts, x) else parts.run(x)
        if out is not None and not isinstance(out, str):
            return out
        return self._ghost_plain(*args, **kwargs)

    def reset_cache(self) -> None:
        """Forget the packed weights of this module and those inside; the next call packs anew.

        Needed after writes through ``parameter.data``, which PyTorch does not record. What was
        packed of modules around this one is packed anew too.
        """
        _resets["count"] += 1
        for module in self.modules():
            if isinstance(module, Fused):
                module._ghost_forget()

    def _ghost_forget(self) -> None:
        state: State | None = self.__dict__.get("_ghost_ops")
        if state is not None:
            state.cached = None
        handle: graph.Handle | None = self.__dict__.get("_ghost_handle")
        if handle is not None:
            handle.forget()

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; forgets the packed weights."""
        self._ghost_forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ghost_forget()
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        if not kind.__dict__.get("_ghost_made"):  # a class with a name of its own
            return super().__reduce_ex__(protocol)
        return _rebuild, (kind.__bases__[0], self._ghost_ops_base), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry no state: it would be that of another module.
        return {k: v for k, v in self.__dict__.items() if k not in ("_ghost_ops", "_ghost_handle")}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        attach(self)

    def extra_repr(self) -> str:
        parts = (super().extra_repr(), "fused by ghost_ops")
        return ", ".join(part for part in parts if part)


class FusedInference(Fused):
    """A module that is fused in eval mode without gradients, and else its own forward."""

    _ghost_in_graph = False
    _ghost_device = ""  # the only one that it is fused on; empty: all

    def _ghost_eager(self, x: Tensor) -> Tensor | str:
        if self.training or torch.is_grad_enabled():
            return ""
        if self._ghost_device and x.device.type != self._ghost_device:
            return ""
        return super()._ghost_eager(x)

    def _ghost_traced(self, args: tuple, kwargs: dict) -> Any:
        return self._ghost_plain(*args, **kwargs)


def fused_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a fused module, in the place of ``plain``; with its signature and source."""

    compiling, call, traced = torch.compiler.is_compiling, _call, _traced

    def forward(self: Fused, *args: Any, **kwargs: Any) -> Any:
        if compiling():
            return traced(self, args, kwargs)
        if not kwargs and len(args) == 1:
            state = self.__dict__.get("_ghost_ops")
            if state is not None and state.kind is type(self):
                cached = state.cached
                if cached is not None:
                    out = cached.run(args[0], self.__dict__)
                    if out is not None:
                        return out
        return call(self, args, kwargs)

    # torch.jit.script compiles the source of what is wrapped, with the globals of the wrapper. A
    # code object of its own has a count of recompilations of its own.
    made = types.FunctionType(
        forward.__code__.replace(), plain.__globals__, "forward", None, forward.__closure__
    )
    made = functools.wraps(plain)(made)
    made._ghost_ops_fused = True  # type: ignore[attr-defined]
    return made


def _call(module: Fused, args: tuple, kwargs: dict) -> Any:
    return module._ghost_call(args, kwargs)


def _traced(module: Fused, args: tuple, kwargs: dict) -> Any:
    return module._ghost_traced(args, kwargs)


def _input(base: type[nn.Module], args: tuple, kwargs: dict) -> Any:
    """The one argument of a forward; None if there are others."""
    if len(args) == 1 and not kwargs:
        return args[0]
    code = base.forward.__code__
    if not args and len(kwargs) == 1 and code.co_argcount > 1 and code.co_posonlyargcount < 2:
        return kwargs.get(code.co_varnames[1])
    return None


def _records(parts: Parts, x: Tensor) -> bool:
    """Whether autograd records the packed operator, with grad mode on."""
    return (
        not parts.alone
        or x.requires_grad
        or any(
            t is not None and t.requires_grad
            for layer in parts.layers
            for t in layer._parameters.values()
        )
    )


def fused_class(mixin: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """The class derived from ``base`` whose forward is the mixin's. One for each base."""
    kind = _classes.get((mixin, base))
    if kind is None:
        attributes = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "_ghost_ops_base": base,
            "_ghost_made": True,
            "forward": fused_forward(base.forward),
        }
        kind = type(f"Fused{base.__name__}", (mixin, base), attributes)
        _classes[mixin, base] = kind
    return kind


def _rebuild(mixin: type[Fused], base: type[nn.Module]) -> nn.Module:
    kind = fused_class(mixin, base)
    return kind.__new__(kind)


def attach(module: Fused) -> None:
    """Read a new fused module, and make it known to the operator of compiled graphs."""
    if not module._ghost_in_graph:
        return  # it is read when it is called
    module.__dict__["_ghost_handle"] = graph.Handle(module)
    with suppress(Exception):  # while it is unpickled it may be incomplete: then it is read later
        module._ghost_state()


def detach(module: Fused) -> None:
    """Give a fused module its plain class back."""
    module.__class__ = module._ghost_ops_base
    for attribute in ("_ghost_ops", "_ghost_handle"):
        module.__dict__.pop(attribute, None)
