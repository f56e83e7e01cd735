"""The page codec: stage 2 and packing, to the bytes of `kv.layout` and back.

A program is one head's keys or values of one page. The tile stands in registers; an octet's line of codes is
a reshape of it, and a plane's bytes are a reduction over the codes that share one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UnsupportedError
from ...kv.layout import PageLayout
from .places import OF_KEYS, OF_VALUES, PLACES, all_places
from .quantize import EXACT
from .rounding import bits_of, float_of, nearest, nearest_int8
from .search import step_and_zero

_TOKEN_SCALE_SHIFT = tl.constexpr(19)


# -- scales ---------------------------------------------------------------------------------------------


@triton.jit
def _common_scale(codes, scale, page, token_scales, head_scale, SIZE: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Write the head's scale and the tokens' bytes; codes int8 [SIZE, WIDTH] under them."""
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
    # Codes are small: where nothing moves the product and its rounding are exact.
    return nearest_int8(codes.to(tl.float32) * ratio[:, None])


# -- lines and planes -----------------------------------------------------------------------------------


@triton.jit
def _to_lines(codes, SIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[SIZE, WIDTH] -> [WIDTH / 8, 8 SIZE], octets in the order of `kv.layout`."""
    if SIDE == 0:
        lines = tl.permute(tl.reshape(codes, (SIZE, WIDTH // 8, 2, 4)), (1, 2, 0, 3))
    else:
        lines = tl.permute(tl.reshape(codes, (SIZE // 4, 4, WIDTH // 8, 8)), (2, 0, 3, 1))
    return tl.reshape(lines, (WIDTH // 8, 8 * SIZE))


@triton.jit
def _from_lines(lines, SIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    if SIDE == 0:
        codes = tl.permute(tl.reshape(lines, (WIDTH // 8, 2, SIZE, 4)), (2, 0, 1, 3))
    else:
        codes = tl.permute(tl.reshape(lines, (WIDTH // 8, SIZE // 4, 8, 4)), (1, 3, 0, 2))
    return tl.reshape(codes, (SIZE, WIDTH))


@triton.jit
def _plane_offsets(D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Offsets of a plane's bytes [WIDTH / 8, SIZE * PLANE], and which there are."""
    octet = tl.arange(0, WIDTH // 8)[:, None]
    return octet * (SIZE * BITS) + tl.arange(0, SIZE * PLANE)[None, :], octet < D // 8


@triton.jit
def _pack(at, lines, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Write the PLANE lowest bits of codes uint8 [WIDTH / 8, 8 SIZE] as bytes."""
    offsets, there = _plane_offsets(D, SIZE, WIDTH, BITS, PLANE)
    if PLANE < 8:
        parts = tl.reshape(lines & ((1 << PLANE) - 1), (WIDTH // 8, 8 // PLANE, SIZE * PLANE))
        shift = (tl.arange(0, 8 // PLANE) * PLANE).to(tl.uint8)[None, :, None]
        lines = tl.sum(parts << shift, 1).to(tl.uint8)  # their bits are apart
    tl.store(at + offsets, lines, mask=there)


@triton.jit
def _unpack(at, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Inverse of `_pack`."""
    offsets, there = _plane_offsets(D, SIZE, WIDTH, BITS, PLANE)
    lines = tl.load(at + offsets, mask=there, other=0)
    if PLANE < 8:
        shift = (tl.arange(0, 8 // PLANE) * PLANE).to(tl.uint8)[None, :, None]
        lines = tl.reshape((lines[:, None, :] >> shift) & ((1 << PLANE) - 1), (WIDTH // 8, 8 * SIZE))
    return lines


@triton.jit
def _quotient(distance, step):
    """round_half_even(distance / step), int32, of integers up to 255.

    By an inverse in two parts: the product with the upper is exact, so that the sum is a tie where the
    quotient is one, and nowhere else, since other quotients are at least 1/170 away from ties.
    """
    upper = float_of(bits_of(tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)) & -0x1000)
    lower = tl.div_rn(1.0 - step * upper, step)
    return nearest(distance * upper[None, :] + distance * lower[None, :])


# -- one width ------------------------------------------------------------------------------------------


@triton.jit
def _encode_width(
    codes,
    page,
    place,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    at = page + tl.multiple_of(tl.load(place + 1), 16)
    if BITS == 8:
        _pack(at, _to_lines((codes.to(tl.int32) + 128).to(tl.uint8), SIDE, SIZE, WIDTH), D, SIZE, WIDTH, 8, 8)
    else:
        step, zero = step_and_zero(codes, BITS, SEARCH)
        channel = tl.arange(0, WIDTH)
        tl.store(page + tl.multiple_of(tl.load(place + 2), 8) + channel, step.to(tl.uint8), mask=channel < D)
        tl.store(page + tl.multiple_of(tl.load(place + 3), 8) + channel, zero.to(tl.uint8), mask=channel < D)
        code = _quotient((codes.to(tl.int32) - zero[None, :]).to(tl.float32), step.to(tl.float32))
        code = tl.minimum(tl.maximum(code, 0), (1 << BITS) - 1).to(tl.uint8)
        lines = _to_lines(code, SIDE, SIZE, WIDTH)
        if BITS == 3:
            _pack(at, lines, D, SIZE, WIDTH, 3, 2)
            _pack(at + 2 * SIZE, lines >> 2, D, SIZE, WIDTH, 3, 1)
        else:
            _pack(at, lines, D, SIZE, WIDTH, BITS, BITS)


@triton.jit
def _decode_width(
    codes,
    page,
    place,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):
    at = page + tl.multiple_of(tl.load(place + 1), 16)
    if BITS == 3:
        lines = _unpack(at, D, SIZE, WIDTH, 3, 2) | (_unpack(at + 2 * SIZE, D, SIZE, WIDTH, 3, 1) << 2)
    else:
        lines = _unpack(at, D, SIZE, WIDTH, BITS, BITS)
    code = _from_lines(lines, SIDE, SIZE, WIDTH).to(tl.int32)
    channel = tl.arange(0, WIDTH)[None, :]
    if BITS == 8:
        code -= 128
    else:
        # Bytes, not signed: as a whole this fits int8, and only its lowest 8 bits are kept.
        step = tl.load(page + tl.multiple_of(tl.load(place + 2), 8) + channel, mask=channel < D, other=0).to(tl.int32)
        zero = tl.load(page + tl.multiple_of(tl.load(place + 3), 8) + channel, mask=channel < D, other=0).to(tl.int32)
        code = code * step + zero
    tl.store(codes + tl.arange(0, SIZE)[:, None] * D + channel, code.to(tl.int8), mask=channel < D)


# -- one head -------------------------------------------------------------------------------------------


@triton.jit
def encode_head(
    codes,
    scales,
    page,
    place,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """A tile of INT8 rows at `codes` [SIZE, D] and `scales` [SIZE] -> its bytes in `page`.

    place: this head's numbers of `places`, of keys or of values. WIDTHS: bit b is set where some head has width b."""
    token = tl.arange(0, SIZE)
    # Four neighbouring channels a thread, no more: the search keeps several numbers of each of them.
    channel = tl.max_contiguous(tl.arange(0, WIDTH), 4)[None, :]
    tile = tl.load(codes + token[:, None] * D + channel, mask=channel < D, other=0)
    scale = tl.load(scales + token).to(tl.float32)
    tile = _common_scale(tile, scale, page, tl.multiple_of(tl.load(place + 4), 16), tl.load(place + 5), SIZE, BY_TOKEN)
    bits = tl.load(place)
    for BITS in tl.static_range(2, 9):
        if WIDTHS >> BITS & 1:  # noqa: SIM102 (known when compiling; the other is not)
            if bits == BITS:
                _encode_width(tile, page, place, SIDE, D, SIZE, WIDTH, BITS, SEARCH and BITS < 4)


@triton.jit
def decode_head(
    codes,
    scales,
    page,
    place,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    """Inverse of `encode_head` up to the error of stage 2."""
    token = tl.arange(0, SIZE)
    scale = tl.load((page + tl.load(place + 5)).to(tl.pointer_type(tl.int32))) + tl.zeros((SIZE,), tl.int32)
    if BY_TOKEN:
        scale -= tl.load(page + tl.multiple_of(tl.load(place + 4), 16) + token).to(tl.int32) << _TOKEN_SCALE_SHIFT
    tl.store(scales + token, float_of(scale))
    bits = tl.load(place)
    for BITS in tl.static_range(2, 9):
        if WIDTHS >> BITS & 1:  # noqa: SIM102 (known when compiling; the other is not)
            if bits == BITS:
                _decode_width(codes, page, place, SIDE, D, SIZE, WIDTH, BITS)


@triton.jit
def clear_padding(page, used, PAGE_BYTES: tl.constexpr):
    """Zeros from byte `used` to the page's end, at most 15."""
    byte = used + tl.arange(0, 16)
    tl.store(page + byte, tl.zeros((16,), tl.uint8), mask=byte < PAGE_BYTES)


# -- kernels and launchers ------------------------------------------------------------------------------


@triton.jit
def _encode_kernel(
    k8,
    v8,
    k_scale,
    v_scale,
    pages,
    places,
    HEADS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    USED: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SEARCH: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    page, head = pages + tile // HEADS * PAGE_BYTES, tile % HEADS
    codes, scales = tile * (SIZE * D), tile * SIZE
    if side == 0:
        place = places + head * PLACES + OF_KEYS
        encode_head(k8 + codes, k_scale + scales, page, place, 0, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH)
        if head == 0:
            clear_padding(page, USED, PAGE_BYTES)
    else:
        place = places + head * PLACES + OF_VALUES
        encode_head(v8 + codes, v_scale + scales, page, place, 1, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH)


@triton.jit
def _decode_kernel(
    k8,
    v8,
    k_scale,
    v_scale,
    pages,
    places,
    HEADS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    USED: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    page, head = pages + tile // HEADS * PAGE_BYTES, tile % HEADS
    codes, scales = tile * (SIZE * D), tile * SIZE
    if side == 0:
        place = places + head * PLACES + OF_KEYS
        decode_head(k8 + codes, k_scale + scales, page, place, 0, D, SIZE, WIDTH, WIDTHS, BY_TOKEN)
    else:
        place = places + head * PLACES + OF_VALUES
        decode_head(v8 + codes, v_scale + scales, page, place, 1, D, SIZE, WIDTH, WIDTHS, BY_TOKEN)


def refusal(layout: PageLayout) -> str | None:
    """Why these kernels cannot take pages of a layout, or None."""
    size = layout.block_size
    return None if size & (size - 1) == 0 else f"block_size: the GPU kernels take powers of two, got {size}"


def encode_pages(layout: PageLayout, k8: Tensor, v8: Tensor, k_scale: Tensor, v_scale: Tensor, search: bool) -> Tensor:
    """Tiles k8, v8 int8 [N, H, B, D] with scales float32 [N, H, B] -> uint8 [N, page_bytes].

    Raises UnsupportedError for block sizes that are no power of two."""
    codes = [x.contiguous() for x in (k8, v8)]
    scales = [x.to(torch.float32).contiguous() for x in (k_scale, v_scale)]
    pages = torch.empty(len(k8), layout.page_bytes, dtype=torch.uint8, device=k8.device)
    _launch(_encode_kernel, layout, pages, codes, scales, SEARCH=search)
    return pages


def decode_pages(layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of `encode_pages` up to the error of stage 2: k8, v8, k_scale, v_scale.

    Raises UnsupportedError for block sizes that are no power of two."""
    pages = pages.contiguous()
    if pages.data_ptr() % 16:  # scales are read as whole words
        pages = pages.clone()
    shape = (len(pages), layout.num_kv_heads, layout.block_size)
    codes = [torch.empty(*shape, layout.head_dim, dtype=torch.int8, device=pages.device) for _ in range(2)]
    scales = [torch.empty(shape, dtype=torch.float32, device=pages.device) for _ in range(2)]
    _launch(_decode_kernel, layout, pages, codes, scales)
    return codes[0], codes[1], scales[0], scales[1]


def _launch(kernel, layout: PageLayout, pages: Tensor, codes: list[Tensor], scales: list[Tensor], **more) -> None:
    refused = refusal(layout)
    if refused:
        raise UnsupportedError(refused)
    tiles = len(pages) * layout.num_kv_heads
    if tiles:
        kernel[(tiles, 2)](*codes, *scales, pages, all_places(layout, pages.device), **layout_facts(layout), **more)


def layout_facts(layout: PageLayout) -> dict:
    """What kernels that write or read pages of a layout are compiled for."""
    width = triton.next_power_of_2(layout.head_dim)
    return {
        "HEADS": layout.num_kv_heads,
        "PAGE_BYTES": layout.page_bytes,
        "USED": layout.v_scales + 4 * layout.num_kv_heads,
        "D": layout.head_dim,
        "SIZE": layout.block_size,
        "WIDTH": width,
        "WIDTHS": sum(1 << bits for bits in {*layout.k_bits, *layout.v_bits}),
        "BY_TOKEN": layout.token_scales,
        "num_warps": min(max(layout.block_size * width // 1024, 1), 8),
        **EXACT,
    }
