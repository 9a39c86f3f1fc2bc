"""Modules made fused by ``fuse``: the same objects, of a class whose forward is the fused one.

``fuse`` gives a module a class derived from its own, so that everything else about it stays: its
attributes, parameters, keys, hooks and place in the model, and ``isinstance``. ``unfuse`` gives
back the class. Whatever is changed inside the module afterwards is noticed at the next call; what
the fused ops cannot stand for then runs as the original forward, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, model_ops, watch
from .autograd import (
    LOW_PRECISION,
    apply_arguments,
    autocast_dtype,
    backend_for,
    dense,
    in_transform,
    is_fused_primary,
    library_conv,
    needs_grad,
    ops_named,
    pack,
    run,
    slopes_need_layers,
)
from .compiled import OneOperator, OutputShape, first_conv, ghost_shape, in_graph
from .convert_layouts import Branch, Layout, Refusal, read, settings_of, slopes_of
from .convert_probe import gate_of, ghost, norms_of, small_gate, uses_batch_stats
from .functional import check
from .nn import running_update
from .structure import _GLOBAL_HOOKS, _hooks_of

# What the settings of a layer are read from.
_CONV_STATE = ("stride", "padding", "dilation", "groups", "padding_mode")
_STATE: dict[type, tuple[str, ...]] = {nn.LeakyReLU: ("negative_slope",), nn.GELU: ("approximate",)}
_announced: set[str] = set()
_classes: dict[tuple[type, type], type] = {}


def _never() -> bool:
    return False


class Watch:
    """Tells whether modules are as they were: children, settings, hooks and forwards.

    Args:
        modules: what is watched, containers included.
        owner: the one among them that holds this watch. Its hooks do run, and may change; its
            attributes are not watched, which would tie it to itself.
    """

    __slots__ = ("same",)

    same: Callable[[], bool]

    def __init__(self, modules: tuple[nn.Module, ...], owner: nn.Module) -> None:
        inside = tuple(m for m in modules if m is not owner)
        dicts = [m._modules for m in modules]
        dicts += [hooks for m in inside for hooks in _hooks_of(m)]
        items, absent = [], []
        for m in inside:
            place = items if "forward" in m.__dict__ else absent
            place.append((m.__dict__, "forward"))
            names = _CONV_STATE if isinstance(m, nn.Conv2d) else _STATE.get(type(m), ())
            names = ("eps",) if isinstance(m, nn.BatchNorm2d) else names
            items += [(m.__dict__, name) for name in names]
        try:
            made = watch.make((*dicts, *_GLOBAL_HOOKS), tuple(items), tuple(absent), ())
            self.same = made.unchanged
        except KeyError:  # a subclass keeps an attribute elsewhere: it is read anew every time
            self.same = _never


class Values:
    """Tells whether the parameters and buffers of modules are as they were.

    A tensor counts as unchanged if its module still has the same object, with the same version and
    at the same address. Batch norms must stay in eval mode, because training moves their statistics
    without a trace; the count of batches tells of a training elsewhere.
    """

    __slots__ = ("alive", "request", "unchanged")

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        places = tuple(d for m in modules for d in (m._parameters, m._buffers) if d)
        tensors = tuple(t for d in places for t in d.values() if t is not None)
        # Holds the memory, so that nothing else comes to the address.
        self.alive = [t.detach() for t in tensors]
        modes = tuple((m.__dict__, "training") for m in modules if isinstance(m, nn.BatchNorm2d))
        self.unchanged = watch.make(places, modes, (), tensors).unchanged
        self.request = backends.requested()

    @staticmethod
    def watchable(modules: tuple[nn.Module, ...]) -> bool:
        """Whether no change of a parameter can go unnoticed: no inference tensors or subclasses,
        and none that a parametrisation or a hook computes."""
        tensors = [t for m in modules for t in (*m.parameters(False), *m.buffers(False))]
        layers = [m for m in modules if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.PReLU))]
        return all("weight" in m._parameters for m in layers) and all(
            type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors
        )

    def same(self) -> bool:
        """Whether nothing has changed."""
        return self.unchanged() and backends.requested() == self.request


class PackedGhost:
    """A Ghost module with its batch norms folded in, for one backend."""

    __slots__ = ("apply", "arguments", "library_w1", "packed", "settings", "takes_gate")

    def __init__(self, primary: Branch, cheap: Branch, settings: Any, backend: str) -> None:
        w1, w2 = primary.conv.weight.detach(), cheap.conv.weight.detach()
        fused = is_fused_primary(w1, settings)
        functions = ops_named(backend)
        self.settings = settings
        self.library_w1 = None if fused else w1
        with torch.no_grad():
            norms, slopes = norms_of(primary, cheap, False), slopes_of(primary, cheap)
            self.packed = pack(functions, w1 if fused else None, w2, norms, settings, slopes)
        self.apply = functions.ghost_apply
        self.arguments = apply_arguments(w1.size(0), w2, settings, fused)
        # Whether x may come with a gate that is applied as it is read.
        self.takes_gate = fused and backend == "native" and settings.stride == (1, 1)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        in_gate: Tensor | None = None,
    ) -> Tensor:
        """The module's output for a dense x that fits, times the gate, plus the residual.

        in_gate: [N, C], multiplied to x as it is read; only where ``takes_gate``.
        """
        if in_gate is not None:
            return model_ops.ghost_apply_gated(
                x, in_gate, self.packed, residual, gate, *self.arguments
            )
        if self.library_w1 is not None:
            x = dense(library_conv(x, self.library_w1, self.settings))
        return self.apply(x, self.packed, residual, gate, *self.arguments)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over the pixels of the output, [N, out_channels], for a dense x that fits."""
        intrinsic, out_channels, *_ = self.arguments
        few = x.size(2) * x.size(3) <= model_ops.MOST_POOLED
        if self.takes_gate and few and intrinsic == out_channels and model_ops.on_gpu(x):
            act, slope = self.arguments[5:7]
            return model_ops.ghost_apply_pooled(x, self.packed, intrinsic, act, slope)
        return self(x).mean((2, 3))


class PackedWhole:
    """What packed bottlenecks and networks share: which inputs fit, and whether they still hold.

    Args:
        module: what is packed.
        modules: all inside it that the packed form computes in the place of.
        first: the convolution that its input goes to.
    """

    def __init__(self, module: nn.Module, modules: tuple[nn.Module, ...], first: nn.Conv2d) -> None:
        self.watch = Watch((module, *modules), module)
        self.values = Values(modules)
        self.dtype, self.device = first.weight.dtype, first.weight.device
        self.device_type, self.channels = first.weight.device.type, first.in_channels

    def fits(self, x: Tensor) -> bool:
        """Whether x can be given to it as it is."""
        return (
            type(x) is Tensor
            and x.dtype is self.dtype
            and x.dim() == 4
            and x.size(1) == self.channels
            and x.numel() > 0
            and x.device == self.device
            and autocast_dtype(self.device_type) is None
            and not in_transform()
        )

    def is_current(self) -> bool:
        """Whether packing now would give the same."""
        return self.values.same() and self.watch.same()

    @staticmethod
    def can_pack(modules: tuple[nn.Module, ...], backend: str) -> bool:
        """Whether these modules can be packed: on one device, by native kernels, and watched."""
        devices = {t.device for m in modules for t in (*m.parameters(False), *m.buffers(False))}
        return len(devices) == 1 and backend == "native" and Values.watchable(modules)


class _Kept:
    """Packed weights, and the values that they were made from."""

    __slots__ = ("backend", "channels", "device", "dtype", "packed", "values")

    def __init__(self, layout: Layout, settings: Any, backend: str) -> None:
        weight = layout.primary.conv.weight
        # Before packing: a change in the meantime, by another thread, is then noticed.
        self.values = Values(layout.modules)
        self.packed = PackedGhost(layout.primary, layout.cheap, settings, backend)
        self.backend, self.dtype, self.device = backend, weight.dtype, weight.device
        self.channels = weight.size(1) * settings.groups


class Converted:
    """What a fused module knows of itself: where its branches are, and its packed weights.

    Attributes:
        layout, out_channels, settings: the Ghost module; layout None where it is none any more.
        reason: why it is none.
        counts: of the intrinsic maps and of the ghosts that out_channels is for.
    """

    counts: tuple[int, int] | None = None

    def __init__(self, module: nn.Module, layout: Layout, out_channels: int) -> None:
        self.names, self.counts = layout.names, _counts(layout.primary.conv, layout.cheap.conv)
        self.layout: Layout | None = layout
        self.out_channels, self.reason = out_channels, ""
        self.settings = settings_of(layout, out_channels)
        self.watch: Watch | None = Watch((module, *layout.modules), module)
        self.kept: _Kept | None = None

    def refresh(self, module: nn.Module) -> None:
        """Look at the module again, because something in it has changed."""
        self.kept = None
        modules = tuple(m for name in self.names for m in module._modules[name].modules())
        try:
            self.layout = read(module, self.names)
            self.out_channels = ghost(module, self.names)
            self.settings = settings_of(self.layout, self.out_channels)
            self.counts = _counts(self.layout.primary.conv, self.layout.cheap.conv)
            modules = self.layout.modules
            self.reason = ""
        except Refusal as refusal:
            self.layout, self.reason = None, str(refusal)
        self.watch = Watch((module, *modules), module)

    def watch_again(self, module: nn.Module) -> None:
        """After a copy: what was true of the original is true of it."""
        layout = self.layout
        self.watch = Watch((module,) if layout is None else (module, *layout.modules), module)

    def __getstate__(self) -> dict[str, Any]:
        # Copies carry neither packed weights, which would be those of another module, nor a watch.
        return {**self.__dict__, "kept": None, "watch": None}


def _counts(primary: nn.Conv2d, cheap: nn.Conv2d) -> tuple[int, int]:
    return primary.out_channels, cheap.out_channels


def _announce(kind: type, reason: str) -> None:
    if reason not in _announced:
        _announced.add(reason)
        warnings.warn(
            f"{kind.__name__} runs its own forward, unfused: {reason}. "
            "(Said once for each reason.)",
            UserWarning,
            stacklevel=5,
        )


class ConvertedGhost(OneOperator):
    """The forward of a fused module, to stand before its own class in the order of lookup."""

    _ghost_ops_base: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, Ho, Wo]."""
        if not torch.compiler.is_compiling():
            return self._ghost_eager(x)
        out = in_graph(self, x)
        return self._ghost_traced(x) if out is None else out

    def _ghost_eager(self, x: Tensor) -> Tensor:
        state: Converted = self.__dict__["_ghost_ops"]
        if torch.jit.is_tracing():
            _announce(self._ghost_ops_base, "torch.jit traces it")
            return super().forward(x)
        self._ghost_look(state)
        if state.layout is None:
            _announce(self._ghost_ops_base, state.reason)
            return super().forward(x)
        if not torch.is_grad_enabled():
            out = _from_packed(state, x)
            if out is not None:
                return out
        reason = _needs_layers(x, state.layout)
        if reason:
            _announce(self._ghost_ops_base, reason)
            return super().forward(x)
        return _run(x, state.layout, state.settings)

    def _ghost_look(self, state: Converted) -> None:
        """Bring the state up to date with the module."""
        if state.watch is None:
            state.watch_again(self)
        elif not state.watch.same():
            state.refresh(self)

    def _ghost_traced(self, x: Tensor) -> Tensor:
        """Without the operator, while a graph is traced."""
        state: Converted = self.__dict__["_ghost_ops"]
        layout = self._ghost_layout(state)
        if layout is None or _needs_layers(x, layout):
            return super().forward(x)
        return _run(x, layout, settings_of(layout, state.out_channels))

    def _ghost_layout(self, state: Converted) -> Layout | None:
        """The layout for a graph; None where the module is not what it was when it was fused."""
        if not torch.compiler.is_dynamo_compiling():
            # torch.export runs this code as it is, on stand-ins for the modules inside.
            current = state.watch is None or state.watch.same()
            return state.layout if current else None
        try:
            layout = read(self, state.names)  # so that the compiler guards all of it
        except Refusal:
            return None
        counts = _counts(layout.primary.conv, layout.cheap.conv)
        return layout if counts == state.counts else None

    def _ghost_packed(self, x: Tensor) -> Tensor | None:
        state: Converted = self.__dict__["_ghost_ops"]
        self._ghost_look(state)
        return None if state.layout is None else _from_packed(state, x)

    def _ghost_shape(self) -> OutputShape | None:
        state: Converted = self.__dict__["_ghost_ops"]
        primary, cheap = (first_conv(self._modules.get(name)) for name in state.names)
        if primary is None or cheap is None or _counts(primary, cheap) != state.counts:
            return None
        return ghost_shape(self, state.names[0], state.out_channels)

    def extra_repr(self) -> str:
        parts = (super().extra_repr(), "fused by ghost_ops")
        return ", ".join(part for part in parts if part)

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; forgets the packed weights."""
        self.__dict__["_ghost_ops"].kept = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__["_ghost_ops"].kept = None
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        return _rebuild, (ConvertedGhost, self._ghost_ops_base), dict(state)


def _rebuild(mixin: type, base: type[nn.Module]) -> nn.Module:
    kind = fused_class(mixin, base)
    return kind.__new__(kind)


def fused_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """The class derived from ``base`` whose forward is the mixin's. One for each base."""
    kind = _classes.get((mixin, base))
    if kind is None:
        attributes = {
            "__module__": base.__module__,
            "_ghost_ops_base": base,
            "__doc__": base.__doc__,
        }
        kind = _classes[mixin, base] = type(f"Fused{base.__name__}", (mixin, base), attributes)
    return kind


def _needs_layers(x: Tensor, layout: Layout) -> str:
    """Why the fused ops cannot compute the layout in the modes that it is in; empty if they can."""
    primary, cheap = layout.primary, layout.cheap
    batch_stats = uses_batch_stats(primary)
    if uses_batch_stats(cheap) != batch_stats:
        return "only one of its branches uses the batch's statistics"
    slopes = slopes_of(primary, cheap)
    if all(t is None for t in slopes):
        return ""
    norms = norms_of(primary, cheap, True)
    grad = needs_grad(x, primary.conv.weight, cheap.conv.weight, norms, slopes)
    return slopes_need_layers(batch_stats, grad)


def _run(x: Tensor, layout: Layout, settings: Any) -> Tensor:
    """The output by the fused ops, norms in the modes that they are in; differentiable."""
    primary, cheap = layout.primary, layout.cheap
    w1, w2 = primary.conv.weight, cheap.conv.weight
    norms, batch_stats = norms_of(primary, cheap, True), uses_batch_stats(primary)
    check(x, w1, w2, norms, settings, batch_stats)
    updates = running_update(primary.bn), running_update(cheap.bn)
    out = run(x, w1, w2, norms, settings, batch_stats, *updates, slopes_of(primary, cheap))
    if layout.gate is None:
        return out
    return out * gate_of(x, layout.gate, (out.size(2), out.size(3)))


def _from_packed(state: Converted, x: Tensor) -> Tensor | None:
    """The fused output, gated too, from packed weights, kept or new; None where these cannot be."""
    layout, settings = state.layout, state.settings
    assert layout is not None
    weight = layout.primary.conv._parameters.get("weight")
    if type(x) is not Tensor or weight is None or in_transform():
        return None
    to = autocast_dtype(x.device.type)
    if to is not None and x.dtype is not torch.float64:
        return None
    kept = state.kept
    if kept is None or not kept.values.same():
        backend = backend_for(x, layout.cheap.conv.kernel_size[0])
        if (
            uses_batch_stats(layout.primary)
            or uses_batch_stats(layout.cheap)
            or (backend == "eager" and x.dtype in LOW_PRECISION)
            or not Values.watchable(layout.modules)
            or any(bn is not None and bn.training for bn in (layout.primary.bn, layout.cheap.bn))
        ):
            return None
        norms = norms_of(layout.primary, layout.cheap, False)
        check(x, weight, layout.cheap.conv.weight, norms, settings, False)
        state.kept = kept = _Kept(layout, settings, backend)
    if x.dim() != 4 or x.dtype is not kept.dtype or x.size(1) != kept.channels or not x.numel():
        return None
    if x.device != kept.device:
        return None
    return kept.packed(dense(x), None, None if layout.gate is None else small_gate(x, layout.gate))
