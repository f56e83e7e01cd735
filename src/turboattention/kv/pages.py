"""Encodes INT8 tiles as pages and decodes them, in plain PyTorch (format: `layout`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flashq import pack_codes, progressive_quantize, unpack_codes
from .layout import TOKEN_SCALE_SHIFT, WIDEST, Group, PageLayout


@dataclass(frozen=True)
class Tiles:
    """INT8 keys and values with a scale per token.

    k8: int8 [..., B, D]; v8: int8 [..., B, Dv]; k_scale, v_scale: float32 [..., B] (B tokens per block).
    """

    k8: Tensor
    v8: Tensor
    k_scale: Tensor
    v_scale: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Tiles:
        """Apply `change` to all four tensors."""
        return Tiles(change(self.k8), change(self.v8), change(self.k_scale), change(self.v_scale))

    def floats(self) -> tuple[Tensor, Tensor]:
        """The dequantized k [..., B, D] and v [..., B, Dv] in the dtype of the scales."""
        k, v = self.k8.to(self.k_scale.dtype), self.v8.to(self.v_scale.dtype)
        return k * self.k_scale[..., None], v * self.v_scale[..., None]

    @staticmethod
    def cat(parts: Sequence[Tiles], dim: int) -> Tiles:
        """Concatenate along a leading dimension."""
        names = ("k8", "v8", "k_scale", "v_scale")
        return Tiles(*(torch.cat([getattr(part, name) for part in parts], dim) for name in names))


def encode_pages(layout: PageLayout, tiles: Tiles, search: bool) -> Tensor:
    """Compress full blocks: tiles [N, H, B, D or Dv] -> uint8 [N, page_bytes] (stage 2 and packing)."""
    count, device = len(tiles.k8), tiles.k8.device
    pages = torch.zeros(count, layout.page_bytes, dtype=torch.uint8, device=device)
    sides = (
        (tiles.k8, tiles.k_scale, layout.k_groups, layout.k_steps, layout.k_token_scales, layout.k_scales, _key_lines),
        (
            tiles.v8,
            tiles.v_scale,
            layout.v_groups,
            layout.v_steps,
            layout.v_token_scales,
            layout.v_scales,
            _value_lines,
        ),
    )
    for codes, scales, groups, steps, token_scales, head_scales, lines in sides:
        codes, scale, exponents = _common_scale(codes, scales, layout.token_scales)
        step_parts, zero_parts = [], []
        for group in groups:
            part = codes[:, list(group.heads)]
            if group.bits == WIDEST:
                packed = lines((part.to(torch.int16) + 128).to(torch.uint8)).flatten(1)
            else:
                packed, step, zero = _encode_group(group, part, lines, search)
                step_parts.append(step.flatten(1))
                zero_parts.append(zero.flatten(1))
            pages[:, group.offset : group.offset + packed.shape[1]] = packed
        if step_parts:
            both = torch.cat(step_parts + zero_parts, 1).view(torch.uint8)
            pages[:, steps : steps + both.shape[1]] = both
        if layout.token_scales:
            pages[:, token_scales : token_scales + exponents[0].numel()] = exponents.flatten(1)
        pages[:, head_scales : head_scales + 4 * layout.num_kv_heads] = scale.contiguous().view(torch.uint8)
    return pages


def _encode_group(
    group: Group, codes: Tensor, lines: Callable[[Tensor], Tensor], search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 codes [N, heads, B, D] -> packed bytes [N, bytes of these heads], steps and zeros [N, heads, 1, D]."""
    channels = codes.split([count for _, count in group.parts], -1)
    packed, steps, zeros = [], [], []
    for (bits, _), part in zip(group.parts, channels, strict=True):
        code, step, zero = progressive_quantize(part, bits, search)
        packed.append(pack_codes(lines(code), bits).flatten(2))
        steps.append(step)
        zeros.append(zero)
    return torch.cat(packed, -1).flatten(1), torch.cat(steps, -1), torch.cat(zeros, -1)


def decode_pages(layout: PageLayout, pages: Tensor) -> Tiles:
    """Decode pages: uint8 [N, page_bytes] -> INT8 tiles [N, H, B, D or Dv], in integer arithmetic."""
    k8 = _decode_codes(layout, pages, layout.k_groups, _step_table(layout, pages, 0), _keys_from_lines)
    v8 = _decode_codes(layout, pages, layout.v_groups, _step_table(layout, pages, 1), _values_from_lines)
    return Tiles(
        k8,
        v8,
        _decode_scales(layout, pages, layout.k_scales, layout.k_token_scales),
        _decode_scales(layout, pages, layout.v_scales, layout.v_token_scales),
    )


def _common_scale(codes: Tensor, scales: Tensor, by_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, the head's scale float32 [N, H] and the byte of each token's scale uint8 [N, H, B].

    With token scales, the head's scale is the smallest power of two that is not below any token's scale, and tokens
    whose scale is too small to be represented relative to it are requantized. Without, rows with different scales
    (which a crop can cause) are requantized to the largest scale.
    """
    used = torch.where(codes.any(-1), scales, 0.0)
    largest = used.amax(-1)
    largest = torch.where(largest > 0, largest, 1.0)
    if not by_token:
        exponents = torch.zeros_like(scales, dtype=torch.uint8)
        return _requantize(codes, used, largest[..., None].expand_as(used)), largest, exponents
    power = ((largest.view(torch.int32) + ((1 << 23) - 1)) >> 23) << 23
    exponents = ((power[..., None] - used.view(torch.int32)) >> TOKEN_SCALE_SHIFT).clamp(0, 255)
    kept = _token_scales(power.view(torch.float32), exponents)
    return _requantize(codes, used, kept), power.view(torch.float32), exponents.to(torch.uint8)


def _requantize(codes: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Requantize rows whose scale changes from `old` to `new` (rare)."""
    changed = (old != new) & (old > 0)
    if not bool(changed.any()):
        return codes
    moved = (codes * (old / new)[..., None]).round_().to(torch.int8)
    return torch.where(changed[..., None], moved, codes)


def _token_scales(head_scale: Tensor, exponents: Tensor) -> Tensor:
    bits = head_scale.contiguous().view(torch.int32)[..., None] - (exponents.to(torch.int32) << TOKEN_SCALE_SHIFT)
    return bits.view(torch.float32)


def _decode_scales(layout: PageLayout, pages: Tensor, head_offset: int, token_offset: int) -> Tensor:
    heads, size = layout.num_kv_heads, layout.block_size
    head_scale = pages[:, head_offset : head_offset + 4 * heads].contiguous().view(torch.float32)
    if not layout.token_scales:
        return head_scale[..., None].expand(-1, -1, size)
    exponents = pages[:, token_offset : token_offset + heads * size].unflatten(1, (heads, size))
    return _token_scales(head_scale, exponents)


def _step_table(layout: PageLayout, pages: Tensor, side: int) -> Tensor:
    """Steps and zeros of K or V, int8 [N, 2, heads below 8 bits, 1, D]."""
    begin, heads, channels = (
        (layout.k_steps, len(layout.k_coded), layout.head_dim),
        (layout.v_steps, len(layout.v_coded), layout.v_head_dim),
    )[side]
    return pages[:, begin : begin + 2 * heads * channels].view(torch.int8).unflatten(1, (2, heads, 1, channels))


def _decode_codes(
    layout: PageLayout,
    pages: Tensor,
    groups: tuple[Group, ...],
    table: Tensor,
    restore: Callable[[Tensor], Tensor],
) -> Tensor:
    parts, taken = [], 0
    for group in groups:
        heads = len(group.heads)
        packed = pages[:, group.offset : group.offset + heads * group.head_bytes]
        code = _decode_group(group, packed.unflatten(1, (heads, -1)), restore, layout.block_size)
        if group.bits == WIDEST:
            parts.append((code.to(torch.int16) - 128).to(torch.int8))
        else:
            # code * step + zero fits in int8, and int8 arithmetic is exact modulo 2^8, so overflow of the
            # product does not matter.
            step, zero = table[:, :, taken : taken + heads].unbind(1)
            parts.append(code.view(torch.int8) * step + zero)
            taken += heads
    if len(parts) == 1:
        return parts[0]
    order = [head for group in groups for head in group.heads]
    return torch.cat(parts, 1)[:, torch.tensor(order, device=pages.device).argsort()]


def _decode_group(group: Group, packed: Tensor, restore: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Packed bytes [N, heads, bytes of a head] -> codes uint8 [N, heads, B, D]."""
    sections = packed.split([count * size * bits // 8 for bits, count in group.parts], -1)
    codes = [
        restore(unpack_codes(section.unflatten(-1, (count // 8, -1)), bits))
        for (bits, count), section in zip(group.parts, sections, strict=True)
    ]
    return torch.cat(codes, -1)


def _key_lines(code: Tensor) -> Tensor:
    """[..., B, D] -> octets [..., D / 8, 8 B] in K's order: quad of channels, token, channel of the quad."""
    return code.unflatten(-1, (-1, 2, 4)).movedim(-4, -2).flatten(-3)


def _keys_from_lines(lines: Tensor) -> Tensor:
    return lines.unflatten(-1, (2, -1, 4)).movedim(-2, -4).flatten(-3)


def _value_lines(code: Tensor) -> Tensor:
    """[..., B, D] -> octets [..., D / 8, 8 B] in V's order: token quad, channel, token of the quad."""
    quads = code.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 4))  # [..., B/4, 4, D/8, 8]
    return quads.movedim(-3, -1).movedim(-4, -3).flatten(-3)  # -> [..., D/8, B/4, 8, 4]


def _values_from_lines(lines: Tensor) -> Tensor:
    quads = lines.unflatten(-1, (-1, 8, 4))  # [..., D/8, B/4, 8, 4]
    return quads.movedim(-3, -4).movedim(-1, -3).flatten(-4, -3).flatten(-2)
