"""The operators between the Ghost modules of a bottleneck: depthwise convolution and gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import World
from cuda_layer_cases import check_gate, check_stem
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, activation, assert_close, covering, with_layout
from torch import Tensor

from ghost_ops import activations, layers, model_ops
from ghost_ops.eager_ops import compute_dtype

DEPTHWISE = covering(
    {
        "shape": [(2, 5, 9, 7), (1, 20, 14, 14), (3, 16, 7, 7), (1, 1, 6, 5), (2, 33, 12, 35),
                  (1, 3, 1, 1), (1, 17, 2, 40)],
        "k": [1, 3, 5, 7],
        "stride": [1, 2],
        "act": list(ACTIVATIONS),
        "layout": list(LAYOUTS),
        "dtype": list(DTYPES),
    }
)  # fmt: skip


GATES = covering(
    {
        "shape": [(2, 5, 3, 7), (3, 72, 6, 6)],
        "reduced": [4, 37],
        "act": ["relu", "silu"],
        "gate": [model_ops.HARD_SIGMOID, model_ops.SIGMOID],
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
    got = model_ops.depthwise_conv(x, weight, shift, stride, activations.CODES[act])
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
    """Widths and channels around the tiles of every kernel, bands of rows, an odd last plane."""
    gen = torch.Generator().manual_seed(5)
    wide = compute_dtype(dtype)
    shapes = [(1, 3, 5, w) for w in range(1, 20)]  # narrow rows, two planes in a vector
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
            got = model_ops.depthwise_conv(with_layout(x, layout), weight, shift, stride)
            assert_close(got, want, eager, f"{shape} stride {stride}", scale=want.abs().max())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5])
def test_depthwise_conv_padding_is_skipped(every_isa: str, k: int, stride: int) -> None:
    """A plane of NaN beside one without, in one vector or the next: nothing passes over."""
    for width in (5, 6, 7, 13, 14, 28, 33):
        for c in (2, 3, 16, 20):
            x = torch.ones(1, c, 14, width)
            x[:, ::2] = torch.nan
            weight, shift = torch.ones(c, 1, k, k), torch.zeros(c)
            for layout in LAYOUTS:
                got = model_ops.depthwise_conv(with_layout(x, layout), weight, shift, stride)
                assert got[:, ::2].isnan().all()
                want = F.conv2d(x[:, 1::2], weight[1::2], None, stride, k // 2, 1, c // 2)
                assert torch.equal(got[:, 1::2], want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squeeze_excite_edges(every_isa: str, dtype: torch.dtype, layout: str) -> None:
    """Channels, rows of the matrices, pixels and images around the tiles."""
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
        model_ops.squeeze_excite_(x, *p, activations.RELU, 0.0, model_ops.SIGMOID)
        assert_close(x, want, eager, f"{shape} {reduced}", scale=want.abs().max())


def gate_parameters(channels: int, reduced: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(2)
    shapes = ((reduced, channels), (reduced,), (reduced, channels), (channels,))
    return tuple(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes)


@pytest.mark.parametrize("gate", [model_ops.HARD_SIGMOID, model_ops.SIGMOID])
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
        s = F.relu6(s + 3) / 6 if gate == model_ops.HARD_SIGMOID else torch.sigmoid(s)
        return x * s[:, :, None, None]

    p = (w_reduce, b_reduce, w_expand, b_expand)
    want = formula(x.double(), *(t.double() for t in p))
    eager = formula(x.to(compute_dtype(dtype)), *p).to(dtype)
    version = x._version
    model_ops.squeeze_excite_(x, *p, activations.SILU, 0.0, gate)
    assert x._version > version  # autograd and caches are told
    assert_close(x, want, eager)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("shape", [(1, 200, 14, 14), (1, 21, 33, 57), (3, 17, 9, 7)], ids=str)
def test_threads_change_no_bit(every_isa: str, shape: tuple, k: int) -> None:
    """Nor does the number of images: both cut the range of items elsewhere."""
    x = torch.randn(shape)
    p = gate_parameters(shape[1], 48, torch.float32)
    weight, shift = torch.randn(shape[1], 1, k, k), torch.randn(shape[1])
    before = torch.get_num_threads()

    def results(threads: int, images: Tensor) -> list[Tensor]:
        torch.set_num_threads(threads)
        found = []
        for layout in LAYOUTS:
            y = with_layout(images, layout).clone(memory_format=torch.preserve_format)
            model_ops.squeeze_excite_(y, *p)
            found.append(y.contiguous())
            for stride in (1, 2):
                y = with_layout(images, layout)
                found.append(model_ops.depthwise_conv(y, weight, shift, stride).contiguous())
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
    """NaN and infinities stay where they are, and padding is zero, not something times zero."""
    x = torch.zeros(1, 2, 8, 8)
    x[0, 0, 3, 3], x[0, 1, 0, 0] = torch.nan, torch.inf
    weight, shift = torch.ones(2, 1, 3, 3), torch.zeros(2)
    for stride in (1, 2):
        for layout in LAYOUTS:
            got = model_ops.depthwise_conv(
                with_layout(x, layout), weight, shift, stride, activations.RELU
            )
            want = F.relu(F.conv2d(x, weight, shift, stride, 1, 1, 2))
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())


CONTIGUOUS = ("depthwise_conv_backward", "plane_affine", "plane_dot")


def packed(channels: int, intrinsic: int, ghosts: int | None = None) -> Tensor:
    """Packed parameters of a Ghost module of ratio 2, or of ratio 1 without ghosts."""
    none = (None,) * 4
    size = 1 if ghosts == 0 else 3
    w2 = torch.randn(intrinsic if ghosts is None else ghosts, 1, size, size)
    w1 = torch.randn(intrinsic, channels, 1, 1)
    return torch.ops.ghost_ops.ghost_pack(w1, *none, 1e-5, w2, *none, 1e-5)


@pytest.mark.parametrize("row", GATES, ids=ids)
def test_squeeze_excite_gate(row: dict) -> None:
    """What runs where no CUDA kernel does."""
    check_gate(World(torch.ops.ghost_ops, "cpu"), row)


@pytest.mark.parametrize("row", STEMS, ids=ids)
def test_conv_stem(row: dict) -> None:
    check_stem(World(torch.ops.ghost_ops, "cpu"), row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_conv_sums(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 9, 7).to(dtype)
    weight, shift = (torch.randn(s, dtype=compute_dtype(dtype)) for s in ((6, 1, 3, 3), (6,)))
    out, sums = model_ops.depthwise_conv_sums(x, weight, shift, 2, activations.RELU)
    want = model_ops.depthwise_conv(x, weight, shift, 2, activations.RELU)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(sums.sum(1).double(), out.double().sum((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_apply_gated(backend: str, layout: str) -> None:
    x, gate = with_layout(torch.randn(2, 6, 9, 7), layout), torch.rand(2, 6)
    numbers = (4, 8, 2, 3, 1, 1, 0.0, 1, 0.0, True)
    tensors = (packed(6, 4), None, None)
    got = model_ops.ghost_apply_gated(x, gate, *tensors, *numbers)
    want = torch.ops.ghost_ops.ghost_apply(x * gate[:, :, None, None], *tensors, *numbers)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", model_ops.NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name: str, layout: str) -> None:
    if layout == "nhwc" and name in CONTIGUOUS:
        pytest.skip("contiguous only")
    x, weight = with_layout(torch.randn(2, 6, 5, 7), layout), torch.randn(6, 1, 3, 3)
    arguments = {
        "depthwise_conv": (x, weight, torch.randn(6), 3, 2, 1, 0.0),
        "depthwise_conv_backward": (torch.randn(2, 6, 3, 4), x, weight, 3, 2, True),
        "plane_affine": (x, torch.randn(2, 6), torch.randn(2, 6)),
        "plane_dot": (x, torch.randn(2, 6, 5, 7)),
        "squeeze_excite_": (x, *gate_parameters(6, 4, torch.float32), 1, 0.0, 0),
        "depthwise_conv_sums": (x, weight, torch.randn(6), 3, 2, 1, 0.0),
        "squeeze_excite_gate": (
            x, torch.randn(2, 3, 6), *gate_parameters(6, 4, torch.float32), 1, 0.0, 0,
        ),
        "conv_stem": (
            x[:, :4].clone(memory_format=torch.preserve_format), torch.randn(8, 4, 3, 3),
            torch.randn(8), 2, 1, 0.0, layout == "nhwc",
        ),
        "ghost_apply_pooled": (x, packed(6, 4, ghosts=0), 4, 1, 0.0),
        "ghost_apply_gated": (
            x, torch.rand(2, 6), packed(6, 4), None, None, 4, 8, 2, 3, 1, 1, 0.0, 1, 0.0, True,
        ),
        "ghost_conv_apply": (
            x, packed(6 * 9, 4), with_layout(torch.randn(2, 7, 3, 4), layout), 3, 1, False, 4, 7, 2,
            3, 2, 1, 0.0, 1, 0.0,
        ),
    }[name]  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.ghost_ops, name).default, arguments)


@pytest.mark.parametrize("row", [r for r in DEPTHWISE if r["layout"] == "nchw"], ids=ids)
def test_depthwise_conv_backward(every_isa: str, row: dict) -> None:
    dtype, k, stride, (n, c, h, w) = row["dtype"], row["k"], row["stride"], row["shape"]
    wide = compute_dtype(dtype)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(n, c, h, w, generator=gen, dtype=torch.float64).to(dtype)
    weight = torch.randn(c, 1, k, k, generator=gen, dtype=torch.float64).to(wide)
    size = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    grad = torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        out = F.conv2d(*leaves, None, stride, k // 2, 1, c)
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    functions = model_ops if every_isa == "eager" else torch.ops.ghost_ops
    name = "_eager_depthwise_conv_backward" if every_isa == "eager" else "depthwise_conv_backward"
    got = getattr(functions, name)(grad, x, weight, k, stride, True)
    want, eager = gradients(torch.float64), gradients(wide)
    assert got[0].dtype == dtype
    assert_close(got[0], want[0], eager[0].to(dtype), "dx")
    scale = (x.double().abs().sum() / c) ** 0.5 * 4
    assert_close(got[1], want[1], eager[1], "dw", scale=scale)
    without = getattr(functions, name)(grad, x, weight, k, stride, False)
    assert torch.equal(without[1], got[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes(every_isa: str, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(1)
    x, other = (torch.randn(2, 5, 7, 9, generator=gen).to(dtype) for _ in range(2))
    wide = compute_dtype(dtype)
    scale, shift = (torch.randn(2, 5, generator=gen).to(wide) for _ in range(2))
    if every_isa == "eager":
        affine, dot = model_ops._eager_plane_affine, model_ops._eager_plane_dot
    else:
        affine, dot = torch.ops.ghost_ops.plane_affine, torch.ops.ghost_ops.plane_dot
    want = x.double() * scale.double()[..., None, None] + shift.double()[..., None, None]
    eager = (x.to(wide) * scale[..., None, None] + shift[..., None, None]).to(dtype)
    assert_close(affine(x, scale, shift), want, eager)
    products = x.double() * other.double()
    assert_close(
        dot(x, other), products.sum((2, 3)), (x.to(wide) * other.to(wide)).sum((2, 3)),
        scale=products.abs().sum((2, 3)).max(),
    )  # fmt: skip


@pytest.mark.parametrize("gate", [model_ops.HARD_SIGMOID, model_ops.SIGMOID])
def test_gradients_of_the_layers(native: str, gate: int) -> None:
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    for stride, k in ((1, 3), (2, 5)):
        weight = torch.randn(4, 1, k, k, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(layers.DepthwiseConv.apply, (x, weight, stride))
        torch.autograd.gradgradcheck(layers.DepthwiseConv.apply, (x, weight, stride))
    shapes = ((3, 4, 1, 1), (3,), (4, 3, 1, 1), (4,))
    p = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    settings = (activations.SILU, 0.0, gate)
    torch.autograd.gradcheck(layers.SqueezeExciteFunction.apply, (x, *p, *settings))
    torch.autograd.gradgradcheck(layers.SqueezeExciteFunction.apply, (x, *p, *settings))


def test_empty_batch(backend: str) -> None:
    x = torch.empty(0, 3, 4, 4)
    assert model_ops.depthwise_conv(x, torch.ones(3, 1, 3, 3), torch.ones(3), 2).shape == (
        0, 3, 2, 2,
    )  # fmt: skip


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
        model_ops.depthwise_conv(torch.ones(1, 3, 4, 4), **arguments)
