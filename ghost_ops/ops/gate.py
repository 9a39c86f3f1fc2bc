"""Squeeze-and-excitation: x times its gate, the gate alone, and the two passes of its gradient.

``squeeze_excite_`` multiplies x in place, with native kernels on the CPU. On CUDA
``squeeze_excite_gate`` computes the gate only, and ``ghost_apply_gated`` multiplies x by the gate
while it reads x. ``plane_affine`` and ``plane_dot`` run in training on the CPU, for contiguous
(NCHW) tensors only.
Parameters are in the compute dtype; the two matrices of a gate on CUDA have the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import activations
from ..activations import hard_sigmoid
from ..conventions import compute_dtype
from .define import native, operator
from .select import on_gpu, runs_native

HARD_SIGMOID, SIGMOID = range(2)  # codes of the gate's function


def pack_gate(
    w_reduce: Tensor, b_reduce: Tensor, w_expand: Tensor, b_expand: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The packed tensors of a gate, for ``squeeze_excite_`` and ``squeeze_excite_gate``.

    Args:
        w_reduce: [R, C, 1, 1]. b_reduce: [R]. w_expand: [C, R, 1, 1]. b_expand: [C].

    Returns:
        [R, C], [R], [R, C] (transposed) and [C].
    """
    wide = compute_dtype(w_reduce.dtype)
    # On a GPU the bytes of the two matrices limit the speed, so they keep their dtype.
    narrow = w_reduce.dtype if on_gpu(w_reduce) else wide
    reduce, expand = (
        t.detach().to(narrow).contiguous() for t in (w_reduce.flatten(1), w_expand.flatten(1).t())
    )
    return reduce, b_reduce.detach().to(wide), expand, b_expand.detach().to(wide)


@operator(
    "plane_affine(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    lambda a: a.x.new_empty(a.x.shape),
)
def eager_plane_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out = torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None])
    return out.to(x.dtype).contiguous()


@operator(
    "plane_dot(Tensor x, Tensor other) -> Tensor",
    lambda a: a.x.new_empty(a.x.shape[:2], dtype=compute_dtype(a.x.dtype)),
)
def eager_plane_dot(x: Tensor, other: Tensor) -> Tensor:
    wide = compute_dtype(x.dtype)
    return (x.to(wide) * other.to(wide)).sum((2, 3))


plane_affine, plane_dot = native.plane_affine, native.plane_dot


@operator(
    "squeeze_excite_(Tensor(a!) x, Tensor w_reduce, Tensor b_reduce, Tensor w_expand, "
    "Tensor b_expand, int act, float slope, int gate) -> ()",
    lambda a: None,
)
def eager_squeeze_excite_(
    x: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int,
    slope: float,
    gate: int,
) -> None:
    parameters = w_reduce, b_reduce, w_expand, b_expand
    x.mul_(eager_squeeze_excite_gate(x, None, *parameters, act, slope, gate)[:, :, None, None])


@operator(
    "squeeze_excite_gate(Tensor x, Tensor? sums, Tensor w_reduce, Tensor b_reduce, "
    "Tensor w_expand, Tensor b_expand, int act, float slope, int gate) -> Tensor",
    lambda a: a.x.new_empty(a.x.shape[:2]),
)
def eager_squeeze_excite_gate(
    x: Tensor,
    sums: Tensor | None,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int,
    slope: float,
    gate: int,
) -> Tensor:
    wide = b_reduce.dtype
    s = x.mean((2, 3), dtype=wide) if sums is None else sums.sum(1) / (x.size(2) * x.size(3))
    s = activations.apply(torch.addmm(b_reduce, s, w_reduce.to(wide).t()), act, slope)
    s = torch.addmm(b_expand, s, w_expand.to(wide))
    s = hard_sigmoid(s) if gate == HARD_SIGMOID else torch.sigmoid(s)
    return s.to(x.dtype)


def squeeze_excite_(
    x: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int = activations.RELU,
    slope: float = activations.DEFAULT_SLOPE,
    gate: int = HARD_SIGMOID,
) -> None:
    """x *= gate(act(mean of x * w_reduce + b_reduce) * w_expand + b_expand), in place.

    Args:
        x: [N, C, H, W], dense, NCHW or channels_last.
        w_reduce, b_reduce, w_expand, b_expand: as ``pack_gate`` gives them.
        act, slope: a code of ``activations``. gate: HARD_SIGMOID or SIGMOID.

    Raises:
        RuntimeError: a shape or dtype that does not fit.

    Source: Hu et al., arXiv:1709.01507.
    """
    arguments = w_reduce, b_reduce, w_expand, b_expand, act, slope, gate
    if on_gpu(x):
        x.mul_(squeeze_excite_gate(x, None, *arguments)[:, :, None, None])
        return
    if not runs_native(x):
        eager_squeeze_excite_(x, *arguments)
        return
    native.squeeze_excite_(x, *arguments)
    if not x.is_inference():
        # The kernel writes x unseen by autograd: increment the version, which watches also compare.
        torch.autograd.graph.increment_version(x)


def squeeze_excite_gate(
    x: Tensor,
    sums: Tensor | None,
    w_reduce: Tensor,
    b_reduce: Tensor,
    w_expand: Tensor,
    b_expand: Tensor,
    act: int = activations.RELU,
    slope: float = activations.DEFAULT_SLOPE,
    gate: int = HARD_SIGMOID,
) -> Tensor:
    """gate(act(mean of x * w_reduce + b_reduce) * w_expand + b_expand), without multiplying x.

    Args:
        sums: [N, parts, C], from the ``depthwise_conv_sums`` that made x; x is then not read. None:
            the sums are computed from x.
        The others: as ``squeeze_excite_``.

    Returns:
        [N, C] in the dtype of x.

    Raises, Source: as ``squeeze_excite_``.
    """
    function = native.squeeze_excite_gate if runs_native(x) else eager_squeeze_excite_gate
    return function(x, sums, w_reduce, b_reduce, w_expand, b_expand, act, slope, gate)
