"""Arguments of the operators for one case, and the operators called as a module calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from helpers import ACT_CODE, Case, Params, activation, make_input, make_module, ops_of, with_layout
from torch import Tensor

from ghost_ops import activations
from ghost_ops.activations import PRELU
from ghost_ops.conventions import NEEDS, compute_dtype
from ghost_ops.reference import GhostModule

OPS = torch.ops.ghost_ops


def samples(case: Case, has_primary: bool, ops: Any = OPS) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op for one case; without a primary convolution x is u [N, m, H, W]."""
    p = Params.of(make_module(case, GhostModule))
    w2 = p.w2.detach()
    gamma1, beta1 = p.bn1.gamma.detach(), p.bn1.beta.detach()
    gamma2, beta2 = p.bn2.gamma.detach(), p.bn2.beta.detach()
    if has_primary:
        x, w1, stride = make_input(case), p.w1.detach(), case.stride
    else:
        x, w1, stride = make_input(case.replace(c=case.m)), None, 1
    h, w = (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1
    grad = make_input(case.replace(c=case.oup, h=h, w=w), 3)
    wide = compute_dtype(case.dtype)
    mean1, var1 = torch.randn(case.m, dtype=wide), torch.rand(case.m, dtype=wide)
    mean2, var2 = torch.randn(case.g, dtype=wide), torch.rand(case.g, dtype=wide)
    acts = (ACT_CODE[case.act1], 0.01, ACT_CODE[case.act2], 0.01)
    first = (w1, gamma1, beta1, p.bn1.mean, p.bn1.var, 1e-5)
    pack = (*first, w2, gamma2, beta2, p.bn2.mean, p.bn2.var, 1e-5)
    unscaled = (*first, w2, None, None, None, None, 1e-5)
    running1 = (p.bn1.mean.clone(), p.bn1.var.clone(), torch.tensor(3))
    running2 = (p.bn2.mean.clone(), p.bn2.var.clone(), torch.tensor(3))
    forward1 = (w1, gamma1, beta1, None, None, 1e-5, None)
    forward2 = (w2, gamma2, beta2, None, None, 1e-5, None)
    backward1 = (w1, gamma1, beta1, mean1, var1, 1e-5, None, None)
    backward2 = (w2, gamma2, beta2, mean2, var2, 1e-5, None, None)
    cheap = (case.m, case.ratio, case.d, stride, *acts[:2], has_primary)
    apply = (case.m, case.oup, case.ratio, case.d, stride, *acts, has_primary)
    found = {
        "ghost_pack": pack,
        "ghost_apply": (x, ops.ghost_pack(*pack), None, None, *apply),
        "ghost_cheap_stats": (x, ops.ghost_pack(*unscaled), *cheap),
        "ghost_train_forward": (x, *forward1, *forward2, case.oup, stride, *acts, False),
        "ghost_backward": (
            *(grad, x, None, *backward1, *backward2, stride, *acts),
            *(True, True, NEEDS.ALL),
        ),
        "ghost_update_running_": (*running1, mean1, var1, 0.1, *running2, mean2, var2, None, 84),
    }
    if has_primary:
        found["ghost_primary_stats"] = (x, w1, stride)
    return found


def extended(case: Case, has_primary: bool, ops: Any = OPS) -> dict[str, tuple[Any, ...]]:
    """Arguments of training's ops with PReLUs, given statistics and the means of other batches."""
    plain = samples(case, has_primary, ops)
    x, w1, g1, b1, *_, w2, g2, b2, _, _, _, _, oup, stride = plain["ghost_train_forward"][:-5]
    gen = torch.Generator().manual_seed(4)

    def made(*size: int) -> Tensor:
        return torch.rand(*size, generator=gen, dtype=compute_dtype(case.dtype)) + 0.1

    m, g = case.m, case.g
    mean1, var1, mean2, var2 = made(m), made(m), made(g), made(g)
    means1, means2 = made(2, m), made(2, g)
    slopes1, slopes2 = made(m).to(case.dtype), made(g).to(case.dtype)
    acts = (PRELU, 0.0, PRELU, 0.0)
    grad = plain["ghost_backward"][0]
    first, second = (g1, b1, mean1, var1, 1e-5, slopes1), (g2, b2, mean2, var2, 1e-5, slopes2)
    packed = ops.ghost_pack(w1, *first[:5], w2, None, None, None, None, 1e-5, slopes1)
    cheap = (m, case.ratio, case.d, stride, *acts[:2], has_primary)
    return {
        "ghost_cheap_stats": (x, packed, *cheap),
        "ghost_train_forward": (x, w1, *first, w2, *second, oup, stride, *acts, True),
        "ghost_backward": (
            *(grad, x, None, w1, *first, means1, w2, *second, means2, stride, *acts),
            *(True, True, NEEDS.ALL),
        ),
    }


def apply_packed(
    backend: str,
    case: Case,
    p: Params,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    slopes: Sequence[Tensor | None] = (),
) -> Tensor:
    """``ghost_apply`` in evaluation on packed parameters; an activation may be "prelu"."""
    ops, codes = ops_of(backend), {**ACT_CODE, "prelu": PRELU}
    norms = [(bn.gamma, bn.beta, bn.mean, bn.var, bn.eps) for bn in (p.bn1, p.bn2)]
    packed = ops.ghost_pack(p.w1, *norms[0], p.w2, *norms[1], *slopes)
    sizes = (case.m, case.oup, case.ratio, case.d, case.stride)
    acts = (codes[case.act1], 0.01, codes[case.act2], 0.01)
    return ops.ghost_apply(x, packed, residual, gate, *sizes, *acts, True)


def strides(t: Tensor) -> list[int]:
    """Strides of the dimensions of more than one element; the others mean nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def row_id(row: dict) -> str:
    """The test id of a row of a grid."""
    return "-".join(str(v).replace("torch.", "") for v in row.values())


class ConvCase:
    """Tensors and arguments of ``ghost_conv_apply`` for one row of a grid."""

    def __init__(self, row: dict) -> None:
        gen = torch.Generator().manual_seed(1)
        dtype, wide = row["dtype"], compute_dtype(row["dtype"])
        n, c, h, w = row["shape"]
        k, m, (ratio, d) = row["k"], row["m"], row["ghosts"]
        self.row, self.g = row, m * (ratio - 1)
        tail = row["tail"] and ratio > 1
        self.out = m + self.g - (row["cut"] if ratio > 1 else 0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=gen, dtype=torch.float64)

        self.x = with_layout(random(n, c, h, w).to(dtype), row["layout"])
        self.w1 = (random(m, c, k, k) * (c * k * k) ** -0.5).to(dtype)
        self.w2 = (random(self.g, 1, d, d) * d**-1.0).to(dtype)
        self.norms = [
            t.to(wide)
            for size in (m, self.g)
            for t in (random(size), random(size), random(size), random(size).abs() + 0.5)
        ]
        self.ends = (random(m).to(wide), random(m).to(wide)) if tail else ()
        p, s = row["padding"], row["stride"]
        size = [(v + 2 * p - k) // s + 1 for v in (h, w)]
        self.residual = None
        if row["residual"]:
            self.residual = with_layout(random(n, self.out, *size).to(dtype), row["layout"])
        self.acts = ("none" if tail else row["act"]), row["act"]
        codes = (activations.CODES[act] for act in self.acts)
        (act1, act2), slope = codes, activations.DEFAULT_SLOPE
        sizes = (k, p, tail, m, self.out, ratio, d if self.g else 1, s)
        self.numbers = (*sizes, act1, slope, act2, slope)

    def packed(self, functions: Any) -> Tensor:
        """Packed parameters, made by the functions of a backend."""
        rows = self.w1.permute(0, 2, 3, 1).reshape(self.w1.size(0), -1, 1, 1)
        w2 = self.w2 if self.g else self.w2.new_empty(0, 1, 1, 1)
        n = self.norms
        made = functions.ghost_pack(rows, *n[:4], 1e-3, w2, *n[4:], 1e-3)
        return torch.cat([made, *self.ends])

    def formula(self, dtype: torch.dtype) -> Tensor:
        """The output by PyTorch's operators in a dtype."""
        x, w1, w2 = (t.to(dtype) for t in (self.x, self.w1, self.w2))
        n = [t.to(dtype) for t in self.norms]
        row = self.row

        def norm(u: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return F.batch_norm(u, mean, var, gamma, beta, False, 0.0, 1e-3)

        u = F.conv2d(x, w1, None, row["stride"], row["padding"])
        y = activation(self.acts[0], norm(u, *n[:4]))
        out = y
        if self.ends:
            scale, shift = (t.to(dtype).view(-1, 1, 1) for t in self.ends)
            out = activation(self.acts[1], y * scale + shift)
        if self.g:
            v = F.conv2d(y, w2, None, 1, w2.size(-1) // 2, 1, y.size(1))
            out = torch.cat([out, activation(self.acts[1], norm(v, *n[4:]))], 1)
        out = out[:, : self.out]
        return out if self.residual is None else out + self.residual.to(dtype)
