"""The operators ``torch.ops.ghost_ops.*``: schemas, fake and eager implementations.

A schema is written here and nowhere else. The native library, when it is loaded, adds kernels for
its devices; a device that has none runs ``eager_ops``. None of the operators is differentiable
itself: ``functional.py`` has the autograd function over them.

``torch.ops.ghost_ops_triton.*`` are the same operators from the Triton backend, under names of
their own: either can then be asked for where both can run.

Dtypes: x, w1 and w2 are one of float32, float64, bfloat16 and float16; gamma, beta, mean and var
that dtype or float32 (float64 for float64). Layouts: x and residual dense, NCHW or channels_last;
weights and vectors contiguous; grad_out any. Activations are the codes of ``activations.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.triton.layout import packed_numel as triton_packed_numel
from . import eager as eager_ops
from .eager import NEEDS, compute_dtype, memory_format, packed_offsets

SCHEMAS = (
    "ghost_pack(Tensor? w1, Tensor? gamma1, Tensor? beta1, Tensor? mean1, Tensor? var1, "
    "float eps1, Tensor w2, Tensor? gamma2, Tensor? beta2, Tensor? mean2, Tensor? var2, "
    "float eps2, Tensor? prelu1=None, Tensor? prelu2=None) -> Tensor",
    "ghost_apply(Tensor x, Tensor packed, Tensor? residual, Tensor? gate, int intrinsic, "
    "int out_channels, int ratio, int dw_size, int stride, int act1, float slope1, int act2, "
    "float slope2, bool has_primary) -> Tensor",
    "ghost_primary_stats(Tensor x, Tensor? w1, int stride) -> (Tensor mean, Tensor var)",
    "ghost_cheap_stats(Tensor x, Tensor packed, int intrinsic, int ratio, int dw_size, "
    "int stride, int act1, float slope1, bool has_primary) -> (Tensor mean, Tensor var)",
    "ghost_train_forward(Tensor x, Tensor? w1, Tensor? gamma1, Tensor? beta1, Tensor? mean1, "
    "Tensor? var1, float eps1, Tensor? prelu1, Tensor w2, Tensor? gamma2, Tensor? beta2, "
    "Tensor? mean2, Tensor? var2, float eps2, Tensor? prelu2, int out_channels, int stride, "
    "int act1, float slope1, int act2, float slope2, bool keep_u) "
    "-> (Tensor out, Tensor mean1, Tensor var1, Tensor mean2, Tensor var2, Tensor u)",
    "ghost_backward(Tensor grad_out, Tensor x, Tensor? u, Tensor? w1, Tensor? gamma1, "
    "Tensor? beta1, Tensor mean1, Tensor var1, float eps1, Tensor? prelu1, Tensor? means1, "
    "Tensor w2, Tensor? gamma2, Tensor? beta2, Tensor mean2, Tensor var2, float eps2, "
    "Tensor? prelu2, Tensor? means2, int stride, int act1, float slope1, int act2, float slope2, "
    "bool batch_stats1, bool batch_stats2, int needs) "
    "-> (Tensor dx, Tensor dw1, Tensor dgamma1, Tensor dbeta1, Tensor dprelu1, Tensor dw2, "
    "Tensor dgamma2, Tensor dbeta2, Tensor dprelu2)",
    "ghost_update_running_(Tensor(a!)? running_mean1, Tensor(b!)? running_var1, "
    "Tensor(c!)? batches1, Tensor mean1, Tensor var1, float? momentum1, "
    "Tensor(d!)? running_mean2, Tensor(e!)? running_var2, Tensor(f!)? batches2, Tensor mean2, "
    "Tensor var2, float? momentum2, int count) -> ()",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)


def packed_numel(
    channels: int, m: int, g: int, d: int, has_primary: bool, has_pairs: bool = False
) -> int:
    """Number of elements of a packed tensor without slopes, for eager and native backends.

    has_pairs: see ``packs_pairs``.
    """
    numel, rows = packed_offsets(channels, m, g, d, has_primary)[-1], -(-m // 16) * 16
    return -(-numel // 16) * 16 + rows * channels // 2 + rows if has_pairs else numel


def packs_pairs(w1: Tensor | None, w2: Tensor) -> bool:
    """Whether the CPU's ``ghost_pack`` adds bfloat16 weights, for a product on AMX tiles."""
    return (
        w1 is not None
        and (w1.device.type, w1.dtype) == ("cpu", torch.bfloat16)
        and w2.dtype is not torch.float64
        and w1.size(1) % 2 == 0
        and backends.native.load()
        and backends.native.library().machine(1)["amx"]
    )


def _numel(*given: Tensor | None) -> int:
    return sum(t.numel() for t in given if t is not None)


def _image(x: Tensor, channels: int, stride: int) -> Tensor:
    """An uninitialised [N, channels, Ho, Wo] in the dtype and memory format of x."""
    n, _, h, w = x.shape
    shape = (n, channels, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _vectors(like: Tensor, size: int, count: int) -> tuple[Tensor, ...]:
    """``count`` vectors of the compute dtype."""
    dtype = compute_dtype(like.dtype)
    return tuple(like.new_empty(size, dtype=dtype) for _ in range(count))


def _fake_pack(
    w1, gamma1, beta1, mean1, var1, eps1, w2, gamma2, beta2, mean2, var2, eps2, prelu1=None,
    prelu2=None,
):  # fmt: skip
    m = eager_ops.intrinsic_count(w1, gamma1, beta1, mean1, var1)
    channels = 0 if w1 is None else w1.size(1)
    sizes = channels, m, w2.size(0), w2.size(-1)
    numel = packed_numel(*sizes, w1 is not None, packs_pairs(w1, w2))
    numel += _numel(prelu1, prelu2)
    return w2.new_empty(numel, dtype=compute_dtype(w2.dtype))


def _fake_triton_pack(
    w1, gamma1, beta1, mean1, var1, eps1, w2, gamma2, beta2, mean2, var2, eps2, prelu1=None,
    prelu2=None,
):  # fmt: skip
    m = eager_ops.intrinsic_count(w1, gamma1, beta1, mean1, var1)
    channels = 0 if w1 is None else w1.size(1)
    numel = triton_packed_numel(channels, m, w2.size(0), w2.size(-1), w2.dtype, w1 is not None)
    numel += _numel(prelu1, prelu2)
    return w2.new_empty(numel, dtype=torch.float32)


def _fake_apply(
    x, packed, residual, gate, intrinsic, out_channels, ratio, dw_size, stride, act1, slope1,
    act2, slope2, has_primary,
):  # fmt: skip
    return _image(x, out_channels, stride if has_primary else 1)


def _fake_primary_stats(x, w1, stride):
    return _vectors(x, x.size(1) if w1 is None else w1.size(0), 2)


def _fake_cheap_stats(x, packed, intrinsic, ratio, dw_size, stride, act1, slope1, has_primary):
    return _vectors(packed, intrinsic * (ratio - 1), 2)


def _fake_train_forward(
    x, w1, gamma1, beta1, mean1, var1, eps1, prelu1, w2, gamma2, beta2, mean2, var2, eps2, prelu2,
    out_channels, stride, act1, slope1, act2, slope2, keep_u,
):  # fmt: skip
    m, g = (x.size(1) if w1 is None else w1.size(0)), w2.size(0)
    stride = 1 if w1 is None else stride
    u = _image(x, m, stride) if keep_u else x.new_empty(0)
    first = _vectors(x, m if mean1 is None else 0, 2)
    return _image(x, out_channels, stride), *first, *_vectors(x, g if mean2 is None else 0, 2), u


def _fake_backward(
    grad_out, x, u, w1, gamma1, beta1, mean1, var1, eps1, prelu1, means1, w2, gamma2, beta2, mean2,
    var2, eps2, prelu2, means2, stride, act1, slope1, act2, slope2, batch_stats1, batch_stats2,
    needs,
):  # fmt: skip
    m, g = mean1.size(0), w2.size(0)
    n, nothing = NEEDS, x.new_empty(0)
    dx = torch.empty_like(x, memory_format=memory_format(x)) if needs & n.DX else nothing
    dw1 = w1.new_empty(w1.shape) if w1 is not None and needs & n.DW1 else x.new_empty(0)
    dw2 = w2.new_empty(w2.shape) if needs & n.DW2 else x.new_empty(0)
    norm1 = _vectors(x, m if needs & n.NORM1 else 0, 2)
    norm2 = _vectors(x, g if needs & n.NORM2 else 0, 2)
    slopes1 = _vectors(x, m if needs & n.PRELU1 and prelu1 is not None else 0, 1)
    slopes2 = _vectors(x, g if needs & n.PRELU2 and prelu2 is not None else 0, 1)
    return dx, dw1, *norm1, *slopes1, dw2, *norm2, *slopes2


def _fake_update_running_(
    running_mean1, running_var1, batches1, mean1, var1, momentum1,
    running_mean2, running_var2, batches2, mean2, var2, momentum2, count,
):  # fmt: skip
    return None


_FAKES = (
    _fake_pack,
    _fake_apply,
    _fake_primary_stats,
    _fake_cheap_stats,
    _fake_train_forward,
    _fake_backward,
    _fake_update_running_,
)


def _triton(name: str) -> Callable[..., Any]:
    """An operator of the Triton backend, which is imported at the first call."""
    module = "backward" if name == "ghost_backward" else "forward"

    def call(*arguments: Any) -> Any:
        functions = importlib.import_module(f"ghost_ops.backends.triton.{module}")
        return getattr(functions, name)(*arguments)

    return call


def _define(
    namespace: str, implementation: Callable[[str], Callable[..., Any]], fake_pack: Callable
) -> torch.library.Library:
    """The operators under ``torch.ops.<namespace>``, on every device."""
    library = torch.library.Library(namespace, "DEF")
    for schema, name, fake in zip(SCHEMAS, NAMES, (fake_pack, *_FAKES[1:]), strict=True):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, torch.no_grad()(implementation(name)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


# Kept: a library that is collected takes its operators with it.
_library = _define("ghost_ops", lambda name: getattr(eager_ops, name), _fake_pack)
_triton_library = _define("ghost_ops_triton", _triton, _fake_triton_pack)


def allow_tf32() -> bool:
    """Whether float32 convolutions may run in TF32, the switch of torch that is in force."""
    backends = torch.backends
    for switch in (getattr(backends.cudnn, "conv", None), backends.cudnn, backends):
        precision = getattr(switch, "fp32_precision", "none")
        if precision != "none":
            return precision == "tf32"
    return False


# The CUDA library asks for it, because the stable ABI does not tell.
_library.define("_allow_tf32() -> bool")
_library.impl("_allow_tf32", allow_tf32, "CompositeImplicitAutograd")


class native:
    """The operators through the dispatcher, under the names that ``eager_ops`` has them.

    Bound to their overload once: looking it up costs more than a small call.
    """

    ghost_pack = torch.ops.ghost_ops.ghost_pack.default
    ghost_apply = torch.ops.ghost_ops.ghost_apply.default
    ghost_primary_stats = torch.ops.ghost_ops.ghost_primary_stats.default
    ghost_cheap_stats = torch.ops.ghost_ops.ghost_cheap_stats.default
    ghost_train_forward = torch.ops.ghost_ops.ghost_train_forward.default
    ghost_backward = torch.ops.ghost_ops.ghost_backward.default
    ghost_update_running_ = torch.ops.ghost_ops.ghost_update_running_.default


class triton:
    """The same of the Triton backend."""

    ghost_pack = torch.ops.ghost_ops_triton.ghost_pack.default
    ghost_apply = torch.ops.ghost_ops_triton.ghost_apply.default
    ghost_primary_stats = torch.ops.ghost_ops_triton.ghost_primary_stats.default
    ghost_cheap_stats = torch.ops.ghost_ops_triton.ghost_cheap_stats.default
    ghost_train_forward = torch.ops.ghost_ops_triton.ghost_train_forward.default
    ghost_backward = torch.ops.ghost_ops_triton.ghost_backward.default
    ghost_update_running_ = torch.ops.ghost_ops_triton.ghost_update_running_.default
