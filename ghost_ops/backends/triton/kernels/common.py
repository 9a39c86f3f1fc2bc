"""What every kernel is made of: addresses, batch norms, activations, the matrix product, moments.

Tensors in memory are dense, [N, CH, pixels] (NHWC false) or [N, pixels, CH] (true), a pixel being a
row-major position of the map. Everything on chip is a tile [pixels, channels] in float32. Channel
counts are compile-time constants, so that the compiler knows how wide a load may be; sizes of maps
are not, so that another resolution needs no other kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---------------------------------------------------------------- where a program works


@triton.jit
def locate(
    pid, pixels, BLOCKS: tl.constexpr, BP: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr
):
    """(channel block, group, image, first tile) of a program.

    A group is TILES consecutive pixel tiles of one image. Neighbouring programs have the same group
    and differ in the channel block: what they share stays in the L2 cache.
    """
    block = pid % BLOCKS
    group = pid // BLOCKS
    per_image = tl.cdiv(tl.cdiv(pixels, BP), TILES)
    image = group // per_image
    first = (group % per_image) * TILES
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
def sampled(p, in_pixels, in_width, out_pixels, out_width, S: tl.constexpr):
    """The input pixel that a primary convolution of stride S reads for output pixel p.

    p may run over the pixels of several images that follow each other.
    """
    if S == 1:
        q = p
    else:
        inner = p % out_pixels
        row = inner // out_width
        column = inner % out_width
        q = (p // out_pixels) * in_pixels + (row * in_width + column) * S
    return q


# ---------------------------------------------------------------- batch norm


@triton.jit
def per_channel(ptr, c, mask):
    """A vector of parameters or statistics, in float32."""
    return tl.load(ptr + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inverse_deviation(var_ptr, c, mask, eps):
    """1 / sqrt(var + eps)."""
    return tl.rsqrt(tl.load(var_ptr + c, mask=mask, other=1.0).to(tl.float32) + eps)


@triton.jit
def scale_shift(c, mask, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps):
    """Batch norm as u * scale + shift. No mean and var: scale and shift are gamma and beta."""
    scale = tl.full(c.shape, 1.0, tl.float32)
    shift = tl.full(c.shape, 0.0, tl.float32)
    if var_ptr is not None:
        scale = inverse_deviation(var_ptr, c, mask, eps)
    if gamma_ptr is not None:
        scale *= per_channel(gamma_ptr, c, mask)
    if mean_ptr is not None:
        shift = -per_channel(mean_ptr, c, mask) * scale
    if beta_ptr is not None:
        shift += per_channel(beta_ptr, c, mask)
    return scale, shift


@triton.jit
def norm_gradient(grad, hat, scale, sum_grad, sum_grad_hat, per_value, BATCH: tl.constexpr):
    """Gradient of batch norm's input from that of its output.

    hat is the normalised input; the sums are those of grad and of grad * hat over all values of the
    channel, and per_value is one over their number. BATCH false: the statistics are constants.
    """
    if BATCH:
        grad -= (sum_grad + hat * sum_grad_hat) * per_value
    return grad * scale


# ---------------------------------------------------------------- activations


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def slopes(slope, c, mask, ACT: tl.constexpr):
    """What ``activate`` takes for channels c: slope, or those that it points to of a PReLU."""
    found = slope
    if ACT == 8:
        found = per_channel(slope, c, mask)[None, :]
    return found


@triton.jit
def activate(x, slope, ACT: tl.constexpr):
    """act(x), by the codes of ghost_ops.activations. Comparisons are such that NaN goes through."""
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
    """grad * act'(x); at a kink the slope that PyTorch takes. slope: see slopes."""
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
        # The interpreter would cut the digits off.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def store(ptr, at, x, mask):
    """Store x, rounded to the dtype that ptr points to."""
    tl.store(ptr + at, rounded(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, PREC: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if INTERPRET:
        # The interpreter multiplies the bit patterns of bfloat16 as if they were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PREC)


@triton.jit
def primary_tile(
    x_ptr, w1_ptr, image, p, pm, c, cm, in_pixels, in_width, out_pixels, out_width,
    C: tl.constexpr, S: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """u [P, M] at output pixels p and intrinsic channels c: x @ w1^T, or x itself without w1."""
    q = sampled(p, in_pixels, in_width, out_pixels, out_width, S)
    if w1_ptr is not None:
        u = tl.zeros((BP, BM), tl.float32)
        for k0 in range(0, C, BK):
            k = k0 + tl.arange(0, BK)
            km = k < C
            if WIDE:
                k = k.to(tl.int64)
            x = tl.load(
                x_ptr + address(image, q, k, in_pixels, C, NHWC),
                mask=pm[:, None] & km[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                w1_ptr + c[None, :] * C + k[:, None], mask=km[:, None] & cm[None, :], other=0.0
            )
            u = dot(x, w, u, PREC)
    else:
        at = address(image, q, c, in_pixels, C, NHWC)
        u = tl.load(x_ptr + at, mask=pm[:, None] & cm[None, :], other=0.0).to(tl.float32)
    return u


@triton.jit
def depthwise_tile(
    y_ptr, w2_ptr, image, p, pm, ghost, gm, out_pixels, height, width,
    Y_CH: tl.constexpr, R: tl.constexpr, D: tl.constexpr, NHWC: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """v [P, G] at pixels p and ghost channels: y in a D x D window, and zeros outside the map.

    y has Y_CH channels in memory, of which the first are the intrinsic maps; ghost channel i reads
    map i // R. Neighbouring taps read the same bytes again, from the L1 cache. Only a row of taps
    is unrolled: with all of them the compiler hoists D * D loads, and spills registers.
    """
    STEP: tl.constexpr = Y_CH if NHWC else 1
    inner = p % out_pixels
    row = inner // width
    column = inner % width
    centre = y_ptr + address(image, p, ghost // R, out_pixels, Y_CH, NHWC)
    v = tl.zeros((BP, BG), tl.float32)
    for i in range(D):
        down = i - D // 2
        in_rows = (row + down >= 0) & (row + down < height) & pm
        for j in tl.static_range(D):
            right = j - D // 2
            inside = in_rows & (column + right >= 0) & (column + right < width)
            mask = inside[:, None] & gm[None, :]
            y = tl.load(centre + (down * width + right) * STEP, mask=mask, other=0.0)
            tap = tl.load(w2_ptr + ghost * (D * D) + (i * D + j), mask=gm, other=0.0)
            v += y.to(tl.float32) * tap.to(tl.float32)[None, :]
    return v


@triton.jit
def finish(
    x, gate_ptr, gate_height, gate_width, row_scale, column_scale, residual_ptr,
    image, p, c, at, mask, out_pixels, width, OUP: tl.constexpr, NHWC: tl.constexpr,
):  # fmt: skip
    """x * gate + residual, of whichever pointers are given, at offsets ``at`` of the output.

    The gate [N, OUP, gate_height, gate_width] is read at the nearest pixel, by PyTorch's rule:
    floor(row * row_scale), in float32, where row_scale is gate_height / height.
    """
    if gate_ptr is not None:
        inner = p % out_pixels
        row = ((inner // width).to(tl.float32) * row_scale).to(tl.int32)
        row = tl.minimum(row, gate_height - 1)
        column = ((inner % width).to(tl.float32) * column_scale).to(tl.int32)
        column = tl.minimum(column, gate_width - 1)
        pixels = gate_height * gate_width
        q = (p // out_pixels) * pixels + row * gate_width + column
        gate_at = address(image, q, c, pixels, OUP, NHWC)
        x *= tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x


# ---------------------------------------------------------------- statistics


@triton.jit
def add_moments(count, mean, m2, u, pm):
    """(count, mean, M2) of the values so far and those of a tile u [P, C], by Chan's formula.

    E[u^2] - E[u]^2 would lose the digits of a variance that is small beside the mean.
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
