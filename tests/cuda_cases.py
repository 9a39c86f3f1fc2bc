"""Checks of the CUDA operators that run both on the emulator and on a GPU.

A ``World`` selects the operators: ``torch.ops.ghost_emu`` on CPU tensors (the kernel sources under
the block emulator) or ``torch.ops.ghost_ops`` on CUDA tensors. Operands are created on the CPU,
results are copied back to it; the oracle and the tolerance rule are those of ``helpers``.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    same_bits,
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
    """torch.empty returns NaN, so that elements that a kernel does not write are found."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


@dataclasses.dataclass(frozen=True)
class World:
    """The operators, and the device of their arguments."""

    ops: Any
    device: str

    def move(self, value: Any) -> Any:
        """Copies a tensor to the device, with its strides. Returns other values unchanged."""
        if not isinstance(value, Tensor) or self.device == "cpu":
            return value
        if not value.numel():
            return value.to(self.device)
        # A plain copy would make expanded and sliced tensors dense.
        reach = (s * (n - 1) for n, s in zip(value.shape, value.stride(), strict=True))
        memory = value.as_strided((1 + sum(reach),), (1,), value.storage_offset())
        return memory.to(self.device).as_strided(value.shape, value.stride())

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls an operator. Returns its results on the CPU."""
        moved = [self.move(a) for a in arguments]
        with poisoned_memory():
            result = getattr(self.ops, name)(*moved)
        if isinstance(result, Tensor):
            return result.cpu()
        return result if result is None else tuple(t.cpu() for t in result)

    def pack(self, *arguments: Any) -> Tensor:
        """Packed parameters, on the device. Their layout depends on the backend."""
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
    """Parameters and input of a module, as arguments of the operators."""

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
    """Parameters and input of the PyTorch peer; w1 and x rounded to TF32 if the kernel does so."""
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
    """Asserts that the output has the memory format of x."""
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
        acts = Training(slopes=slopes).codes(o)
        got = world.call(name, *first, packed, extra, factor, *o.shape, *acts, o.w1 is not None)
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
        """Whether ``helpers.oracle`` supports it."""
        return self.batch[0] == self.batch[1] and self.slopes == (None, None)

    def codes(self, o: Operands) -> tuple[int, float, int, float]:
        acts = o.acts[0], o.acts[2]
        first, second = (
            PRELU if s is not None else c for s, c in zip(self.slopes, acts, strict=True)
        )
        return first, SLOPE, second, SLOPE


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
    """Output and gradients; in float64 of ``oracle`` if it supports ``how``."""
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
    """Asserts that statistics, sums of many rounded terms, are close. ``spread``: the size of the
    terms, if they cancel."""
    eps = torch.finfo(dtype).eps
    scale = max(
        (t.abs().max().item() for t in (want, spread) if t is not None and t.numel()), default=0.0
    )
    atol = max(16 * eps, 1e-6 * (eps > 1e-10)) * scale
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol, msg=what)


def make_grad(o: Operands, size: torch.Size, style: str) -> Tensor:
    """grad_out [N, oup, Ho, Wo]; ``style`` selects its strides."""
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


# Names of the results of ghost_backward, and the bits of NEEDS that request them.
GRADIENTS = {
    "x": NEEDS.DX,
    "w1": NEEDS.DW1,
    "gamma1": NEEDS.NORM1,
    "beta1": NEEDS.NORM1,
    "slopes1": NEEDS.PRELU1,
    "w2": NEEDS.DW2,
    "gamma2": NEEDS.NORM2,
    "beta2": NEEDS.NORM2,
    "slopes2": NEEDS.PRELU2,
}


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
    arguments = (o.x, o.w1, *norms[0], o.p.w2.detach(), *norms[1], o.case.oup, o.stride)
    return world.call("ghost_train_forward", *arguments, *how.codes(o), keep_u)


def backward(
    world: World,
    o: Operands,
    how: Training,
    grad: Tensor,
    u: Tensor | None,
    moments: list[Tensor],
    needs: int = NEEDS.ALL,
    means: tuple[Tensor | None, Tensor | None] = (None, None),
) -> dict[str, Tensor]:
    """Results of ``ghost_backward`` by name. Those that are not needed must be empty, and are left
    out."""
    bn1, bn2 = norm_arguments(o)
    norms = [
        [*bn[:2], *statistics, 1e-5, how.slopes[i], means[i]]
        for i, (bn, statistics) in enumerate([(bn1, moments[:2]), (bn2, moments[2:])])
    ]
    arguments = (grad, o.x, u, o.w1, *norms[0], o.p.w2.detach(), *norms[1], o.stride)
    found = world.call("ghost_backward", *arguments, *how.codes(o), *how.batch, needs)
    named = dict(zip(GRADIENTS, found, strict=True))
    missing = {"w1": o.w1, "slopes1": how.slopes[0], "slopes2": how.slopes[1]}
    kept = {}
    for name, t in named.items():
        if needs & GRADIENTS[name] and not (name in missing and missing[name] is None):
            kept[name] = t
        else:
            assert t.numel() == 0, name
    return kept


def backward_in_three(
    world: World, o: Operands, how: Training, grad: Tensor, u: Tensor | None, moments: list[Tensor]
) -> dict[str, Tensor]:
    """The same in three calls, which end where several processes would add up their sums."""
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
        x = o.x.double()
        if how.plain:
            exact = oracle(reference, x, case, batch[0])
        else:
            exact = layers(reference, x, case, how)
    grad = make_grad(o, exact.out.shape, grad_style)
    want_out, want = gradients(reference, o.x.double(), grad.double(), case, how)
    peer_p, peer_x = as_tensor_cores_see_it(o, use_tf32)
    eager_out, eager = gradients(peer_p, peer_x, grad, case, how)
    kinked = dtype in LOW and not (
        {case.act1, case.act2}.isdisjoint(KINKS) and how.slopes == (None, None)
    )
    rms, slack = rms or kinked, 4.0
    if kinked:
        # The derivative jumps: a share eps of the pre-activations rounds to the other side, each
        # with an error of the full size of the jump. Smooth activations keep the strict rule.
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
        label, how_close = f"gradient of {name}", {"rms": rms, "slack": slack, "dtype": dtype}
        assert_close(found[name], want[name], eager[name], label, scale=size, **how_close)
        got[name] = found[name]
    return got


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    """Asserts that named results have the same bits."""
    for name in a:
        assert same_bits(a[name], b[name]), f"{name} differs {what}"
