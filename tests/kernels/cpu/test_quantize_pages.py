"""The C++ page codec against kv.pages, byte by byte, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboattention.flashq import quantize_tokens
from turboattention.kv.channel_order import ChannelOrder
from turboattention.kv.layout import PageLayout
from turboattention.kv.quantizer import PYTORCH

from ...helpers import normals
from .tools import ISAS, every_isa

kernels = pytest.importorskip("turboattention.kernels.cpu.quantize", exc_type=ImportError)

MIXED = ((4, 2, 8, 3, 2), (2, 3, 4, 8, 4))


def sides(layout: PageLayout, blocks: int = 2, seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
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


def assert_same(layout: PageLayout, tiles: tuple[torch.Tensor, ...], search: bool, isa: str) -> None:
    want = PYTORCH.encode_pages(layout, *tiles, search)
    got = kernels.encode_pages(layout, *tiles, search, isa=isa)
    assert torch.equal(got, want)
    for a, b in zip(kernels.decode_pages(layout, want, isa), PYTORCH.decode_pages(layout, want), strict=True):
        assert torch.equal(a, b)


@every_isa
@pytest.mark.parametrize("token_scales", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("head_dim, size", [(8, 16), (24, 48), (64, 64), (96, 256), (128, 64), (256, 112)])
def test_mixed_widths(isa, token_scales, search, head_dim, size):
    layout = PageLayout(head_dim, size, *MIXED, token_scales)
    assert_same(layout, sides(layout), search, isa)


@every_isa
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_one_width(isa, bits):
    layout = PageLayout.uniform(3, 128, 64, bits, True)
    assert_same(layout, sides(layout, seed=bits), True, isa)


@every_isa
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("head_dim, size", [(16, 16), (64, 64), (80, 64), (96, 256), (128, 64), (240, 48), (256, 112)])
def test_keys_of_two_widths(isa, search, head_dim, size):
    layout = PageLayout(head_dim, size, *MIXED, True, (True,) * len(MIXED[0]))
    assert_same(layout, sides(layout), search, isa)


@every_isa
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("head_dim, size", [(16, 16), (64, 64), (80, 64), (96, 256), (128, 64), (240, 48), (256, 112)])
def test_keys_in_an_order(isa, rotated, head_dim, size):
    """Rows rotated back, quantized again and permuted, in some heads."""
    halves = (True, True, False, False, True)
    layout = PageLayout(head_dim, size, *MIXED, True, halves)
    order = normals(len(halves), head_dim, seed=6).argsort(-1).to(torch.uint8)
    given = *sides(layout, spread=3.0), True, ChannelOrder(order, torch.tensor(halves)), rotated
    assert torch.equal(kernels.encode_pages(layout, *given, isa=isa), PYTORCH.encode_pages(layout, *given))


@every_isa
@pytest.mark.parametrize("token_scales", [True, False])
def test_rows_far_apart_are_requantized_alike(isa, token_scales):
    for head_dim, halves in ((24, ()), (48, (True,) * len(MIXED[0]))):
        layout = PageLayout(head_dim, 32, *MIXED, token_scales, halves)
        assert_same(layout, sides(layout, spread=9.0), True, isa)


@every_isa
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("halves", [(), (True,)], ids=["one", "two"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_all_of_int8_and_constant_channels(isa, bits, halves, search):
    """Decoded codes may reach beyond 119, and a crop compresses them once more."""
    layout = PageLayout(32, 256, (bits,), (bits,), True, halves)
    codes = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, 16).clone()
    codes[:, 1], codes[:, 2], codes[:, 3] = 127, -128, 0
    codes[:, 4] = torch.where(torch.arange(256) == 7, 127, -128).to(torch.int8)
    codes[:, 5:] = torch.randint(-128, 128, (256, 11), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    tile = torch.cat((codes, codes), 1)[None, None]
    scale = torch.full((1, 1, 256), 0.25)
    assert_same(layout, (tile, tile.flip(2), scale, scale), search, isa)


@every_isa
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_every_pair_of_ends(isa, bits):
    """Steps, shrunken ranges and ties of each range that a channel may have, in both halves."""
    ends = torch.combinations(torch.arange(-128, 128, 3), 2)[:, :, None]
    steps = torch.linspace(0, 1, 16)
    channels = (ends[:, 0] + (ends[:, 1] - ends[:, 0]) * steps).round().to(torch.int8)  # [pairs, 16 tokens]
    channels = channels[: len(channels) // 128 * 128].view(-1, 128, 16).transpose(1, 2)
    tile = torch.cat((channels, channels.flip(2)), 2)[:, None].contiguous()  # each in the wide and the narrow half
    scale = torch.full((len(tile), 1, 16), 0.25)
    layout = PageLayout(256, 16, (bits,), (bits,), True, (True,))
    for search in (True, False):
        assert_same(layout, (tile, tile, scale, scale), search, isa)


@every_isa
def test_pages_anywhere_in_memory_and_none_at_all(isa):
    layout = PageLayout(24, 16, *MIXED, True)
    tiles = sides(layout)
    pages = PYTORCH.encode_pages(layout, *tiles, False)
    odd = torch.zeros(2, layout.page_bytes + 5, dtype=torch.uint8)[:, 3 : 3 + layout.page_bytes]
    odd.copy_(pages)
    for a, b in zip(kernels.decode_pages(layout, odd, isa), PYTORCH.decode_pages(layout, pages), strict=True):
        assert torch.equal(a, b)
    spread = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in tiles)
    assert torch.equal(kernels.encode_pages(layout, *spread, False, isa=isa), pages)
    assert kernels.encode_pages(layout, *(x[:0] for x in tiles), True, isa=isa).shape == (0, layout.page_bytes)
    assert kernels.decode_pages(layout, pages[:0], isa)[0].shape == (0, 5, 16, 24)


WIDTHS = st.sampled_from([8, 4, 3, 2])


@settings(max_examples=40)
@given(data=st.data())
def test_any_layout_on_every_instruction_set(data):
    heads, head_dim = data.draw(st.integers(1, 4)), 8 * data.draw(st.integers(1, 32))
    layout = PageLayout(
        head_dim,
        16 * data.draw(st.integers(1, 6)),
        tuple(data.draw(st.lists(WIDTHS, min_size=heads, max_size=heads))),
        tuple(data.draw(st.lists(WIDTHS, min_size=heads, max_size=heads))),
        data.draw(st.booleans()),
        () if head_dim % 16 else tuple(data.draw(st.lists(st.booleans(), min_size=heads, max_size=heads))),
    )
    spread = data.draw(st.sampled_from([0.0, 1.0, 8.0]))
    tiles = sides(layout, 1, data.draw(st.integers(0, 99)), spread)
    search = data.draw(st.booleans())
    for isa in ISAS:
        assert_same(layout, tiles, search, isa)
