"""The plan of the Triton kernels for a shape: tiles, launches, bytes moved. Does not import Triton.

Three decisions, which ``explain`` prints:

- *One pass or two launches.* In one pass a program owns a whole image and some channels, stores y,
  and reads y back through the caches. This saves a read of y from memory, but needs enough images
  to fill the device. Two launches spread every image over the device, but read y once more, unless
  y is still in the L2 cache.
- *Recompute or stash u* in a training forward, between the statistics of u and their use.
- *Tiles*, from the channels and the layout. GHOST_OPS_TRITON_AUTOTUNE=1 times the alternatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ...conventions import ghosts_per_map, out_size

KINDS = (
    "primary",
    "cheap",
    "fused",
    "cheap_sums",
    "cheap_gradient",
    "intrinsic_gradient",
    "fused_gradient",
    "input_gradient",
    "weight_gradient",
)
_WITH_PRODUCT = ("primary", "fused", "input_gradient", "weight_gradient")
# The time of a launch as the bytes that memory moves in this time; assumed: 4 us at 2 TB/s.
LAUNCH_BYTES = 8 * 2**20
# Programs of one pass per multiprocessor that fill it: one loads while another computes.
RESIDENT = 2


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that the plan uses.

    Attributes:
        name: torch's name of the GPU.
        multiprocessors: streaming multiprocessors or compute units.
        l2_bytes: size of the L2 cache.
        hip: an AMD GPU.
        interpreter: Triton's interpreter on the CPU, where the number of tiles costs time.
    """

    name: str
    multiprocessors: int
    l2_bytes: int
    hip: bool = False
    interpreter: bool = False


INTERPRETER = Device("Triton interpreter", 1, 2**25, interpreter=True)


@dataclass(frozen=True)
class Problem:
    """One Ghost module on one input: sizes, layout, dtype. x [n, c, h, w]; w1 None: c = m."""

    n: int
    c: int
    h: int
    w: int
    m: int
    ratio: int
    out_channels: int
    dw_size: int
    stride: int
    act1: int
    slope1: float
    act2: int
    slope2: float
    nhwc: bool
    dtype: torch.dtype
    has_primary: bool

    @property
    def ghosts_per_map(self) -> int:
        """Ghost maps that are made from one intrinsic map."""
        return ghosts_per_map(self.ratio)

    @property
    def g(self) -> int:
        """Ghost maps."""
        return self.m * self.ghosts_per_map

    @property
    def ho(self) -> int:
        return out_size(self.h, self.stride)

    @property
    def wo(self) -> int:
        return out_size(self.w, self.stride)

    @property
    def out_pixels(self) -> int:
        """Pixels of an output map."""
        return self.ho * self.wo

    @property
    def wide(self) -> bool:
        """Whether some offset may need 64 bits."""
        pixels = max(self.h * self.w, self.out_pixels)
        channels = max(self.c, self.m, self.g, self.out_channels)
        return needs_64_bits(self.n * pixels * channels)

    def map_bytes(self, channels: int) -> int:
        """Bytes of that many output maps of the whole batch."""
        return self.n * self.out_pixels * channels * self.dtype.itemsize

    @property
    def x_bytes(self) -> int:
        return self.n * self.h * self.w * self.c * self.dtype.itemsize

    def given_u(self) -> Problem:
        """The problem that has u as its x, and no primary convolution."""
        return replace(self, c=self.m, h=self.ho, w=self.wo, stride=1, has_primary=False)


@dataclass(frozen=True)
class Tile:
    """Tile sizes and launch options of one kernel.

    Attributes:
        pixels: pixels of a tile.
        channels: channels of a tile.
        depth: step of the matrix product (weight_gradient: its second channel axis).
        warps, stages: warps of a program, stages of the software pipeline.
    """

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Passes:
    """The choice between one pass and two launches; cost is bytes moved at the device's full rate.

    Attributes:
        one_pass: the choice.
        programs: programs of the one pass.
        bytes_one, bytes_two: bytes that each moves through memory.
        cost_one, cost_two: these bytes over the busy share of the device, plus LAUNCH_BYTES for
            each launch.
        reason: the choice in words.
    """

    one_pass: bool
    programs: int
    bytes_one: int
    bytes_two: int
    cost_one: float
    cost_two: float
    reason: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"passes       {'one pass' if self.one_pass else 'two launches'}: {self.reason}",
                f"one pass     {self.bytes_one:,} bytes, {self.programs} programs, "
                f"cost {self.cost_one:,.0f}",
                f"two launches {self.bytes_two:,} bytes, cost {self.cost_two:,.0f}",
            )
        )


def needs_64_bits(numel: int) -> bool:
    """Whether offsets into a tensor, and those of a tile beyond its end, pass 31 bits."""
    return numel >= 2**31 - 2**24


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def rounded_up(n: int) -> int:
    """n rounded up to three significant bits: loop lengths are constants, so few should exist."""
    step = 1 << max(n.bit_length() - 3, 0)
    return -(-n // step) * step


def passes(p: Problem, device: Device, *, stores_z: bool, epilogue: bool = False) -> Passes:
    """One pass or two launches, for evaluation (stores_z) or the second pass of a training forward.

    See this file's docstring for the two costs. One pass needs a block barrier that orders the
    stores and loads of its threads. CUDA's barrier does; Triton's barrier for AMD is an s_barrier
    without the s_waitcnt vmcnt before it. The backward uses the same choice to join launches.
    """
    tile = default_tile("fused", p, device)
    programs = p.n * math.ceil(p.m / tile.channels)
    y, z = p.map_bytes(p.m), p.map_bytes(p.out_channels - p.m) if stores_z else 0
    one = p.x_bytes + y + z
    two = one + (0 if 2 * y <= device.l2_bytes else y)
    busy = min(1.0, programs / (RESIDENT * device.multiprocessors))
    cost_one = one / busy + LAUNCH_BYTES if programs else 0.0
    cost_two = two + 2 * LAUNCH_BYTES
    if p.g == 0:
        choice, reason = False, "ratio 1 has no ghost maps, the primary launch is all"
    elif device.hip:
        choice = False
        reason = "on AMD, Triton's block barrier does not wait for stores to memory"
    elif epilogue:
        choice, reason = False, "gate and residual change what is stored, so y needs its own place"
    elif cost_one <= cost_two:
        choice, reason = True, "enough programs, and y is not read from memory again"
    else:
        choice = False
        reason = f"{programs} whole-image programs keep {busy:.0%} of the device busy"
    return Passes(choice, programs, one, two, cost_one, cost_two, reason)


def stashes_u(p: Problem) -> bool:
    """Whether the first pass of a training forward stores u, so that the second pass reads u.

    Recomputing u reads x twice; stashing u reads x once, writes u and reads u. Without a primary
    convolution u is given. (The third pass reads y, which the second pass has written into out.)
    """
    return p.has_primary and p.x_bytes > 2 * p.map_bytes(p.m)


def explain(p: Problem, device: Device) -> str:
    """The decisions for a problem, one a line."""
    lines = [str(passes(p, device, stores_z=True))]
    lines += [f"training     {'stashes' if stashes_u(p) else 'recomputes'} u between its passes"]
    lines += [f"{kind:<19}{default_tile(kind, p, device)}" for kind in KINDS]
    return "\n".join(lines)


# ---------------------------------------------------------------- tiles


def channel_axis(kind: str, p: Problem) -> int:
    """The number of channels that the programs of a kernel divide among themselves."""
    if kind in ("cheap", "cheap_sums", "cheap_gradient"):
        return p.g
    return p.c if kind == "input_gradient" else p.m


def default_tile(kind: str, p: Problem, device: Device) -> Tile:
    """The tile that runs without autotuning."""
    channels = channel_axis(kind, p)
    depth = {"input_gradient": p.m, "weight_gradient": p.c}.get(kind, p.c)
    if device.interpreter:
        return _interpreter_tile(p, channels, depth)
    if kind not in _WITH_PRODUCT:
        return _stencil_tile(p, channels)
    if kind == "fused":
        # Few channels per program: more programs, and the y of an image stays in the caches.
        block, pixels = min(power_of_two(max(channels, 16)), 64), 64
        if p.dw_size > 3:
            block = min(block, 32)
    else:
        # x is read once for every channel block: up to 128 channels there is only one.
        block = min(power_of_two(max(channels, 16)), 128)
        pixels = 128 if block <= 64 else 64
    step = 32
    if p.dtype is torch.float32:  # twice the bytes in shared memory and, without TF32, no MMA
        block, pixels = min(block, 64), 64
    if kind == "weight_gradient":
        block = min(block, 64)
        step = min(power_of_two(max(p.c, 16)), 64)
        pixels = 64 if p.dtype is not torch.float32 else 32
    step = min(step, power_of_two(max(depth, 16)))
    return Tile(pixels, block, step, 4, 2 if device.hip else 3)


def weight_tile(p: Problem, other: Tile, device: Device) -> Tile:
    """The tile of dw1 in the launch that makes dx with tile ``other``."""
    tile = default_tile("weight_gradient", p, device)
    return replace(tile, warps=other.warps, stages=other.stages)


def _stencil_tile(p: Problem, channels: int) -> Tile:
    # The contiguous axis is the longer one, for wide loads. 16 values per thread, or 8 for a long
    # row of taps, because the loads of a row occupy registers at the same time.
    values = 2048 if p.dw_size <= 5 else 1024
    if p.nhwc:
        block = min(power_of_two(max(channels, 8)), values // 32)
    else:
        block = min(power_of_two(channels), 8)
    return Tile(min(values // block, 512), block, 0, 4, 1)


def _interpreter_tile(p: Problem, channels: int, depth: int) -> Tile:
    pixels = p.n * max(p.h * p.w, 1) if p.nhwc else p.h * p.w
    return Tile(
        min(power_of_two(max(pixels, 16)), 2048),
        min(power_of_two(max(channels, 1)), 64),
        min(power_of_two(max(depth, 1)), 128),
        4,
        1,
    )


def candidates(kind: str, p: Problem, device: Device) -> list[Tile]:
    """The default tile, then the alternatives that autotuning times."""
    first = default_tile(kind, p, device)
    found = [first]
    if device.interpreter:
        return found
    widest = power_of_two(max(channel_axis(kind, p), 16))
    for pixels in (first.pixels // 2, first.pixels, first.pixels * 2):
        for channels in (first.channels // 2, first.channels, first.channels * 2):
            for warps in (4, 8):
                tile = replace(first, pixels=pixels, channels=channels, warps=warps)
                if (
                    tile not in found
                    and 16 <= channels <= min(widest, 128)
                    and 16 <= pixels <= 512
                    and 1024 <= pixels * channels <= 16384
                ):
                    found.append(tile)
    if kind in _WITH_PRODUCT and kind != "weight_gradient":
        deepest = power_of_two(max(p.m if kind == "input_gradient" else p.c, 16))
        found += [replace(first, depth=d) for d in (16, 32, 64) if first.depth != d <= deepest]
        found += [replace(first, stages=s) for s in (2, 4) if s != first.stages]
    return found


def tiles_per_program(
    kind: str, p: Problem, tile: Tile, device: Device, images: int, pixels: int
) -> int:
    """The number of consecutive tiles of one program, for ``images`` runs of ``pixels`` pixels.

    With few programs the partial results are small, and consecutive tiles share rows in the caches.
    The number of programs is about eight per multiprocessor (two for weight_gradient).
    """
    tiles = math.ceil(pixels / tile.pixels)
    blocks = math.ceil(channel_axis(kind, p) / tile.channels)
    if kind == "weight_gradient":
        blocks *= math.ceil(p.c / tile.depth)
    programs = math.ceil(8 * device.multiprocessors / max(blocks * images, 1))
    if kind == "weight_gradient":
        programs = max(1, programs // 4)
    return rounded_up(max(1, math.ceil(tiles / programs)))
