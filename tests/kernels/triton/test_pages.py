"""The Triton page codec against kv.pages, byte by byte."""

from __future__ import annotations

import pytest
import torch

from . import tools  # noqa: F401  (skips without Triton)  # isort: skip

from turboattention.errors import UnsupportedError
from turboattention.flashq import quantize_tokens
from turboattention.kernels.triton import pages as kernels
from turboattention.kv.layout import PageLayout
from turboattention.kv.quantizer import PYTORCH

from ...helpers import normals

MIXED = ((4, 2, 8, 3), (2, 3, 4, 8))


def sides(layout: PageLayout, blocks: int = 1, seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """k8, v8, k_scale, v_scale; rows differ in scale by up to 2^spread either way."""
    shape = blocks, layout.num_kv_heads, layout.block_size, layout.head_dim
    out: list[torch.Tensor] = []
    for i in range(2):
        x = normals(*shape, seed=2 * seed + i) * 2.0 ** (spread * normals(*shape[:3], 1, seed=2 * seed + i + 50))
        x[..., 3] += 5.0
        x[0, 0, 2] = 0.0
        out.extend(quantize_tokens(x))
    k8, k_scale, v8, v_scale = out
    return k8, v8, k_scale, v_scale


def assert_same(layout: PageLayout, tiles: tuple[torch.Tensor, ...], search: bool) -> None:
    want = PYTORCH.encode_pages(layout, *tiles, search)
    assert torch.equal(kernels.encode_pages(layout, *tiles, search), want)
    for a, b in zip(kernels.decode_pages(layout, want), PYTORCH.decode_pages(layout, want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head_dim, size", [(8, 16), (24, 32), (40, 64), (8, 256)])
@pytest.mark.parametrize("token_scales, search", [(True, True), (False, False)])
def test_mixed_widths(token_scales, search, head_dim, size):
    layout = PageLayout(head_dim, size, *MIXED, token_scales)
    assert_same(layout, sides(layout), search)


@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_one_width(bits, head_dim):
    layout = PageLayout.uniform(1, head_dim, 64, bits, True)
    assert_same(layout, sides(layout, seed=bits), head_dim == 128)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_keys_of_two_widths(bits, head_dim):
    layout = PageLayout(head_dim, 64, (bits,), (4,), True, (True,))
    assert_same(layout, sides(layout, seed=bits), head_dim != 128)


@pytest.mark.parametrize("head_dim, size, token_scales", [(16, 16, True), (48, 64, False), (80, 32, True)])
@pytest.mark.parametrize("halves", [(True, False, True, True), (False, True, False, False)], ids=str)
def test_heads_of_two_widths_and_of_one(head_dim, size, token_scales, halves):
    layout = PageLayout(head_dim, size, *MIXED, token_scales, halves)
    assert_same(layout, sides(layout, blocks=2, spread=9.0), True)


@pytest.mark.parametrize("token_scales", [True, False])
def test_rows_far_apart_are_requantized_alike(token_scales):
    layout = PageLayout(24, 32, *MIXED, token_scales)
    assert_same(layout, sides(layout, spread=9.0), False)


def test_rows_of_zeros():
    layout = PageLayout.uniform(1, 8, 16, 4, True)
    codes, scales = torch.zeros(1, 1, 16, 8, dtype=torch.int8), torch.full((1, 1, 16), 3.0)
    assert_same(layout, (codes, codes, scales, scales), False)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_all_of_int8_and_constant_channels(bits, halves, search):
    """Decoded codes may reach beyond 119, and a crop compresses them once more. Steps are 127 at most."""
    layout = PageLayout(16, 256, (bits,), (bits,), True, (halves,))
    codes = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, 16).clone()
    codes[:, 1], codes[:, 2], codes[:, 3] = 127, -128, 0
    codes[:, 4] = torch.where(torch.arange(256) == 7, 127, -128).to(torch.int8)
    codes[:, 5:] = torch.randint(-128, 128, (256, 11), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.full((1, 1, 256), 0.25)
    for tile in (codes[None, None], codes.flip(1)[None, None]):
        assert_same(layout, (tile, tile.flip(2), scale, scale), search)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("halves", [False, True])
def test_every_quotient(bits, halves):
    """Every distance over every step that min-max gives: ties go to the even code."""
    layout = PageLayout(256, 256, (bits,), (bits,), True, (halves,))
    base = torch.arange(256)[:, None] - 128
    for channels in (torch.arange(256), torch.arange(255, -1, -1)):
        width = channels[None, :]  # the channel's range
        codes = torch.where(base + 128 <= width, base, -128).to(torch.int8)[None, None].contiguous()
        scale = torch.ones(1, 1, 256)
        assert_same(layout, (codes, codes.flip(2), scale, scale), False)


def test_pages_anywhere_in_memory_and_none_at_all():
    layout = PageLayout(24, 16, *MIXED, True)
    tiles = sides(layout, blocks=2)
    pages = PYTORCH.encode_pages(layout, *tiles, False)
    odd = torch.zeros(2, layout.page_bytes + 5, dtype=torch.uint8)[:, 3 : 3 + layout.page_bytes]
    odd.copy_(pages)
    for given in (odd, odd[:1]):
        for a, b in zip(kernels.decode_pages(layout, given), PYTORCH.decode_pages(layout, pages), strict=True):
            assert torch.equal(a, b[: len(given)])
    spread = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in tiles)
    assert torch.equal(kernels.encode_pages(layout, *spread, False), pages)
    assert kernels.encode_pages(layout, *(x[:0] for x in tiles), True).shape == (0, layout.page_bytes)
    assert kernels.decode_pages(layout, pages[:0])[0].shape == (0, 4, 16, 24)


def test_blocks_that_are_no_power_of_two_are_refused():
    layout = PageLayout.uniform(1, 8, 48, 4, True)
    with pytest.raises(UnsupportedError, match=r"^block_size: the GPU kernels take powers of two, got 48"):
        kernels.encode_pages(layout, *sides(layout), False)
    with pytest.raises(UnsupportedError, match=r"^block_size"):
        kernels.decode_pages(layout, torch.zeros(1, layout.page_bytes, dtype=torch.uint8))
