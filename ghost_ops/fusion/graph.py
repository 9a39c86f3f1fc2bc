"""Fused modules in compiled graphs: each is one operator in inference.

While ``torch.compile`` traces a fused module in eval mode without gradients, the module puts one
call of ``ghost_ops::fused_inference`` into the graph. When the graph runs, the operator runs the
module's eager path with its packed weights and guards, so it notices every change that eager code
notices.

The parameters and buffers are inputs of the operator. Therefore the compiler may treat the operator
as a function of its inputs and reorder it. If the graph passes other tensors than those of the
module (``functional_call``, or a parameter that the same graph changes), a copy of the module runs
with the passed tensors, unpacked.

The operator finds the module by a key, a tensor that is an input too. Therefore one graph serves
all modules of one structure, and neither a copied module nor a new state causes a recompilation.
"""

from __future__ import annotations

import copy
import itertools
import operator
import secrets
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..conventions import dense, memory_format
from ..modes import autocast_dtype
from ..sync import NORMS
from . import watch
from .guards import GLOBAL_HOOKS, HANDLE, Refusal, hooks_of

_NUMBERS = 8  # per convolution: kernel size, stride, padding and dilation, two each
# Keys start at a random number, so that a key of another process is no key of this process.
_keys = itertools.count(secrets.randbits(62))
_handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
_DEAD = (
    "ghost_ops::fused_inference: the fused module that this graph was compiled for does not exist "
    "any more. Compile the model that is in use."
)


class OutputShape(NamedTuple):
    """The numbers that determine the output's shape for a given x.

    Attributes:
        out_channels: channels of the output.
        convs: ``numbers_of`` each convolution that x passes through, in order.
    """

    out_channels: int
    convs: tuple[int, ...]

    def of(self, x: Tensor) -> tuple[int, int, int, int]:
        """[N, out_channels, Ho, Wo] for x [N, C, H, W]; the numbers may be symbols."""
        n, _, h, w = x.shape
        for i in range(0, len(self.convs), _NUMBERS):
            kh, kw, sh, sw, ph, pw, dh, dw = self.convs[i : i + _NUMBERS]
            h = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
            w = (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        return n, self.out_channels, h, w


def numbers_of(conv: nn.Conv2d, padding: tuple[int, int]) -> tuple[int, ...]:
    """The numbers of a convolution for ``OutputShape``."""
    return (*conv.kernel_size, *conv.stride, *padding, *conv.dilation)


class Handle:
    """A weak reference to a module, which the operator finds by the key.

    Attributes:
        key: [1], int64 on the CPU; an input of the operator.
    """

    def __init__(self, module: nn.Module) -> None:
        number = next(_keys)
        with torch.inference_mode(False):
            # Not 0-dimensional: the compiler may read such a tensor and make it a constant.
            self.key = torch.tensor([number], device="cpu")
        self._module = weakref.ref(module)
        self._known: _Known | None = None
        _handles[number] = self

    def __reduce__(self) -> Any:
        # ``Fused.__setstate__`` gives the copy of a module a new handle.
        return type(None), ()

    def module(self) -> nn.Module:
        """The module. Raises RuntimeError if it has been collected."""
        module = self._module()
        if module is None:
            raise RuntimeError(_DEAD)
        return module

    def forget(self) -> None:
        """Drop the references to the module's tensors."""
        self._known = None

    def has(self, module: nn.Module, tensors: list[Tensor]) -> bool:
        """Whether the module with all inner modules is in eval mode, and has these tensors."""
        known = self._known
        if known is None or not known.unchanged():
            self._known = known = _Known(module)
        if module.training or not known.evaluates or len(tensors) != len(known.tensors):
            return False
        pairs = tensors, known.tensors
        return all(map(operator.is_, *pairs)) or all(map(_is_alias, *pairs))


class _Known:
    """The tensors of a module and the modes of the modules inside it.

    Attributes:
        tensors: as ``tensors_of``.
        evaluates: all inner modules are in eval mode.
        unchanged: a function that returns whether ``tensors`` and ``evaluates`` are still valid.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = modules_in(module)
        dicts = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        # Not the module's own mode: a watch that holds the module's dictionary would be part of a
        # reference cycle with the module.
        modes = [(m.__dict__, "training") for m in modules[1:]]
        self.unchanged = watch.make_watch(tuple(dicts), tuple(modes)).unchanged
        self.evaluates = not any(m.training for m in modules[1:])
        self.tensors = tensors_of(modules)


def _is_alias(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same memory, shape, strides, dtype and device."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype is b.dtype
        and a.device == b.device
    )


def modules_in(module: nn.Module) -> list[nn.Module]:
    """The module and all inner modules; a module with several names occurs several times.

    Dynamo makes half as many guards for this function as for ``module.modules()``.
    """
    found = [module]
    for child in module._modules.values():
        if child is not None:
            found += modules_in(child)
    return found


def tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, except ``num_batches_tracked``, which inference does not read."""
    return [
        t
        for m in modules
        for tensors in (m._parameters, m._buffers)
        for name, t in tensors.items()
        if name != "num_batches_tracked" and t is not None
    ]


def call(module: Any, x: Tensor, form: Any) -> Tensor | None:
    """Add a call of the operator to the traced graph. Returns the output, or None if not possible.

    The compiler guards everything that this function reads, and compiles again after a change.
    """
    handle = module.__dict__.get(HANDLE)
    if (
        handle is None
        or torch.is_grad_enabled()
        or torch.compiler.is_exporting()
        or type(x) is not Tensor
        or x.dim() != 4
        or autocast_dtype(x.device.type) is not None
        or _in_transform()
    ):
        return None
    backend = backends.select(x.device.type, x.dtype)
    if backend not in module._ghost_backends or backend == "eager":
        return None
    shape, modules = _shape_of(module, form), modules_in(module)
    if shape is None or not _holds(modules, x):
        return None
    return torch.ops.ghost_ops.fused_inference(
        dense(x), tensors_of(modules), handle.key, shape.out_channels, shape.convs
    )


def _shape_of(module: Any, form: Any) -> OutputShape | None:
    try:
        return form.shape(module)
    except Refusal:
        return None


def _in_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


# Evaluated while a graph is traced. The compiler guards torch.func's transforms itself.
_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _holds(modules: list[nn.Module], x: Tensor) -> bool:
    """Whether the operator may run with packed weights for x and these modules."""
    for hooks in GLOBAL_HOOKS:
        if len(hooks):
            return False
    for m in modules:
        if m.training:
            return False
        for hooks in hooks_of(m):
            if len(hooks):  # the compiler cannot see the effects of a hook inside the operator
                return False
        if isinstance(m, nn.Conv2d):
            # A weight computed by a parametrisation or a hook is not in ``_parameters``.
            if "weight" not in m._parameters or m.weight.dtype is not x.dtype:
                return False
        elif isinstance(m, NORMS) and m._buffers.get("running_mean") is None:
            return False
    return True


def _fake(x: Tensor, tensors: Any, key: Tensor, out_channels: int, convs: Any) -> Tensor:
    shape = OutputShape(out_channels, tuple(convs)).of(x)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@torch.no_grad()
def _run(x: Tensor, tensors: list[Tensor], key: Tensor, out_channels: int, convs: Any) -> Tensor:
    handle = _handles.get(key.item())  # type: ignore[arg-type]
    if handle is None:
        raise RuntimeError(_DEAD)
    module = handle.module()
    out = _run_module(handle, module, x, tensors)
    shape = OutputShape(out_channels, tuple(convs)).of(x)
    if out.shape != shape or out.dtype is not x.dtype:
        raise RuntimeError(
            f"{type(module).__name__} gave {list(out.shape)} in {out.dtype} where the compiled "
            f"graph has {list(shape)} in {x.dtype}: it was changed after it was compiled, in a way "
            "that the compiler does not see. torch.compiler.reset() lets it compile again."
        )
    return out


def _run_module(handle: Handle, module: Any, x: Tensor, tensors: list[Tensor]) -> Tensor:
    """The output of a ``Fused`` module with these tensors."""
    if handle.has(module, tensors):
        state = module._ghost_state()
        if state.parts is not None and state.form.shape(module) is not None:
            out = module._ghost_infer(state, x)
            if out is not None:
                return out
    else:
        module = _with_tensors(module, tensors)
    out = module._ghost_eager(x)
    if isinstance(out, str):
        out = module._ghost_plain(x)
    # An unfused output may be a view, have another layout, or be stored by a hook.
    return out.clone(memory_format=memory_format(x))


def _with_tensors(module: nn.Module, tensors: list[Tensor]) -> nn.Module:
    """A copy of the module with these tensors instead of its own, in eval mode."""
    own = tensors_of(modules_in(module))
    if len(own) != len(tensors):
        raise RuntimeError(
            f"{type(module).__name__} has {len(own)} parameters and buffers where the compiled "
            f"graph has {len(tensors)}"
        )
    memo: dict[int, Any] = {id(old): new for old, new in zip(own, tensors, strict=True)}
    return copy.deepcopy(module, memo).eval()


_library = torch.library.Library("ghost_ops", "FRAGMENT")
# cudagraph_unsafe: a captured CUDA graph would keep the packed weights of its capture.
_tags = [torch.Tag.pt2_compliant_tag, *filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)])]
_library.define(
    "fused_inference(Tensor x, Tensor[] tensors, Tensor key, int out_channels, int[] convs) "
    "-> Tensor",
    tags=tuple(_tags),
)
_library.impl("fused_inference", _run, "CompositeExplicitAutograd")
torch.library.register_fake("ghost_ops::fused_inference", _fake, lib=_library)
