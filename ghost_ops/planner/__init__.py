"""How the kernels cut a Ghost module into tiles, and what that moves through memory.

The decisions are made in ``csrc/core/plan.cpp`` (CPU) and ``csrc/core/cuda_plan.cpp`` (CUDA), the
same code that the kernels run on; this module only shows them. ``explain`` takes the shape of a
Ghost module's input, ``explain_module`` a module and the shape of its input::

    >>> print(ghost_ops.planner.explain((16, 40, 28, 28), out_channels=240))
    >>> print(ghost_ops.planner.explain((256, 40, 28, 28), 240, device="sm_90",
    ...                                 dtype=torch.float16, channels_last=True))

A CUDA plan needs no GPU: it follows from the architecture's name. With a whole model in the place
of the shape, ``explain`` lists every operator of its fused form on a GPU, beside eager PyTorch's::

    >>> print(ghost_ops.planner.explain(ghost_ops.models.ghostnet(), (256, 3, 224, 224)))

``explain_saved`` lists what a training step keeps for backward, and what it computes again::

    >>> print(ghost_ops.planner.explain_saved(ghost_ops.models.ghostnet(), (16, 3, 224, 224)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from .. import activations, backends, environment
from ..ops.ghost import allow_tf32
from ..reference import GhostModule
from .saved import SavedPlan as SavedPlan
from .saved import explain_saved as explain_saved

if TYPE_CHECKING:
    from .network import NetworkPlan

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CpuMachine:
    """What a CPU plan depends on, besides the problem.

    Attributes:
        lanes: float32 lanes of a vector register: 4, 8 or 16.
        registers: vector registers, 8 or more.
        l1_bytes, l2_bytes: data caches of a core, 4 KiB and 64 KiB or more.
        cores: threads that share the work, 1 or more.
        amx: whether it multiplies tiles of bfloat16.

    Raises:
        ValueError: a value is not allowed.
    """

    lanes: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    cores: int = 1
    amx: bool = False

    def __post_init__(self) -> None:
        if self.lanes not in (4, 8, 16):
            raise ValueError(f"lanes must be 4, 8 or 16, got {self.lanes}")
        least = {"registers": 8, "l1_bytes": 4 << 10, "l2_bytes": 64 << 10, "cores": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")


def cpu_machine(threads: int | None = None) -> CpuMachine:
    """This machine with the chosen instruction set, or what GHOST_OPS_CPU_MACHINE makes of it.

    Args:
        threads: its cores, ``torch.get_num_threads()`` by default.

    Raises:
        RuntimeError: the native library is not there; the message says why.
    """
    threads = torch.get_num_threads() if threads is None else threads
    return CpuMachine(**backends.native.library().machine(threads))


@dataclass(frozen=True)
class Plan:
    """The tile plan of one evaluation pass on the CPU and its cost model.

    Attributes:
        along_lanes: what lies along the lanes of a vector: ``"pixels"``, or ``"channels"`` (in
            channels_last, and for small maps that narrow).
        depth: with channels along the lanes, input channels of a slice of the matrix product.
        amx: the product runs in bfloat16 on the processor's tiles, with float32 sums.
        in_place: the output itself is the scratch for y; with channels along the lanes.
        pack: x is first converted, transposed or gathered into scratch, tile by tile.
        images: whole images joined in one tile.
        band_rows: output rows that one band of an image computes (all rows: no banding).
        row_splits: independent row ranges an image is cut into for threads.
        channel_splits: independent ranges of intrinsic channels for threads.
        group: intrinsic channels whose maps stay in scratch until their ghosts are done.
        vecs: width of the matrix product's register block, in vectors of pixels.
        fetch: what the matrix product has fetched from beyond L2 meanwhile: ``"columns"``, the next
            ones of x; ``"images"``, the next ones of x and the place of the results, evenly; or
            ``"nothing"``.
        fetch_results: it also has the place of the next columns' results fetched.
        stream: the output is written with non-temporal stores.
        items: length of the parallel loop.
        scratch_bytes: scratch memory a thread.
        bytes_fused: x read once, out written once, parameters read once.
        bytes_eager: what the unfused module's kernels read and write.
        flops: multiplications and additions of both convolutions.
        keep_primary: training keeps u for backward (u is a quarter of x or less).
        machine: the machine the plan is for.
    """

    along_lanes: str
    depth: int
    amx: bool
    in_place: bool
    pack: bool
    images: int
    band_rows: int
    row_splits: int
    channel_splits: int
    group: int
    vecs: int
    fetch: str
    fetch_results: bool
    stream: bool
    items: int
    scratch_bytes: int
    bytes_fused: int
    bytes_eager: int
    flops: int
    keep_primary: bool
    machine: CpuMachine

    def __str__(self) -> str:
        source = "packed into scratch" if self.pack else "read in place"
        block = f"{self.vecs} vectors of {self.machine.lanes} wide"
        if self.along_lanes == "channels":
            block = f"channels along the lanes, {self.depth} of x in a slice"
            if self.amx:
                block = "channels along the lanes, bfloat16 on AMX tiles"
        tile = f"{self.images} whole images" if self.images > 1 else f"{self.band_rows} rows"
        return "\n".join(
            (
                f"x            {source}",
                f"tile         {tile}, {self.group} intrinsic channels at a time, {block}",
                f"parallel     {self.items} items (rows / {self.row_splits}, "
                f"channels / {self.channel_splits}), "
                f"{self.scratch_bytes / 1024:.0f} KiB scratch a thread",
                f"fetched      {self.fetch} ahead{', results ahead' if self.fetch_results else ''}",
                f"stores       {'non-temporal' if self.stream else 'ordinary'}",
                f"bytes        {self.bytes_fused:,} fused, {self.bytes_eager:,} eager "
                f"({self.bytes_eager / max(self.bytes_fused, 1):.1f}x)",
                f"FLOPs        {self.flops:,} ({self.flops / max(self.bytes_fused, 1):.1f} a byte)",
                f"training     {'keeps' if self.keep_primary else 'recomputes'} u for backward",
            )
        )


@dataclass(frozen=True)
class CudaPass:
    """One kernel launch of a CUDA plan.

    A block of threads owns a tile of pixels times a block of intrinsic channels with their ghosts.

    Attributes:
        kernel: ``ghost_apply`` (``ghost_apply_pipelined``, if GHOST_OPS_CUDA_PIPELINE is 1),
            ``ghost_primary_stats``, ``ghost_cheap_stats`` or ``ghost_backward_sums``.
        channels, channel_blocks: intrinsic channels a block owns, and into how many blocks of them
            the module is cut.
        ghosts, ghost_blocks: the same for the ghost maps of an intrinsic map.
        images, rows, cols: output pixels of a tile: whole images, or a band of one.
        halo: pixels of y around a tile that are recomputed.
        tiles: tiles of the batch.
        blocks, blocks_per_sm: thread blocks launched, and how many a multiprocessor holds.
        instance: channels that the chosen kernel instance has room for.
        slice, resident: channels of x in a pipeline stage; whether w1 stays in shared memory.
        smem_bytes: shared memory of a block.
        tensor_cores: whether the product runs on them.
        dram_bytes, l2_bytes: the model's traffic, with halos and what is read more than once.
        seconds: the model's time. It ranks tiles; it was not measured.
        alternatives: the best plans of this launch, as many as asked for, this one among them: the
            order in which GHOST_OPS_CUDA_PLAN counts them.
    """

    kernel: str
    channels: int
    channel_blocks: int
    ghosts: int
    ghost_blocks: int
    images: int
    rows: int
    cols: int
    halo: int
    tiles: int
    blocks: int
    blocks_per_sm: int
    instance: int
    slice: int
    resident: bool
    smem_bytes: int
    tensor_cores: bool
    dram_bytes: int
    l2_bytes: int
    seconds: float
    alternatives: tuple[CudaPass, ...] = ()

    def __str__(self) -> str:
        tile = (
            f"{self.images} whole images"
            if self.images > 1
            else f"{self.rows} x {self.cols} pixels"
        )
        weights = "w1 resident" if self.resident else "w1 streamed"
        unit = "tensor cores" if self.tensor_cores else "plain multiply-adds"
        return "\n".join(
            (
                self.kernel,
                f"  tile       {tile}, halo {self.halo}, {self.channels} intrinsic channels",
                f"  grid       {self.blocks} blocks for {self.tiles} tiles x {self.channel_blocks} "
                f"channel blocks x {self.ghost_blocks} ghost blocks, {self.blocks_per_sm} an SM",
                f"  product    {unit}, {self.slice} channels a stage, {weights}, "
                f"instance {self.instance}",
                f"  memory     {self.smem_bytes:,} bytes shared, {self.dram_bytes:,} from DRAM, "
                f"{self.l2_bytes:,} from L2",
                f"  model      {self.seconds * 1e6:.1f} us (the model's, not measured)",
                *(
                    f"  plan {rank}     {one.seconds * 1e6:.1f} us: {one.images} x {one.rows} x "
                    f"{one.cols} pixels, {one.channels} of {one.instance} channels, "
                    f"{one.blocks} blocks"
                    for rank, one in enumerate(self.alternatives, 1)
                ),
            )
        )


@dataclass(frozen=True)
class CudaBackward:
    """The launches of a backward pass on a GPU.

    Attributes:
        launches: how many there are, four at most.
        stores_u: the first of them writes u, pixel by pixel, for the others.
        sums: the first launch, sums over da2 of the second batch norm; None where it is not needed.
        channels, channel_blocks, images, rows, cols, tiles, workers: the second launch (dv, dw2,
            da1): intrinsic channels of a block, pixels of a tile, and how many blocks share the
            tiles of a channel block.
        halo_rows, halo_cols: pixels around a tile where dv is recomputed.
        du_workers, du_slices, du_channels, du_pixels: the third launch where one block makes dx and
            dw1: how many blocks share the pixels of a slice of the channels of x, the slices, their
            channels, and the pixels of a tile. No workers: dx and dw1 have blocks of their own.
        makes_u: these blocks make u again from x instead of reading it.
        dx_blocks, dx_groups, dx_depth: the third launch: blocks for dx, independent parts of the
            channels of x, and intrinsic channels of du that stay in shared memory.
        dw1_blocks, dw1_splits, dw1_pixels: its blocks for dw1, the slices of the pixels among them,
            and how many pixels are summed at a time.
        grads_smem_bytes, primary_smem_bytes: shared memory of a block of the second and third.
        scratch_bytes: memory that lives as long as the pass: u, da1 and the partial sums.
    """

    launches: int
    stores_u: bool
    sums: CudaPass | None
    channels: int
    channel_blocks: int
    images: int
    rows: int
    cols: int
    halo_rows: int
    halo_cols: int
    tiles: int
    workers: int
    grads_smem_bytes: int
    du_workers: int
    du_slices: int
    du_channels: int
    du_pixels: int
    makes_u: bool
    dx_blocks: int
    dx_groups: int
    dx_depth: int
    dw1_blocks: int
    dw1_splits: int
    dw1_pixels: int
    primary_smem_bytes: int
    scratch_bytes: int

    def __str__(self) -> str:
        tile = (
            f"{self.images} whole images"
            if self.images > 1
            else f"{self.rows} x {self.cols} pixels"
        )
        lines = [f"backward, {self.launches} launches"]
        if self.sums is not None:
            lines.append(str(self.sums))
        lines += [
            "ghost_backward_grads",
            f"  tile       {tile}, dv {self.halo_rows} rows and {self.halo_cols} columns around, "
            f"{self.channels} intrinsic channels",
            f"  grid       {self.workers} x {self.channel_blocks} blocks for {self.tiles} tiles, "
            f"{self.grads_smem_bytes:,} bytes shared",
            *self._primary(),
            f"  memory     {self.primary_smem_bytes:,} bytes shared",
            f"scratch      {self.scratch_bytes:,} bytes",
        ]
        return "\n".join(lines)

    def _primary(self) -> list[str]:
        if self.du_workers:
            return [
                "ghost_backward_du",
                f"  dx, dw1    {self.du_workers} x {self.du_slices} blocks, {self.du_pixels} "
                f"pixels x {self.du_channels} channels at a time, "
                f"u {'made again' if self.makes_u else 'read'}",
            ]
        return [
            "ghost_backward_primary",
            f"  dx         {self.dx_blocks} blocks, {self.dx_groups} parts of x's channels, "
            f"{self.dx_depth} intrinsic channels at a time",
            f"  dw1        {self.dw1_blocks} blocks, pixels in {self.dw1_splits} parts, "
            f"{self.dw1_pixels} at a time",
        ]


@dataclass(frozen=True)
class CudaPlan:
    """The launches of an evaluation pass, or of a training forward, on a GPU.

    Attributes:
        device: the architecture, such as ``"sm_90"``.
        passes: one entry a launch, in order.
        writes_u: training: the first pass writes u, and the later ones read it instead of x.
        bytes_fused, bytes_eager, flops: as in :class:`Plan`.
        backward: training: the backward pass, None otherwise.
    """

    device: str
    passes: tuple[CudaPass, ...]
    writes_u: bool
    bytes_fused: int
    bytes_eager: int
    flops: int
    backward: CudaBackward | None = None

    @property
    def seconds(self) -> float:
        """The model's time of all passes; not measured."""
        return sum(one.seconds for one in self.passes)

    def __str__(self) -> str:
        lines = [f"{self.device}, {len(self.passes)} launches", *map(str, self.passes)]
        lines.append(f"bytes        {self.bytes_fused:,} fused, {self.bytes_eager:,} eager")
        if self.writes_u:
            lines.append("u            written by the first pass, read by the others")
        if self.backward is not None:
            lines.append(str(self.backward))
        return "\n".join(lines)


CUDA_DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")


def compute_capability(device: str) -> int | None:
    """10 * major + minor of a device that ``explain`` takes; None for the CPU.

    Raises:
        ValueError: it is none of them.
        RuntimeError: ``"cuda"`` without a GPU.
    """
    if device == "cpu":
        return None
    if device == "cuda":
        if not torch.cuda.is_available():
            allowed = ", ".join(CUDA_DEVICES)
            raise RuntimeError(
                f"device 'cuda' asks for the plan of this machine's GPU, and torch sees none; name "
                f"an architecture instead: {allowed}"
            )
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    if device not in CUDA_DEVICES:
        allowed = ", ".join(map(repr, ("cpu", "cuda", *CUDA_DEVICES)))
        raise ValueError(f"device must be one of {allowed}, got {device!r}")
    return int(device.removeprefix("sm_"))


@overload
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
    machine: CpuMachine | None = None,
    device: str = "cpu",
    training: bool = False,
    alternatives: int = 0,
) -> Plan | CudaPlan: ...


@overload
def explain(
    model: nn.Module,
    input_shape: Sequence[int],
    device: str = "sm_90",
    dtype: torch.dtype = torch.float16,
    *,
    channels_last: bool = True,
    training: bool = False,
) -> NetworkPlan: ...


def explain(*args: Any, **kwargs: Any) -> Plan | CudaPlan | NetworkPlan:
    """The plan of a Ghost module by its shape, or of a whole model.

    ``explain(shape, out_channels, *, ...)`` is :func:`explain_shape`: the tile plan of one Ghost
    module, for the CPU by default. ``explain(model, input_shape, device, dtype, *, ...)`` is
    :func:`ghost_ops.planner.network.explain_network`: every operator of the fused model on a GPU.

    Raises:
        TypeError: an argument of the other form, such as ``ratio`` for a model.
        ValueError, RuntimeError: as these functions.
    """
    if isinstance(args[0] if args else kwargs.get("model"), nn.Module):
        from .network import explain_network

        return explain_network(*args, **kwargs)
    return explain_shape(*args, **kwargs)


def explain_shape(
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
    machine: CpuMachine | None = None,
    device: str = "cpu",
    training: bool = False,
    alternatives: int = 0,
) -> Plan | CudaPlan:
    """The plan for an input of ``shape`` [N, C, H, W] and a 1x1 primary convolution.

    Args:
        shape: N, C, H, W of x.
        out_channels: oup, channels of the output.
        ratio, dw_size, stride: as in :class:`ghost_ops.FusedGhostModule`.
        activation, cheap_activation: of the two branches; the second defaults to the first.
        dtype: float32, float64, bfloat16 or float16.
        channels_last: memory format of x.
        residual: a residual is added to the output.
        threads: size of the CPU's thread pool, ``torch.get_num_threads()`` by default.
        machine: the CPU to plan for; by default this one, see :func:`cpu_machine`.
        device: ``"cpu"``; ``"sm_80"``, ``"sm_86"``, ``"sm_89"``, ``"sm_90"`` or ``"sm_100"``;
            ``"cuda"``, the architecture of the current GPU. float32 follows torch's TF32 switch.
        training: the launches of a training forward and its backward instead of an evaluation pass
            (CUDA).
        alternatives: how many of the best plans each launch of a forward lists (CUDA). Plans within
            a thousandth of one another keep the order in which they are found.

    Returns:
        A :class:`Plan` for the CPU, a :class:`CudaPlan` for a GPU.

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
    sm = compute_capability(device)
    if alternatives < 0:
        raise ValueError(f"alternatives must not be negative, got {alternatives}")
    if alternatives and sm is None:
        raise ValueError("alternatives: only plans for a GPU have any, device is 'cpu'")
    if training and sm is None:
        raise ValueError("training: only the passes on a GPU are planned, device is 'cpu'")
    if sm is not None and (min(dims) < 1):
        raise ValueError(f"shape must have no empty size for a GPU plan, got {dims}")
    if machine is not None and (threads is not None or sm is not None):
        raise ValueError("machine goes with device 'cpu' and without threads: it has its own cores")
    library = backends.native.library()
    machine = cpu_machine(threads) if machine is None else machine
    act1, _ = activations.resolve(activation)
    cheap = activation if cheap_activation is None else cheap_activation
    act2, _ = activations.resolve(cheap, "cheap_activation")
    problem: dict[str, Any] = {
        "intrinsic": math.ceil(out_channels / ratio),
        "out_channels": out_channels,
        "ratio": ratio,
        "dw_size": dw_size,
        "stride": stride,
        "act1": act1,
        "act2": act2,
        "dtype": _DTYPES.index(dtype),
        "channels_last": channels_last,
        "has_residual": residual,
    }
    fields = library.plan(*dims, **problem, **asdict(machine))
    if sm is None:
        return Plan(**fields, machine=machine)
    environment.CUDA_PLAN.get()  # which the plan follows, too
    found = library.cuda_plan(
        *dims,
        **problem,
        sm=sm,
        allow_tf32=allow_tf32(),
        training=training,
        alternatives=alternatives,
    )
    return CudaPlan(
        f"sm_{sm}",
        tuple(_pass(one) for one in found["passes"]),
        found["writes_u"],
        *(fields[name] for name in ("bytes_fused", "bytes_eager", "flops")),
        backward=_backward(found["backward"]),
    )


def _pass(found: dict[str, Any]) -> CudaPass:
    ranked = tuple(CudaPass(**one) for one in found.pop("alternatives"))
    return CudaPass(**found, alternatives=ranked)


def _backward(found: dict[str, Any] | None) -> CudaBackward | None:
    if found is None:
        return None
    sums = found.pop("sums")
    return CudaBackward(sums=None if sums is None else CudaPass(**sums), **found)


def explain_module(module: GhostModule, shape: Sequence[int], **kwargs: Any) -> Plan | CudaPlan:
    """The plan for ``module`` (fused or reference) on an input of ``shape`` [N, C, H, W].

    Takes the keyword arguments of :func:`explain_shape` that a module does not determine.

    Raises:
        ValueError: the primary convolution is not a plain 1x1 and so is not planned here.
    """
    conv, cheap = module.primary_conv[0], module.cheap_operation[0]
    if conv.kernel_size != (1, 1) or conv.groups != 1:
        raise ValueError(f"module: only a plain 1x1 primary convolution is planned, got {conv}")
    kwargs.setdefault("dtype", conv.weight.dtype)
    return explain_shape(
        shape,
        module.oup,
        ratio=cheap.out_channels // conv.out_channels + 1,
        dw_size=cheap.kernel_size[0],
        stride=conv.stride[0],
        activation=module.primary_conv[2],
        cheap_activation=module.cheap_operation[2],
        **kwargs,
    )
