"""The packed format: where every byte of a page stands. Shared by every backend.

A page is one block (`block_size` tokens) of one sequence: the keys and values of all its KV heads.
Sections, in this order; within a section heads are in the order of falling width, those of two
widths first, then of their index:

    K codes       per head `D / 8` octets of `block_size * bits` bytes
    V codes       likewise
    K steps, K zeros, V steps, V zeros      int8 [heads below 8 bits, D] each
    K token scales, V token scales          uint8 [H, block_size] each, only with token scales
    K scales, V scales                      float32 [H] each, little-endian
    padding to a multiple of 16 bytes

An octet is 8 channels of the whole block: `8 * block_size` codes in an order that integer dot
products read as it stands, packed by `flashq.packing`:

    K: [2 quads of channels][block_size tokens][4 channels]   a 32-bit lane is one token
    V: [block_size / 4 quads of tokens][8 channels][4 tokens] a 32-bit lane is one channel

so four neighbouring codes are summed over by one 32-bit lane (VNNI, DP4A, MMA fragments).

K of a head in `k_halves` has two widths (`K_HALVES`): the octets of the first D / 2 channels are coded with the wider
one, those of the others with the narrower one; the mean is the head's width. Caches bring a head's channels into an
order in which the first ones matter most (`kv.channel_order`).

Codes of 8 bits are `X8 + 128`, and have no step or zero. A token's scale is the byte `e`:
`scale_t = bits_to_float(float_to_bits(S) - (e << 19))`, where the head's scale `S` is a power of
two; without token scales every token has the scale `S`, any float.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import ConfigError

FORMAT_NAME = "turboattention-kv"
FORMAT_VERSION = 2

TOKEN_SCALE_SHIFT = 19
"""A step of a token scale's byte, in units of a float32's bits: 4 mantissa bits are kept."""

WIDEST = 8
"""Codes of this width are INT8 itself: no step, no zero."""

K_HALVES = {3: (4, 2), 2: (3, 1)}
"""Width of a head's K -> widths of its two halves of channels, where `PageLayout.k_halves` has the head."""

_ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """The heads of one width within a code section. `parts`: (width, channels) of runs of channels; one of all D
    channels unless K has two widths."""

    bits: int
    heads: tuple[int, ...]
    offset: int
    head_bytes: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of a page. `k_bits` and `v_bits` are one width per KV head; `k_halves`: per KV head whether K's
    width is the mean of two, which takes a head_dim in 16s (no entries: of none)."""

    head_dim: int
    block_size: int
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    token_scales: bool
    k_halves: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim % 8 or self.block_size % 16:
            raise ConfigError(
                f"layout: expected head_dim in 8s and block_size in 16s, got {self.head_dim} and {self.block_size}"
            )
        # Other widths are never means, so that equal layouts have equal fields.
        halves = tuple(half and bits in K_HALVES for half, bits in zip(self.k_halves, self.k_bits, strict=False))
        object.__setattr__(self, "k_halves", halves if any(halves) else ())
        if self.k_halves and self.head_dim % 16:
            raise ConfigError(f"layout: expected head_dim in 16s for two widths of K, got {self.head_dim}")
        if self.k_halves and len(self.k_halves) != len(self.k_bits):
            raise ConfigError(f"k_halves: expected {len(self.k_bits)} entries, got {len(self.k_halves)}")
        if len(self.k_bits) != len(self.v_bits):
            raise ConfigError(f"v_bits: expected {len(self.k_bits)} widths, as K has, got {len(self.v_bits)}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: layouts are keys on the way of every step."""
        return hash((self.head_dim, self.block_size, self.k_bits, self.v_bits, self.token_scales, self.k_halves))

    @classmethod
    def uniform(cls, heads: int, head_dim: int, block_size: int, bits: int, token_scales: bool) -> PageLayout:
        """The layout with one width everywhere (8 for sink blocks)."""
        widths = (bits,) * heads
        return cls(head_dim, block_size, widths, widths, token_scales)

    @property
    def num_kv_heads(self) -> int:
        return len(self.k_bits)

    @cached_property
    def k_groups(self) -> tuple[Group, ...]:
        return self._groups(self.k_bits, 0, self.k_halves)

    @cached_property
    def v_groups(self) -> tuple[Group, ...]:
        return self._groups(self.v_bits, self._code_bytes(self.k_bits), ())

    @cached_property
    def k_coded(self) -> tuple[int, ...]:
        """Heads of K that have steps and zeros, in stored order."""
        return tuple(h for h in _stored_order(self.k_bits, self.k_halves) if self.k_bits[h] < WIDEST)

    @cached_property
    def v_coded(self) -> tuple[int, ...]:
        return tuple(h for h in _stored_order(self.v_bits, ()) if self.v_bits[h] < WIDEST)

    @cached_property
    def k_steps(self) -> int:
        """Offset of K's steps; the zeros follow them."""
        return self._code_bytes(self.k_bits) + self._code_bytes(self.v_bits)

    @cached_property
    def v_steps(self) -> int:
        return self.k_steps + 2 * len(self.k_coded) * self.head_dim

    @cached_property
    def k_token_scales(self) -> int:
        return self.v_steps + 2 * len(self.v_coded) * self.head_dim

    @cached_property
    def v_token_scales(self) -> int:
        return self.k_token_scales + self._token_scale_bytes

    @cached_property
    def k_scales(self) -> int:
        return self.v_token_scales + self._token_scale_bytes

    @cached_property
    def v_scales(self) -> int:
        return self.k_scales + 4 * self.num_kv_heads

    @cached_property
    def page_bytes(self) -> int:
        end = self.v_scales + 4 * self.num_kv_heads
        return -(-end // _ALIGNMENT) * _ALIGNMENT

    @property
    def _token_scale_bytes(self) -> int:
        return self.num_kv_heads * self.block_size if self.token_scales else 0

    def _head_bytes(self, bits: int) -> int:
        return self.head_dim * self.block_size * bits // 8

    def _code_bytes(self, widths: Sequence[int]) -> int:
        return sum(self._head_bytes(bits) for bits in widths)

    def _groups(self, widths: Sequence[int], offset: int, halves: Sequence[bool]) -> tuple[Group, ...]:
        groups = []
        for (bits, halved), members in itertools.groupby(
            _stored_order(widths, halves), lambda head: (widths[head], _is_halved(halves, head))
        ):
            heads = tuple(members)
            groups.append(Group(bits, heads, offset, self._head_bytes(bits), self._parts(bits, halved)))
            offset += len(heads) * self._head_bytes(bits)
        return tuple(groups)

    def _parts(self, bits: int, halved: bool) -> tuple[tuple[int, int], ...]:
        if not halved:
            return ((bits, self.head_dim),)
        wide, narrow = K_HALVES[bits]
        return ((wide, self.head_dim // 2), (narrow, self.head_dim // 2))


def _is_halved(halves: Sequence[bool], head: int) -> bool:
    return bool(halves) and halves[head]


def _stored_order(widths: Sequence[int], halves: Sequence[bool]) -> list[int]:
    return sorted(range(len(widths)), key=lambda head: (-widths[head], not _is_halved(halves, head), head))
