"""The formula of the Ghost module in plain PyTorch, on tensors, with the types of its arguments.

With m = ceil(oup / ratio) intrinsic maps and g = m * (ratio - 1) ghost maps::

    u   = conv(x, w1)                      primary conv, inp -> m channels, no bias
    y   = act1(bn1(u))                     m intrinsic maps
    v   = depthwise(y, w2)                 d x d, groups = m, zero padding d // 2; ghost channel
                                           i * (ratio - 1) + j reads intrinsic map i
    z   = act2(bn2(v))                     g ghost maps
    out = concat(y, z)[:, :oup]

Source: Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, section 3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, sync


class Settings(NamedTuple):
    """The numbers of one Ghost module.

    Attributes:
        out_channels: channels of the output; the ghost maps beyond it are dropped.
        stride, padding, dilation, groups: of the primary convolution.
        eps1, eps2: added to the variances of the first and second batch norm.
        act1, act2: codes of ``activations``; slope1, slope2: their slopes, for leaky ReLU.
    """

    out_channels: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps1: float
    eps2: float
    act1: int
    slope1: float
    act2: int
    slope2: float


class Norms(NamedTuple):
    """The tensors of both batch norms: [m] for the first, [g] for the second.

    gamma and beta None stand for 1 and 0. mean and var are the running statistics; both are None
    for a norm without running statistics.
    """

    gamma1: Tensor | None
    beta1: Tensor | None
    mean1: Tensor | None
    var1: Tensor | None
    gamma2: Tensor | None
    beta2: Tensor | None
    mean2: Tensor | None
    var2: Tensor | None


class Slopes(NamedTuple):
    """The slopes of PReLUs: slopes1 [m] if act1 is a PReLU, slopes2 [g] if act2 is; else None."""

    slopes1: Tensor | None = None
    slopes2: Tensor | None = None


NO_SLOPES = Slopes()


class Statistics(NamedTuple):
    """The source of the statistics of both norms.

    Attributes:
        batch1, batch2: True: the norm uses the statistics of the batch. False: it uses the running
            statistics, as constants.
        group1, group2: the process group over whose batches a norm with batch True computes its
            statistics; None: over the batch of this process.
    """

    batch1: bool
    batch2: bool
    group1: Any = None
    group2: Any = None

    def use_batch(self) -> bool:
        return self.batch1 or self.batch2

    def cross_processes(self) -> bool:
        return self.group1 is not None or self.group2 is not None


FROZEN, BATCH = Statistics(False, False), Statistics(True, True)


def ghost_formula(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    norms: Norms,
    settings: Settings,
    stats: Statistics,
    momentum1: float = 0.0,
    momentum2: float = 0.0,
    slopes: Slopes = NO_SLOPES,
) -> Tensor:
    """The formula of this file's docstring in plain PyTorch, differentiable any number of times.

    Args:
        x: [N, C, H, W], in a floating-point dtype, of any layout.
        w1: [m, C / groups, k, k] in the dtype of x, or None if x already is u.
        w2: [g, 1, d, d] in the dtype of x; g = 0 for ratio 1.
        norms, settings: the tensors of both batch norms, and the numbers of the module.
        stats: the source of each norm's statistics. A norm that uses the statistics of the batch of
            this process updates its running statistics, if norms has them; a norm over a process
            group does not.
        momentum1, momentum2: share of the batch in the updated running statistics.
        slopes: of the PReLUs among the activations.

    Returns:
        [N, out_channels, Ho, Wo] in the dtype of x.

    Source: GhostNet, CVPR 2020, section 3.1.
    """
    n, s = norms, settings
    inplace = not torch.is_grad_enabled()
    u = x if w1 is None else F.conv2d(x, w1, None, s.stride, s.padding, s.dilation, s.groups)
    norm1, norm2 = n[:4], n[4:]
    y = _batch_norm(u, *norm1, stats.batch1, stats.group1, momentum1, s.eps1)
    y = activations.apply(y, s.act1, s.slope1, inplace, slopes.slopes1)
    if w2.size(0) == 0:
        return y[:, : s.out_channels]
    v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
    z = _batch_norm(v, *norm2, stats.batch2, stats.group2, momentum2, s.eps2)
    z = activations.apply(z, s.act2, s.slope2, inplace, slopes.slopes2)
    return torch.cat([y, z], 1)[:, : s.out_channels]


def _batch_norm(
    u: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batch: bool,
    group: Any,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm``; with a group ``sync_formula``, which updates no running statistic."""
    if group is None:
        return F.batch_norm(u, mean, var, gamma, beta, batch, momentum, eps)
    return sync.sync_formula(u, gamma, beta, eps, group)
