"""Promise: the operators between Ghost modules give the numbers of PyTorch's layers.

Depthwise convolutions with and without batch norm, squeeze-and-excitation, stem, pooling.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import World
from cuda_layer_cases import check_gate, check_stem
from helpers import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    activation,
    assert_close,
    covering,
    with_layout,
)
from torch import Tensor

from ghost_ops import activations, ops
from ghost_ops.autograd import layers
from ghost_ops.conventions import compute_dtype
from ghost_ops.ops import depthwise, ghost
from ghost_ops.ops import gate as gate_ops
from ghost_ops.ops.define import SCHEMAS

DEPTHWISE = covering(
    {
        "shape": [
            *((2, 5, 9, 7), (1, 20, 14, 14), (3, 16, 7, 7), (1, 1, 6, 5)),
            *((2, 33, 12, 35), (1, 3, 1, 1), (1, 17, 2, 40)),
        ],
        "k": [1, 3, 5, 7],
        "stride": [1, 2],
        "act": list(ACTIVATIONS),
        "layout": list(LAYOUTS),
        "dtype": list(DTYPES),
    }
)


GATES = covering(
    {
        "shape": [(2, 5, 3, 7), (3, 72, 6, 6)],
        "reduced": [4, 37],
        "act": ["relu", "silu"],
        "gate": [ops.HARD_SIGMOID, ops.SIGMOID],
        "sums": [False, True],
        "layout": list(LAYOUTS),
        "dtype": list(DTYPES),
    }
)
STEMS = covering(
    {
        "shape": [(2, 3, 9, 12), (1, 1, 4, 4)],
        "out_channels": [2, 16],
        "stride": [1, 2],
        "act": ["relu", "silu"],
        "layouts": [("nchw", "nchw"), ("nhwc", "nhwc"), ("nchw", "nhwc")],
        "dtype": list(DTYPES),
    }
)


def ids(row: dict) -> str:
    shape = "x".join(map(str, row["shape"]))
    return f"{shape}-" + "-".join(str(v) for k, v in row.items() if k != "shape")


@pytest.mark.parametrize("row", DEPTHWISE, ids=ids)
def test_depthwise_conv(every_isa: str, row: dict) -> None:
    dtype, k, stride, act = row["dtype"], row["k"], row["stride"], row["act"]
    channels = row["shape"][1]
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(row["shape"], generator=gen, dtype=torch.float64).to(dtype)
    x = with_layout(x, row["layout"])
    wide = compute_dtype(dtype)
    weight = torch.randn(channels, 1, k, k, generator=gen, dtype=torch.float64).to(wide)
    shift = torch.randn(channels, generator=gen, dtype=torch.float64).to(wide)
    got = ops.depthwise_conv(x, weight, shift, stride, activations.CODES[act])
    u = F.conv2d(x.double(), weight.double(), shift.double(), stride, k // 2, 1, channels)
    want = activation(act, u)
    eager = activation(act, F.conv2d(x.to(wide), weight, shift, stride, k // 2, 1, channels))
    assert got.dtype == dtype
    assert got.stride() == torch.empty_like(want).stride() or row["layout"] == "nhwc"
    if row["layout"] == "nhwc" and channels > 1:
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got, want, eager.to(dtype), scale=want.abs().max() + u.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_depthwise_conv_edges(every_isa: str, dtype: torch.dtype, k: int, layout: str) -> None:
    """Widths and channels just below, at and above the tiles of every kernel."""
    gen = torch.Generator().manual_seed(5)
    wide = compute_dtype(dtype)
    shapes = [(1, 3, 5, w) for w in range(1, 20)]  # narrow rows: two planes share a vector
    shapes += [(2, c, 3, 9) for c in (2, 4, 7, 8, 9, 15, 16, 17, 31, 33)]
    shapes += [(1, 2, 31, w) for w in (28, 33, 57, 63, 66, 130)] + [(1, 5, 29, 6), (1, 17, 4, 15)]
    for shape in shapes:
        c = shape[1]
        x = torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)
        weight = torch.randn(c, 1, k, k, generator=gen, dtype=torch.float64).to(wide)
        shift = torch.randn(c, generator=gen, dtype=torch.float64).to(wide)
        for stride in (1, 2):
            want = F.conv2d(x.double(), weight.double(), shift.double(), stride, k // 2, 1, c)
            eager = F.conv2d(x.to(wide), weight, shift, stride, k // 2, 1, c).to(dtype)
            got = ops.depthwise_conv(with_layout(x, layout), weight, shift, stride)
            assert_close(got, want, eager, f"{shape} stride {stride}", scale=want.abs().max())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5])
def test_depthwise_conv_padding_is_skipped(every_isa: str, k: int, stride: int) -> None:
    """NaN in one plane does not reach its neighbours in the same or the next vector."""
    for width in (5, 6, 7, 13, 14, 28, 33):
        for c in (2, 3, 16, 20):
            x = torch.ones(1, c, 14, width)
            x[:, ::2] = torch.nan
            weight, shift = torch.ones(c, 1, k, k), torch.zeros(c)
            for layout in LAYOUTS:
                got = ops.depthwise_conv(with_layout(x, layout), weight, shift, stride)
                assert got[:, ::2].isnan().all()
                want = F.conv2d(x[:, 1::2], weight[1::2], None, stride, k // 2, 1, c // 2)
                assert torch.equal(got[:, 1::2], want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squeeze_excite_edges(every_isa: str, dtype: torch.dtype, layout: str) -> None:
    """Channels, reduced channels, pixels and images just below, at and above the tiles."""
    gen = torch.Generator().manual_seed(6)
    wide = compute_dtype(dtype)
    cases = [((1, c, 2, 5), r) for c, r in ((1, 1), (3, 2), (8, 7), (15, 9), (17, 16), (67, 33))]
    cases += [((n, 20, 3, 3), 13) for n in (2, 3, 4, 7)]
    cases += [((1, 18, 1, p), 8) for p in (1, 3, 8, 15, 16, 17, 31, 33, 49, 65, 130)]
    for shape, reduced in cases:
        x = with_layout(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype), layout)
        p = gate_parameters(shape[1], reduced, wide)

        def formula(x: Tensor, *p: Tensor) -> Tensor:
            s = F.relu(x.mean((2, 3)) @ p[0].t() + p[1]) @ p[2] + p[3]
            return x * torch.sigmoid(s)[:, :, None, None]

        want = formula(x.double(), *(t.double() for t in p))
        eager = formula(x.to(wide), *p).to(dtype)
        ops.squeeze_excite_(x, *p, activations.RELU, 0.0, ops.SIGMOID)
        assert_close(x, want, eager, f"{shape} {reduced}", scale=want.abs().max())


def gate_parameters(channels: int, reduced: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(2)
    shapes = ((reduced, channels), (reduced,), (reduced, channels), (channels,))
    return tuple(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)


@pytest.mark.parametrize("gate", [ops.HARD_SIGMOID, ops.SIGMOID])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "reduced"), [((2, 5, 3, 7), 4), ((5, 72, 6, 6), 20), ((1, 140, 7, 7), 36)]
)
def test_squeeze_excite(
    every_isa: str, shape: tuple, reduced: int, dtype: torch.dtype, layout: str, gate: int
) -> None:
    gen = torch.Generator().manual_seed(3)
    x = with_layout(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype), layout)
    w_reduce, b_reduce, w_expand, b_expand = gate_parameters(
        shape[1], reduced, compute_dtype(dtype)
    )

    def formula(x: Tensor, *p: Tensor) -> Tensor:
        hidden = F.silu(x.mean((2, 3)) @ p[0].t() + p[1])
        s = hidden @ p[2] + p[3]
        s = F.relu6(s + 3) / 6 if gate == ops.HARD_SIGMOID else torch.sigmoid(s)
        return x * s[:, :, None, None]

    p = (w_reduce, b_reduce, w_expand, b_expand)
    want = formula(x.double(), *(t.double() for t in p))
    eager = formula(x.to(compute_dtype(dtype)), *p).to(dtype)
    version = x._version
    ops.squeeze_excite_(x, *p, activations.SILU, 0.0, gate)
    assert x._version > version  # so that autograd and caches see the change
    assert_close(x, want, eager)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("shape", [(1, 200, 14, 14), (1, 21, 33, 57), (3, 17, 9, 7)], ids=str)
def test_threads_change_no_bit(every_isa: str, shape: tuple, k: int) -> None:
    """The same bits for any number of threads and images, which divide the work differently."""
    x = torch.randn(shape)
    p = gate_parameters(shape[1], 48, torch.float32)
    weight, shift = torch.randn(shape[1], 1, k, k), torch.randn(shape[1])
    before = torch.get_num_threads()

    def results(threads: int, images: Tensor) -> list[Tensor]:
        torch.set_num_threads(threads)
        found = []
        for layout in LAYOUTS:
            y = with_layout(images, layout).clone(memory_format=torch.preserve_format)
            ops.squeeze_excite_(y, *p)
            found.append(y.contiguous())
            for stride in (1, 2):
                y = with_layout(images, layout)
                found.append(ops.depthwise_conv(y, weight, shift, stride).contiguous())
        return found

    one, two, three = (results(threads, x) for threads in (1, 2, 3))
    torch.set_num_threads(before)
    last = results(1, x[-1:])
    torch.set_num_threads(before)
    for a, b, c, d in zip(one, two, three, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        if every_isa != "eager":
            assert torch.equal(a[-1:], d)


def test_special_values(backend: str) -> None:
    """NaN and infinities reach the same pixels as in PyTorch; padding is not multiplied."""
    x = torch.zeros(1, 2, 8, 8)
    x[0, 0, 3, 3], x[0, 1, 0, 0] = torch.nan, torch.inf
    weight, shift = torch.ones(2, 1, 3, 3), torch.zeros(2)
    for stride in (1, 2):
        for layout in LAYOUTS:
            got = ops.depthwise_conv(
                with_layout(x, layout), weight, shift, stride, activations.RELU
            )
            want = F.relu(F.conv2d(x, weight, shift, stride, 1, 1, 2))
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())


CONTIGUOUS = ("plane_affine", "plane_dot")
LAYER_OPERATORS = [n for n in SCHEMAS if n not in ghost.NAMES and not n.startswith("sync_")]


def packed(channels: int, intrinsic: int, ghosts: int | None = None) -> Tensor:
    """Packed parameters of a Ghost module of ratio 2, or of ratio 1 without ghosts."""
    none = (None,) * 4
    size = 1 if ghosts == 0 else 3
    w2 = torch.randn(intrinsic if ghosts is None else ghosts, 1, size, size)
    w1 = torch.randn(intrinsic, channels, 1, 1)
    return torch.ops.ghost_ops.ghost_pack(w1, *none, 1e-5, w2, *none, 1e-5)


@pytest.mark.parametrize("row", GATES, ids=ids)
def test_squeeze_excite_gate(row: dict) -> None:
    """The composition of PyTorch operators that runs without a CUDA kernel."""
    check_gate(World(torch.ops.ghost_ops, "cpu"), row)


@pytest.mark.parametrize("row", STEMS, ids=ids)
def test_conv_stem(row: dict) -> None:
    check_stem(World(torch.ops.ghost_ops, "cpu"), row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_conv_sums(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 9, 7).to(dtype)
    weight, shift = (torch.randn(s, dtype=compute_dtype(dtype)) for s in ((6, 1, 3, 3), (6,)))
    out, sums = ops.depthwise_conv_sums(x, weight, shift, 2, activations.RELU)
    want = ops.depthwise_conv(x, weight, shift, 2, activations.RELU)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(sums.sum(1).double(), out.double().sum((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_apply_gated(backend: str, layout: str) -> None:
    x, gate = with_layout(torch.randn(2, 6, 9, 7), layout), torch.rand(2, 6)
    numbers = (4, 8, 2, 3, 1, 1, 0.0, 1, 0.0, True)
    tensors = (packed(6, 4), None, None)
    got = ops.ghost_apply_gated(x, gate, *tensors, *numbers)
    want = torch.ops.ghost_ops.ghost_apply(x * gate[:, :, None, None], *tensors, *numbers)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", LAYER_OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name: str, layout: str) -> None:
    if layout == "nhwc" and name in CONTIGUOUS:
        pytest.skip("contiguous only")
    x, weight = with_layout(torch.randn(2, 6, 5, 7), layout), torch.randn(6, 1, 3, 3)
    gamma, mean, var = torch.rand(6), torch.randn(6), torch.rand(6)
    gate = (*gate_parameters(6, 4, torch.float32), 1, 0.0, 0)
    x4 = x[:, :4].clone(memory_format=torch.preserve_format)
    residual = with_layout(torch.randn(2, 7, 3, 4), layout)
    arguments = {
        "depthwise_conv": (x, weight, torch.randn(6), 3, 2, 1, 0.0),
        "depthwise_norm": (x, weight, gamma, None, None, None, 1e-5, True, 2, 1, 0.0),
        "depthwise_norm_backward": (
            *(torch.randn(2, 6, 3, 4), x, weight, gamma, None, mean, var),
            *(1e-5, True, 2, 1, 0.0, True, True),
        ),
        "plane_affine": (x, torch.randn(2, 6), torch.randn(2, 6)),
        "plane_dot": (x, torch.randn(2, 6, 5, 7)),
        "squeeze_excite_": (x, *gate),
        "depthwise_conv_sums": (x, weight, torch.randn(6), 3, 2, 1, 0.0),
        "squeeze_excite_gate": (x, torch.randn(2, 3, 6), *gate),
        "conv_stem": (
            *(x4, torch.randn(8, 4, 3, 3), torch.randn(8)),
            *(2, 1, 0.0, layout == "nhwc"),
        ),
        "ghost_apply_pooled": (x, packed(6, 4, ghosts=0), 4, 1, 0.0),
        "ghost_apply_gated": (
            *(x, torch.rand(2, 6), packed(6, 4), None, None),
            *(4, 8, 2, 3, 1, 1, 0.0, 1, 0.0, True),
        ),
        "ghost_conv_apply": (
            *(x, packed(6 * 9, 4), residual),
            *(3, 1, False, 4, 7, 2, 3, 2, 1, 0.0, 1, 0.0),
        ),
    }[name]
    torch.library.opcheck(getattr(torch.ops.ghost_ops, name).default, arguments)


NORMS = ("batch", "frozen", "none")
TRAINED = covering(
    {
        "shape": [
            *((2, 5, 9, 7), (3, 20, 14, 14), (4, 16, 7, 7), (2, 1, 6, 5)),
            *((2, 33, 12, 35), (3, 3, 1, 1), (2, 17, 2, 40), (2, 2, 33, 66)),
        ],
        "k": [1, 3, 5, 7],
        "stride": [1, 2],
        "norm": NORMS,
        "affine": [True, False],
        "act": ["none", "relu", "silu"],
        "layout": list(LAYOUTS),
        "dtype": list(DTYPES),
    }
)


class Trained:
    """Arguments of ``depthwise_norm`` for a row of TRAINED, and its formula."""

    def __init__(self, row: dict) -> None:
        dtype, k, (n, c, h, w) = row["dtype"], row["k"], row["shape"]
        self.stride, self.act = row["stride"], row["act"]
        wide, gen = compute_dtype(dtype), torch.Generator().manual_seed(1)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=gen, dtype=torch.float64)

        self.x = with_layout(normal(n, c, h, w).to(dtype), row["layout"])
        self.weight = normal(c, 1, k, k).to(dtype)
        size = (n, c, (h - 1) // self.stride + 1, (w - 1) // self.stride + 1)
        self.grad = with_layout(normal(*size).to(dtype), row["layout"])
        self.batch_stats, has_norm = row["norm"] == "batch", row["norm"] != "none"
        affine = has_norm and row["affine"]
        self.gamma, self.beta = (normal(c).to(wide) if affine else None for _ in range(2))
        self.mean = self.var = None
        if row["norm"] == "frozen":
            self.mean, self.var = normal(c).to(wide), normal(c).square().add(0.5).to(wide)
        code = activations.CODES[self.act]
        self.numbers = 0.01, self.batch_stats, self.stride, code, activations.DEFAULT_SLOPE
        self.tensors = self.x, self.weight, self.gamma, self.beta

    def formula(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """u, out, and the gradients of x, weight, gamma and beta, in a dtype."""
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in self.tensors]
        x, weight, gamma, beta = leaves
        u = F.conv2d(x, weight, None, self.stride, weight.size(-1) // 2, 1, weight.size(0))
        y = u
        if self.batch_stats or self.mean is not None:
            stats = [None if t is None else t.to(dtype) for t in (self.mean, self.var)]
            y = F.batch_norm(u, *stats, gamma, beta, self.batch_stats, 0.0, 0.01)
        out = activation(self.act, y)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(out, wanted, self.grad.to(dtype)))
        return u, out, [None if t is None else next(found) for t in leaves]


def trained_functions(backend: str) -> tuple:
    if backend == "eager":
        return depthwise.eager_depthwise_norm, depthwise.eager_depthwise_norm_backward
    return ops.depthwise_norm, ops.depthwise_norm_backward


@pytest.mark.parametrize("row", TRAINED, ids=ids)
def test_depthwise_norm(every_isa: str, row: dict) -> None:
    case, dtype = Trained(row), row["dtype"]
    if case.batch_stats and case.grad.numel() == case.grad.size(1):
        pytest.skip("one value per channel")
    forward, backward = trained_functions(every_isa)
    out, mean, var = forward(*case.tensors, case.mean, case.var, *case.numbers)
    u, want, grads = case.formula(torch.float64)
    _, eager, eager_grads = case.formula(compute_dtype(dtype))
    assert out.dtype == dtype
    assert_close(out, want, eager.to(dtype), scale=want.abs().max() + u.abs().max())
    stats = case.mean, case.var
    if case.batch_stats:
        stats = mean, var
        assert_close(mean, u.mean((0, 2, 3)), u.float().mean((0, 2, 3)), "mean", scale=u)
        wanted = u.var((0, 2, 3), correction=0)
        assert_close(var, wanted, wanted.float(), "var", slack=4.0)
    else:
        assert mean.numel() == var.numel() == 0
    got = backward(case.grad, *case.tensors, *stats, *case.numbers, True, True)
    assert got[0].dtype == dtype
    assert got[0].stride() == case.x.stride()
    # dweight, dgamma and dbeta are sums over the batch whose terms cancel.
    scales = [None, *((g.double().abs() * 8).amax() * g.numel() ** 0.5 for g in [case.grad] * 3)]
    names = ("dx", "dweight", "dgamma", "dbeta")
    for name, a, b, c, scale in zip(names, got, grads, eager_grads, scales, strict=True):
        if b is None:
            assert name in ("dgamma", "dbeta")
            continue
        low = dtype if name == "dx" else a.dtype
        assert_close(a, b, c.to(low), name, scale=scale, slack=4.0)
    # A gradient that is not needed is empty; the others do not change.
    without = backward(case.grad, *case.tensors, *stats, *case.numbers, False, False)
    assert without[0].numel() == without[1].numel() == 0
    for a, b in zip(without[2:], got[2:], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        backward(case.grad, *case.tensors, *stats, *case.numbers, True, False)[0], got[0]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_norm_is_deterministic(native: str, layout: str) -> None:
    """The same bits for any number of threads."""
    x = with_layout(torch.randn(3, 35, 20, 18, generator=torch.Generator().manual_seed(2)), layout)
    weight, gamma = torch.randn(35, 1, 5, 5), torch.rand(35)
    numbers = (1e-5, True, 2, activations.RELU, 0.0)
    results = []
    for count in (2, 3, 1):  # one thread last, the setting of every test
        torch.set_num_threads(count)
        out, *stats = ops.depthwise_norm(x, weight, gamma, None, None, None, *numbers)
        grads = ops.depthwise_norm_backward(
            out, x, weight, gamma, None, *stats, *numbers, True, True
        )
        results.append((out, *stats, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes(every_isa: str, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(1)
    x, other = (torch.randn(2, 5, 7, 9, generator=gen).to(dtype) for _ in range(2))
    wide = compute_dtype(dtype)
    scale, shift = (torch.randn(2, 5, generator=gen).to(wide) for _ in range(2))
    if every_isa == "eager":
        affine, dot = gate_ops.eager_plane_affine, gate_ops.eager_plane_dot
    else:
        affine, dot = torch.ops.ghost_ops.plane_affine, torch.ops.ghost_ops.plane_dot
    want = x.double() * scale.double()[..., None, None] + shift.double()[..., None, None]
    eager = (x.to(wide) * scale[..., None, None] + shift[..., None, None]).to(dtype)
    assert_close(affine(x, scale, shift), want, eager)
    products = x.double() * other.double()
    eager, largest = (x.to(wide) * other.to(wide)).sum((2, 3)), products.abs().sum((2, 3)).max()
    assert_close(dot(x, other), products.sum((2, 3)), eager, scale=largest)


@pytest.mark.parametrize("gate", [ops.HARD_SIGMOID, ops.SIGMOID])
def test_gradients_of_the_layers(native: str, gate: int) -> None:
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    shapes = ((3, 4, 1, 1), (3,), (4, 3, 1, 1), (4,))
    p = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    settings = (activations.SILU, 0.0, gate)
    torch.autograd.gradcheck(layers.SqueezeExciteFunction.apply, (x, *p, *settings))
    torch.autograd.gradgradcheck(layers.SqueezeExciteFunction.apply, (x, *p, *settings))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("stride", "k", "layout"), [(1, 3, "nhwc"), (2, 5, "nchw")])
def test_gradients_of_the_depthwise_function(
    native: str, stride: int, k: int, layout: str, norm: str
) -> None:
    gen = torch.Generator().manual_seed(3)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64).requires_grad_()

    x, weight = leaf(2, 3, 5, 4), leaf(3, 1, k, k)
    affine = (None, None) if norm == "none" else (leaf(3), leaf(3))
    stats = (None, None)
    if norm == "frozen":
        stats = leaf(3).detach(), leaf(3).detach().square() + 0.5
    settings = layers.DepthwiseSettings(stride, 0.1, norm == "batch", activations.SILU, 0.0)

    def function(x: Tensor, weight: Tensor, *affine: Tensor | None) -> Tensor:
        x = with_layout(x, layout)
        return layers.DepthwiseFunction.apply(x, weight, *affine, *stats, settings)[0]

    torch.autograd.gradcheck(function, (x, weight, *affine))
    torch.autograd.gradgradcheck(function, (x, weight, *affine))


def test_empty_batch(backend: str) -> None:
    weight, shift = torch.ones(3, 1, 3, 3), torch.ones(3)
    out = ops.depthwise_conv(torch.empty(0, 3, 4, 4), weight, shift, 2)
    assert out.shape == (0, 3, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 3}, "stride"),
        ({"weight": torch.ones(3, 1, 4, 4)}, "kernel size"),
        ({"weight": torch.ones(4, 1, 3, 3)}, "weight"),
        ({"shift": torch.ones(2)}, "shift"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"weight": torch.ones(3, 1, 3, 3), "shift": torch.ones(3), "stride": 2, **change}
    with pytest.raises(RuntimeError, match=message):
        ops.depthwise_conv(torch.ones(1, 3, 4, 4), **arguments)
