"""Parts of every kernel: addresses, batch norms, activations, the matrix product, moments.

Tensors in memory are dense, [N, CH, pixels] (NHWC false) or [N, pixels, CH] (NHWC true); a pixel is
a row-major index into a map. Values in registers are tiles [pixels, channels] in float32. Channel
counts are compile-time constants, so that the compiler can choose the width of loads. Sizes of maps
are arguments, so that one compiled kernel serves every resolution.

Arguments of the kernels come in the bundles of ``launch``: ``norm`` (``Norm``: vectors [channels]
or None, eps, and the slope of the activation: one number, or the vector of a PReLU), ``size``
(``Size``: sizes of maps), ``part`` (``Rows``: partial results), ``epilogue`` (``Epilogue``),
``sums`` (``Sums`` of ``backward``), and the constants ``shape`` (``Shape``) and ``tile``
(``Blocks``). ``channels`` is a pair: channel numbers [C], and the mask of those that exist.

In Triton 3.6 a constant of a bundle is a plain number or string, and not a ``tl.constexpr``:
``tl.zeros``, which is a jit function, takes no tuple of such numbers, and ``tl.static_range`` no
such number. The kernels use ``tl.full``, and bind the number to a local constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---------------------------------------------------------------- where a program works


@triton.jit
def locate(pid, size, BLOCKS: tl.constexpr, tile: tl.constexpr, WIDE: tl.constexpr):
    """(channel block, group, image, first tile) of a program.

    A group is TILES consecutive pixel tiles of one image. Neighbouring programs have the same group
    and differ in the channel block: the pixels that both read stay in the L2 cache.
    """
    block = pid % BLOCKS
    group = pid // BLOCKS
    per_image = tl.cdiv(tl.cdiv(size.pixels, tile.PIXELS), tile.TILES)
    image = group // per_image
    first = (group % per_image) * tile.TILES
    if WIDE:
        image = image.to(tl.int64)
        first = first.to(tl.int64)
    return block, group, image, first


@triton.jit
def block_channels(block, B: tl.constexpr, WIDE: tl.constexpr):
    """The B channels of a block."""
    c = block * B + tl.arange(0, B)
    if WIDE:
        c = c.to(tl.int64)
    return c


@triton.jit
def address(image, p, c, pixels, CH: tl.constexpr, NHWC: tl.constexpr):
    """Offsets [P, C] of pixels p [P] and channels c [C] in a dense tensor of CH channels."""
    if NHWC:
        at = ((image * pixels + p) * CH)[:, None] + c[None, :]
    else:
        at = (image * CH * pixels + p)[:, None] + (c * pixels)[None, :]
    return at


@triton.jit
def sampled(p, size, S: tl.constexpr):
    """The input pixel that a primary convolution of stride S reads for output pixel p.

    p may run over the pixels of several images that follow each other.
    """
    if S == 1:
        q = p
    else:
        inner = p % size.out_pixels
        row = inner // size.width
        column = inner % size.width
        q = (p // size.out_pixels) * size.in_pixels + (row * size.in_width + column) * S
    return q


# ---------------------------------------------------------------- batch norm


@triton.jit
def per_channel(ptr, c, mask):
    """A vector of parameters or statistics, in float32."""
    return tl.load(ptr + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inverse_deviation(norm, c, mask):
    """1 / sqrt(var + eps)."""
    return tl.rsqrt(tl.load(norm.var + c, mask=mask, other=1.0).to(tl.float32) + norm.eps)


@triton.jit
def scale_shift(norm, c, mask):
    """Batch norm as u * scale + shift; without mean and var these are gamma and beta."""
    scale = tl.full(c.shape, 1.0, tl.float32)
    shift = tl.full(c.shape, 0.0, tl.float32)
    if norm.var is not None:
        scale = inverse_deviation(norm, c, mask)
    if norm.gamma is not None:
        scale *= per_channel(norm.gamma, c, mask)
    if norm.mean is not None:
        shift = -per_channel(norm.mean, c, mask) * scale
    if norm.beta is not None:
        shift += per_channel(norm.beta, c, mask)
    return scale, shift


@triton.jit
def norm_gradient(grad, hat, scale, of_batch, BATCH: tl.constexpr):
    """Gradient of batch norm's input from that of its output; hat is the normalised input.

    of_batch: the sums of grad and of grad * hat over all values of the channel, and one over the
    number of values. BATCH false: the statistics are constants.
    """
    if BATCH:
        sum_grad, sum_grad_hat, per_value = of_batch
        grad -= (sum_grad + hat * sum_grad_hat) * per_value
    return grad * scale


# ---------------------------------------------------------------- activations


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def slopes(slope, c, mask, ACT: tl.constexpr):
    """The slope argument of ``activate`` for channels c: the number, or a PReLU's slopes [1, C]."""
    found = slope
    if ACT == 8:
        found = per_channel(slope, c, mask)[None, :]
    return found


@triton.jit
def activate(x, slope, ACT: tl.constexpr):
    """act(x), by the codes of ghost_ops.activations. The comparisons propagate NaN."""
    if ACT == 1:
        x = tl.where(x < 0.0, 0.0, x)
    elif ACT == 2:
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACT == 3 or ACT == 8:
        x = tl.where(x > 0.0, x, x * slope)
    elif ACT == 4:
        x = x / (1.0 + tl.exp(-x))
    elif ACT == 5:
        t = x + 3.0
        x = x * tl.where(t < 0.0, 0.0, tl.where(t > 6.0, 6.0, t)) / 6.0
    elif ACT == 6:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 7:
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return x


@triton.jit
def activate_gradient(x, grad, slope, ACT: tl.constexpr):
    """grad * act'(x), with PyTorch's derivative at a kink. slope: as ``slopes`` returns it."""
    if ACT == 1:
        grad = tl.where(x <= 0.0, 0.0, grad)
    elif ACT == 2:
        grad = tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 0.0, grad))
    elif ACT == 3 or ACT == 8:
        grad = tl.where(x > 0.0, grad, grad * slope)
    elif ACT == 4:
        s = 1.0 / (1.0 + tl.exp(-x))
        grad = grad * s * (1.0 + x * (1.0 - s))
    elif ACT == 5:
        inner = grad * (x / 3.0 + 0.5)
        grad = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, grad, inner))
    elif ACT == 6:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        grad = grad * (cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
    elif ACT == 7:
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        grad = grad * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
    return grad


@triton.jit
def slope_gradient(x, grad):
    """The gradient of a PReLU's slope at each x: grad * min(x, 0)."""
    return tl.where(x > 0.0, 0.0, grad * x)


# ---------------------------------------------------------------- tiles


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x to the nearest value of dtype."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter's conversion truncates; this rounds to nearest even.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def store(ptr, at, x, mask):
    """Store x, rounded to the dtype that ptr points to."""
    tl.store(ptr + at, rounded(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, shape: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if INTERPRET:
        # The interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=shape.PREC)


@triton.jit
def primary_tile(x_ptr, w1_ptr, image, p, pm, c, cm, size, shape: tl.constexpr, tile: tl.constexpr):
    """u [P, M] at output pixels p and intrinsic channels c: x @ w1^T, or x itself without w1."""
    C: tl.constexpr = shape.C
    q = sampled(p, size, shape.S)
    if w1_ptr is not None:
        u = tl.full((tile.PIXELS, tile.CHANNELS), 0.0, tl.float32)
        for k0 in range(0, C, tile.DEPTH):
            k = k0 + tl.arange(0, tile.DEPTH)
            km = k < C
            if shape.WIDE:
                k = k.to(tl.int64)
            at = address(image, q, k, size.in_pixels, C, shape.NHWC)
            x = tl.load(x_ptr + at, mask=pm[:, None] & km[None, :], other=0.0)
            at = c[None, :] * C + k[:, None]
            w = tl.load(w1_ptr + at, mask=km[:, None] & cm[None, :], other=0.0)
            u = dot(x, w, u, shape)
    else:
        at = address(image, q, c, size.in_pixels, C, shape.NHWC)
        u = tl.load(x_ptr + at, mask=pm[:, None] & cm[None, :], other=0.0).to(tl.float32)
    return u


@triton.jit
def depthwise_tile(
    y_ptr, w2_ptr, image, p, pm, ghost, gm, size, shape: tl.constexpr, tile: tl.constexpr
):
    """v [P, G] at pixels p and ghost channels: y in a D x D window, and zeros outside the map.

    y has Y_CH channels in memory, of which the first are the intrinsic maps; ghost channel i reads
    map i // GHOSTS_PER_MAP. Neighbouring taps read the same bytes again, from the L1 cache. Only a
    row of taps is unrolled: with all taps the compiler hoists D * D loads and spills registers.
    """
    D: tl.constexpr = shape.D
    STEP: tl.constexpr = shape.Y_CH if shape.NHWC else 1
    width = size.width
    inner = p % size.out_pixels
    row = inner // width
    column = inner % width
    source = ghost // shape.GHOSTS_PER_MAP
    centre = y_ptr + address(image, p, source, size.out_pixels, shape.Y_CH, shape.NHWC)
    v = tl.full((tile.PIXELS, tile.CHANNELS), 0.0, tl.float32)
    for i in range(D):
        down = i - D // 2
        in_rows = (row + down >= 0) & (row + down < size.height) & pm
        for j in tl.static_range(D):
            right = j - D // 2
            inside = in_rows & (column + right >= 0) & (column + right < width)
            mask = inside[:, None] & gm[None, :]
            y = tl.load(centre + (down * width + right) * STEP, mask=mask, other=0.0)
            tap = tl.load(w2_ptr + ghost * (D * D) + (i * D + j), mask=gm, other=0.0)
            v += y.to(tl.float32) * tap.to(tl.float32)[None, :]
    return v


@triton.jit
def finish(x, epilogue, image, p, c, at, mask, size, shape: tl.constexpr):
    """x * gate + residual, with the pointers that are given, at offsets ``at`` of the output.

    The gate [N, OUT_CH, height, width] is read at the nearest pixel, by PyTorch's rule:
    floor(row * row_scale) in float32, where row_scale is the gate's height / the output's height.
    """
    if epilogue.gate is not None:
        inner = p % size.out_pixels
        row = ((inner // size.width).to(tl.float32) * epilogue.row_scale).to(tl.int32)
        row = tl.minimum(row, epilogue.height - 1)
        column = ((inner % size.width).to(tl.float32) * epilogue.column_scale).to(tl.int32)
        column = tl.minimum(column, epilogue.width - 1)
        pixels = epilogue.height * epilogue.width
        q = (p // size.out_pixels) * pixels + row * epilogue.width + column
        gate_at = address(image, q, c, pixels, shape.OUT_CH, shape.NHWC)
        x *= tl.load(epilogue.gate + gate_at, mask=mask, other=0.0).to(tl.float32)
    if epilogue.residual is not None:
        x += tl.load(epilogue.residual + at, mask=mask, other=0.0).to(tl.float32)
    return x


# ---------------------------------------------------------------- statistics


@triton.jit
def add_moments(count, mean, m2, u, pm):
    """(count, mean, M2) of the values so far and those of a tile u [P, C], by Chan's formula.

    E[u^2] - E[u]^2 would lose the digits of a variance that is small compared to the mean.
    """
    added = tl.sum(pm.to(tl.float32), 0)
    tile_mean = tl.sum(tl.where(pm[:, None], u, 0.0), 0) / tl.where(added > 0.0, added, 1.0)
    off = tl.where(pm[:, None], u - tile_mean[None, :], 0.0)
    total = count + added
    share = added / tl.where(total > 0.0, total, 1.0)
    delta = tile_mean - mean
    m2 += tl.sum(off * off, 0) + delta * delta * count * share
    mean += delta * share
    return total, mean, m2
