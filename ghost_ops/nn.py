"""``FusedGhostModule``: the reference Ghost module, computed by the fused ops."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import activations, backends, kept_call, watch
from .activations import ActivationSpec
from .autograd import (
    LOW_PRECISION,
    RunningUpdate,
    apply_arguments,
    autocast_dtype,
    backend_for,
    dense,
    direct,
    in_transform,
    is_fused_primary,
    library_conv,
    needs_grad,
    ops_named,
    pack,
    run,
    slopes_need_layers,
)
from .compiled import OneOperator, OutputShape, attach, ghost_shape, in_graph
from .functional import check
from .reference import Norms, _build_children, _checked_arguments, composed_forward
from .structure import Structure, inspect

_announced: set[str] = set()


def _announce_unfused(reason: str) -> None:
    if reason not in _announced:
        _announced.add(reason)
        warnings.warn(
            f"FusedGhostModule runs unfused, as its children one after the other: {reason}. "
            "(Said once for each reason.)",
            UserWarning,
            stacklevel=4,
        )


# What else has to be as it was, and what has to be answered with no, for a module to run at once.
_STATE = ((forward_ad.__dict__, "_current_level"), (backends.__dict__, "_requested"))
_QUESTIONS: tuple[kept_call.Question, ...] = (
    (torch.is_grad_enabled, ()),
    (torch._C._are_functorch_transforms_active, ()),
    (torch._C._is_tracing, ()),
)


class _Packed:
    """Packed weights of a module in eval mode, and the watch over all that they were made from.

    PyTorch's batch norm does not raise the version of the running statistics that it updates; the
    count of batches is among the tensors because it tells.
    """

    __slots__ = ("alive", "arguments", "backend", "library_w1", "operator", "run", "settings",
                 "unchanged")  # fmt: skip

    def __init__(
        self,
        module: nn.Module,
        structure: Structure,
        places: tuple[dict, ...],
        tensors: tuple[Tensor, ...],
        backend: str,
    ) -> None:
        conv1, conv2 = structure.conv1, structure.conv2
        w1, w2 = conv1.weight.detach(), conv2.weight.detach()
        self.settings = structure.settings
        fused = is_fused_primary(w1, self.settings)
        norms = Norms(*_norm_tensors(structure.bn1), *_norm_tensors(structure.bn2))
        functions = ops_named(backend)
        self.backend = backend
        # Keeps the memory, so that nothing else comes to a watched address.
        self.alive = [t.detach() for t in tensors]
        # Before packing: a change in the meantime, by another thread, is then noticed.
        dicts, items, absent = structure.watched(module)
        modes = tuple((bn.__dict__, "training") for bn in (structure.bn1, structure.bn2))
        watched = watch.make((*dicts, *places), (*items, *modes, *_STATE), absent, tensors)
        self.unchanged = watched.unchanged
        self.library_w1 = None if fused else w1
        with torch.no_grad():
            weight = w1 if fused else None
            packed = pack(functions, weight, w2, norms, self.settings, structure.slopes())
        self.operator = direct(functions.ghost_apply)
        numbers = apply_arguments(w1.size(0), w2, self.settings, fused)
        self.arguments = (packed, None, None, *numbers)
        questions = _QUESTIONS
        if w1.device.type != "meta":  # which autocast does not know, and raises
            questions += ((torch.is_autocast_enabled, (w1.device.type,)),)
        self.run = kept_call.make(
            watch=watched,
            questions=questions,
            tensor_type=Tensor,
            dtype=w1.dtype,
            device=w1.device,
            channels_last=torch.channels_last,
            channels=w1.size(1) * self.settings.groups,
            out_channels=self.settings.out_channels,
            operator=self.operator if fused else self,
            arguments=self.arguments if fused else (),
        ).run

    def is_current(self, module: nn.Module) -> bool:
        """Whether packing now would give the same."""
        return module.oup == self.settings.out_channels and self.unchanged()

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output for an x that is dense and fits."""
        if self.library_w1 is not None:
            x = dense(library_conv(x, self.library_w1, self.settings))
        return self.operator(x, *self.arguments)


class FusedGhostModule(OneOperator):
    """Drop-in for the reference ``GhostModule``: same numbers, in fewer passes over memory.

    Formula and shapes: ``ghost_ops.reference``. Constructor, children (``primary_conv`` and
    ``cheap_operation``, each convolution, batch norm, activation), state_dict keys, initial
    values from a given seed and batch norm behaviour are the reference's; everything is read from
    the children at each call, so they can be changed as those of the reference can.

    A PReLU (one slope, or one a channel) is fused in eval mode without gradients; where gradients
    are recorded, its module runs its children one after the other.

    Children that the fused ops cannot stand for (hooks, another layer type, a bias) are run one
    after the other, and a warning says so once. Hooks of weight norm, spectral norm and pruning
    are known and stay fused.

    In eval mode without gradients the weights with batch norm folded in are kept from call to
    call, and made anew when a parameter, buffer or setting has changed. Writing into
    ``parameter.data`` in place is the one change that PyTorch does not record: call ``eval()``,
    ``train()`` or ``reset_cache()`` after it. In a compiled graph the module is then one operator,
    with the same weights and the same checks (``compiled``).

    Args:
        inp, oup, kernel_size, ratio, dw_size, stride, relu: as ``reference.GhostModule``.
        activation: a name of ``ghost_ops.activations`` or a module (copied), in place of relu;
            ``"prelu"`` has a slope for every channel, as ``nn.PReLU(channels)``.
        cheap_activation: that of the cheap branch; as the primary one if None.
        device, dtype: of the parameters and buffers.

    Input [N, inp, H, W] in the dtype of the weights (under autocast, any floating-point dtype);
    float32, float64, bfloat16 or float16; NCHW or channels_last, and the output has the layout
    of the input.

    Raises:
        TypeError, ValueError: as the reference; ValueError for an unknown activation.
        In forward: as ``functional.ghost_module``.

    Source: GhostNet, CVPR 2020, section 3.1.
    """

    _packed: _Packed | None = None
    _structure: Structure | None = None

    def __init__(
        self,
        inp: int,
        oup: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        relu: bool = True,
        *,
        activation: ActivationSpec | None = None,
        cheap_activation: ActivationSpec | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        numbers = _checked_arguments(inp, oup, kernel_size, ratio, dw_size, stride)
        first = ("relu" if relu else "none") if activation is None else activation
        second = first if cheap_activation is None else cheap_activation
        m = math.ceil(numbers[1] / numbers[3])
        g = m * (numbers[3] - 1)
        act1 = activations.make_module(first, "activation", m, device, dtype)
        act2 = activations.make_module(second, "cheap_activation", g, device, dtype)
        _build_children(self, *numbers, act1, act2, device, dtype)
        attach(self)

    @classmethod
    def from_reference(cls, module: nn.Module) -> FusedGhostModule:
        """A fused module over the very children of ``module``: shared parameters, buffers, hooks.

        Args:
            module: a ``reference.GhostModule``, or any module with its attributes ``oup``,
                ``primary_conv`` and ``cheap_operation`` and its forward.

        Raises:
            TypeError: ``module`` lacks one of these.
        """
        for name in ("oup", "primary_conv", "cheap_operation"):
            if not isinstance(module, nn.Module) or not hasattr(module, name):
                raise TypeError(
                    "from_reference takes a Ghost module with oup, primary_conv and "
                    f"cheap_operation, got {type(module).__name__} without {name}"
                )
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        fused.__dict__.update(module.__dict__)
        # Shared until one of the two has a child replaced.
        fused._modules = module._modules.copy()
        fused.reset_cache()
        attach(fused)
        return fused

    def forward(self, x: Tensor) -> Tensor:
        """[N, inp, H, W] -> [N, oup, Ho, Wo]."""
        if torch.compiler.is_compiling():
            out = in_graph(self, x)
            return self._read_and_run(x) if out is None else out
        kept = self._packed
        if kept is not None:
            out = kept.run(x, self.oup)
            if out is not None:
                return out
        return self._read_and_run(x)

    def _ghost_packed(self, x: Tensor) -> Tensor | None:
        return None if self._packed is None else self._packed.run(x, self.oup)

    def _ghost_eager(self, x: Tensor) -> Tensor:
        return self._read_and_run(x)

    def _ghost_shape(self) -> OutputShape | None:
        return ghost_shape(self, "primary_conv", self.oup)

    def _read_and_run(self, x: Tensor) -> Tensor:
        """Forward on whatever the children are now."""
        structure = self._read_structure()
        if isinstance(structure, str):
            return self._unfused(x, structure)
        structure.run_parameter_hooks()
        bn1, bn2 = structure.bn1, structure.bn2
        w1, w2 = structure.conv1.weight, structure.conv2.weight
        batch_stats = _uses_batch_stats(bn1)
        if w2.size(0) and _uses_batch_stats(bn2) != batch_stats:
            return self._unfused(x, "only one of its batch norms uses the batch's statistics")
        norms = Norms(*_norm_tensors(bn1), *_norm_tensors(bn2))
        settings = structure.settings
        check(x, w1, w2, norms, settings, batch_stats)
        slopes = structure.slopes()
        if structure.has_slopes:
            grad = needs_grad(x, w1, w2, norms, slopes)
            if reason := slopes_need_layers(batch_stats, grad):
                return self._unfused(x, reason)
        if not batch_stats and not torch.compiler.is_compiling():
            out = self._infer(x, structure, w1, w2, norms)
            if out is not None:
                return out
        updates = running_update(bn1), running_update(bn2)
        return run(x, w1, w2, norms, settings, batch_stats, *updates, slopes)

    def _infer(
        self, x: Tensor, structure: Structure, w1: Tensor, w2: Tensor, norms: Norms
    ) -> Tensor | None:
        """Forward from packed weights, kept or new; None where they cannot be kept."""
        to = autocast_dtype(x.device.type)
        data = x if to is None or x.dtype is torch.float64 else x.to(to)
        backend = backend_for(data, w2.size(-1))
        if (
            type(x) is not Tensor
            or structure.parameter_hooks
            or in_transform()
            or needs_grad(x, w1, w2, norms)
            or (backend == "eager" and data.dtype in LOW_PRECISION)
        ):
            return None
        kept = self._packed
        if kept is None or kept.backend != backend or not kept.is_current(self):
            places = _places(structure)
            tensors = tuple(t for values in places for t in values.values() if t is not None)
            if not _watchable(structure, tensors):
                return None
            self._packed = kept = _Packed(self, structure, places, tensors, backend)
        return kept(dense(data))

    def _read_structure(self) -> Structure | str:
        if torch.compiler.is_compiling():
            return inspect(self)
        if torch.jit.is_tracing():
            return "torch.jit traces it, and cannot trace the autograd function"
        kept = self._structure
        if kept is not None and kept.is_current(self):
            return kept
        found = inspect(self)
        keep = isinstance(found, Structure) and not found.parameter_hooks
        self._structure = found if keep else None
        return found

    def _unfused(self, x: Tensor, reason: str) -> Tensor:
        if not torch.compiler.is_compiling():
            _announce_unfused(reason)
        return composed_forward(self, x)

    def reset_cache(self) -> None:
        """Forget the packed weights; the next call makes them anew."""
        self._packed = self._structure = None

    def train(self, mode: bool = True) -> FusedGhostModule:
        """As ``nn.Module.train``."""
        self.reset_cache()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> FusedGhostModule:
        self.reset_cache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry no packed weights: they would be those of another module.
        state = self.__dict__.copy()
        state.pop("_packed", None)
        state.pop("_structure", None)
        state.pop("_ghost_handle", None)
        return state

    def extra_repr(self) -> str:
        return f"oup={self.oup}, backend={self._backend_name()}"

    def _backend_name(self) -> str:
        """What will run, or why nothing fused will; without warning or raising."""
        try:
            found = inspect(self)
        except RuntimeError as error:
            return f"none: {error}"
        if isinstance(found, str):
            return f"none, unfused: {found}"
        weight = found.conv1.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        rows = backends.status((weight.device.type,))
        return next((row.backend for row in rows if row.dtype == dtype), "none")


def _uses_batch_stats(bn: nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _norm_tensors(bn: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """gamma, beta, running mean and var; without the latter where the norm would not use them."""
    parameters, buffers = bn._parameters, bn._buffers
    if "weight" in parameters and "bias" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:  # computed, by a parametrisation or a hook
        weight, bias = bn.weight, bn.bias
    if bn.training and not bn.track_running_stats:
        return weight, bias, None, None
    return weight, bias, buffers["running_mean"], buffers["running_var"]


def running_update(bn: nn.BatchNorm2d | None) -> RunningUpdate:
    """What a forward in bn's mode does to its running statistics."""
    if bn is None:
        return RunningUpdate()
    counts = bn.training and bn.track_running_stats
    batches = bn.num_batches_tracked if counts else None
    if bn.momentum is None and batches is None:
        return RunningUpdate()
    return RunningUpdate(bn.momentum, batches)


def _places(structure: Structure) -> tuple[dict, ...]:
    """The dictionaries that a module's parameters and running statistics are in."""
    conv1, conv2, bn1, bn2 = structure.conv1, structure.conv2, structure.bn1, structure.bn2
    return (
        conv1._parameters,
        conv2._parameters,
        bn1._parameters,
        bn2._parameters,
        bn1._buffers,
        bn2._buffers,
        *(act._parameters for act in structure.prelus),
    )


def _watchable(structure: Structure, tensors: tuple[Tensor, ...]) -> bool:
    """Whether no change of the parameters can go unnoticed.

    Computed parameters are in no dictionary, inference tensors have no version, and tensor
    subclasses may have no address.
    """
    return (
        all(
            "weight" in layer._parameters
            for layer in (structure.conv1, structure.conv2, *structure.prelus)
        )
        and all(
            {"weight", "bias"} <= bn._parameters.keys() for bn in (structure.bn1, structure.bn2)
        )
        and all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors)
    )
