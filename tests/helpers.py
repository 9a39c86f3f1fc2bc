"""The oracle, the cases and the tolerance rule that every numeric test shares.

``oracle`` is the formula of a Ghost module in plain tensor arithmetic, without anything from
``ghost_ops``, so that it cannot share a mistake with the library's reference. It runs in float64.
``plain`` is what a PyTorch user would write; in the dtype of the case its error against the oracle
is PyTorch's own rounding error, which the tolerance rule allows twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "gelu_tanh")
ACT_CODE = {name: code for code, name in enumerate(ACTIVATIONS)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)
LAYOUTS = ("nchw", "nhwc")

# (spatial size, inp, oup, relu): the 22 distinct Ghost modules of GhostNet 1.0x at 224 x 224.
GHOSTNET = (
    (112, 16, 16, True), (112, 16, 16, False), (112, 16, 48, True),
    (56, 48, 24, False), (56, 24, 72, True), (56, 72, 24, False),
    (28, 72, 40, False), (28, 40, 120, True), (28, 120, 40, False), (28, 40, 240, True),
    (14, 240, 80, False), (14, 80, 200, True), (14, 200, 80, False), (14, 80, 184, True),
    (14, 184, 80, False), (14, 80, 480, True), (14, 480, 112, False), (14, 112, 672, True),
    (14, 672, 112, False),
    (7, 672, 160, False), (7, 160, 960, True), (7, 960, 160, False),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One Ghost module and one input."""

    n: int = 2
    c: int = 5
    h: int = 6
    w: int = 7
    oup: int = 8
    ratio: int = 2
    d: int = 3
    stride: int = 1
    k: int = 1
    groups: int = 1
    act1: str = "relu"
    act2: str = "relu"
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    bn_dtype: torch.dtype | None = None  # dtype of batch norm parameters; None: that of x
    seed: int = 0

    @property
    def m(self) -> int:
        return math.ceil(self.oup / self.ratio)

    @property
    def g(self) -> int:
        return self.m * (self.ratio - 1)

    def __str__(self) -> str:
        primary = f"k{self.k}s{self.stride}" + (f"g{self.groups}" if self.groups > 1 else "")
        bn = f"-bn_{str(self.bn_dtype)[6:]}" if self.bn_dtype else ""
        return (
            f"{self.n}x{self.c}x{self.h}x{self.w}-o{self.oup}r{self.ratio}d{self.d}-{primary}"
            f"-{self.act1}-{self.act2}-{self.layout}-{str(self.dtype)[6:]}{bn}"
        )

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def activation(name: str, x: Tensor) -> Tensor:
    """The activation for the oracle: by its formula, or by PyTorch's function if that is long."""
    match name:
        case "none":
            return x
        case "relu":
            return torch.where(x > 0, x, 0 * x.detach())
        case "relu6":
            return x.clamp(0, 6)
        case "leaky_relu":
            return torch.where(x > 0, x, 0.01 * x)
        case "silu":
            return x * torch.sigmoid(x)
        case "hardswish":
            return F.hardswish(x)
        case "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
    raise AssertionError(name)


def activation_module(name: str) -> nn.Module:
    modules = (nn.Sequential, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU)
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return dict(zip(ACTIVATIONS, modules, strict=False))[name]()


# Arguments at which the derivative of an activation jumps.
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


@dataclasses.dataclass
class Norm:
    """One batch norm; ``mean``/``var`` are the running statistics."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float = 1e-5


@dataclasses.dataclass
class Params:
    """The parameters of a Ghost module."""

    w1: Tensor  # [m, c / groups, k, k]
    bn1: Norm
    w2: Tensor  # [g, 1, d, d]
    bn2: Norm

    @classmethod
    def of(cls, module: nn.Module) -> Params:
        """The tensors of a module, not copies."""

        def norm(bn: nn.BatchNorm2d) -> Norm:
            return Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)

        primary, cheap = module.primary_conv, module.cheap_operation
        return cls(primary[0].weight, norm(primary[1]), cheap[0].weight, norm(cheap[1]))

    def tensors(self) -> dict[str, Tensor]:
        """The learnt tensors by name."""
        first = {"w1": self.w1, "gamma1": self.bn1.gamma, "beta1": self.bn1.beta}
        second = {"w2": self.w2, "gamma2": self.bn2.gamma, "beta2": self.bn2.beta}
        return {name: t for name, t in (first | second).items() if t is not None}

    def to(self, dtype: torch.dtype | None = None) -> Params:
        """Detached copies; those of ``tensors()`` require gradients. ``None`` keeps each dtype."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype or t.dtype, copy=True)

        def norm(bn: Norm) -> Norm:
            return Norm(leaf(bn.gamma), leaf(bn.beta), leaf(bn.mean), leaf(bn.var), bn.eps)

        copy = Params(leaf(self.w1), norm(self.bn1), leaf(self.w2), norm(self.bn2))
        for t in copy.tensors().values():
            t.requires_grad_()
        return copy


@dataclasses.dataclass
class Result:
    """The results of a forward; the variances are the batch's biased ones."""

    out: Tensor
    mean1: Tensor
    var1: Tensor
    mean2: Tensor
    var2: Tensor
    a: Tensor  # bn1(u), the argument of the first activation
    b: Tensor  # bn2(v)


def oracle(p: Params, x: Tensor, case: Case, training: bool) -> Result:
    """The formula of the module in the dtype of its arguments, which is float64 in every test."""

    def batch_norm(t: Tensor, bn: Norm) -> tuple[Tensor, Tensor, Tensor]:
        mean = t.mean((0, 2, 3))
        var = ((t - mean[:, None, None]) ** 2).mean((0, 2, 3))
        use_mean, use_var = (mean, var) if training else (bn.mean, bn.var)
        scale = (use_var + bn.eps).rsqrt()
        if bn.gamma is not None:
            scale = scale * bn.gamma
        out = (t - use_mean[:, None, None]) * scale[:, None, None]
        return (out if bn.beta is None else out + bn.beta[:, None, None]), mean, var

    u = F.conv2d(x, p.w1, None, case.stride, case.k // 2, 1, case.groups)
    a, mean1, var1 = batch_norm(u, p.bn1)
    y = activation(case.act1, a)
    if case.ratio == 1:
        none = y.new_empty(0)
        return Result(y, mean1, var1, none, none, a, none)
    # The depthwise convolution as a sum of shifted maps. y is padded with zeros, not bn1(u).
    radius = case.d // 2
    padded = F.pad(y, (radius,) * 4).repeat_interleave(case.ratio - 1, dim=1)
    height, width = y.shape[2:]
    v = sum(
        padded[:, :, i : i + height, j : j + width] * p.w2[:, 0, i, j][:, None, None]
        for i in range(case.d)
        for j in range(case.d)
    )
    b, mean2, var2 = batch_norm(v, p.bn2)
    out = torch.cat([y, activation(case.act2, b)], 1)[:, : case.oup]
    return Result(out, mean1, var1, mean2, var2, a, b)


def peer_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """PyTorch's convolution without oneDNN's faulty weight gradient (onednn_fault.py).

    A 1x1 convolution of stride s is replaced by one of stride 1 over every s-th row and column.
    """
    if weight.shape[2:] == (1, 1) and padding == 0:
        x, stride = x[:, :, ::stride, ::stride], 1
    return F.conv2d(x, weight, None, stride, padding, 1, groups)


def plain(p: Params, x: Tensor, case: Case, training: bool) -> Tensor:
    """The output by PyTorch's operators; running statistics do not change."""

    def bn(t: Tensor, n: Norm) -> Tensor:
        mean, var = (None, None) if training else (n.mean, n.var)
        return F.batch_norm(t, mean, var, n.gamma, n.beta, training, 0.0, n.eps)

    u = peer_conv2d(x, p.w1, case.stride, case.k // 2, case.groups)
    y = activation_module(case.act1)(bn(u, p.bn1))
    if case.ratio == 1:
        return y
    v = F.conv2d(y, p.w2, None, 1, case.d // 2, 1, case.m)
    z = activation_module(case.act2)(bn(v, p.bn2))
    return torch.cat([y, z], 1)[:, : case.oup]


# --- making modules and inputs ----------------------------------------------------------------


def make_module(case: Case, cls: type[nn.Module] | None = None) -> nn.Module:
    """A seeded module of ``cls`` (the fused one by default) with non-trivial batch norms."""
    if cls is None:
        from ghost_ops import FusedGhostModule as cls
    torch.manual_seed(case.seed)
    module = cls(case.c, case.oup, case.k, case.ratio, case.d, case.stride, relu=False)
    if case.groups > 1:
        module.primary_conv[0] = nn.Conv2d(
            case.c, case.m, case.k, case.stride, case.k // 2, groups=case.groups, bias=False
        )
    module.primary_conv[2] = activation_module(case.act1)
    module.cheap_operation[2] = activation_module(case.act2)
    with torch.no_grad():
        for branch in (module.primary_conv, module.cheap_operation):
            conv, bn = branch[0], branch[1]
            fan_in = conv.weight[0].numel() if conv.weight.numel() else 1
            conv.weight.normal_(0, fan_in**-0.5)
            if fan_in < 4:  # a batch norm may divide by the size of the weight: keep it off zero
                conv.weight.add_(0.5 * conv.weight.sign())
            sign = torch.where(torch.rand_like(bn.weight) < 0.2, -1.0, 1.0)  # some scales negative
            bn.weight.uniform_(0.5, 1.5).mul_(sign)
            bn.bias.normal_(0, 0.5)
            bn.running_mean.normal_(0, 0.3)
            bn.running_var.uniform_(0.3, 1.5)
    module = module.to(case.dtype)
    if case.bn_dtype is not None:
        module.primary_conv[1].to(case.bn_dtype)
        module.cheap_operation[1].to(case.bn_dtype)
    return module


def make_input(case: Case, extra_seed: int = 1) -> Tensor:
    """x [n, c, h, w] of the case's dtype and layout."""
    gen = torch.Generator().manual_seed(1000 * case.seed + extra_seed)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=gen, dtype=torch.float64)
    return with_layout(x.to(case.dtype), case.layout)


def with_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def kink_distance(case: Case, module: nn.Module, x: Tensor, training: bool) -> float:
    """The smallest distance of a pre-activation from a kink of its activation."""
    with torch.no_grad():
        result = oracle(Params.of(module).to(torch.float64), x.double(), case, training)
    distance = math.inf
    for name, t in ((case.act1, result.a), (case.act2, result.b)):
        for kink in KINKS.get(name, ()):
            if t.numel():
                distance = min(distance, (t - kink).abs().min().item())
    return distance


def make_smooth(case: Case, training: bool, margin: float = 2e-5) -> tuple[Case, nn.Module, Tensor]:
    """Module and input whose gradients do not depend on the last bit of a pre-activation.

    At a kink the derivative jumps: a rounding error there changes a gradient by an amount of order
    one. Draws with a pre-activation near a kink are rejected. In low precision every draw has one,
    and the best of eight is taken.
    """
    if {case.act1, case.act2}.isdisjoint(KINKS):
        return case, make_module(case), make_input(case)
    low_precision = case.dtype in (torch.bfloat16, torch.float16)
    draws: list[tuple[float, int]] = []
    for seed in range(case.seed, case.seed + (8 if low_precision else 200)):
        draw = case.replace(seed=seed)
        distance = kink_distance(draw, make_module(draw), make_input(draw), training)
        draws.append((distance, -seed))
        if distance > (0.02 if low_precision else margin):
            break
    else:
        assert low_precision, f"no draw of {case} stays {margin} away from every kink"
    case = case.replace(seed=-max(draws)[1])
    return case, make_module(case), make_input(case)


def sound(case: Case) -> Case:
    """The case; in float32 if PyTorch's own convolution has a fault for it.

    A bfloat16 convolution with k > 1 and stride 2 on a map of width 1 returns uninitialised memory
    (oneDNN, seen in torch 2.13). Both ``plain`` and the module would run that convolution.
    """
    if case.k > 1 and case.stride > 1 and case.w == 1 and case.dtype == torch.bfloat16:
        return case.replace(dtype=torch.float32)
    return case


# --- the tolerance rule -----------------------------------------------------------------------

# The floor, as a multiple of the dtype's epsilon and of the largest value compared. It is needed if
# PyTorch's own error is nearly zero: for one channel, one pixel, or float64, the dtype of the
# oracle. Measured over the grids of test_forward.py and test_training.py with AVX-512,
# AVX2 and generic kernels.
FLOOR_ULPS = {
    torch.float64: 64.0,
    torch.float32: 8.0,
    torch.bfloat16: 2.0,
    torch.float16: 2.0,
}


def assert_close(
    got: Tensor,
    want: Tensor,
    eager: Tensor,
    what: str = "out",
    *,
    rms: bool = False,
    slack: float = 1.0,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """``|got - want| <= 2 |eager - want| + floor``, in the maximum or the rms norm.

    Args:
        want: the float64 result of the oracle.
        eager: PyTorch's result in the dtype of ``got``.
        rms: compare root mean squares; for tensors so large that a pre-activation sits on a kink.
        slack: factor of the floor.
        scale: a tensor as large as the terms of ``want``, if these cancel.
        dtype: the dtype that sets the floor; that of ``got`` if None.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} not {tuple(want.shape)}"
    if not want.numel():
        return
    dtype = dtype or got.dtype
    got, want, eager = got.detach().double(), want.detach().double(), eager.detach().double()
    assert torch.isfinite(want).all(), f"{what}: the oracle is not finite"
    assert torch.isfinite(got).all(), f"{what}: not finite"

    def size(t: Tensor) -> float:
        return (t.square().mean().sqrt() if rms else t.abs().max()).item()

    error, eager_error = size(got - want), size(eager - want)
    largest = max(size(want), size(scale.detach().double()) if scale is not None else 0.0)
    floor = slack * FLOOR_ULPS[dtype] * torch.finfo(dtype).eps * largest
    assert error <= 2 * eager_error + floor, (
        f"{what}: error {error:.3g}, PyTorch's own {eager_error:.3g}, floor {floor:.3g}, "
        f"scale {largest:.3g}"
    )


# --- machines ---------------------------------------------------------------------------------

L2_BYTES = (256 << 10, 512 << 10, 1 << 20, 2 << 20)
# (lanes, registers) of instruction sets; "narrow" is invented, to test a plan for 12 registers.
VECTORS = {"avx512": (16, 32), "avx2": (8, 16), "neon": (4, 32), "narrow": (4, 12)}


# --- grids ------------------------------------------------------------------------------------


def product(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The full grid."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def covering(axes: Mapping[str, Sequence[Any]], strength: int = 2) -> list[dict[str, Any]]:
    """A small grid in which every combination of ``strength`` axes occurs (greedy, seeded)."""
    names = list(axes)
    missing: dict[tuple[Any, ...], None] = {}  # an ordered set
    for group in itertools.combinations(names, strength):
        for values in itertools.product(*(range(len(axes[name])) for name in group)):
            missing[tuple(zip(group, values, strict=True))] = None
    gen = torch.Generator().manual_seed(0)
    rows = []
    while missing:
        best, best_gain = None, -1
        start = dict(next(iter(missing)))
        for _ in range(12):
            row = {
                name: start[name]
                if name in start
                else int(torch.randint(len(axes[name]), (), generator=gen))
                for name in names
            }
            gain = sum(combo in missing for combo in combos(row, names, strength))
            if gain > best_gain:
                best, best_gain = row, gain
        assert best is not None
        for combo in combos(best, names, strength):
            missing.pop(combo, None)
        rows.append({name: axes[name][best[name]] for name in names})
    return rows


def combos(
    row: Mapping[str, int], names: Sequence[str], strength: int
) -> Iterable[tuple[tuple[str, int], ...]]:
    for group in itertools.combinations(names, strength):
        yield tuple((name, row[name]) for name in group)


# --- backends and comparisons -----------------------------------------------------------------


def ops_of(backend: str) -> Any:
    """The namespace that holds the operators of a backend, eager or native."""
    if backend.startswith("native"):
        return torch.ops.ghost_ops
    from ghost_ops.ops import eager as eager_ops

    return eager_ops


def reference_like(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that runs the children of a module one by one, with their present parameters."""

    def forward(x: Tensor) -> Tensor:
        y = module.primary_conv(x)
        return torch.cat([y, module.cheap_operation(y)], 1)[:, : module.oup]

    return forward


def close(a: Tensor, b: Tensor, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m: f"{what}: {m}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def check_update_running(
    update: Callable[..., None],
    dtype: torch.dtype,
    stat: torch.dtype,
    count: int,
    *,
    missing: str = "",
    device: str = "cpu",
) -> None:
    """``ghost_update_running_`` on two batch norms: momentum 0.25, and the average of 4 batches.

    Args:
        dtype, stat: dtypes of the running statistics and of the batch's statistics.
        count: number of values per channel in the batch.
        missing: "statistics1", "batches2" and so on: the tensors that a norm does not have.
    """
    eps = torch.finfo(dtype).eps
    arguments: list[Any] = []
    wanted: list[tuple[Tensor, Tensor]] = []
    for which, channels, momentum in (("1", 300, 0.25), ("2", 5, None)):
        running = [torch.randn(channels).to(device, dtype), torch.rand(channels).to(device, dtype)]
        stats = [torch.randn(channels).to(device, stat), torch.rand(channels).to(device, stat)]
        batches = torch.tensor(3, device=device)
        if missing == f"batches{which}":
            momentum = 0.25
        if missing != f"statistics{which}":
            factors = (1.0, count / (count - 1) if count > 1 else 1.0)
            for old, new, factor in zip(running, stats, factors, strict=True):
                blended = 0.75 * old.double() + 0.25 * factor * new.double()
                wanted.append((old, blended if count else old.double().clone()))
        if missing != f"batches{which}":
            wanted.append((batches, torch.tensor(4, device=device)))
        arguments += running if missing != f"statistics{which}" else [None, None]
        arguments += [None if missing == f"batches{which}" else batches, *stats, momentum]
    update(*arguments, count)
    for got, want in wanted:
        torch.testing.assert_close(got.to(want.dtype), want, rtol=2 * eps, atol=2 * eps)


# --- observation ------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Appends the names of the operators that run, such as "aten::add"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the operators that run inside the block."""
    with Recorder() as recorder:
        yield recorder.names


def our_launches(plan: Any) -> int:
    """The kernel launches that a ``NetworkPlan`` predicts for the operators of ghost_ops."""
    from ghost_ops.planner.network import OWN_KINDS

    return sum(row.launches for row in plan.rows if row.kind in OWN_KINDS)


def autograd_nodes(out: Tensor) -> Counter[str]:
    """How often each kind of autograd node is in the graph of a tensor."""
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return Counter(type(node).__name__ for node in found)


# --- tensors that lie oddly in memory: the same values, or a part of them expanded ------------


def expanded(x: Tensor) -> Tensor:
    return x[:1, :1, :1, :1].expand_as(x)


def expanded_rows(x: Tensor) -> Tensor:
    return x[:, :, :1].expand_as(x)


def other_format(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def sliced_channels(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, c + 3, h, w), float("nan"), dtype=x.dtype)
    wide[:, 1 : c + 1] = x
    return wide[:, 1 : c + 1]


def sliced_columns(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, c, h, 2 * w), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def unaligned(x: Tensor) -> Tensor:
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    return flat[1:].view_as(x)
