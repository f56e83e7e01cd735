"""Kernels and launchers of the page codec. One program encodes or decodes a head's keys or values (`codec`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UnsupportedError
from ...kv.channel_order import ChannelOrder
from ...kv.layout import PageLayout
from .codec import clear_padding, decode_head, encode_head
from .configs import EXACT
from .ordering import Order, order_rows
from .page_offsets import OF_KEYS, OF_VALUES, OFFSETS, all_page_offsets, key_widths


@triton.jit
def _encode_kernel(
    k8,
    v8,
    k_scale,
    v_scale,
    pages,
    page_offsets,
    HEADS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    USED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SEARCH: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    page, head = pages + tile // HEADS * PAGE_BYTES, tile % HEADS
    scales = tile * SIZE
    if side == 0:
        head_ptr = page_offsets + head * OFFSETS + OF_KEYS
        encode_head(k8 + scales * D, k_scale + scales, page, head_ptr, 0, D, SIZE, WIDTH, WIDTHS, BY_TOKEN, SEARCH)
        if head == 0:
            clear_padding(page, USED, PAGE_BYTES)
    else:
        head_ptr = page_offsets + head * OFFSETS + OF_VALUES
        encode_head(v8 + scales * DV, v_scale + scales, page, head_ptr, 1, DV, SIZE, V_WIDTH, WIDTHS, BY_TOKEN, SEARCH)


@triton.jit
def _decode_kernel(
    k8,
    v8,
    k_scale,
    v_scale,
    pages,
    page_offsets,
    HEADS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    USED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    page, head = pages + tile // HEADS * PAGE_BYTES, tile % HEADS
    scales = tile * SIZE
    if side == 0:
        head_ptr = page_offsets + head * OFFSETS + OF_KEYS
        decode_head(k8 + scales * D, k_scale + scales, page, head_ptr, 0, D, SIZE, WIDTH, WIDTHS, BY_TOKEN)
    else:
        head_ptr = page_offsets + head * OFFSETS + OF_VALUES
        decode_head(v8 + scales * DV, v_scale + scales, page, head_ptr, 1, DV, SIZE, V_WIDTH, WIDTHS, BY_TOKEN)


def refusal(layout: PageLayout) -> str | None:
    """Why these kernels do not support a page layout, or None."""
    size = layout.block_size
    return None if size & (size - 1) == 0 else f"block_size: the GPU kernels take powers of two, got {size}"


def encode_pages(
    layout: PageLayout,
    k8: Tensor,
    v8: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    search: bool,
    order: ChannelOrder | None = None,
    rotated: bool = False,
) -> Tensor:
    """Encode tiles k8 int8 [N, H, B, D], v8 int8 [N, H, B, Dv] with scales [N, H, B] as uint8 [N, page_bytes].

    Keys of heads that `order` applies to are brought into it first; rotated: whether INT8 rows are. Raises
    UnsupportedError unless the block size is a power of two."""
    codes = [x.contiguous() for x in (k8, v8)]
    scales = [x.to(torch.float32).contiguous() for x in (k_scale, v_scale)]
    on_device = Order.of(order, k8)
    if on_device is not None:
        codes[0], scales[0] = codes[0].clone(), scales[0].clone()
        order_rows(codes[0], scales[0], on_device, rotated, layout.block_size)
    pages = torch.empty(len(k8), layout.page_bytes, dtype=torch.uint8, device=k8.device)
    _launch(_encode_kernel, layout, pages, codes, scales, SEARCH=search)
    return pages


def decode_pages(layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of `encode_pages`, up to the error of stage 2: k8, v8 int8 [N, H, B, D or Dv], scales float32 [N, H, B].

    Raises UnsupportedError unless the block size is a power of two."""
    pages = pages.contiguous()
    if pages.data_ptr() % 16:  # scales are loaded as aligned words
        pages = pages.clone()
    shape = (len(pages), layout.num_kv_heads, layout.block_size)
    dims = layout.head_dim, layout.v_head_dim
    codes = [torch.empty(*shape, width, dtype=torch.int8, device=pages.device) for width in dims]
    scales = [torch.empty(shape, dtype=torch.float32, device=pages.device) for _ in range(2)]
    _launch(_decode_kernel, layout, pages, codes, scales)
    return codes[0], codes[1], scales[0], scales[1]


def _launch(kernel, layout: PageLayout, pages: Tensor, codes: list[Tensor], scales: list[Tensor], **more) -> None:
    refused = refusal(layout)
    if refused:
        raise UnsupportedError(refused)
    tiles = len(pages) * layout.num_kv_heads
    if tiles:
        kernel[(tiles, 2)](
            *codes, *scales, pages, all_page_offsets(layout, pages.device), **layout_facts(layout), **more
        )


def layout_facts(layout: PageLayout) -> dict:
    """Constexpr arguments and launch options of kernels that read or write pages of a layout."""
    width, v_width = (triton.next_power_of_2(size) for size in (layout.head_dim, layout.v_head_dim))
    return {
        "HEADS": layout.num_kv_heads,
        "PAGE_BYTES": layout.page_bytes,
        "USED": layout.v_scales + 4 * layout.num_kv_heads,
        "D": layout.head_dim,
        "DV": layout.v_head_dim,
        "SIZE": layout.block_size,
        "WIDTH": width,
        "V_WIDTH": v_width,
        "WIDTHS": sum(1 << bits for bits in {*key_widths(layout), *layout.v_bits}),
        "BY_TOKEN": layout.token_scales,
        "num_warps": min(max(layout.block_size * max(width, v_width) // 1024, 1), 8),
        **EXACT,
    }
