"""Gradients of a convolution, with a workaround for a bug of oneDNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_aten = torch.ops.aten


def onednn_corrupts(x: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether oneDNN's weight gradient of this convolution may write out of bounds.

    ``jit_avx2_1x1_convolution_bwd_weights_t`` writes out of bounds, and the process aborts at a
    later ``free``, for float32, 1x1, stride 2 or 3, channels_last, 2 to 7 input channels and images
    of about 14 columns or more. Seen in torch 2.10 and 2.13 on processors with AVX2 and without
    AVX-512, or with DNNL_MAX_CPU_ISA=AVX2; tests/onednn_fault.py reproduces it. This function's
    condition includes more cases, which costs no time.
    """
    few = weight.size(1) < 8 and weight.shape[2:] == (1, 1) and max(stride) > 1
    return few and x.dtype is torch.float32 and x.device.type == "cpu"


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of a convolution without bias; None for a gradient that is not needed."""
    product = need_dw and groups == 1 and not any(padding) and onednn_corrupts(x, weight, stride)
    dx, dw = None, None
    if need_dx or not product:
        geometry = None, stride, padding, dilation, False, [0, 0], groups
        needs = [need_dx, need_dw and not product, False]
        dx, dw, _ = _aten.convolution_backward.default(grad, x, weight, *geometry, needs)
    if product:
        seen = x[:, :, :: stride[0], :: stride[1]]
        dw = (grad.flatten(2) @ seen.flatten(2).transpose(1, 2)).sum(0).view_as(weight)
    return dx, dw
