"""One check of the CUDA operators for both places they run: the emulator and a GPU.

A ``World`` is where the operators are: ``torch.ops.ghost_emu`` on CPU tensors (the kernel sources
under the block emulator) or ``torch.ops.ghost_ops`` on CUDA tensors. Operands are made on the CPU,
results come back to it, and the oracle and the tolerance rule are those of ``helpers``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from helpers import (
    ACT_CODE,
    KINKS,
    Case,
    Norm,
    Params,
    Result,
    activation_module,
    assert_close,
    make_input,
    make_module,
    make_smooth,
    oracle,
    peer_conv2d,
    plain,
    with_layout,
)
from torch import Tensor

from ghost_ops.conventions import NEEDS
from ghost_ops.reference import GhostModule

LOW = (torch.bfloat16, torch.float16)
SLOPE = 0.01
PRELU = 8  # of activations


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty full of NaN: whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory, True
    )  # fmt: skip
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@dataclasses.dataclass(frozen=True)
class World:
    """Where the operators run."""

    ops: Any
    device: str

    def move(self, value: Any) -> Any:
        """A tensor or None to the device, strides and all; anything else as it is."""
        if not isinstance(value, Tensor) or self.device == "cpu":
            return value
        if not value.numel():
            return value.to(self.device)
        # A plain copy would make expanded and sliced tensors dense.
        reach = (s * (n - 1) for n, s in zip(value.shape, value.stride(), strict=True))
        memory = value.as_strided((1 + sum(reach),), (1,), value.storage_offset())
        return memory.to(self.device).as_strided(value.shape, value.stride())

    def call(self, name: str, *arguments: Any) -> Any:
        """The operator's results, on the CPU."""
        moved = [self.move(a) for a in arguments]
        with poisoned_memory():
            result = getattr(self.ops, name)(*moved)
        if isinstance(result, Tensor):
            return result.cpu()
        return result if result is None else tuple(t.cpu() for t in result)

    def pack(self, *arguments: Any) -> Tensor:
        """Packed parameters, left on the device: their content is the backend's own."""
        moved = [self.move(a) for a in arguments]
        with poisoned_memory():
            return self.ops.ghost_pack(*moved)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's switch for float32 convolutions on tensor cores."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@dataclasses.dataclass
class Operands:
    """A module's parameters and input, as the operators take them."""

    case: Case
    p: Params
    x: Tensor
    w1: Tensor | None  # None: x is u

    @property
    def stride(self) -> int:
        return self.case.stride if self.w1 is not None else 1

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        c = self.case
        return c.m, c.oup, c.ratio, c.d, self.stride

    @property
    def acts(self) -> tuple[int, float, int, float]:
        return ACT_CODE[self.case.act1], SLOPE, ACT_CODE[self.case.act2], SLOPE


def detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def operands(case: Case, has_primary: bool = True, smooth: bool | None = None) -> Operands:
    """Seeded operands. ``smooth`` (training?): away from the kinks of the activations."""
    if not has_primary:
        case = case.replace(c=case.m, stride=1)
    if smooth is None:
        module, x = make_module(case, GhostModule), make_input(case)
    else:
        case, module, x = make_smooth(case, smooth)
    p = Params.of(module)
    if has_primary:
        return Operands(case, p, x, p.w1.detach())
    p.w1 = torch.eye(case.m, dtype=case.dtype)[:, :, None, None].requires_grad_()
    return Operands(case, p, x, None)


def rounded_to_tf32(t: Tensor) -> Tensor:
    bits = t.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view_as(t)


def as_tensor_cores_see_it(o: Operands, use_tf32: bool) -> tuple[Params, Tensor]:
    """Parameters and input of the peer: those of PyTorch, rounded where TF32 rounds them."""
    p, x = o.p.to(o.case.dtype if o.case.bn_dtype else None), o.x
    if use_tf32 and o.case.dtype == torch.float32:
        p.w1.data = rounded_to_tf32(p.w1)
        x = with_layout(rounded_to_tf32(x), o.case.layout)
    return p, x


def tolerance_dtype(case: Case, use_tf32: bool) -> torch.dtype:
    """float16 has as many mantissa bits as TF32."""
    return torch.float16 if use_tf32 and case.dtype == torch.float32 else case.dtype


def norm_arguments(o: Operands) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(gamma, beta, mean, var) of both batch norms."""
    return tuple([detached(n.gamma), detached(n.beta), n.mean, n.var] for n in (o.p.bn1, o.p.bn2))  # type: ignore[return-value]


def same_format(got: Tensor, x: Tensor) -> None:
    """channels_last out of channels_last in."""
    if got.numel() and x.is_contiguous(memory_format=torch.channels_last) != x.is_contiguous():
        nchw = x.is_contiguous()
        fmt = torch.contiguous_format if nchw else torch.channels_last
        assert got.is_contiguous(memory_format=fmt), "memory format"


def misaligned(x: Tensor, shift: int = 1) -> Tensor:
    """The same numbers in the same format, ``shift`` elements into an allocation."""
    memory = x.new_empty(x.numel() + shift)
    return memory.as_strided(x.size(), x.stride(), shift).copy_(x)


def check_eval(
    world: World,
    case: Case,
    *,
    has_primary: bool = True,
    residual: bool = False,
    use_tf32: bool = False,
    x: Tensor | None = None,
) -> Tensor:
    """``ghost_pack`` and ``ghost_apply`` against the oracle; x replaces the seeded input."""
    o = operands(case, has_primary)
    o.x = o.x if x is None else x
    bn1, bn2 = norm_arguments(o)
    with torch.no_grad():
        want = oracle(o.p.to(torch.float64), o.x.double(), o.case, training=False).out
        peer_p, peer_x = as_tensor_cores_see_it(o, use_tf32)
        eager = plain(peer_p, peer_x, o.case, training=False)
        extra = None
        if residual:
            extra = make_input(o.case.replace(c=o.case.oup, h=want.shape[2], w=want.shape[3]), 5)
            want, eager = want + extra.double(), eager + extra
        with tf32(use_tf32):
            packed = world.pack(o.w1, *bn1, 1e-5, o.p.w2.detach(), *bn2, 1e-5)
            arguments = (o.x, packed, extra, None, *o.shape, *o.acts, o.w1 is not None)
            got = world.call("ghost_apply", *arguments)
    assert got.dtype == o.x.dtype
    same_format(got, o.x)
    assert_close(got, want, eager, dtype=tolerance_dtype(case, use_tf32))
    return got


def check_extras(
    world: World,
    case: Case,
    *,
    prelu: tuple[bool, bool] = (False, False),
    gate: tuple[int, int] | None = None,
    gate_layout: str | None = None,
    residual: bool = False,
    has_primary: bool = True,
    use_tf32: bool = False,
    in_gate: bool = False,
) -> Tensor:
    """``ghost_apply`` with slopes per channel as activations, a gate [Hg, Wg] and a gate of its
    input, against PyTorch's layers in float64."""
    o = operands(case, has_primary)
    case, (bn1, bn2), w2 = o.case, norm_arguments(o), o.p.w2.detach()
    slopes = make_slopes(case, prelu)
    codes = [PRELU if s is not None else ACT_CODE[name]
             for s, name in zip(slopes, (case.act1, case.act2), strict=True)]  # fmt: skip

    def activate(t: Tensor, name: str, slope: Tensor | None) -> Tensor:
        return activation_module(name)(t) if slope is None else F.prelu(t, slope.to(t.dtype))

    def module(
        p: Params, x: Tensor, inner: Tensor | None, factor: Tensor | None, extra: Tensor | None
    ) -> Tensor:
        if inner is not None:
            x = x * inner[:, :, None, None]

        def bn(t: Tensor, n: Norm) -> Tensor:
            return F.batch_norm(t, n.mean, n.var, n.gamma, n.beta, False, 0.0, n.eps)

        y = activate(bn(F.conv2d(x, p.w1, None, o.stride), p.bn1), case.act1, slopes[0])
        out = y
        if case.ratio > 1:
            v = F.conv2d(y, p.w2, None, 1, case.d // 2, 1, case.m)
            out = torch.cat([y, activate(bn(v, p.bn2), case.act2, slopes[1])], 1)[:, : case.oup]
        if factor is not None:
            out = out * F.interpolate(factor, out.shape[2:], mode="nearest")
        return out if extra is None else out + extra

    size = [-(-n // o.stride) for n in (case.h, case.w)]
    maps = case.replace(c=case.oup)
    extra = make_input(maps.replace(h=size[0], w=size[1]), 5) if residual else None
    factor = None
    if gate is not None:
        layout = gate_layout or case.layout
        factor = make_input(maps.replace(h=gate[0], w=gate[1], layout=layout), 7)
    inner = None
    if in_gate:
        g = torch.Generator().manual_seed(11)
        inner = torch.rand(case.n, o.x.size(1), generator=g).to(case.dtype)
    wide = [None if t is None else t.double() for t in (inner, factor, extra)]
    with torch.no_grad(), tf32(use_tf32):
        want = module(o.p.to(torch.float64), o.x.double(), *wide)
        peer_p, peer_x = as_tensor_cores_see_it(o, use_tf32)
        eager = module(peer_p, peer_x, inner, factor, extra)
        packed = world.pack(o.w1, *bn1, 1e-5, w2, *bn2, 1e-5, *slopes)
        name, first = ("ghost_apply_gated", [o.x, inner]) if in_gate else ("ghost_apply", [o.x])
        got = world.call(
            name, *first, packed, extra, factor, *o.shape, codes[0], SLOPE, codes[1], SLOPE,
            o.w1 is not None,
        )  # fmt: skip
    assert got.dtype == o.x.dtype
    same_format(got, o.x)
    assert_close(got, want, eager, dtype=tolerance_dtype(case, use_tf32))
    return got


@dataclasses.dataclass(frozen=True)
class Training:
    """How a module trains.

    Args:
        batch: which norms have statistics of the batch; the others are frozen.
        slopes: of activations that are PReLUs, [m] and [g].
    """

    batch: tuple[bool, bool] = (True, True)
    slopes: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def plain(self) -> bool:
        """Whether ``helpers.oracle`` knows it."""
        return self.batch[0] == self.batch[1] and self.slopes == (None, None)

    def codes(self, o: Operands) -> tuple[int, float, int, float]:
        first, _, second, _ = o.acts
        codes = [code if s is None else PRELU
                 for s, code in zip(self.slopes, (first, second), strict=True)]  # fmt: skip
        return codes[0], SLOPE, codes[1], SLOPE


def layers(p: Params, x: Tensor, case: Case, how: Training) -> Result:
    """PyTorch's layers in the dtype of x."""

    def layer(t: Tensor, n: Norm, i: int, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(t.detach(), (0, 2, 3), correction=0)
        given = (None, None) if how.batch[i] else (n.mean, n.var)
        a = F.batch_norm(t, *given, n.gamma, n.beta, how.batch[i], 0.0, n.eps)
        slopes = how.slopes[i]
        out = activation_module(name)(a) if slopes is None else F.prelu(a, slopes.to(t.dtype))
        return out, mean, var, a

    y, mean1, var1, a = layer(peer_conv2d(x, p.w1, case.stride, 0, 1), p.bn1, 0, case.act1)
    if case.ratio == 1:
        none = y.new_empty(0)
        return Result(y, mean1, var1, none, none, a, none)
    v = F.conv2d(y, p.w2, None, 1, case.d // 2, 1, case.m)
    z, mean2, var2, b = layer(v, p.bn2, 1, case.act2)
    return Result(torch.cat([y, z], 1)[:, : case.oup], mean1, var1, mean2, var2, a, b)


def gradients(
    p: Params, x: Tensor, grad: Tensor, case: Case, how: Training
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients, in float64 of ``oracle`` where that knows ``how``."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    slopes = [None if s is None else s.to(x.dtype).requires_grad_() for s in how.slopes]
    if not how.plain:
        out = layers(p, x, case, dataclasses.replace(how, slopes=tuple(slopes))).out
    elif x.dtype == torch.float64:
        out = oracle(p, x, case, how.batch[0]).out
    else:
        out = plain(p, x, case, how.batch[0])
    named = {"x": x, **p.tensors()}
    named |= {f"slopes{i + 1}": s for i, s in enumerate(slopes) if s is not None}
    if case.ratio == 1:
        named = {k: t for k, t in named.items() if k[-1] != "2"}
    got = torch.autograd.grad(out, list(named.values()), grad.to(out.dtype))
    return out.detach(), dict(zip(named, got, strict=True))


def near(
    got: Tensor, want: Tensor, dtype: torch.dtype, what: str, spread: Tensor | None = None
) -> None:
    """Statistics: sums of many terms, with the operands' own rounding. ``spread``: the size of the
    terms, where they cancel."""
    eps = torch.finfo(dtype).eps
    scale = max(
        (t.abs().max().item() for t in (want, spread) if t is not None and t.numel()), default=0.0
    )
    atol = max(16 * eps, 1e-6 * (eps > 1e-10)) * scale
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol, msg=what)


def make_grad(o: Operands, size: torch.Size, style: str) -> Tensor:
    """grad_out [N, oup, Ho, Wo] in the manner of ``style``."""
    case = o.case.replace(c=o.case.oup, h=size[2], w=size[3])
    if style == "expanded":
        return make_input(case.replace(n=1, h=1, w=1, layout="nchw"), 3).expand(size)
    other = {"nchw": "nhwc", "nhwc": "nchw"}
    if style == "other layout":
        return make_input(case.replace(layout=other[case.layout]), 3)
    if style == "sliced":
        return make_input(case.replace(c=case.oup + 3, w=size[3] + 1), 3)[:, 2:-1, :, 1:]
    assert style == "dense"
    return make_input(case, 3)


GRADIENTS = (
    "x", "w1", "gamma1", "beta1", "slopes1", "w2", "gamma2", "beta2", "slopes2"
)  # fmt: skip


def make_slopes(case: Case, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Seeded slopes [m] and [g] of either sign."""
    g = torch.Generator().manual_seed(11)
    found = [torch.randn(n, generator=g).to(case.dtype) for n in (case.m, case.g)]
    return tuple(s if want else None for s, want in zip(found, wanted, strict=True))  # type: ignore[return-value]


def train_forward(world: World, o: Operands, how: Training, keep_u: bool) -> tuple[Tensor, ...]:
    """Results of ``ghost_train_forward``: a frozen norm has its running statistics."""
    norms = [
        [*n[:2], *((None, None) if batch else n[2:]), 1e-5, slopes]
        for n, batch, slopes in zip(norm_arguments(o), how.batch, how.slopes, strict=True)
    ]
    return world.call(
        "ghost_train_forward", o.x, o.w1, *norms[0], o.p.w2.detach(), *norms[1], o.case.oup,
        o.stride, *how.codes(o), keep_u,
    )  # fmt: skip


def backward(
    world: World, o: Operands, how: Training, grad: Tensor, u: Tensor | None,
    moments: list[Tensor], needs: int = NEEDS.ALL,
    means: tuple[Tensor | None, Tensor | None] = (None, None),
) -> dict[str, Tensor]:  # fmt: skip
    """Results of ``ghost_backward``; what is not needed must be empty, and is left out."""
    bn1, bn2 = norm_arguments(o)
    found = world.call(
        "ghost_backward", grad, o.x, u, o.w1, *bn1[:2], *moments[:2], 1e-5, how.slopes[0],
        means[0], o.p.w2.detach(), *bn2[:2], *moments[2:], 1e-5, how.slopes[1], means[1],
        o.stride, *how.codes(o), *how.batch, needs,
    )  # fmt: skip
    n = NEEDS
    wanted = {"x": n.DX, "w1": n.DW1, "gamma1": n.NORM1, "beta1": n.NORM1, "slopes1": n.PRELU1,
              "w2": n.DW2, "gamma2": n.NORM2, "beta2": n.NORM2, "slopes2": n.PRELU2}  # fmt: skip
    named = dict(zip(GRADIENTS, found, strict=True))
    missing = {"w1": o.w1, "slopes1": how.slopes[0], "slopes2": how.slopes[1]}
    kept = {}
    for name, t in named.items():
        if needs & wanted[name] and not (name in missing and missing[name] is None):
            kept[name] = t
        else:
            assert t.numel() == 0, name
    return kept


def backward_in_three(
    world: World, o: Operands, how: Training, grad: Tensor, u: Tensor | None, moments: list[Tensor]
) -> dict[str, Tensor]:
    """The same by calls that stop where the sums of several processes would be added up."""
    if u is None and o.w1 is not None:
        u = peer_conv2d(o.x, o.w1, o.stride, 0, 1)
        u = with_layout(u, o.case.layout)
    arguments = (world, o, how, grad, u, moments)
    count = grad[:, 0].numel()

    def means(found: dict[str, Tensor], i: int) -> Tensor | None:
        if not how.batch[i] or not found[f"beta{i + 1}"].numel():
            return None
        return torch.stack([found[f"beta{i + 1}"], found[f"gamma{i + 1}"]]) / count

    n = NEEDS
    found = backward(*arguments, n.NORM2 | n.PRELU2)
    means2 = means(found, 1)
    found |= backward(*arguments, n.NORM1 | n.PRELU1 | n.DW2, (None, means2))
    return found | backward(*arguments, n.DX | n.DW1, (means(found, 0), means2))


def check_train(
    world: World,
    case: Case,
    *,
    batch_stats: bool | tuple[bool, bool] = True,
    prelu: tuple[bool, bool] = (False, False),
    has_primary: bool = True,
    keep_u: bool = False,
    grad_style: str = "dense",
    use_tf32: bool = False,
    rms: bool = False,
    shift: int = 0,
    in_three: bool = False,
) -> dict[str, Tensor]:
    """``ghost_train_forward`` and ``ghost_backward`` against the oracle. x and w1 begin ``shift``
    elements into their memory. in_three: as ``backward_in_three``."""
    batch = (batch_stats, batch_stats) if isinstance(batch_stats, bool) else batch_stats
    o = operands(case, has_primary, smooth=all(batch))
    if shift:
        o.x = misaligned(o.x, shift)
        o.w1 = None if o.w1 is None else misaligned(o.w1, shift)
    case, dtype = o.case, tolerance_dtype(o.case, use_tf32)
    how = Training(batch, make_slopes(case, prelu))
    reference = o.p.to(torch.float64)
    with torch.no_grad():
        exact = oracle(reference, o.x.double(), case, batch[0]) if how.plain else layers(
            reference, o.x.double(), case, how
        )  # fmt: skip
    grad = make_grad(o, exact.out.shape, grad_style)
    want_out, want = gradients(reference, o.x.double(), grad.double(), case, how)
    peer_p, peer_x = as_tensor_cores_see_it(o, use_tf32)
    eager_out, eager = gradients(peer_p, peer_x, grad, case, how)
    kinked = dtype in LOW and not (
        {case.act1, case.act2}.isdisjoint(KINKS) and how.slopes == (None, None)
    )
    rms, slack = rms or kinked, 4.0
    if kinked:
        # The derivative jumps: some eps of all pre-activations round to the other side, each an
        # error of its full size. The smooth activations are held to the strict rule.
        slack = (8 * torch.finfo(dtype).eps) ** 0.5 / (2 * torch.finfo(dtype).eps)

    got: dict[str, Tensor] = {}
    with torch.no_grad(), tf32(use_tf32):
        out, *moments, u = train_forward(world, o, how, keep_u)
        same_format(out, o.x)
        assert_close(out, want_out, eager_out, rms=rms, dtype=dtype)
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        for i, name in enumerate(("mean1", "var1", "mean2", "var2")):
            if not batch[i // 2]:
                assert moments[i].numel() == 0, name
                moments[i] = norm_arguments(o)[i // 2][2 + i % 2].to(wide)
                continue
            spread = getattr(exact, f"var{name[-1]}").sqrt() if name[:-1] == "mean" else None
            near(moments[i], getattr(exact, name).detach(), dtype, name, spread)
            got[name] = moments[i]
        got["out"] = out
        if keep_u:
            exact_u = torch.nn.functional.conv2d(
                o.x.double(), reference.w1.detach(), stride=o.stride
            )
            near(u, exact_u, dtype, "u")
        else:
            assert u.numel() == 0
            u = None
        run = backward_in_three if in_three else backward
        found = run(world, o, how, grad, u, moments)
    same_format(found["x"], o.x)
    scale = want
    if any(batch):
        # Batch statistics make the terms of a gradient cancel; held constant they do not.
        frozen = o.p.to(torch.float64)
        for i, bn in enumerate((frozen.bn1, frozen.bn2)):
            if batch[i]:
                bn.mean, bn.var = (getattr(exact, f"{k}{i + 1}").detach() for k in ("mean", "var"))
        constant = dataclasses.replace(how, batch=(False, False))
        _, scale = gradients(frozen, o.x.double(), grad.double(), case, constant)
    # Sums over all pixels of terms of either sign cancel by chance, to the root of their number.
    count = grad[:, 0].numel()
    chance = torch.tensor(max(count**0.5, count / 32))
    for name in want:
        if name == "w1" and not has_primary:
            continue
        size = scale[name]
        if name[:-1] in ("gamma", "beta", "slopes") and chance > size.abs().max():
            size = chance
        assert_close(
            found[name], want[name], eager[name], f"gradient of {name}", rms=rms, slack=slack,
            scale=size, dtype=dtype,
        )  # fmt: skip
        got[name] = found[name]
    return got


def check_statistics(world: World, case: Case, has_primary: bool = True) -> None:
    """``ghost_primary_stats`` and ``ghost_cheap_stats`` on their own."""
    o = operands(case, has_primary)
    bn1, _ = norm_arguments(o)
    reference = o.p.to(torch.float64)
    with torch.no_grad(), tf32(False):
        live = oracle(reference, o.x.double(), o.case, training=True)
        frozen = oracle(reference, o.x.double(), o.case, training=False)
        mean, var = world.call("ghost_primary_stats", o.x, o.w1, o.stride)
        near(mean, live.mean1, case.dtype, "mean1", live.var1.sqrt())
        near(var, live.var1, case.dtype, "var1")
        for prelu in (False, True):
            how = Training((False, False), make_slopes(case, (prelu, False)))
            if prelu:
                frozen = layers(reference, o.x.double(), o.case, how)
            none = (None, None, None, None)
            packed = world.pack(o.w1, *bn1, 1e-5, o.p.w2.detach(), *none, 1e-5, how.slopes[0])
            mean, var = world.call(
                "ghost_cheap_stats", o.x, packed, case.m, case.ratio, case.d, o.stride,
                *how.codes(o)[:2], has_primary,
            )  # fmt: skip
            near(mean, frozen.mean2, case.dtype, "mean2", frozen.var2.sqrt())
            near(var, frozen.var2, case.dtype, "var2")


def moments(world: World, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of x from each pass, by way of an identity in the place of w1 and w2."""
    c = x.size(1)
    w1 = torch.eye(c, dtype=x.dtype)[:, :, None, None]
    w2, gamma = torch.zeros(c, 1, 3, 3, dtype=x.dtype), torch.ones(c, dtype=x.dtype)
    w2[:, 0, 1, 1] = 1
    none = (None, None, None)
    with tf32(False):
        packed = world.pack(None, gamma, *none, 0.0, w2, *none, None, 0.0)
        norm = (None, None, None, None, 0.0, None)
        given = (x, None, *norm, w2, *norm, 2 * c, 1, 0, 0.0, 0, 0.0, False)
        return {
            "primary": world.call("ghost_primary_stats", x, w1, 1),
            "x is u": world.call("ghost_primary_stats", x, None, 1),
            "u given": world.call("ghost_train_forward", *given)[1:3],
            "cheap": world.call("ghost_cheap_stats", x, packed, c, 2, 3, 1, 0, 0.0, False),
        }


def welford(x: Tensor) -> Tensor:
    """Variance in float32 as PyTorch's CUDA batch norm computes it, by 32 threads a channel."""
    v = x.transpose(0, 1).flatten(1).float()
    v = v[:, : v.size(1) // 32 * 32].unflatten(1, (-1, 32))
    mean, m2 = v[:, 0], torch.zeros_like(v[:, 0])
    for i in range(1, v.size(1)):
        d = v[:, i] - mean
        mean = mean + d / (i + 1)
        m2 = m2 + d * (v[:, i] - mean)
    count = v.size(1)
    while mean.size(1) > 1:
        half = mean.size(1) // 2
        d = mean[:, half:] - mean[:, :half]
        mean, m2 = mean[:, :half] + d / 2, m2[:, :half] + m2[:, half:] + d * d * count / 2
        count *= 2
    return m2[:, 0].double() / count


def check_far_statistics(
    world: World, mean: float, deviation: float, kind: str, dtype: torch.dtype, layout: str
) -> None:
    """As many digits as PyTorch's float32, with E[u^2] - E[u]^2 there would be none. ``kind``:
    "normal", "outliers" (the first value of every image) or "drift" (of the images' means). The
    last channel is constant."""
    x = torch.randn(5, 8, 15, 16, generator=torch.Generator().manual_seed(0)).double()
    if kind == "outliers":
        x[:, :, 0, 0] = 300
    elif kind == "drift":
        x += 20 * torch.arange(5).view(5, 1, 1, 1)
    x = x * deviation + mean
    x[:, -1] = mean
    x = with_layout(x.to(dtype), layout)
    want, exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    varies, eager = exact > 0, welford(x)
    usual = 2 * ((eager - exact)[varies] / exact[varies]).abs().max() + 1e-6 if any(varies) else 0
    for name, (got, var) in moments(world, x).items():
        near = exact.sqrt() * 1e-6 + want.abs() * 1.2e-7
        assert bool(((got.double() - want).abs() <= near).all()), name
        assert not var[~varies].any(), name
        error = ((var.double() - exact).abs() / exact)[varies]
        assert bool((error <= usual).all()), (name, error, usual)


def check_empty(world: World, case: Case, has_primary: bool = True) -> None:
    """All operators on a batch of no images, as PyTorch: outputs are empty, statistics and
    gradients of parameters are zero, running statistics stay as they are."""
    o = operands(case, has_primary)
    case, (bn1, bn2), w2 = o.case, norm_arguments(o), o.p.w2.detach()
    assert o.x.numel() == 0
    size = (case.n, case.oup, *(-(-n // o.stride) for n in (case.h, case.w)))

    def zero(tensors: Any) -> None:
        for t in tensors:
            assert torch.equal(t, torch.zeros_like(t))

    packed = world.pack(o.w1, *bn1, 1e-5, w2, *bn2, 1e-5)
    maps = make_input(case.replace(c=case.oup, h=size[2], w=size[3]))
    gate = make_input(case.replace(c=case.oup, h=1, w=1))
    for extras in ((None, None), (maps, gate)):
        out = world.call("ghost_apply", o.x, packed, *extras, *o.shape, *o.acts, has_primary)
        assert out.shape == size
    zero(world.call("ghost_primary_stats", o.x, o.w1, o.stride))
    shape = (case.m, case.ratio, case.d, o.stride)
    zero(world.call("ghost_cheap_stats", o.x, packed, *shape, *o.acts[:2], has_primary))
    for keep_u, batch in itertools.product((False, True), repeat=2):
        how = Training((batch, batch), make_slopes(case, (batch, not batch)))
        out, *found, u = train_forward(world, o, how, keep_u)
        assert out.shape == size
        zero(found)
        assert all((t.numel() == 0) == (not batch or (case.ratio == 1 and i > 1))
                   for i, t in enumerate(found))  # fmt: skip
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        moments = [t.to(wide) for t in (*bn1[2:], *bn2[2:])]
        grads = backward(world, o, how, out, u, moments)
        assert grads.pop("x").shape == o.x.shape
        zero(grads.values())
    # On the operator itself: it changes its arguments.
    running = [world.move(t.to(moments[0].dtype).clone()) for t in (*bn1[2:], *bn2[2:])]
    before, counts = [t.cpu() for t in running], [world.move(torch.tensor(3)) for _ in range(2)]
    moments = [world.move(t) for t in moments]
    world.ops.ghost_update_running_(
        *running[:2], counts[0], *moments[:2], 0.1, *running[2:], counts[1], *moments[2:], None, 0
    )
    for old, new in zip(before, running, strict=True):
        assert torch.equal(old, new.cpu())
    assert [int(t) for t in counts] == [4, 4]
