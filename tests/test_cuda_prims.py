"""The emulated primitives compute what the hardware's documentation says, and so does a GPU.

``prim_harness.cu`` has one kernel for each function of csrc/cuda/prim.cuh. Under the emulator their
outputs are compared with formulas of this file; a GPU must give the same words as the emulator.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor

BLOCK = 64
SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65519.9, 65520.0),
    *(-65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 3 * 2.0**-25, 6.1e-5, 1e-45),
    *(1e38, 3.3895e38, 3.4e38, 1.0009765625, 1.00048828125, 1.00146484375, 1.00390625),
    *(1.01171875, 2.0**-126, 2.0**-130),
]


def words(t: Tensor) -> Tensor:
    """The 32-bit words of a tensor."""
    return t.contiguous().view(torch.int32).flatten()


def floats(t: Tensor) -> Tensor:
    return t.view(torch.float32)


def bits16(t: Tensor) -> Tensor:
    """The bits of a 16-bit tensor as non-negative int32."""
    return t.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF


def from_bits16(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(torch.int16).view(dtype)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def numbers(count: int) -> Tensor:
    """Floats of every size, and the special ones."""
    g = generator()
    some = torch.randn(count, generator=g) * 2.0 ** torch.randint(-30, 20, (count,), generator=g)
    return torch.cat([torch.tensor(SPECIAL), some])


def integers(*shape: int, limit: int = 9) -> Tensor:
    """Small whole numbers: their products and sums are exact in every precision."""
    return torch.randint(-limit, limit + 1, shape, generator=generator()).float()


def rounded(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Bits of x rounded to a 16-bit type; the GPU's NaN is 0x7fff."""
    return torch.where(x.isnan(), 0x7FFF, bits16(x.to(dtype)))


def expect_from_float(dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    x = numbers(4000)
    return words(x), rounded(dtype, x), x.numel()


def expect_division() -> tuple[Tensor, Tensor, int]:
    """Divisors around the powers of two, dividends around their multiples and at the far end."""
    most = 2**31 - 1
    powers = [2**i + k for i in range(31) for k in (-1, 0, 1)]
    divisors = [d for d in {*powers, 7, 49, 112 * 112, most} if 1 <= d <= most]
    pairs = [
        (n, d)
        for d in divisors
        for times in (0, 1, 2, most // d // 2, most // d)
        for n in (times * d - 1, times * d, times * d + 1, most)
        if 0 <= n <= most
    ]
    data = torch.tensor(pairs, dtype=torch.int64)
    n, d = data.unbind(1)
    want = torch.stack([n // d, n % d], 1)
    return data.flatten().to(torch.int32), want.flatten().to(torch.int32), len(pairs)


def expect_to_float(dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    every = torch.arange(1 << 16, dtype=torch.int32)
    return every, words(from_bits16(every, dtype).float()), every.numel()


def packed(dtype: torch.dtype, x: Tensor) -> Tensor:
    """[n, 2] numbers as words [n] of two 16-bit ones."""
    low = rounded(dtype, x)
    return low[:, 0] | low[:, 1] << 16


def expect_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    x = numbers(1000)
    x = x[: x.numel() // 2 * 2].view(-1, 2)
    back = from_bits16(rounded(dtype, x), dtype).float()
    out = [packed(dtype, x), *words(back).view(-1, 2).unbind(1), packed(dtype, x.relu() + 0.0)]
    return words(x), torch.stack(out, 1).flatten(), x.size(0)


def expect_pair_arithmetic(dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Operands of similar size, so that float32 holds every exact result; for sums and products
    also operands of any size, where rounding twice makes no difference."""
    g = generator()
    near = 1 + torch.rand(600, 2, 3, generator=g)
    wide = numbers(1200)[: 1200 // 6 * 6].view(-1, 2, 3).clone()
    special = torch.tensor([0.0, 1.0, -2.0, float("nan"), float("inf"), 0.25])
    few = torch.cartesian_prod(special, special)[:, None, :].expand(-1, 2, -1)
    few = torch.cat([few, torch.ones(len(few), 2, 1)], 2)
    signs = torch.randint(0, 2, near.shape, generator=g) * 2 - 1
    x = torch.cat([near * signs, few, wide]).to(dtype).float() + 0.0  # no -0: min may take either
    a, b, c = x.unbind(2)
    c[-len(wide) :] = 0.0
    in_reach = (a * b).isnan() | (a * b).isinf() | ((a * b).abs() > 1e-30) | (a * b == 0)
    a[~in_reach] = 1.0
    data = torch.stack([packed(dtype, t) for t in (a, b, c)], 1)
    out = [a + b, a * b, a * b + c, torch.minimum(a, b)]
    out = torch.stack([packed(dtype, t) for t in out], 1)
    return data.flatten(), out.flatten(), len(data)


def expect_to_tf32() -> tuple[Tensor, Tensor, int]:
    x = numbers(4000)
    x = x[x.isfinite()]
    return words(x), (words(x) + 0x1000) & ~0x1FFF, x.numel()


def expect_rsqrt() -> tuple[Tensor, Tensor, int]:
    x = numbers(1000).abs()
    x = x[(x > 1e-30) & x.isfinite()]
    return words(x), words(x.double().rsqrt().float()), x.numel()


def expect_arithmetic() -> tuple[Tensor, Tensor, int]:
    special = torch.tensor([0.0, 1.0, -2.0, float("nan"), float("inf")])
    a, b = (t.flatten() for t in torch.meshgrid(special, special, indexing="ij"))
    a, b = torch.cat([a, integers(500)]), torch.cat([b, integers(2, 500)[1]])
    c = integers(a.numel())
    largest, least = torch.maximum(a, b), torch.minimum(a, b)
    out = torch.stack([largest, least, a * b + c, largest, least], 1)
    return words(torch.stack([a, b, c], 1)), words(out), a.numel()


def expect_shuffle() -> tuple[Tensor, Tensor, int]:
    x = torch.randint(1 << 30, (BLOCK,), generator=generator(), dtype=torch.int32)
    i = torch.arange(BLOCK)
    lane, first = i % 32, i // 32 * 32
    down = torch.where(lane + 3 < 32, lane + 3, lane)
    out = [x[first + (lane ^ 5)], x[first + down], x[first + 31 - lane], x[first + (lane ^ 16)]]
    return x, torch.cat([*out, (lane + 100 * (i // 32)).int()]), BLOCK


def expect_barrier() -> tuple[Tensor, Tensor, int]:
    x = torch.randint(1000, (BLOCK,), generator=generator(), dtype=torch.int32)
    return x, x.sum().int().expand(BLOCK), BLOCK


def expect_warp_barrier() -> tuple[Tensor, Tensor, int]:
    x = torch.arange(BLOCK, dtype=torch.int32)
    return x, x.view(2, 32).flip(1).flatten(), BLOCK


def expect_vector() -> tuple[Tensor, Tensor, int]:
    x = torch.randint(1 << 30, (4 * BLOCK,), generator=generator(), dtype=torch.int32)
    return x, x.repeat(4), BLOCK


def expect_cp_async() -> tuple[Tensor, Tensor, int]:
    x = torch.randint(1, 1 << 30, (5, BLOCK, 4), generator=generator(), dtype=torch.int32)
    out = x.clone()
    out[2] = 0
    out[:, 7] = 0
    return x.flatten(), out.flip(1).flatten(), 5


def expect_bulk(again: bool) -> tuple[Tensor, Tensor, int]:
    """again: the last word once more behind the others."""
    x = torch.randint(1, 1 << 30, (5, BLOCK, 4), generator=generator(), dtype=torch.int32)
    out = x.flip(1).flatten()
    return x.flatten(), torch.cat([out, out[-1:]]) if again else out, 5


def expect_ldmatrix(transposed: bool) -> tuple[Tensor, Tensor, int]:
    rows = torch.arange(32 * 8, dtype=torch.int32).view(4, 8, 8)
    data = rows.flatten()[0::2] | rows.flatten()[1::2] << 16
    matrix = rows.flip(1)
    matrix = matrix.mT if transposed else matrix
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4 * 2
    out = matrix[:, g, t] | matrix[:, g, t + 1] << 16  # [4, 32]
    return data, out.T.flatten(), 32


def expect_mma(dtype: torch.dtype | None) -> tuple[Tensor, Tensor, int]:
    """dtype None: TF32."""
    depth = 8 if dtype is None else 16
    a, b, c = integers(16, depth), integers(depth, 8, limit=7), integers(16, 8, limit=100)
    lane = torch.arange(32)
    g = lane // 4
    if dtype is None:
        t = lane % 4
        registers = [a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4], b[t, g], b[t + 4, g]]
        registers = [words(r) for r in registers]
    else:
        t = lane % 4 * 2
        pairs = [
            (a[g, t], a[g, t + 1]),
            (a[g + 8, t], a[g + 8, t + 1]),
            (a[g, t + 8], a[g, t + 9]),
            (a[g + 8, t + 8], a[g + 8, t + 9]),
            (b[t, g], b[t + 1, g]),
            (b[t + 8, g], b[t + 9, g]),
        ]
        registers = [bits16(x.to(dtype)) | bits16(y.to(dtype)) << 16 for x, y in pairs]
    t = lane % 4 * 2

    def spread(m: Tensor) -> list[Tensor]:
        return [words(r) for r in (m[g, t], m[g, t + 1], m[g + 8, t], m[g + 8, t + 1])]

    data = torch.stack([*registers, *spread(c)], 1)
    return data.flatten(), torch.stack(spread(c + a @ b), 1).flatten(), 32


HALF, BFLOAT16, FLOAT = torch.float16, torch.bfloat16, torch.float32
# Name in the harness -> (input words, output words, n).
EXPECTED: dict[str, Callable[[], tuple[Tensor, Tensor, int]]] = {
    "half_from_float": lambda: expect_from_float(HALF),
    "bfloat16_from_float": lambda: expect_from_float(BFLOAT16),
    "half_to_float": lambda: expect_to_float(HALF),
    "bfloat16_to_float": lambda: expect_to_float(BFLOAT16),
    "half_pair": lambda: expect_pair(HALF),
    "bfloat16_pair": lambda: expect_pair(BFLOAT16),
    "half_pair_arithmetic": lambda: expect_pair_arithmetic(HALF),
    "bfloat16_pair_arithmetic": lambda: expect_pair_arithmetic(BFLOAT16),
    "to_tf32": expect_to_tf32,
    "division": expect_division,
    "rsqrt": expect_rsqrt,
    "arithmetic": expect_arithmetic,
    "shuffle": expect_shuffle,
    "barrier": expect_barrier,
    "warp_barrier": expect_warp_barrier,
    "vector": expect_vector,
    "cp_async_16": expect_cp_async,
    "cp_async_8": expect_cp_async,
    "cp_async_4": expect_cp_async,
    "mbarrier": expect_barrier,
    "bulk_load": lambda: expect_bulk(False),
    "bulk_store": lambda: expect_bulk(True),
    "ldmatrix_x4": lambda: expect_ldmatrix(False),
    "ldmatrix_x4_trans": lambda: expect_ldmatrix(True),
    "mma_half": lambda: expect_mma(HALF),
    "mma_bfloat16": lambda: expect_mma(BFLOAT16),
    "mma_tf32": lambda: expect_mma(None),
}
SINCE_SM_90 = {"mbarrier", "bulk_load", "bulk_store"}
ULPS = {"rsqrt": 2}  # of the hardware's approximation; all others are exact
# The types of a case's output words, column by column: a float32, or a pair of 16-bit numbers. A
# NaN matches any NaN there: the payload and the sign of a NaN are the hardware's own. All other
# words, and all words of the cases that are not named, are compared bit for bit.
RESULTS: dict[str, tuple[torch.dtype, ...]] = {
    "half_from_float": (HALF,),
    "bfloat16_from_float": (BFLOAT16,),
    "half_to_float": (FLOAT,),
    "bfloat16_to_float": (FLOAT,),
    "half_pair": (HALF, FLOAT, FLOAT, HALF),
    "bfloat16_pair": (BFLOAT16, FLOAT, FLOAT, BFLOAT16),
    "half_pair_arithmetic": (HALF,),
    "bfloat16_pair_arithmetic": (BFLOAT16,),
    "to_tf32": (FLOAT,),
    "arithmetic": (FLOAT,),
}


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.or_skip(emulator.prims)


def equal_words(got: Tensor, want: Tensor, dtype: torch.dtype) -> Tensor:
    """Which 32-bit words hold the same bits, or NaN at the same places of numbers of this type."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    nan = got.view(dtype).isnan() & want.view(dtype).isnan()
    return (nan | (got.view(bits) == want.view(bits))).view(got.numel(), -1).all(1)


def same_words(name: str, got: Tensor, want: Tensor) -> None:
    if name in ULPS:
        assert (got - want).abs().max() <= ULPS[name]
        return
    equal = got == want
    columns = RESULTS.get(name, ())
    for i, dtype in enumerate(columns):
        every = slice(i, None, len(columns))
        equal[every] = equal_words(got, want, dtype)[every]
    where = (~equal).nonzero().flatten()[:5].tolist()
    assert equal.all(), f"{name}: word {where}: {got[where].tolist()} not {want[where].tolist()}"


@pytest.mark.parametrize(
    ("name", "got", "want", "same"),
    [
        ("half_pair", (0x7FFF3C00, 0x7FFFFFFF, 0, 0), (0xFE003C00, 0x7FFFE000, 0, 0), True),
        ("half_pair", (0x3C007FFF, 0, 0, 0), (0x3C007E00, 0, 0, 0), True),
        ("half_pair", (0x3C007FFF, 0, 0, 0), (0x3C017E00, 0, 0, 0), False),
        ("half_pair", (0x3C007FFF, 0, 0, 0), (0x3C007C00, 0, 0, 0), False),  # infinity
        ("half_pair", (0x7FFF0000, 0, 0, 0), (0x7F800000, 0, 0, 0), True),  # as halves both NaN
        ("bfloat16_pair", (0x7FFF0000, 0, 0, 0), (0x7F800000, 0, 0, 0), False),  # infinity
        ("half_pair", (0, 0x7FFFFFFF, 0, 0), (0, 0x7F800000, 0, 0), False),  # infinity
        ("half_pair", (0x8000, 0, 0, 0), (0, 0, 0, 0), False),  # -0 is not 0
        ("vector", (0x7FFFFFFF,), (0x7FFFE000,), False),  # no numbers
    ],
)
def test_nan_is_compared_as_nan(
    name: str, got: tuple[int, ...], want: tuple[int, ...], same: bool
) -> None:
    a, b = (torch.tensor(t, dtype=torch.int64).to(torch.int32) for t in (got, want))
    if same:
        same_words(name, a, b)
    else:
        with pytest.raises(AssertionError, match="word"):
            same_words(name, a, b)


def emulated(library: emulator.Library, name: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """(input, expected, got, n) of one primitive."""
    data, want, n = EXPECTED[name]()
    data, want = data.contiguous(), want.contiguous()
    out = torch.full_like(want, -1)
    library.call("ghost_prim_run", name, data.data_ptr(), out.data_ptr(), n)
    return data, want, out, n


def test_every_primitive_has_an_expectation(library: emulator.Library) -> None:
    assert set(library.primitives()) == set(EXPECTED)


@pytest.mark.parametrize("schedule", emulator.SCHEDULES)
@pytest.mark.parametrize("name", EXPECTED)
def test_emulated(library: emulator.Library, name: str, schedule: str) -> None:
    with library.scheduled(emulator.SCHEDULES[schedule], seed=3):
        _, want, got, _ = emulated(library, name)
    same_words(name, got, want)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The harness, compiled by nvcc for the GPU of this machine."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    major, minor = torch.cuda.get_device_capability()
    path: Path = tmp_path_factory.mktemp("prims") / "prims.so"
    arch = f"arch=compute_{major}{minor},code=sm_{major}{minor}"
    flags = ["-std=c++17", "-O3", f"-I{emulator.CSRC}", "-gencode", arch, "-shared"]
    files = [str(emulator.HERE / "prim_harness.cu"), "-o", str(path)]
    subprocess.run([nvcc, *flags, "-Xcompiler", "-fPIC", *files], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXPECTED)
def test_gpu_agrees_with_its_emulated_twin(
    library: emulator.Library, on_gpu: ctypes.CDLL, name: str
) -> None:
    if name in SINCE_SM_90 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the device is older than sm_90")
    data, _, want, n = emulated(library, name)
    device_data, out = data.cuda(), torch.full_like(want, -1).cuda()
    on_gpu.ghost_prim_run.restype = ctypes.c_char_p
    torch.cuda.synchronize()
    message = on_gpu.ghost_prim_run(
        name.encode(), ctypes.c_void_p(device_data.data_ptr()), ctypes.c_void_p(out.data_ptr()), n
    )
    assert message is None, message
    torch.cuda.synchronize()
    got = out.cpu()
    if name == "to_tf32":  # mma does not look at the lower bits
        got, want = got & ~0x1FFF, want & ~0x1FFF
    same_words(name, got, want)
