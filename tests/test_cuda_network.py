"""Whole fused networks on the emulated GPU: same kernels and launches as on a CUDA device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import emulator
import pytest
import torch
from cuda_cases import tf32
from ghost_forms import randomize
from helpers import assert_close, our_launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ghost_ops
from ghost_ops import ops
from ghost_ops.ops import conv, gate
from ghost_ops.reference import GhostBottleneck


@pytest.fixture
def library() -> emulator.Library:
    return emulator.or_skip(emulator.ops)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """CPU tensors are dispatched like CUDA tensors, to the operators of the emulator."""
    layers = ("depthwise_conv", "depthwise_conv_sums", "squeeze_excite_gate", "conv_stem")
    on_emulator = torch.ops.ghost_emu
    with pytest.MonkeyPatch.context() as patch:
        for name in (*ops.NAMES, *layers):
            patch.setattr(ops.native, name, getattr(on_emulator, name).default)
        for name in ("ghost_apply_gated", "ghost_apply_pooled"):
            patch.setattr(ops, name, getattr(on_emulator, name).default)
        for module in (ops, conv, gate):
            patch.setattr(module, "on_gpu", lambda t: True)
        with ghost_ops.use_backend("native"), tf32(False), torch.no_grad():
            yield


class Log(TorchDispatchMode):
    """Records the operators that run, and PyTorch operators with a float32 map as output."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.others: list[str] = []
        self.wide: list[str] = []  # float32 maps that an operator of PyTorch made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("ghost_emu::"):
            self.ours.append(name.removeprefix("ghost_emu::"))
        else:
            self.others.append(name)
            if isinstance(out, Tensor) and out.dim() == 4 and out.dtype is torch.float32:
                self.wide.append(name)
        return out


def inputs(dtype: torch.dtype, size: int = 33) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size + 7, generator=gen)
    return x.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 0.5), (torch.float16, 1.0)], ids=["float32", "float16"]
)
def test_ghostnet(library: emulator.Library, dtype: torch.dtype, width: float) -> None:
    """The output is right, there are at most 75 launches, and no float32 map in float16."""
    torch.manual_seed(0)
    plain = ghost_ops.reference.ghostnet(width).eval()
    randomize(plain)
    plain = plain.to(dtype).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    x = inputs(dtype)
    with torch.no_grad():
        want, eager = copy.deepcopy(plain).double()(x.double()), plain(x)
    with emulated():
        fused(x)
        before = library.launches()
        with Log() as log:
            got = fused(x)
        launches = library.launches() - before
    assert_close(got, want, eager)
    assert len(log.ours) == 55
    plan = ghost_ops.planner.explain(plain, tuple(x.shape), device="sm_90", dtype=dtype)
    assert our_launches(plan) == launches  # more than 55: a gate of few images takes two
    counts = {name: log.ours.count(name) for name in set(log.ours)}
    once, seven = {"conv_stem": 1, "ghost_apply_pooled": 1}, {"depthwise_conv": 7}
    seven |= {"ghost_apply_gated": 7, "squeeze_excite_gate": 7}
    assert counts == {"ghost_apply": 30, "depthwise_conv_sums": 2, **once, **seven}
    moving = [name for name in log.others if name not in VIEWS]
    assert launches + len(moving) <= 75, moving
    assert dtype is torch.float32 or not log.wide


VIEWS = ("aten::view", "aten::t", "aten::detach", "aten::_unsafe_view")

# (in, mid, out, kernel, stride, squeeze-excite ratio), as in tests/test_bottleneck.py.
BLOCKS = [
    (8, 12, 8, 3, 1, 0.0),
    (8, 20, 8, 5, 1, 0.25),
    (8, 20, 12, 3, 1, 0.25),
    (8, 13, 10, 3, 2, 0.0),
    (8, 20, 12, 5, 2, 0.25),
]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bottlenecks(
    library: emulator.Library, block: tuple, dtype: torch.dtype, layout: str
) -> None:
    plain: nn.Module = randomize(GhostBottleneck(*block[:5], se_ratio=block[5])).to(dtype).eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 9, 10, generator=gen, dtype=torch.float64).to(dtype)
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        want, eager = copy.deepcopy(plain).double()(x.double()), plain(x)
    with emulated():
        got = fused(x)
        with Log() as log:
            again = fused(x)
    assert torch.equal(again, got)
    assert not log.others, log.others
    assert got.is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
    assert_close(got, want, eager)


def test_a_gate_before_a_library_convolution(library: emulator.Library) -> None:
    """A second Ghost module with a library convolution as its primary gets the gated map."""
    plain = randomize(GhostBottleneck(8, 20, 12, 3, 1, se_ratio=0.25))
    plain.ghost2 = randomize(ghost_ops.reference.GhostModule(20, 12, 3, relu=False), 3)
    plain = plain.half().eval()
    fused = copy.deepcopy(plain)
    ghost_ops.fuse(fused)
    x = torch.randn(2, 8, 9, 10).half()
    with torch.no_grad():
        want, eager = copy.deepcopy(plain).double()(x.double()), plain(x)
    with emulated(), Log() as log:
        got = fused(x)
    assert "ghost_apply_gated" not in log.ours
    assert_close(got, want, eager)
