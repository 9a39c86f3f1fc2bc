"""The plans that ``module`` returns: dataclasses; ``str`` of a plan explains it."""

from __future__ import annotations

from dataclasses import dataclass

from .machine import CpuMachine


@dataclass(frozen=True)
class Plan:
    """The tile plan of one evaluation pass on the CPU, and the bytes and FLOPs of its cost model.

    Attributes:
        along_lanes: the dimension along the lanes of a vector: ``"pixels"``, or ``"channels"`` (in
            channels_last, and for narrow small maps).
        depth: with channels along the lanes, the input channels in a slice of the matrix product.
        amx: the product runs in bfloat16 on AMX tiles, with float32 sums.
        in_place: y is written to the output, not to scratch; only with channels along the lanes.
        pack: each tile of x is first converted, transposed or gathered into scratch.
        images: whole images in one tile.
        band_rows: output rows of one band of an image (all rows: no banding).
        row_splits: independent row ranges of an image, for threads.
        channel_splits: independent ranges of intrinsic channels, for threads.
        group: intrinsic channels whose maps stay in scratch until their ghosts are computed.
        vecs: width of the matrix product's register block, in vectors of pixels.
        fetch: the memory that the matrix product prefetches: ``"columns"``, the next columns of x;
            ``"images"``, the next images of x and their results, evenly; or ``"nothing"``.
        fetch_results: the matrix product also prefetches the memory of its next results.
        stream: the output is written with non-temporal stores.
        items: length of the parallel loop.
        scratch_bytes: scratch memory per thread.
        bytes_fused: bytes of x and the parameters, read once, and of out, written once.
        bytes_eager: bytes that the kernels of the unfused module read and write.
        flops: multiplications and additions of both convolutions.
        keep_primary: training saves u for backward (u has at most a quarter of the bytes of x).
        machine: the machine that the plan was computed for.
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
        channels, channel_blocks: intrinsic channels of a block; blocks that divide all of them.
        ghosts, ghost_blocks: ghost maps per intrinsic map of a block; blocks that divide them.
        images, rows, cols: output pixels of a tile: whole images, or a band of one.
        halo: width in pixels of the border of y around a tile that is recomputed.
        tiles: tiles of the whole batch.
        blocks, blocks_per_sm: thread blocks of the launch; blocks on one multiprocessor.
        instance: the largest number of channels that the chosen kernel instance supports.
        slice, resident: channels of x in a pipeline stage; whether w1 stays in shared memory.
        smem_bytes: bytes of shared memory of a block.
        tensor_cores: whether the product runs on tensor cores.
        dram_bytes, l2_bytes: modelled traffic, with halos and repeated reads.
        seconds: modelled time, not measured; it ranks tiles.
        alternatives: the best plans of this launch, including this plan; GHOST_OPS_CUDA_PLAN is an
            index into this order, from 1.
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
        tile = _tile(self)
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
        launches: number of launches, at most four.
        stores_u: the first launch writes u [pixels, m] for the later launches.
        sums: the first launch, which computes the sums of the second batch norm; None if no
            gradient needs them.
        channels, channel_blocks, images, rows, cols, tiles, workers: the second launch (dv, dw2,
            da1): intrinsic channels of a block and ranges of them, output pixels of a tile, tiles,
            and the blocks that share the tiles of one channel range.
        halo_rows, halo_cols: pixels around a tile where dv is recomputed.
        du_workers, du_slices, du_channels, du_pixels: the third launch if its blocks make both dx
            and dw1: blocks that share the pixels of a slice of x's channels, slices, channels of a
            slice, pixels of a tile. No workers: dx and dw1 have separate blocks.
        makes_u: the blocks of the third launch compute u from x instead of reading u.
        dx_blocks, dx_groups, dx_depth: the third launch: blocks for dx, independent ranges of x's
            channels, and intrinsic channels of du that stay in shared memory.
        dw1_blocks, dw1_splits, dw1_pixels: the third launch: blocks for dw1, slices of the pixels,
            and pixels that are summed at a time.
        grads_smem_bytes, primary_smem_bytes: bytes of shared memory of a block of the second and of
            the third launch.
        scratch_bytes: bytes of device memory that the pass allocates and frees: u, da1 and the
            partial sums.
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
        tile = _tile(self)
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
        passes: the launches in order.
        writes_u: training: the first pass writes u, and the later passes read u instead of x.
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
        """Modelled time of all passes; not measured."""
        return sum(one.seconds for one in self.passes)

    def __str__(self) -> str:
        lines = [f"{self.device}, {len(self.passes)} launches", *map(str, self.passes)]
        lines.append(f"bytes        {self.bytes_fused:,} fused, {self.bytes_eager:,} eager")
        if self.writes_u:
            lines.append("u            written by the first pass, read by the others")
        if self.backward is not None:
            lines.append(str(self.backward))
        return "\n".join(lines)


def _tile(plan: CudaPass | CudaBackward) -> str:
    images, rows, cols = plan.images, plan.rows, plan.cols
    return f"{images} whole images" if images > 1 else f"{rows} x {cols} pixels"
