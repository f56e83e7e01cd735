"""Packs the codes of octets into bit planes, and unpacks them (`flashq.packing`).

A tile is in registers. The lines of its octets are a reshape, and the bytes of a plane are a reduction over the codes
that share a byte.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_lines(codes, SIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[SIZE, WIDTH] -> [WIDTH / 8, 8 SIZE], octets in the order of `kv.layout`."""
    if SIDE == 0:
        lines = tl.permute(tl.reshape(codes, (SIZE, WIDTH // 8, 2, 4)), (1, 2, 0, 3))
    else:
        lines = tl.permute(tl.reshape(codes, (SIZE // 4, 4, WIDTH // 8, 8)), (2, 0, 3, 1))
    return tl.reshape(lines, (WIDTH // 8, 8 * SIZE))


@triton.jit
def from_lines(lines, SIDE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    if SIDE == 0:
        codes = tl.permute(tl.reshape(lines, (WIDTH // 8, 2, SIZE, 4)), (2, 0, 1, 3))
    else:
        codes = tl.permute(tl.reshape(lines, (WIDTH // 8, SIZE // 4, 8, 4)), (1, 3, 0, 2))
    return tl.reshape(codes, (SIZE, WIDTH))


@triton.jit
def _plane_offsets(D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Offsets of a plane's bytes [WIDTH / 8, SIZE * PLANE], and a mask of those that exist."""
    octet = tl.arange(0, WIDTH // 8)[:, None]
    return octet * (SIZE * BITS) + tl.arange(0, SIZE * PLANE)[None, :], octet < D // 8


@triton.jit
def pack(at, lines, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Write the PLANE lowest bits of codes uint8 [WIDTH / 8, 8 SIZE]."""
    offsets, there = _plane_offsets(D, SIZE, WIDTH, BITS, PLANE)
    if PLANE < 8:
        parts = tl.reshape(lines & ((1 << PLANE) - 1), (WIDTH // 8, 8 // PLANE, SIZE * PLANE))
        shift = (tl.arange(0, 8 // PLANE) * PLANE).to(tl.uint8)[None, :, None]
        lines = tl.sum(parts << shift, 1).to(tl.uint8)  # the bits do not overlap
    tl.store(at + offsets, lines, mask=there)


@triton.jit
def unpack(at, D: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Inverse of `pack`."""
    offsets, there = _plane_offsets(D, SIZE, WIDTH, BITS, PLANE)
    lines = tl.load(at + offsets, mask=there, other=0)
    if PLANE < 8:
        shift = (tl.arange(0, 8 // PLANE) * PLANE).to(tl.uint8)[None, :, None]
        lines = tl.reshape((lines[:, None, :] >> shift) & ((1 << PLANE) - 1), (WIDTH // 8, 8 * SIZE))
    return lines
