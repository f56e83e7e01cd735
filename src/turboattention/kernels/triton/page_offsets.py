"""Tables of the byte offsets and widths of each head in a page, which kernels read."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UnsupportedError
from ...kv.layout import WIDEST, PageLayout
from ...modes import in_own_modes
from ...uploads import upload
from .widths import TWO_WIDTHS, pair_of

# Entries in a head's row, and the first entry of its keys and of its values.
OFFSETS = tl.constexpr(16)
OF_KEYS = tl.constexpr(1)
OF_VALUES = tl.constexpr(7)


@functools.cache  # kept forever: captured graphs hold its address
@in_own_modes
def head_page_offsets(layout: PageLayout, heads: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [heads, OFFSETS]: the head; then for K and for V its width (`key_widths`) and the byte offsets of its
    codes, steps, zeros, token scales and scale; 0 for sections it does not have.

    Raises UnsupportedError during a stream capture: the copy to the device would only run when it is replayed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "layout: expected pages of widths that a call before the capture had, got new ones: take a step first"
        )
    sides = (
        (layout.k_groups, layout.k_coded, layout.k_steps, layout.head_dim, layout.k_token_scales, layout.k_scales),
        (layout.v_groups, layout.v_coded, layout.v_steps, layout.v_head_dim, layout.v_token_scales, layout.v_scales),
    )
    rows = []
    for head in heads:
        row = [head]
        for groups, coded, steps, head_dim, token_scales, scales in sides:
            group = next(group for group in groups if head in group.heads)
            codes = group.offset + group.heads.index(head) * group.head_bytes
            step = zero = 0
            if group.bits < WIDEST:
                step = steps + coded.index(head) * head_dim
                zero = step + len(coded) * head_dim
            width = group.bits + (TWO_WIDTHS if len(group.parts) > 1 else 0)
            row += [width, codes, step, zero, token_scales + head * layout.block_size, scales + 4 * head]
        rows.append(row + [0] * (OFFSETS.value - len(row)))
    return upload(torch.tensor(rows, dtype=torch.int32).view(len(rows), OFFSETS.value), device)


@functools.cache
def all_page_offsets(layout: PageLayout, device: torch.device) -> Tensor:
    """`head_page_offsets` of every head."""
    return head_page_offsets(layout, tuple(range(layout.num_kv_heads)), device)


@functools.lru_cache(maxsize=1024)
def key_widths(layout: PageLayout) -> tuple[int, ...]:
    """The number of each head's K width (`widths`)."""
    halves = layout.k_halves or (False,) * len(layout.k_bits)
    return tuple(bits + TWO_WIDTHS * halved for bits, halved in zip(layout.k_bits, halves, strict=True))


@functools.lru_cache(maxsize=1024)
def pairs_of_widths(layout: PageLayout) -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
    """Heads grouped by their widths (K as in `key_widths`, V)."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for head, pair in enumerate(zip(key_widths(layout), layout.v_bits, strict=True)):
        pairs.setdefault(pair, []).append(head)
    return tuple((pair, tuple(heads)) for pair, heads in pairs.items())


@functools.lru_cache(maxsize=1024)
def widths_of(layout: PageLayout) -> tuple[tuple[int, int], ...]:
    """The pairs of widths that occur."""
    return tuple(pair for pair, _ in pairs_of_widths(layout))


@functools.lru_cache(maxsize=1024)
def pairs_mask(layout: PageLayout) -> int:
    """Bit mask of the pairs of widths that occur (`widths.pair_of`)."""
    return sum(pair_of(k_bits, v_bits) for k_bits, v_bits in widths_of(layout))


@functools.lru_cache(maxsize=1024)
def widths_masks(layout: PageLayout) -> dict[str, int]:
    """Constexpr arguments of kernels that choose code by a head's width of K and of V: bit n is set if some head's has
    the number n."""
    k_bits, v_bits = zip(*widths_of(layout), strict=True)
    return {"K_WIDTHS": sum(1 << bits for bits in {*k_bits}), "V_WIDTHS": sum(1 << bits for bits in {*v_bits})}


@triton.jit
def section_offsets(head_ptr, D: tl.constexpr, DV: tl.constexpr):
    """A head's offsets of K and of V, with divisibility hints for the compiler."""
    return _side(head_ptr + OF_KEYS, D), _side(head_ptr + OF_VALUES, DV)


@triton.jit
def _side(head_ptr, D: tl.constexpr):
    """Offsets of codes, steps, zeros, token scales, scale."""
    EIGHTS: tl.constexpr = 16 if D % 16 == 0 else 8
    codes = tl.multiple_of(tl.load(head_ptr + 1), 16)
    step = tl.multiple_of(tl.load(head_ptr + 2), EIGHTS)
    zero = tl.multiple_of(tl.load(head_ptr + 3), EIGHTS)
    tokens = tl.multiple_of(tl.load(head_ptr + 4), 16)
    scale = tl.multiple_of(tl.load(head_ptr + 5), 4)
    return codes, step, zero, tokens, scale
