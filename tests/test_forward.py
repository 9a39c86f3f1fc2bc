"""Promise: evaluation mode gives the oracle's numbers, in every configuration."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import machine, native_isas, running
from helpers import (
    ACTIVATIONS,
    DTYPES,
    GHOSTNET,
    L2_BYTES,
    LAYOUTS,
    VECTORS,
    Case,
    Params,
    assert_close,
    covering,
    make_input,
    make_module,
    oracle,
    plain,
    sound,
)
from module_checks import STRUCTURE, check_forward
from operator_cases import apply_packed


# The eager backend runs PyTorch's operators for most of these: every third is enough.
@pytest.mark.parametrize(
    ("backend", "case"),
    [("native", case) for case in STRUCTURE] + [("eager", case) for case in STRUCTURE[::3]],
    ids=str,
    indirect=["backend"],
)
def test_structure(backend: str, case: Case) -> None:
    check_forward(case)


@pytest.mark.parametrize("act1", ACTIVATIONS)
@pytest.mark.parametrize("act2", ACTIVATIONS)
def test_every_pair_of_activations(every_isa: str, act1: str, act2: str) -> None:
    check_forward(Case(act1=act1, act2=act2, c=9, oup=7, h=5, w=19))


# Every pair of these occurs. Sizes lie on both sides of vectors of 8 and 16 lanes, of blocks of 7
# vectors (112) and of the row tiles; ``oup`` is odd or even.
COVERING = [
    sound(Case(h=hw[0], w=hw[1], k=primary[0], stride=primary[1], **axes))
    for axes in covering(
        {
            "n": (1, 2, 3),
            "c": (2, 6, 16, 34),
            "hw": (
                *((1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (7, 7), (8, 8), (5, 16), (5, 17)),
                *((13, 31), (6, 33), (4, 63), (4, 65), (3, 111), (3, 112), (2, 113)),
                *((14, 14), (28, 28)),
            ),
            "oup": (1, 2, 7, 16, 23, 26, 33),
            "ratio": (1, 2, 3, 5),
            "d": (1, 3, 5, 7),
            "primary": ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (5, 2)),
            "act1": ACTIVATIONS,
            "act2": ACTIVATIONS,
            "layout": LAYOUTS,
            "dtype": DTYPES,
        }
    )
    for hw, primary in [(axes.pop("hw"), axes.pop("primary"))]
]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_covering(every_isa: str, case: Case) -> None:
    check_forward(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(c=8, oup=8, groups=2, h=9, w=9),
        Case(c=8, oup=16, groups=8, h=9, w=9, act1="silu"),  # a depthwise primary
        Case(c=8, oup=12, ratio=3, groups=4, k=3, stride=2, h=9, w=9, layout="nhwc"),
        Case(c=8, oup=8, groups=2, k=5, h=9, w=8, dtype=torch.bfloat16),
        Case(c=8, oup=8, groups=2, k=1, stride=2, h=9, w=8, dtype=torch.float64),
        Case(k=3, stride=3, h=11, w=10),
        Case(k=1, stride=3, h=11, w=10),
        Case(k=7, stride=1, h=11, w=10),
        Case(k=2, stride=1, h=6, w=5),  # padding 1: the map grows by one
        Case(k=4, stride=2, h=6, w=5),
    ],
    ids=str,
)
def test_other_primary_convolutions(backend: str, case: Case) -> None:
    check_forward(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "inp", "oup", "relu"), GHOSTNET)
def test_ghostnet_shapes(
    backend: str, size: int, inp: int, oup: int, relu: bool, layout: str
) -> None:
    act = "relu" if relu else "none"
    check_forward(Case(1, inp, size, size, oup, act1=act, act2=act, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "inp", "oup", "relu"), GHOSTNET)
def test_ghostnet_shapes_in_half_precision(
    backend: str, size: int, inp: int, oup: int, relu: bool, dtype: torch.dtype
) -> None:
    act = "relu" if relu else "none"
    check_forward(Case(1, inp, min(size, 29), size, oup, act1=act, act2=act, dtype=dtype))


# Maps that are cut into bands of rows, and small maps that are joined into one GEMM.
TILING = [
    Case(n, c, h, w, oup, r, d, act1="relu", act2="silu", layout=layout)
    for (n, c, h, w, oup, r, d) in (
        (1, 16, 112, 112, 16, 2, 3),
        (2, 3, 56, 57, 20, 2, 5),
        (1, 7, 113, 41, 9, 2, 3),
        (1, 7, 41, 113, 9, 2, 7),
        (1, 4, 200, 17, 6, 3, 5),
        (1, 4, 17, 400, 6, 2, 3),
        (1, 2, 9, 1030, 3, 2, 7),
        (1, 2, 1030, 9, 3, 2, 7),
        (5, 33, 7, 7, 26, 2, 3),
        (16, 40, 7, 7, 12, 2, 3),
        (7, 19, 3, 3, 50, 2, 5),
        (33, 12, 1, 1, 24, 2, 3),
        (17, 5, 2, 3, 8, 4, 7),
        (3, 300, 14, 14, 60, 2, 3),
        (2, 513, 5, 5, 30, 3, 3),
        (2, 64, 20, 20, 256, 2, 5),
        (3, 1, 14, 15, 1, 2, 3),
        (150, 24, 3, 7, 40, 1, 1),
        (9, 70, 7, 7, 40, 2, 3),
    )
    for layout in LAYOUTS
]


def on_machines(cases: list[Case]) -> list[tuple[Case, int]]:
    """Each case with the L2 size of one of four machines, instead of the one that runs the test."""
    return [(case, L2_BYTES[i % 4]) for i, case in enumerate(cases)]


@pytest.mark.parametrize(("case", "l2_bytes"), on_machines(TILING), ids=str)
def test_bands_and_joined_images(every_isa: str, case: Case, l2_bytes: int) -> None:
    if every_isa == "eager":
        return check_forward(case)
    with machine(l2_bytes):
        check_forward(case)


@pytest.mark.parametrize(("case", "l2_bytes"), on_machines(TILING)[::3], ids=str)
def test_bands_and_joined_images_on_two_threads(native: str, case: Case, l2_bytes: int) -> None:
    torch.set_num_threads(2)
    with machine(l2_bytes):
        check_forward(case)


# Maps of more rows than one band, outputs beyond any cache (non-temporal stores), aligned or not.
LARGE = [
    Case(1, 24, 65, 130, 120, d=5),
    Case(1, 24, 65, 130, 120, d=5, layout="nhwc", act1="silu"),
    Case(1, 9, 129, 131, 301, ratio=3, d=7, stride=2, dtype=torch.bfloat16),
    Case(1, 9, 129, 131, 150, stride=2, layout="nhwc", act2="gelu"),
    Case(2, 3, 70, 75, 130, ratio=1),
    Case(1, 3, 67, 72, 130, dtype=torch.float64, act1="hardswish", act2="none"),
    Case(1, 3, 67, 72, 130, d=1, dtype=torch.float16),
    Case(6, 4, 112, 112, 48),
    Case(6, 4, 112, 112, 48, d=5, act1="silu"),
    Case(6, 4, 112, 112, 48, d=7, ratio=3, act2="silu"),
    Case(5, 3, 111, 113, 51),
    Case(40, 3, 28, 28, 129, act1="none", act2="none"),
    Case(2, 3, 50, 50, 520, act2="silu"),
    Case(300, 5, 7, 7, 230),
    Case(1, 20, 66, 66, 64),  # by two threads, each with a few pixels beyond its last vector
    Case(1, 9, 97, 49, 80),
    Case(2, 3, 40, 50, 520, ratio=3, layout="nhwc"),
    Case(2, 3, 112, 112, 200, ratio=1),
    Case(34, 24, 56, 56, 16),
    Case(2, 3, 56, 56, 300, act1="none"),
    Case(3, 3, 56, 56, 200, d=5, act1="silu"),
    Case(64, 3, 36, 36, 20),
    Case(1, 3, 28, 28, 200, act2="silu"),
    Case(400, 40, 3, 3, 30),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("case", "l2_bytes"), on_machines(LARGE), ids=str)
def test_large_outputs(native: str, case: Case, l2_bytes: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with machine(l2_bytes):
        check_forward(case)


@pytest.mark.parametrize("isa", native_isas() or ["none"])
@pytest.mark.parametrize(("case", "l2_bytes"), on_machines(LARGE)[::2], ids=str)
def test_large_outputs_of_every_instruction_set(case: Case, l2_bytes: int, isa: str) -> None:
    with running(f"native-{isa}"), machine(l2_bytes):
        check_forward(case)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon"])
def test_the_cases_take_every_path(native: str, isa: str) -> None:
    """Every decision of the planner is taken both ways by the cases of this file."""
    from ghost_ops import planner

    seen: dict[str, set[bool]] = {}
    for case, l2_bytes in on_machines(TILING) + on_machines(LARGE):
        machine = planner.CpuMachine(*VECTORS[isa], 32 << 10, l2_bytes, cores=2)
        settings = {"ratio": case.ratio, "dw_size": case.d, "stride": case.stride}
        settings |= {"dtype": case.dtype, "channels_last": case.layout == "nhwc"}
        shape = (case.n, case.c, case.h, case.w)
        plan = planner.explain(shape, case.oup, **settings, machine=machine)
        rows = -(-case.h // case.stride)
        for name, value in (
            ("packed", plan.pack),
            ("joined", plan.images > 1),
            ("banded", plan.band_rows < rows),
            ("grouped", plan.group < case.m),
            ("rows split", plan.row_splits > 1),
            ("channels split", plan.channel_splits > 1),
            ("columns fetched", plan.fetch == "columns"),
            ("images fetched", plan.fetch == "images" and plan.images == 1),
            ("joined images fetched", plan.fetch == "images" and plan.images > 1),
            ("results fetched", plan.fetch_results),
            ("streamed", plan.stream),
            ("streamed in bands", plan.stream and plan.band_rows < rows),
            ("streamed as images", plan.stream and plan.band_rows >= rows),
        ):
            seen.setdefault(name, set()).add(value)
    assert {name for name, values in seen.items() if values != {True, False}} == set()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_of_none(backend: str, layout: str, dtype: torch.dtype) -> None:
    case = Case(n=0, layout=layout, dtype=dtype, stride=2)
    out = make_module(case).eval()(make_input(case))
    assert out.shape == (0, 8, 3, 4)
    assert out.dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_batch_norms_around_half_precision(
    backend: str, dtype: torch.dtype, ratio: int, layout: str
) -> None:
    check_forward(Case(dtype=dtype, bn_dtype=torch.float32, ratio=ratio, layout=layout, h=9, w=18))


@pytest.mark.parametrize("isa", native_isas() or ["none"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(2, 9, 14, 15, 22, act1="silu"), TILING[0]], ids=str)
def test_half_precision_rounds_once(
    isa: str, case: Case, dtype: torch.dtype, layout: str, training: bool
) -> None:
    """All arithmetic is in float32; only the result is rounded, to nearest even."""
    case = case.replace(dtype=dtype, layout=layout)
    module, x = make_module(case).train(training), make_input(case)
    exact = copy.deepcopy(module).float()
    with running(f"native-{isa}"), torch.no_grad():
        got, want = module(x), exact(x.float()).to(dtype)
    # Sums in another order may round to the other side of a tie, in a few places.
    assert (got != want).double().mean() < 0.002


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 5, 6, 7, 9), (3, 40, 7, 7, 30), (1, 6, 30, 56, 12), (1, 3, 66, 66, 130)], ids=str
)
def test_residual_is_added_last(
    backend: str, shape: tuple[int, ...], residual_layout: str, dtype: torch.dtype, layout: str
) -> None:
    n, c, h, w, oup = shape
    case = Case(n, c, h, w, oup, act1="hardswish", act2="relu", dtype=dtype, layout=layout)
    x = make_input(case)
    residual = make_input(case.replace(c=oup, layout=residual_layout), extra_seed=2)
    before = residual.clone()
    with torch.no_grad():
        p = Params.of(make_module(case))
        got = apply_packed(backend, case, p, x, residual=residual)
        want = oracle(p.to(torch.float64), x.double(), case, False).out + residual.double()
        assert_close(got, want, plain(p, x, case, False) + residual)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.5, -0.3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_leaky_relu_slope(backend: str, slope: float, training: bool) -> None:
    case = Case()
    module, x = make_module(case).train(training), make_input(case)
    module.primary_conv[2] = torch.nn.LeakyReLU(slope)
    module.cheap_operation[2] = torch.nn.LeakyReLU(slope / 2)
    p = Params.of(module).to(torch.float64)
    with torch.no_grad():
        got = module(x)
        linear = case.replace(act1="none", act2="none")
        y = torch.nn.functional.leaky_relu(oracle(p, x.double(), linear, training).a, slope)
        # The module on y, with the identity as its primary convolution.
        p.w1 = torch.eye(case.m, dtype=torch.float64)[:, :, None, None]
        p.bn1.gamma = p.bn1.beta = None
        p.bn1.mean, p.bn1.var, p.bn1.eps = torch.zeros(case.m), torch.ones(case.m), 0.0
        p.bn1.mean, p.bn1.var = p.bn1.mean.double(), p.bn1.var.double()
        v = torch.nn.functional.conv2d(y, p.w2, None, 1, 1, 1, case.m)
        mean = v.mean((0, 2, 3)) if training else p.bn2.mean
        var = v.var((0, 2, 3), correction=0) if training else p.bn2.var
        z = torch.nn.functional.batch_norm(v, mean, var, p.bn2.gamma, p.bn2.beta, False, 0.0, 1e-5)
        want = torch.cat([y, torch.nn.functional.leaky_relu(z, slope / 2)], 1)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_input_is_left_alone(backend: str, inplace: bool) -> None:
    case = Case(act1="none", act2="none")
    module, x = make_module(case), make_input(case)
    module.primary_conv[2] = torch.nn.ReLU(inplace=inplace)
    before = x.clone()
    for training in (False, True):
        module.train(training)(x)
        assert torch.equal(x, before)
