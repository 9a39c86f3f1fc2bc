"""Partial results, a row for each group of tiles, folded by the program that arrives last.

A sum over all pixels needs every program, and none of them waits for another. So each stores its
row and then counts itself in; the one that finds all others counted folds the rows. It does so in
the rows' order, whichever program it is: the same bits every time. The counters are integers, and
the last program sets them back to zero for the next kernel.

Folding has two levels, so that the tail of a kernel stays short: each FAN neighbouring rows become
one more row, and those rows the result. FAN is about the square root of the number of rows. Every
block of channels folds for itself, with a counter for each cluster of FAN rows and one for all.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from .common import INTERPRET, block_channels, store


@triton.jit
def _is_last(counter_ptr, count):
    """Whether this program is the last of ``count`` to come here; it sees what all have stored.

    One thread counts. It releases what the barrier has put before it, and acquires the others'.
    """
    if not INTERPRET and is_hip():
        # The barrier that Triton emits for AMD does not wait for stores under way.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [tl.arange(0, 64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _all_rows(parts, FAN: tl.constexpr):
    """Rows of a plane of partial results: a group each, then a cluster each."""
    return tl.cast(parts + tl.cdiv(parts, FAN), tl.int64)


# ---------------------------------------------------------------- moments


@triton.jit
def store_moments(
    part_ptr, parts, row, column, count, mean, m2, c, cm, CH: tl.constexpr, FAN: tl.constexpr
):
    """A row of partial moments: mean [rows, CH], M2 [rows, CH], and count [columns, rows]."""
    rows = _all_rows(parts, FAN)
    at = tl.cast(row, tl.int64) * CH + c
    tl.store(part_ptr + at, mean, mask=cm)
    tl.store(part_ptr + rows * CH + at, m2, mask=cm)
    tl.store(part_ptr + 2 * rows * CH + column * rows + row, count)


@triton.jit
def _moments_of(
    part_ptr, parts, first, number, column, c, cm,
    CH: tl.constexpr, FAN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2) of ``number`` rows, by Chan's formula in their order."""
    FIT: tl.constexpr = 2048 // B if B < 256 else 8
    AT_ONCE: tl.constexpr = FIT if FIT < FAN else FAN
    rows = _all_rows(parts, FAN)
    count = 0.0
    mean = tl.zeros((B,), tl.float32)
    m2 = tl.zeros((B,), tl.float32)
    start = 0
    while start < number:
        i = start + tl.arange(0, AT_ONCE)
        im = i < number
        at = tl.cast(first + i, tl.int64)[:, None] * CH + c[None, :]
        mask = im[:, None] & cm[None, :]
        counts = tl.load(part_ptr + 2 * rows * CH + column * rows + first + i, mask=im, other=0.0)
        means = tl.load(part_ptr + at, mask=mask, other=0.0)
        m2s = tl.load(part_ptr + rows * CH + at, mask=mask, other=0.0)
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
    part_ptr, counter_ptr, mean_ptr, var_ptr, parts, group, block,
    CH: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of everything, once all groups have stored their moments.

    A block is COLUMNS times B channels.
    """
    clusters = tl.cdiv(parts, FAN)
    cluster = group // FAN
    first = cluster * FAN
    number = tl.minimum(parts - first, FAN)
    counter_ptr += block * (clusters + 1)
    if _is_last(counter_ptr + cluster, number):
        for j in range(COLUMNS):
            column = block * COLUMNS + j
            c = block_channels(column, B, WIDE)
            cm = c < CH
            count, mean, m2 = _moments_of(part_ptr, parts, first, number, column, c, cm, CH, FAN, B)
            store_moments(part_ptr, parts, parts + cluster, column, count, mean, m2, c, cm, CH, FAN)
        if _is_last(counter_ptr + clusters, clusters):
            for j in range(COLUMNS):
                column = block * COLUMNS + j
                c = block_channels(column, B, WIDE)
                cm = c < CH
                count, mean, m2 = _moments_of(
                    part_ptr, parts, parts, clusters, column, c, cm, CH, FAN, B
                )
                tl.store(mean_ptr + c, mean, mask=cm)
                tl.store(var_ptr + c, m2 / tl.where(count > 0.0, count, 1.0), mask=cm)


# ---------------------------------------------------------------- sums of two or three vectors


@triton.jit
def store_sums(
    part_ptr, parts, row, one, two, three, c, cm,
    CH: tl.constexpr, FAN: tl.constexpr, THREE: tl.constexpr,
):  # fmt: skip
    """A row of partial sums: [2, rows, CH], or THREE instead of two."""
    at = tl.cast(row, tl.int64) * CH + c
    plane = _all_rows(parts, FAN) * CH
    tl.store(part_ptr + at, one, mask=cm)
    tl.store(part_ptr + plane + at, two, mask=cm)
    if THREE:
        tl.store(part_ptr + 2 * plane + at, three, mask=cm)


@triton.jit
def _sums_of(
    part_ptr, parts, first, number, c, cm,
    CH: tl.constexpr, FAN: tl.constexpr, THREE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums over ``number`` rows, in their order."""
    FIT: tl.constexpr = 2048 // B if B < 256 else 8
    AT_ONCE: tl.constexpr = FIT if FIT < FAN else FAN
    plane = _all_rows(parts, FAN) * CH
    one = tl.zeros((B,), tl.float32)
    two = tl.zeros((B,), tl.float32)
    three = tl.zeros((B,), tl.float32)
    start = 0
    while start < number:
        i = start + tl.arange(0, AT_ONCE)
        at = tl.cast(first + i, tl.int64)[:, None] * CH + c[None, :]
        mask = (i < number)[:, None] & cm[None, :]
        one += tl.sum(tl.load(part_ptr + at, mask=mask, other=0.0), 0)
        two += tl.sum(tl.load(part_ptr + plane + at, mask=mask, other=0.0), 0)
        if THREE:
            three += tl.sum(tl.load(part_ptr + 2 * plane + at, mask=mask, other=0.0), 0)
        start += AT_ONCE
    return one, two, three


@triton.jit
def fold_sums(
    part_ptr, counter_ptr, one_ptr, two_ptr, three_ptr, parts, group, block,
    CH: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, FAN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The sums over everything, once all groups have stored theirs; a block as above.

    three_ptr None: there are two.
    """
    THREE: tl.constexpr = three_ptr is not None
    clusters = tl.cdiv(parts, FAN)
    cluster = group // FAN
    first = cluster * FAN
    number = tl.minimum(parts - first, FAN)
    counter_ptr += block * (clusters + 1)
    if _is_last(counter_ptr + cluster, number):
        for j in range(COLUMNS):
            column = block * COLUMNS + j
            c = block_channels(column, B, WIDE)
            cm = c < CH
            one, two, three = _sums_of(part_ptr, parts, first, number, c, cm, CH, FAN, THREE, B)
            store_sums(part_ptr, parts, parts + cluster, one, two, three, c, cm, CH, FAN, THREE)
        if _is_last(counter_ptr + clusters, clusters):
            for j in range(COLUMNS):
                column = block * COLUMNS + j
                c = block_channels(column, B, WIDE)
                cm = c < CH
                one, two, three = _sums_of(
                    part_ptr, parts, parts, clusters, c, cm, CH, FAN, THREE, B
                )
                tl.store(one_ptr + c, one, mask=cm)
                tl.store(two_ptr + c, two, mask=cm)
                if THREE:
                    tl.store(three_ptr + c, three, mask=cm)


# ---------------------------------------------------------------- sums of matrices


@triton.jit
def store_matrix(part_ptr, row, value, at, mask, SIZE: tl.constexpr):
    """A block of a row of partial sums [rows, SIZE]: ``at`` are offsets in the row."""
    tl.store(part_ptr + tl.cast(row, tl.int64) * SIZE + at, value, mask=mask)


@triton.jit
def _matrix_of(part_ptr, first, number, at, mask, SIZE: tl.constexpr):
    """The sum over ``number`` rows, in their order."""
    total = tl.zeros(at.shape, tl.float32)
    row = tl.cast(first, tl.int64)
    end = row + number
    while row < end:
        for _ in tl.static_range(4):  # several rows are on their way at a time
            inside = mask & (row + tl.zeros_like(at) < end)
            total += tl.load(part_ptr + row * SIZE + at, mask=inside, other=0.0)
            row += 1
    return total


@triton.jit
def fold_matrix(
    part_ptr, counter_ptr, out_ptr, parts, group, block, at, mask,
    SIZE: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """The block's sums over everything, once all groups have stored theirs."""
    clusters = tl.cdiv(parts, FAN)
    cluster = group // FAN
    first = cluster * FAN
    number = tl.minimum(parts - first, FAN)
    counter_ptr += block * (clusters + 1)
    if _is_last(counter_ptr + cluster, number):
        total = _matrix_of(part_ptr, first, number, at, mask, SIZE)
        store_matrix(part_ptr, parts + cluster, total, at, mask, SIZE)
        if _is_last(counter_ptr + clusters, clusters):
            total = _matrix_of(part_ptr, parts, clusters, at, mask, SIZE)
            store(out_ptr, at, total, mask)
