"""The packed format: the meaning of every byte of a page, for all backends.

A page is one block (`block_size` tokens) of one sequence: the keys and values of all its KV heads.
Its sections are listed in order below. Within a section, heads are sorted by decreasing width, at equal
width those with two widths first, then by index:

    K codes       per head `D / 8` octets of `block_size * bits` bytes
    V codes       the same, with `Dv / 8` octets
    K steps, K zeros, V steps, V zeros      int8 [heads below 8 bits, D or Dv] each
    K token scales, V token scales          uint8 [H, block_size] each, only with token scales
    K scales, V scales                      float32 [H] each, little-endian
    padding to a multiple of 16 bytes

D and Dv are the head_dim of keys and of values, which differ in models with latent attention. An octet is 8 channels of
the whole block: `8 * block_size` codes, packed by `flashq.packing`, in an order that integer dot products read without
a shuffle:

    K: [2 quads of channels][block_size tokens][4 channels]   a 32-bit lane is one token
    V: [block_size / 4 quads of tokens][8 channels][4 tokens] a 32-bit lane is one channel

so the four neighbouring codes of a 32-bit lane are summed by one instruction (VNNI, DP4A, MMA fragments).

K of a head in `k_halves` has two widths (`K_HALVES`): octets of the first D / 2 channels use the wider one, the others
the narrower one; their mean is the head's width. Caches sort a head's channels by importance (`kv.channel_order`).

Codes of 8 bits are `X8 + 128` and have no step or zero. A token scale is stored as a byte `e`:
`scale_t = bits_to_float(float_to_bits(S) - (e << 19))`, where the head's scale `S` is a power of two. Without token
scales, every token has the scale `S`, which may be any float.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import ConfigError

FORMAT_NAME = "turboattention-kv"
FORMAT_VERSION = 4

TOKEN_SCALE_SHIFT = 19
"""Bits by which a token scale's byte is shifted to subtract it from a float32; this keeps 4 mantissa bits."""

WIDEST = 8
"""Width at which a page stores INT8 values, without steps and zeros."""

K_HALVES = {4: (5, 3), 3: (4, 2), 2: (3, 1)}
"""Width of a head's K -> widths of its first and second half of channels, for heads in `PageLayout.k_halves`."""

_ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """The heads of equal width in a code section.

    offset: of the first head's codes, bytes; head_bytes: bytes per head. parts: (width, number of channels) of each
    run of channels; one run unless K has two widths.
    """

    bits: int
    heads: tuple[int, ...]
    offset: int
    head_bytes: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of a page.

    k_bits, v_bits: one width per KV head. k_halves: for each KV head, whether K has two widths (empty if no head has),
    which needs a head_dim divisible by 16. v_head_dim: Dv; 0 stands for head_dim.

    Raises:
        ConfigError: head_dim or v_head_dim is not a multiple of 8 (16 with k_halves), block_size not of 16, or lengths
            differ.
    """

    head_dim: int
    block_size: int
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    token_scales: bool
    k_halves: tuple[bool, ...] = ()
    v_head_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)
        for name, width in (("head_dim", self.head_dim), ("v_head_dim", self.v_head_dim)):
            if width % 8 or self.block_size % 16:
                raise ConfigError(
                    f"layout: expected {name} in multiples of 8 and block_size in multiples of 16, got {width} and "
                    f"{self.block_size}"
                )
        # Only the widths of K_HALVES can be halved. Normalize, so that equal layouts have equal fields.
        halves = tuple(half and bits in K_HALVES for half, bits in zip(self.k_halves, self.k_bits, strict=False))
        object.__setattr__(self, "k_halves", halves if any(halves) else ())
        if self.k_halves and self.head_dim % 16:
            raise ConfigError(f"layout: expected head_dim in multiples of 16 for two widths of K, got {self.head_dim}")
        if self.k_halves and len(self.k_halves) != len(self.k_bits):
            raise ConfigError(f"k_halves: expected {len(self.k_bits)} entries, got {len(self.k_halves)}")
        if len(self.k_bits) != len(self.v_bits):
            raise ConfigError(f"v_bits: expected {len(self.k_bits)} widths, as K has, got {len(self.v_bits)}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Cached, because layouts are dictionary keys in every decode step."""
        sizes = self.head_dim, self.v_head_dim, self.block_size
        return hash((sizes, self.k_bits, self.v_bits, self.token_scales, self.k_halves))

    @classmethod
    def uniform(
        cls, heads: int, head_dim: int, block_size: int, bits: int, token_scales: bool, v_head_dim: int = 0
    ) -> PageLayout:
        """A layout with one width for all heads (sink pages: 8)."""
        widths = (bits,) * heads
        return cls(head_dim, block_size, widths, widths, token_scales, v_head_dim=v_head_dim)

    @property
    def num_kv_heads(self) -> int:
        return len(self.k_bits)

    @cached_property
    def k_groups(self) -> tuple[Group, ...]:
        return self._groups(self.head_dim, self.k_bits, 0, self.k_halves)

    @cached_property
    def v_groups(self) -> tuple[Group, ...]:
        return self._groups(self.v_head_dim, self.v_bits, self._code_bytes(self.head_dim, self.k_bits), ())

    @cached_property
    def k_coded(self) -> tuple[int, ...]:
        """Heads whose K has steps and zeros, in stored order."""
        return tuple(h for h in _stored_order(self.k_bits, self.k_halves) if self.k_bits[h] < WIDEST)

    @cached_property
    def v_coded(self) -> tuple[int, ...]:
        return tuple(h for h in _stored_order(self.v_bits, ()) if self.v_bits[h] < WIDEST)

    @cached_property
    def k_steps(self) -> int:
        """Byte offset of K's steps, which K's zeros follow."""
        return self._code_bytes(self.head_dim, self.k_bits) + self._code_bytes(self.v_head_dim, self.v_bits)

    @cached_property
    def v_steps(self) -> int:
        return self.k_steps + 2 * len(self.k_coded) * self.head_dim

    @cached_property
    def k_token_scales(self) -> int:
        return self.v_steps + 2 * len(self.v_coded) * self.v_head_dim

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

    def _head_bytes(self, channels: int, bits: int) -> int:
        return channels * self.block_size * bits // 8

    def _code_bytes(self, channels: int, widths: Sequence[int]) -> int:
        return sum(self._head_bytes(channels, bits) for bits in widths)

    def _groups(self, channels: int, widths: Sequence[int], offset: int, halves: Sequence[bool]) -> tuple[Group, ...]:
        groups = []
        for (bits, halved), members in itertools.groupby(
            _stored_order(widths, halves), lambda head: (widths[head], _is_halved(halves, head))
        ):
            heads, head_bytes = tuple(members), self._head_bytes(channels, bits)
            groups.append(Group(bits, heads, offset, head_bytes, _parts(channels, bits, halved)))
            offset += len(heads) * head_bytes
        return tuple(groups)


def _parts(channels: int, bits: int, halved: bool) -> tuple[tuple[int, int], ...]:
    if not halved:
        return ((bits, channels),)
    wide, narrow = K_HALVES[bits]
    return ((wide, channels // 2), (narrow, channels // 2))


def _is_halved(halves: Sequence[bool], head: int) -> bool:
    return bool(halves) and halves[head]


def _stored_order(widths: Sequence[int], halves: Sequence[bool]) -> list[int]:
    return sorted(range(len(widths)), key=lambda head: (-widths[head], not _is_halved(halves, head), head))
