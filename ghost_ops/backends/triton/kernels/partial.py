"""Partial results, a row for each group of tiles, folded by the program that arrives last.

A sum over all pixels needs the results of all programs, but no program waits for another. Each
program stores its row and increments a counter; the program that reaches the final count folds the
rows, in the order of the rows. Therefore the bits of the sum do not depend on which program arrives
last. The counters are integers; the last program resets them to zero for the next kernel.

Folding has two levels, so that the tail of a kernel stays short: each FAN neighbouring rows become
one more row, a cluster, and the clusters become the result. FAN is about the square root of the
number of rows. Every block of channels folds for itself, with a counter for each cluster and one
for all clusters.

``part`` is ``launch.Rows``: data (float32 rows), counters, and parts (the number of groups).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from .common import INTERPRET, block_channels, store


@triton.jit
def _is_last(counter_ptr, count):
    """Whether this program is the last of ``count`` programs to arrive at this counter.

    The last program sees the stores of the others: the atomic of one thread releases this program's
    stores before the barrier, and acquires those of the other programs.
    """
    if not INTERPRET and is_hip():
        # The barrier that Triton emits for AMD does not wait for outstanding stores.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1",
            "=v,v",
            [tl.arange(0, 64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _all_rows(part, FAN: tl.constexpr):
    """Number of rows of a plane of partial results: one per group, then one per cluster."""
    return tl.cast(part.parts + tl.cdiv(part.parts, FAN), tl.int64)


@triton.jit
def _cluster(part, group, block, FAN: tl.constexpr):
    """(clusters, cluster of a group, its first row, its number of rows, counters of the block)."""
    clusters = tl.cdiv(part.parts, FAN)
    cluster = group // FAN
    first = cluster * FAN
    number = tl.minimum(part.parts - first, FAN)
    return clusters, cluster, first, number, part.counters + block * (clusters + 1)


# ---------------------------------------------------------------- moments


@triton.jit
def store_moments(part, row, column, count, mean, m2, c, cm, CH: tl.constexpr, FAN: tl.constexpr):
    """Store a row of partial moments: mean [rows, CH], M2 [rows, CH], and count [columns, rows]."""
    rows = _all_rows(part, FAN)
    at = tl.cast(row, tl.int64) * CH + c
    tl.store(part.data + at, mean, mask=cm)
    tl.store(part.data + rows * CH + at, m2, mask=cm)
    tl.store(part.data + 2 * rows * CH + column * rows + row, count)


@triton.jit
def _moments_of(part, first, number, column, c, cm, CH: tl.constexpr, tile: tl.constexpr):
    """(count, mean, M2) of ``number`` rows, by Chan's formula in their order."""
    B: tl.constexpr = tile.CHANNELS
    FIT: tl.constexpr = 2048 // B if B < 256 else 8
    AT_ONCE: tl.constexpr = FIT if FIT < tile.FAN else tile.FAN
    rows = _all_rows(part, tile.FAN)
    count = 0.0
    mean = tl.zeros((B,), tl.float32)
    m2 = tl.zeros((B,), tl.float32)
    start = 0
    while start < number:
        i = start + tl.arange(0, AT_ONCE)
        im = i < number
        at = tl.cast(first + i, tl.int64)[:, None] * CH + c[None, :]
        mask = im[:, None] & cm[None, :]
        counts = tl.load(part.data + 2 * rows * CH + column * rows + first + i, mask=im, other=0.0)
        means = tl.load(part.data + at, mask=mask, other=0.0)
        m2s = tl.load(part.data + rows * CH + at, mask=mask, other=0.0)
        added = tl.sum(counts, 0)
        # A row without values has mean 0 and weight 0.
        chunk_mean = tl.sum(means * counts[:, None], 0) / tl.where(added > 0.0, added, 1.0)
        off = means - chunk_mean[None, :]
        chunk_m2 = tl.sum(m2s + off * off * counts[:, None], 0)
        total = count + added
        share = added / tl.where(total > 0.0, total, 1.0)
        delta = chunk_mean - mean
        m2 += chunk_m2 + delta * delta * count * share
        mean += delta * share
        count = total
        start += AT_ONCE
    return count, mean, m2


@triton.jit
def fold_moments(
    part,
    moments,
    group,
    block,
    CH: tl.constexpr,
    COLUMNS: tl.constexpr,
    tile: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store mean and biased variance of all rows, once all groups have stored their moments.

    A block is COLUMNS times tile.CHANNELS channels.
    """
    mean_ptr, var_ptr = moments
    clusters, cluster, first, number, counters = _cluster(part, group, block, tile.FAN)
    if _is_last(counters + cluster, number):
        for j in range(COLUMNS):
            column = block * COLUMNS + j
            c = block_channels(column, tile.CHANNELS, WIDE)
            cm = c < CH
            count, mean, m2 = _moments_of(part, first, number, column, c, cm, CH, tile)
            row = part.parts + cluster
            store_moments(part, row, column, count, mean, m2, c, cm, CH, tile.FAN)
        if _is_last(counters + clusters, clusters):
            for j in range(COLUMNS):
                column = block * COLUMNS + j
                c = block_channels(column, tile.CHANNELS, WIDE)
                cm = c < CH
                count, mean, m2 = _moments_of(part, part.parts, clusters, column, c, cm, CH, tile)
                tl.store(mean_ptr + c, mean, mask=cm)
                tl.store(var_ptr + c, m2 / tl.where(count > 0.0, count, 1.0), mask=cm)


# ---------------------------------------------------------------- sums of two or three vectors


@triton.jit
def store_sums(part, row, values, c, cm, CH: tl.constexpr, FAN: tl.constexpr, THREE: tl.constexpr):
    """Store a row of partial sums [2, rows, CH], or [3, rows, CH] with THREE. values: three [B]."""
    one, two, three = values
    at = tl.cast(row, tl.int64) * CH + c
    plane = _all_rows(part, FAN) * CH
    tl.store(part.data + at, one, mask=cm)
    tl.store(part.data + plane + at, two, mask=cm)
    if THREE:
        tl.store(part.data + 2 * plane + at, three, mask=cm)


@triton.jit
def _sums_of(part, first, number, c, cm, CH: tl.constexpr, THREE: tl.constexpr, tile: tl.constexpr):
    """The three sums over ``number`` rows, in their order; the third is zero without THREE."""
    B: tl.constexpr = tile.CHANNELS
    FIT: tl.constexpr = 2048 // B if B < 256 else 8
    AT_ONCE: tl.constexpr = FIT if FIT < tile.FAN else tile.FAN
    plane = _all_rows(part, tile.FAN) * CH
    one = tl.zeros((B,), tl.float32)
    two = tl.zeros((B,), tl.float32)
    three = tl.zeros((B,), tl.float32)
    start = 0
    while start < number:
        i = start + tl.arange(0, AT_ONCE)
        at = tl.cast(first + i, tl.int64)[:, None] * CH + c[None, :]
        mask = (i < number)[:, None] & cm[None, :]
        one += tl.sum(tl.load(part.data + at, mask=mask, other=0.0), 0)
        two += tl.sum(tl.load(part.data + plane + at, mask=mask, other=0.0), 0)
        if THREE:
            three += tl.sum(tl.load(part.data + 2 * plane + at, mask=mask, other=0.0), 0)
        start += AT_ONCE
    return one, two, three


@triton.jit
def fold_sums(
    part,
    sums,
    group,
    block,
    CH: tl.constexpr,
    COLUMNS: tl.constexpr,
    tile: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store the sums of all rows, once all groups have stored their sums.

    A block is COLUMNS times tile.CHANNELS channels. sums: beta, gamma and slope are written; slope
    None: there are two sums.
    """
    THREE: tl.constexpr = sums.slope is not None
    clusters, cluster, first, number, counters = _cluster(part, group, block, tile.FAN)
    if _is_last(counters + cluster, number):
        for j in range(COLUMNS):
            c = block_channels(block * COLUMNS + j, tile.CHANNELS, WIDE)
            cm = c < CH
            values = _sums_of(part, first, number, c, cm, CH, THREE, tile)
            store_sums(part, part.parts + cluster, values, c, cm, CH, tile.FAN, THREE)
        if _is_last(counters + clusters, clusters):
            for j in range(COLUMNS):
                c = block_channels(block * COLUMNS + j, tile.CHANNELS, WIDE)
                cm = c < CH
                one, two, three = _sums_of(part, part.parts, clusters, c, cm, CH, THREE, tile)
                tl.store(sums.beta + c, one, mask=cm)
                tl.store(sums.gamma + c, two, mask=cm)
                if THREE:
                    tl.store(sums.slope + c, three, mask=cm)


# ---------------------------------------------------------------- sums of matrices


@triton.jit
def store_matrix(part, row, value, at, mask, SIZE: tl.constexpr):
    """Store a block of a row of partial sums [rows, SIZE]; ``at`` are offsets in the row."""
    tl.store(part.data + tl.cast(row, tl.int64) * SIZE + at, value, mask=mask)


@triton.jit
def _matrix_of(part, first, number, at, mask, SIZE: tl.constexpr):
    """The sum over ``number`` rows, in their order."""
    total = tl.zeros(at.shape, tl.float32)
    row = tl.cast(first, tl.int64)
    end = row + number
    while row < end:
        for _ in tl.static_range(4):  # several loads are in flight at a time
            inside = mask & (row + tl.zeros_like(at) < end)
            total += tl.load(part.data + row * SIZE + at, mask=inside, other=0.0)
            row += 1
    return total


@triton.jit
def fold_matrix(part, out_ptr, group, block, at, mask, SIZE: tl.constexpr, FAN: tl.constexpr):
    """Store the sums of all rows for this block, once all groups have stored their rows."""
    clusters, cluster, first, number, counters = _cluster(part, group, block, FAN)
    if _is_last(counters + cluster, number):
        total = _matrix_of(part, first, number, at, mask, SIZE)
        store_matrix(part, part.parts + cluster, total, at, mask, SIZE)
        if _is_last(counters + clusters, clusters):
            total = _matrix_of(part, part.parts, clusters, at, mask, SIZE)
            store(out_ptr, at, total, mask)
