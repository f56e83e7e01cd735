"""Encodes and decodes one head's keys or values of a page: stage 2 and packing, in the format of `kv.layout`."""

from __future__ import annotations

import triton
import triton.language as tl

from .planes import from_lines, has_two_widths, narrower, own_widths, pack, to_lines, unpack, wider
from .rounding import bits_of, float_of, nearest, nearest_int8
from .search import step_and_zero

_TOKEN_SCALE_SHIFT = tl.constexpr(19)


# -- scales ---------------------------------------------------------------------------------------------


@triton.jit
def _common_scale(codes, scale, page, token_scales, head_scale, SIZE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Write the head's scale and the bytes of token scales; returns codes int8 [SIZE, WIDTH] for these scales."""
    used = tl.where(tl.max((codes != 0).to(tl.int32), 1) > 0, scale, 0.0)
    largest = tl.max(used, 0)
    largest = tl.where(largest > 0, largest, 1.0)
    if BY_TOKEN:
        power = ((bits_of(largest) + 0x7FFFFF) >> 23) << 23
        # The power of two is not below any scale, so the difference is not negative.
        exponent = tl.minimum((power - bits_of(used)) >> _TOKEN_SCALE_SHIFT, 255)
        tl.store(page + token_scales + tl.arange(0, SIZE), exponent.to(tl.uint8))
        largest = float_of(power)
        kept = float_of(power - (exponent << _TOKEN_SCALE_SHIFT))
    else:
        kept = tl.zeros_like(used) + largest
    tl.store((page + head_scale).to(tl.pointer_type(tl.float32)), largest)
    moved = (used > 0) & (used != kept)
    ratio = tl.div_rn(tl.where(moved, used, 1.0), tl.where(moved, kept, 1.0))
    # Where a scale does not change, the ratio is 1 and codes are unchanged.
    return nearest_int8(codes.to(tl.float32) * ratio[:, None])


# -- one width ------------------------------------------------------------------------------------------


@triton.jit
def _quotient(distance, step):
    """round_half_even(distance / step), int32, for integers up to 255.

    Multiplies by the inverse in two parts. The product with the upper part is exact, so the sum is a tie exactly where
    the quotient is one: other quotients are at least 1/254 away from ties.
    """
    upper = float_of(bits_of(tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)) & -0x1000)
    lower = tl.div_rn(1.0 - step * upper, step)
    return nearest(distance * upper[None, :] + distance * lower[None, :])


@triton.jit
def _encode_run(
    codes,
    at,
    steps,
    zeros,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Encode codes int8 [SIZE, WIDTH] of D channels with one width."""
    if BITS == 8:
        pack(at, to_lines((codes.to(tl.int32) + 128).to(tl.uint8), SIDE, SIZE, WIDTH), D, SIZE, WIDTH, 8, 8)
    else:
        step, zero = step_and_zero(codes, BITS, SEARCH)
        channel = tl.arange(0, WIDTH)
        tl.store(steps + channel, step.to(tl.uint8), mask=channel < D)
        tl.store(zeros + channel, zero.to(tl.uint8), mask=channel < D)
        code = _quotient((codes.to(tl.int32) - zero[None, :]).to(tl.float32), step.to(tl.float32))
        code = tl.minimum(tl.maximum(code, 0), (1 << BITS) - 1).to(tl.uint8)
        lines = to_lines(code, SIDE, SIZE, WIDTH)
        if BITS == 5 or BITS == 3:
            pack(at, lines, D, SIZE, WIDTH, BITS, BITS - 1)
            pack(at + (BITS - 1) * SIZE, lines >> (BITS - 1), D, SIZE, WIDTH, BITS, 1)
        else:
            pack(at, lines, D, SIZE, WIDTH, BITS, BITS)


@triton.jit
def _decode_run(
    codes,
    at,
    steps,
    zeros,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Inverse of `_encode_run`, into rows of STRIDE channels at `codes`."""
    if BITS == 5 or BITS == 3:
        high = unpack(at + (BITS - 1) * SIZE, D, SIZE, WIDTH, BITS, 1)
        lines = unpack(at, D, SIZE, WIDTH, BITS, BITS - 1) | (high << (BITS - 1))
    else:
        lines = unpack(at, D, SIZE, WIDTH, BITS, BITS)
    code = from_lines(lines, SIDE, SIZE, WIDTH).to(tl.int32)
    channel = tl.arange(0, WIDTH)[None, :]
    if BITS == 8:
        code -= 128
    else:
        # Loaded as unsigned bytes: the result fits int8, and only its lowest 8 bits are kept.
        step = tl.load(steps + channel, mask=channel < D, other=0).to(tl.int32)
        zero = tl.load(zeros + channel, mask=channel < D, other=0).to(tl.int32)
        code = code * step + zero
    tl.store(codes + tl.arange(0, SIZE)[:, None] * STRIDE + channel, code.to(tl.int8), mask=channel < D)


@triton.jit
def _sections(page, head_ptr, BITS: tl.constexpr):
    """Pointers to a head's codes, steps and zeros; at 8 bits there are only codes."""
    at = page + tl.multiple_of(tl.load(head_ptr + 1), 16)
    steps, zeros = at, at
    if BITS < 8:
        steps = page + tl.multiple_of(tl.load(head_ptr + 2), 8)
        zeros = page + tl.multiple_of(tl.load(head_ptr + 3), 8)
    return at, steps, zeros


# -- one head -------------------------------------------------------------------------------------------


@triton.jit
def encode_head(
    codes,
    scales,
    page,
    head_ptr,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Encode INT8 rows at `codes` [SIZE, D] with `scales` [SIZE] into `page`.

    head_ptr: this head's entries for keys or values (`page_offsets`). WIDTHS: bit b is set if some head has width b,
    numbered as in `page_offsets`."""
    HALF: tl.constexpr = D // 2
    OWN: tl.constexpr = own_widths(WIDTHS, SIDE)
    HALVES: tl.constexpr = has_two_widths(OWN)
    token = tl.arange(0, SIZE)
    # At most four adjacent channels per thread, since the search keeps several values per channel.
    column = tl.max_contiguous(tl.arange(0, WIDTH), 4)[None, :]
    channel, inside = column, column < D
    if HALVES and D < WIDTH:
        # The second half of the channels starts in the middle of the tile.
        channel = tl.where(column < WIDTH // 2, column, column - WIDTH // 2 + D // 2)
        inside = column % (WIDTH // 2) < D // 2
    tile = tl.load(codes + token[:, None] * D + channel, mask=inside, other=0)
    scale = tl.load(scales + token).to(tl.float32)
    tile = _common_scale(
        tile, scale, page, tl.multiple_of(tl.load(head_ptr + 4), 16), tl.load(head_ptr + 5), SIZE, BY_TOKEN
    )
    bits = tl.load(head_ptr)
    for BITS in tl.static_range(2, 9):
        if OWN >> BITS & 1:  # noqa: SIM102 (only the outer condition is constexpr)
            if bits == BITS:
                at, steps, zeros = _sections(page, head_ptr, BITS)
                if HALVES:
                    first, second = tl.split(tl.permute(tl.reshape(tile, (SIZE, 2, WIDTH // 2)), (0, 2, 1)))
                    _encode_run(first, at, steps, zeros, SIDE, HALF, SIZE, WIDTH // 2, wider(BITS), SEARCH)
                    at += HALF * SIZE * wider(BITS) // 8
                    steps += HALF
                    zeros += HALF
                    _encode_run(second, at, steps, zeros, SIDE, HALF, SIZE, WIDTH // 2, narrower(BITS), SEARCH)
                else:
                    _encode_run(tile, at, steps, zeros, SIDE, D, SIZE, WIDTH, BITS, SEARCH)


@triton.jit
def decode_head(
    codes,
    scales,
    page,
    head_ptr,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    """Inverse of `encode_head`, up to the error of stage 2."""
    HALF: tl.constexpr = D // 2
    OWN: tl.constexpr = own_widths(WIDTHS, SIDE)
    HALVES: tl.constexpr = has_two_widths(OWN)
    token = tl.arange(0, SIZE)
    scale = tl.load((page + tl.load(head_ptr + 5)).to(tl.pointer_type(tl.int32))) + tl.zeros((SIZE,), tl.int32)
    if BY_TOKEN:
        scale -= tl.load(page + tl.multiple_of(tl.load(head_ptr + 4), 16) + token).to(tl.int32) << _TOKEN_SCALE_SHIFT
    tl.store(scales + token, float_of(scale))
    bits = tl.load(head_ptr)
    for BITS in tl.static_range(2, 9):
        if OWN >> BITS & 1:  # noqa: SIM102 (only the outer condition is constexpr)
            if bits == BITS:
                at, steps, zeros = _sections(page, head_ptr, BITS)
                if HALVES:
                    _decode_run(codes, at, steps, zeros, SIDE, HALF, SIZE, WIDTH // 2, wider(BITS), D)
                    at += HALF * SIZE * wider(BITS) // 8
                    steps += HALF
                    zeros += HALF
                    _decode_run(codes + HALF, at, steps, zeros, SIDE, HALF, SIZE, WIDTH // 2, narrower(BITS), D)
                else:
                    _decode_run(codes, at, steps, zeros, SIDE, D, SIZE, WIDTH, BITS, D)


@triton.jit
def clear_padding(page, used, PAGE_BYTES: tl.constexpr):
    """Zero the bytes from `used` to the end of the page, at most 15."""
    byte = used + tl.arange(0, 16)
    tl.store(page + byte, tl.zeros((16,), tl.uint8), mask=byte < PAGE_BYTES)
