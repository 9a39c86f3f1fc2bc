"""``State`` of a fused module: the record of its forward, the matched parts, the packed weights.

The state holds the ``Record`` of the forward, the parts that match it, and the watch over the
record. If a guard fails, a new state is made: from the old record if the record holds, else by
reading the forward again. Of an existing state only the packed weights are replaced. A state holds
no reference to its module. A replica of a module may contain the state of the original: the guards
fail for the replica, which then makes a new state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import cached_call
from .graph import OutputShape
from .guards import REQUESTED_BACKEND, Record, Refusal
from .read import Failed

# Counts calls of ``reset_cache``. Global, because an outer module may have packed the weights.
RESETS = {"count": 0}
_GUARDED_MODES = ((forward_ad.__dict__, "_current_level"), REQUESTED_BACKEND, (RESETS, "count"))
_GUARDS: tuple[cached_call.Guard, ...] = (
    (torch.is_grad_enabled, ()),
    (torch._C._are_functorch_transforms_active, ()),
    (torch._C._is_tracing, ()),
)


class Form(Protocol):
    """The match of a module's forward with a formula: paths of layers and numbers, no modules."""

    def bind(self, module: nn.Module) -> Parts:
        """The parts in ``module``. Raises ``Refusal`` if the fused ops cannot compute them.

        Dynamo can trace this.
        """
        ...

    def shape(self, module: nn.Module) -> OutputShape | None:
        """The present data that decide the output's shape; None if they are not known.

        Raises ``Refusal`` as ``bind``. Dynamo can trace this.
        """
        ...


class Parts(Protocol):
    """The layers of a fused module, and the ways to compute its output from them.

    Attributes:
        layers: modules with parameters whose computation the packed operator replaces.
        first: the convolution that takes x.
        dw_size: kernel size of the largest cheap convolution.
        alone: the packed operator calls no modules. Then, under autocast, x may be cast before it.
    """

    layers: tuple[nn.Module, ...]
    first: nn.Conv2d
    dw_size: int
    alone: bool

    def run(self, x: Tensor) -> Tensor | str:
        """The output, differentiable; or the reason for a fallback to the module's own forward.

        An empty reason gives no warning.
        """
        ...

    def why_not_packed(self) -> str:
        """Why the parts cannot be packed in their present modes; empty if they can."""
        ...

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        """An operator, and its arguments after x; x must be dense and fit."""
        ...

    def check(self, x: Tensor) -> None:
        """Raise the module's error for an x that does not fit."""
        ...

    def description(self) -> str:
        """The parts in words, for the report of ``fuse``."""
        ...


class State:
    """The result of reading a fused module, valid while its guards hold.

    Attributes:
        kind: the module's class.
        record: everything that its forward read.
        form, parts: the match of the forward, and the layers; parts is None if the fused ops cannot
            compute the module.
        reason: why the fused ops cannot compute the module; empty if they can.
        watch: over ``record``; None: the forward must be read again at every call.
        packed: the packed weights; None before the first call in inference.
        known: the last record and form that were found, for compiled graphs.

    Args:
        module: the ``Fused`` module to read.
        old: the module's last state; its record is used again if the record holds.
    """

    record: Record

    def __init__(self, module: Any, old: State | None = None) -> None:
        self.kind = type(module)
        self.form: Form | None = None
        self.parts: Parts | None = None
        self.reason = ""
        self.packed: Packed | None = None
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
        self.watch = self.record.watch(module)


class Packed:
    """Packed weights of a module, with the watch over their sources and the cached call.

    Attributes:
        backend, dtype, device, channels: what x must fit.
        watch: over the record, and the parameters, buffers and modes that were packed; None if they
            cannot be watched.
        operator, arguments: the packed operator, and its arguments after x.
        run: the ``run`` of the cached call; without a watch, a function that returns None.
    """

    def __init__(self, module: nn.Module, state: State, parts: Parts, backend: str) -> None:
        self.backend = backend
        first = parts.first.weight
        self.dtype, self.device = first.dtype, first.device
        self.channels = parts.first.in_channels
        # Keeps the memory alive, so that no other tensor can come to a watched address.
        self.alive = [
            t.detach()
            for layer in parts.layers
            for t in (*layer._parameters.values(), *layer._buffers.values())
            if t is not None
        ]
        # Made before packing, so that the watch sees a change by another thread during packing.
        self.watch = state.record.watch(module, parts.layers, _GUARDED_MODES)
        with torch.no_grad():
            self.operator, self.arguments = parts.pack(backend)
        self.run: Callable[[Any, dict], Tensor | None] = _never
        if self.watch is not None:
            guards = _GUARDS
            if first.device.type != "meta":  # autocast raises for the meta device
                guards += ((torch.is_autocast_enabled, (first.device.type,)),)
            self.run = cached_call.make_cached_call(
                watch=self.watch,
                guards=guards,
                tensor_type=Tensor,
                dtype=self.dtype,
                device=self.device,
                channels_last=torch.channels_last,
                channels=self.channels,
                operator=self.operator,
                arguments=self.arguments,
            ).run

    def is_current(self, module: nn.Module, backend: str) -> bool:
        """Whether packing again would give equal weights, for ``backend``."""
        watch = self.watch
        return backend == self.backend and watch is not None and watch.unchanged(module.__dict__)

    def fits(self, x: Tensor) -> bool:
        """Whether x is [N, channels, H, W], not empty, in the packed dtype and on the device."""
        return (
            x.dim() == 4
            and x.dtype is self.dtype
            and x.device == self.device
            and x.size(1) == self.channels
            and x.numel() > 0
        )


def _never(x: Any, own: dict) -> None:
    return None
