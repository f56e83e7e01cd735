"""Unpacks pages and INT8 rows for `prefill`, once for all queries.

A block of one KV head becomes K int8 [64, WIDE] and V^T int8 [V_WIDE, 64] (channels from D or Dv on are zero; tokens
in the order of `value_column`), with float32 K scales [64], V levels [64] (127 times the token's scale divided by the
block's largest) and the largest V scale. Blocks are ordered by position. Temporary memory per block and KV head:
`bytes_per_block`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS, section_offsets
from .softmax import LEVELS
from .widths import K_NUMBERS, V_NUMBERS, lower_plane, narrower, wider


def bytes_per_block(wide: int, v_wide: int) -> int:
    """Bytes of one unpacked block of a KV head."""
    return 64 * (wide + v_wide + 4 + 4) + 4


@triton.jit
def value_column(t):
    """Column of token t in V^T. A thread gets scores of tokens 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of each 16 from one
    matrix product, and passes the weights of four adjacent columns to the next one: these are the same tokens."""
    return t // 16 * 16 + t % 8 // 2 * 4 + t // 8 % 2 * 2 + t % 2


@triton.jit
def by_value_columns(p):
    """Permute weights or values [M, 64] from token order to the order of `value_column`."""
    M: tl.constexpr = p.shape[0]
    return tl.reshape(tl.permute(tl.reshape(p, (M, 4, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, 64))


@triton.jit
def token_scales(page, offsets, t, BY_TOKEN: tl.constexpr):
    """Scales of tokens t of a page, float32; `offsets`: offsets of K or V from `section_offsets`."""
    bits = tl.zeros_like(t) + tl.load((page + offsets[4]).to(tl.pointer_type(tl.int32)))
    if BY_TOKEN:
        bits -= tl.load(page + offsets[3] + t).to(tl.int32) << 19
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def largest_of(scales):
    """The largest scale of a block; 1 if all are zero."""
    largest = tl.max(scales, 0)
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def _codes(octets, index, inside, BITS: tl.constexpr):
    """Codes `index` (of 512) of octets, uint8."""
    if BITS == 8:
        code = tl.load(octets + index, mask=inside, other=128)
    else:
        LOWER: tl.constexpr = lower_plane(BITS)
        code = _plane(octets, index, inside, LOWER)
        if LOWER < BITS:
            code |= _plane(octets + 64 * LOWER, index, inside, BITS - LOWER) << LOWER
    return code


@triton.jit
def _plane(at, index, inside, BITS: tl.constexpr):
    code = tl.load(at + index % (64 * BITS), mask=inside, other=0) >> (index // (64 * BITS) * BITS).to(tl.uint8)
    return code & ((1 << BITS) - 1)


@triton.jit
def _key_codes(at, t, d, inside, D: tl.constexpr, BITS: tl.constexpr):
    """Codes of channels d of keys t, uint8."""
    index = (d % 8 // 4 * 256 + d % 4)[None, :] + (t * 4)[:, None]
    if wider(BITS) != narrower(BITS):
        first = (d < D // 2)[None, :]
        octet = (d // 8)[None, :] * (64 * wider(BITS))
        code = _codes(at + octet, index, first, wider(BITS))
        octet = (D // 2 * 8) * wider(BITS) + ((d - D // 2) // 8)[None, :] * (64 * narrower(BITS))
        code |= _codes(at + octet, index, inside[None, :] & ~first, narrower(BITS))
    else:
        code = _codes(at + (d // 8 * (64 * BITS))[None, :], index, inside[None, :], BITS)
    return code


@triton.jit
def _restored(code, page, offsets, channel, inside, BITS: tl.constexpr):
    """INT8 values `code * step + zero`, which fit in a byte; intermediate overflow does not matter."""
    if BITS == 8:
        code ^= 128
    else:
        step = tl.load(page + offsets[1] + channel, mask=inside, other=0)
        zero = tl.load(page + offsets[2] + channel, mask=inside, other=0)
        code = code * step + zero
    return code.to(tl.int8, bitcast=True)


@triton.jit
def _unpacked_keys(page, offsets, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """A head's keys, int8 [64, WIDE]; zero from D on."""
    d = tl.arange(0, WIDE)
    inside = d < D
    code = _key_codes(page + offsets[0], tl.arange(0, 64), d, inside, D, BITS)
    return _restored(code, page, offsets, d[None, :], inside[None, :], BITS)


@triton.jit
def _unpacked_values(page, offsets, V_WIDE: tl.constexpr, DV: tl.constexpr, BITS: tl.constexpr):
    """A head's values, int8 [V_WIDE, 64]; zero from DV on."""
    t = tl.arange(0, 64)
    c = tl.arange(0, V_WIDE)[:, None]
    index = c % 8 * 4 + (t // 4 * 32 + t % 4)[None, :]
    code = _codes(page + offsets[0] + c // 8 * (64 * BITS), index, c < DV, BITS)
    return _restored(code, page, offsets, c, c < DV, BITS)


@triton.jit
def _store(
    k, v, k_scale, v_scale, at, k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr, t,
    WIDE: tl.constexpr, V_WIDE: tl.constexpr,
):  # fmt: skip
    at = at.to(tl.int64)
    largest = largest_of(v_scale)
    tl.store(k_ptr + at * (64 * WIDE) + t[:, None] * WIDE + tl.arange(0, WIDE)[None, :], k)
    tl.store(v_ptr + at * (64 * V_WIDE) + tl.arange(0, V_WIDE)[:, None] * 64 + value_column(t)[None, :], v)
    tl.store(k_scale_ptr + at * 64 + t, k_scale)
    tl.store(v_level_ptr + at * 64 + t, v_scale / largest * LEVELS)
    tl.store(v_scale_ptr + at, largest)


@triton.jit(do_not_specialize=["table_stride", "first_block", "first_head", "heads", "first_sequence", "blocks"])
def unpack_pages(
    table_ptr, counts_ptr, page_offsets_ptr, k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr,
    table_stride, first_block, first_head, heads, first_sequence, blocks,
    D: tl.constexpr, WIDE: tl.constexpr, DV: tl.constexpr, V_WIDE: tl.constexpr, K_WIDTHS: tl.constexpr,
    V_WIDTHS: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid (blocks from first_block on, KV heads from first_head on, sequences from first_sequence on).

    K_WIDTHS, V_WIDTHS: `page_offsets.widths_masks`. table: int64 [B, table_stride], page addresses (0: evicted,
    skipped). counts: int64 [B], pages per sequence. The unpacked have `heads` heads from first_head on and `blocks`
    blocks.
    """
    block = first_block + tl.program_id(0)
    b = first_sequence + tl.program_id(2)
    address = tl.load(table_ptr + b.to(tl.int64) * table_stride + block)
    if (block < tl.load(counts_ptr + b)) & (address != 0):
        page = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        head_ptr = page_offsets_ptr + (first_head + tl.program_id(1)) * OFFSETS
        k_offsets, v_offsets = section_offsets(head_ptr, D, DV)
        k_bits = tl.load(head_ptr + OF_KEYS)
        v_bits = tl.load(head_ptr + OF_VALUES)
        # Of several widths the head's is chosen here, so that one launch unpacks all heads.
        k = tl.zeros((64, WIDE), tl.int8)
        for BITS in tl.static_range(K_NUMBERS):
            if K_WIDTHS == 1 << BITS:
                k = _unpacked_keys(page, k_offsets, WIDE, D, BITS)
            elif K_WIDTHS >> BITS & 1:  # noqa: SIM102 (only the outer condition is constexpr)
                if k_bits == BITS:
                    k = _unpacked_keys(page, k_offsets, WIDE, D, BITS)
        v = tl.zeros((V_WIDE, 64), tl.int8)
        for BITS in tl.static_range(V_NUMBERS):
            if V_WIDTHS == 1 << BITS:
                v = _unpacked_values(page, v_offsets, V_WIDE, DV, BITS)
            elif V_WIDTHS >> BITS & 1:  # noqa: SIM102 (only the outer condition is constexpr)
                if v_bits == BITS:
                    v = _unpacked_values(page, v_offsets, V_WIDE, DV, BITS)
        t = tl.arange(0, 64)
        k_scale = token_scales(page, k_offsets, t, BY_TOKEN)
        v_scale = token_scales(page, v_offsets, t, BY_TOKEN)
        at = (tl.program_id(2) * heads + tl.program_id(1)) * blocks + block
        _store(k, v, k_scale, v_scale, at, k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr, t, WIDE, V_WIDE)


@triton.jit(do_not_specialize=["first_head", "first_sequence", "blocks"])
def unpack_rows(
    k8_ptr, v8_ptr, ks_ptr, vs_ptr, start_ptr, lengths_ptr, k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr,
    width, kv_heads, first_head, first_sequence, blocks,
    D: tl.constexpr, WIDE: tl.constexpr, DV: tl.constexpr, V_WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, KV heads from first_head on, sequences from first_sequence on).

    k8, v8: int8 [B, Hkv, width, D or Dv], scales [B, Hkv, width] of any float dtype; row 0 has position start[b]."""
    b = first_sequence + tl.program_id(2)
    start = tl.load(start_ptr + b).to(tl.int32)
    used = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32) - start, width)
    row = tl.program_id(0) * 64
    if row < used:
        t = tl.arange(0, 64)
        d = tl.arange(0, WIDE)
        of = (b * kv_heads + first_head + tl.program_id(1)).to(tl.int64) * width + row
        there = row + t < used
        k_in = k8_ptr + of * D + t[:, None] * D + d[None, :]
        k = tl.load(k_in, mask=there[:, None] & (d < D)[None, :], other=0)
        c = tl.arange(0, V_WIDE)[None, :]
        v = tl.load(v8_ptr + of * DV + t[:, None] * DV + c, mask=there[:, None] & (c < DV), other=0)
        k_scale = tl.load(ks_ptr + of + t, mask=there, other=0.0).to(tl.float32)
        v_scale = tl.load(vs_ptr + of + t, mask=there, other=0.0).to(tl.float32)
        at = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * blocks + start // 64 + tl.program_id(0)
        v = tl.trans(v)
        _store(k, v, k_scale, v_scale, at, k_ptr, v_ptr, k_scale_ptr, v_level_ptr, v_scale_ptr, t, WIDE, V_WIDE)
