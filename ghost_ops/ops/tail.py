"""Operators of a Ghost module whose batch norm follows the concatenation; see ``autograd.tail``."""

from __future__ import annotations

from .define import declare

ghost_tail_forward = declare(
    "ghost_tail_forward(Tensor y, Tensor w2, Tensor? gamma, Tensor? beta, Tensor? mean, "
    "Tensor? var, float eps, Tensor? residual, int out_channels, int act, float slope) "
    "-> (Tensor out, Tensor mean, Tensor var)"
)
ghost_tail_backward = declare(
    "ghost_tail_backward(Tensor grad_out, Tensor y, Tensor w2, Tensor? gamma, Tensor? beta, "
    "Tensor mean, Tensor var, float eps, Tensor? residual, int act, float slope, "
    "bool batch_stats, bool need_dy, bool need_dresidual) "
    "-> (Tensor dy, Tensor dw2, Tensor dgamma, Tensor dbeta, Tensor dresidual)"
)
