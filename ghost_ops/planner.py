"""How the CPU kernels cut a Ghost module into tiles, and what that moves through memory.

The decisions are made in ``csrc/core/plan.cpp``, the same code that the kernels run on; this module
only shows them. ``explain`` takes a shape, ``explain_module`` a module and the shape of its input::

    >>> print(ghost_ops.planner.explain((16, 40, 28, 28), out_channels=240))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import activations, backends
from .reference import GhostModule

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """The tile plan of one evaluation pass on the CPU and its cost model.

    Attributes:
        pack: x is first converted, transposed or gathered into channel-major scratch, tile by tile.
        images: whole images joined in one tile.
        band_rows: output rows that one band of an image computes (all rows: no banding).
        row_splits: independent row ranges an image is cut into for threads.
        channel_splits: independent ranges of intrinsic channels for threads.
        group: intrinsic channels whose maps stay in scratch until their ghosts are done.
        vecs: width of the matrix product's register block, in vectors of pixels.
        stream: the output is written with non-temporal stores.
        items: length of the parallel loop.
        scratch_bytes: scratch memory a thread.
        bytes_fused: x read once, out written once, parameters read once.
        bytes_eager: what the unfused module's kernels read and write.
        flops: multiplications and additions of both convolutions.
        keep_primary: training keeps u for backward (u is a quarter of x or less).
        isa: instruction set the plan is for.
    """

    pack: bool
    images: int
    band_rows: int
    row_splits: int
    channel_splits: int
    group: int
    vecs: int
    stream: bool
    items: int
    scratch_bytes: int
    bytes_fused: int
    bytes_eager: int
    flops: int
    keep_primary: bool
    isa: str

    def __str__(self) -> str:
        source = "packed into scratch" if self.pack else "read in place"
        tile = f"{self.images} whole images" if self.images > 1 else f"{self.band_rows} rows"
        return "\n".join(
            (
                f"x            {source}",
                f"tile         {tile}, {self.group} intrinsic channels at a time, "
                f"{self.vecs} vectors wide ({self.isa})",
                f"parallel     {self.items} items (rows / {self.row_splits}, "
                f"channels / {self.channel_splits}), "
                f"{self.scratch_bytes / 1024:.0f} KiB scratch a thread",
                f"stores       {'non-temporal' if self.stream else 'ordinary'}",
                f"bytes        {self.bytes_fused:,} fused, {self.bytes_eager:,} eager "
                f"({self.bytes_eager / max(self.bytes_fused, 1):.1f}x)",
                f"FLOPs        {self.flops:,} ({self.flops / max(self.bytes_fused, 1):.1f} a byte)",
                f"training     {'keeps' if self.keep_primary else 'recomputes'} u for backward",
            )
        )


def explain(
    shape: Sequence[int],
    out_channels: int,
    *,
    ratio: int = 2,
    dw_size: int = 3,
    stride: int = 1,
    activation: activations.ActivationSpec = "relu",
    cheap_activation: activations.ActivationSpec | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    residual: bool = False,
    threads: int | None = None,
) -> Plan:
    """The plan for an input of ``shape`` [N, C, H, W] and a 1x1 primary convolution.

    Args:
        shape: N, C, H, W of x.
        out_channels: oup, channels of the output.
        ratio, dw_size, stride: as in :class:`ghost_ops.FusedGhostModule`.
        activation, cheap_activation: of the two branches; the second defaults to the first.
        dtype: float32, float64, bfloat16 or float16.
        channels_last: memory format of x.
        residual: a residual is added to the output.
        threads: size of the thread pool, ``torch.get_num_threads()`` by default.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the native library is not there; the message says why.
    """
    dims = tuple(int(v) for v in shape)
    if len(dims) != 4 or min(dims) < 0:
        raise ValueError(f"shape must be four sizes [N, C, H, W], none negative, got {dims}")
    for name, value in (("out_channels", out_channels), ("ratio", ratio), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if dw_size not in (1, 3, 5, 7):
        raise ValueError(f"dw_size must be 1, 3, 5 or 7, got {dw_size}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    library = backends.native.library()
    act1, _ = activations.resolve(activation)
    cheap = activation if cheap_activation is None else cheap_activation
    act2, _ = activations.resolve(cheap, "cheap_activation")
    fields = library.plan(
        *dims,
        intrinsic=math.ceil(out_channels / ratio),
        out_channels=out_channels,
        ratio=ratio,
        dw_size=dw_size,
        stride=stride,
        act1=act1,
        act2=act2,
        dtype=_DTYPES.index(dtype),
        channels_last=channels_last,
        has_residual=residual,
        threads=torch.get_num_threads() if threads is None else threads,
    )
    return Plan(**fields, isa=library.isa())


def explain_module(module: GhostModule, shape: Sequence[int], **kwargs) -> Plan:
    """The plan for ``module`` (fused or reference) on an input of ``shape`` [N, C, H, W].

    Takes the keyword arguments of :func:`explain` that a module does not determine.

    Raises:
        ValueError: the primary convolution is not a plain 1x1 and so is not planned here.
    """
    conv, cheap = module.primary_conv[0], module.cheap_operation[0]
    if conv.kernel_size != (1, 1) or conv.groups != 1:
        raise ValueError(f"module: only a plain 1x1 primary convolution is planned, got {conv}")
    kwargs.setdefault("dtype", conv.weight.dtype)
    return explain(
        shape,
        module.oup,
        ratio=cheap.out_channels // conv.out_channels + 1,
        dw_size=cheap.kernel_size[0],
        stride=conv.stride[0],
        activation=module.primary_conv[2],
        cheap_activation=module.cheap_operation[2],
        **kwargs,
    )
