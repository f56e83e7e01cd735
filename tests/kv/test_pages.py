"""Pages byte for byte against an encoder written from the format's description, and back."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboattention.flashq import quantize_tokens
from turboattention.kv.layout import PageLayout
from turboattention.kv.pages import Tiles, decode_pages, encode_pages

from ..flashq import formulas
from ..helpers import bits_of, normals

MIXED = ((4, 2, 8, 3, 2), (2, 3, 4, 8, 4))


def tiles(blocks: int, heads: int, size: int, head_dim: int, token_scales: bool = True, seed: int = 0) -> Tiles:
    """Random INT8 tiles [N, H, B, D] as stage 1 gives them."""
    k, v = (normals(blocks, heads, size, head_dim, seed=seed + i) * 3 for i in range(2))
    (k8, ks), (v8, vs) = quantize_tokens(k), quantize_tokens(v)
    if not token_scales:
        ks, vs = (torch.rand(blocks, heads, 1).expand(blocks, heads, size).contiguous() + 0.1 for _ in range(2))
    return Tiles(k8, v8, ks, vs)


# -- the description, in plain Python -------------------------------------------------------------


def key_order(size: int) -> list[tuple[int, int]]:
    """(token, channel of the octet) of each of an octet's codes: quad of channels, token, channel."""
    return [(token, 4 * quad + c) for quad in range(2) for token in range(size) for c in range(4)]


def value_order(size: int) -> list[tuple[int, int]]:
    """Quad of tokens, channel, token of the quad."""
    return [(4 * quad + t, channel) for quad in range(size // 4) for channel in range(8) for t in range(4)]


def packed(codes: list[int], bits: int) -> bytes:
    out = b""
    planes = {8: [(8, 0)], 5: [(4, 0), (1, 4)], 4: [(4, 0)], 3: [(2, 0), (1, 2)], 2: [(2, 0)], 1: [(1, 0)]}
    for width, shift in planes[bits]:
        line = len(codes) * width // 8
        plane = [code >> shift & 2**width - 1 for code in codes]
        out += bytes(sum(plane[j + i * line] << (i * width) for i in range(8 // width)) for j in range(line))
    return out


def float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


def channel_runs(bits: int, halves: bool, head_dim: int) -> list[tuple[int, slice]]:
    """(width, channels) of what is coded alike."""
    if not halves or bits > 4:
        return [(bits, slice(None))]
    wide, narrow = {4: (5, 3), 3: (4, 2), 2: (3, 1)}[bits]
    return [(wide, slice(None, head_dim // 2)), (narrow, slice(head_dim // 2, None))]


def page(layout: PageLayout, tile: Tiles, search: bool) -> bytes:
    """The bytes of one block; `tile` without the leading dimension, rows within 2^16 of each other."""
    sections: dict[str, list[bytes]] = {name: [] for name in ("codes", "steps", "exponents", "scales")}
    for codes, scales, widths, halves, order in (
        (tile.k8, tile.k_scale, layout.k_bits, layout.k_halves or (False,) * 9, key_order(layout.block_size)),
        (tile.v8, tile.v_scale, layout.v_bits, (False,) * 9, value_order(layout.block_size)),
    ):
        steps, zeros = b"", b""
        for head in sorted(range(len(widths)), key=lambda h: (-widths[h], not halves[h], h)):
            values = codes[head].numpy().astype(int)
            for bits, channels in channel_runs(widths[head], halves[head], layout.head_dim):
                if bits == 8:
                    code = values + 128
                else:
                    code, step, zero = formulas.stage2(values[:, channels], bits, search)
                    steps += step.astype(np.int8).tobytes()
                    zeros += zero.astype(np.int8).tobytes()
                for octet in range(code.shape[1] // 8):
                    line = [int(code[token, 8 * octet + channel]) for token, channel in order]
                    sections["codes"].append(packed(line, bits))
        sections["steps"].append(steps + zeros)
        for row in scales.tolist():
            head_scale = max(row)
            if layout.token_scales:
                head_scale = 2.0 ** int(np.ceil(np.log2(head_scale)))
                sections["exponents"].append(bytes((float_bits(head_scale) - float_bits(s)) >> 19 for s in row))
            sections["scales"].append(struct.pack("<f", head_scale))
    body = b"".join(b"".join(parts) for parts in sections.values())
    return body + bytes(-len(body) % 16)


def one(tile: Tiles, index: int) -> Tiles:
    return tile.map(lambda x: x[index])


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("search", [False, True], ids=["min-max", "search"])
@pytest.mark.parametrize("token_scales", [True, False], ids=["by token", "by tile"])
@pytest.mark.parametrize("widths", [((4,), (4,)), ((3, 3), (2, 2)), ((8,), (8,)), MIXED], ids=str)
def test_bytes_are_as_described(widths, token_scales, search, size):
    layout = PageLayout(24, size, *widths, token_scales)
    block = tiles(2, len(widths[0]), size, 24, token_scales)
    got = encode_pages(layout, block, search)
    assert got.dtype == torch.uint8
    assert got.shape == (2, layout.page_bytes)
    for n in range(2):
        assert bytes(got[n].tolist()) == page(layout, one(block, n), search)


@pytest.mark.parametrize("search", [False, True], ids=["min-max", "search"])
@pytest.mark.parametrize("head_dim", [16, 48])
@pytest.mark.parametrize("halves", [(True,) * 5, (False, True, False, True, False)], ids=["all", "some"])
def test_bytes_of_keys_of_two_widths_are_as_described(head_dim, search, halves):
    layout = PageLayout(head_dim, 32, *MIXED, True, halves)
    block = tiles(2, 5, 32, head_dim)
    got = encode_pages(layout, block, search)
    for n in range(2):
        assert bytes(got[n].tolist()) == page(layout, one(block, n), search)
    back = decode_pages(layout, got)
    for n, head in itertools.product(range(2), range(5)):
        parts = [
            formulas.restored(block.k8[n, head, :, channels].numpy().astype(int), bits, search)
            if bits < 8
            else block.k8[n, head, :, channels].numpy()
            for bits, channels in channel_runs(layout.k_bits[head], halves[head], head_dim)
        ]
        assert np.array_equal(back.k8[n, head].numpy(), np.concatenate(parts, 1))


def test_first_bytes_of_an_octet_by_hand():
    """8 bits, so that a byte is a code: K runs over 4 channels, then tokens; V over 4 tokens, then channels."""
    layout = PageLayout.uniform(1, 8, 16, 8, True)
    value = (torch.arange(16)[:, None] * 8 + torch.arange(8)).sub(64).to(torch.int8)  # token t, channel c: 8 t + c - 64
    block = Tiles(*(value.view(1, 1, 16, 8),) * 2, *(torch.ones(1, 1, 16),) * 2)
    got = (encode_pages(layout, block, False)[0].to(torch.int16) - 128 + 64).tolist()
    assert got[:12] == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert got[64:68] == [4, 5, 6, 7]  # the octet's second quad
    assert got[128:140] == [0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26]
    assert got[128 + 32 : 128 + 36] == [32, 40, 48, 56]  # the next four tokens


# -- and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [False, True], ids=["min-max", "search"])
@pytest.mark.parametrize("token_scales", [True, False], ids=["by token", "by tile"])
@pytest.mark.parametrize("widths", [((4, 4), (4, 4)), ((3,), (3,)), ((2,), (2,)), MIXED], ids=str)
def test_decoding_gives_code_times_step_plus_zero(widths, token_scales, search):
    layout = PageLayout(16, 32, *widths, token_scales)
    block = tiles(2, len(widths[0]), 32, 16, token_scales)
    got = decode_pages(layout, encode_pages(layout, block, search))
    for side, bits in (("k8", layout.k_bits), ("v8", layout.v_bits)):
        for n in range(2):
            for head, width in enumerate(bits):
                want = formulas.restored(getattr(block, side)[n, head].numpy().astype(int), width, search)
                assert np.array_equal(getattr(got, side)[n, head].numpy(), want)
    assert torch.equal(bits_of(got.k_scale), bits_of(block.k_scale))
    assert torch.equal(bits_of(got.v_scale), bits_of(block.v_scale))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from((8, 16, 40)), st.sampled_from((16, 48, 64)), st.booleans())
def test_eight_bits_are_exact(seed, head_dim, size, token_scales):
    layout = PageLayout.uniform(2, head_dim, size, 8, token_scales)
    block = tiles(1, 2, size, head_dim, token_scales, seed)
    got = decode_pages(layout, encode_pages(layout, block, True))
    for name in ("k8", "v8", "k_scale", "v_scale"):
        assert torch.equal(getattr(got, name), getattr(block, name))


@settings(max_examples=30)
@given(st.data(), st.integers(0, 10**6))
def test_a_decoded_page_encodes_to_itself_at_eight_bits(data, seed):
    """The page of what a low-bit page holds, as a crop makes it: nothing is lost a second time."""
    widths = tuple(data.draw(st.lists(st.sampled_from((2, 3, 4)), min_size=2, max_size=2)))
    low, wide = PageLayout(8, 16, widths, widths, True), PageLayout.uniform(2, 8, 16, 8, True)
    first = decode_pages(low, encode_pages(low, tiles(1, 2, 16, 8, seed=seed), True))
    again = decode_pages(wide, encode_pages(wide, first, True))
    for name in ("k8", "v8", "k_scale", "v_scale"):
        assert torch.equal(getattr(again, name), getattr(first, name))


def scaled(scales: list[float], codes: torch.Tensor | None = None, head_dim: int = 8) -> Tiles:
    """One block of one head, K and V alike, whose rows have the given scales."""
    if codes is None:
        generator = torch.Generator().manual_seed(5)
        codes = torch.randint(-119, 120, (len(scales), head_dim), generator=generator).to(torch.int8)
    scale = torch.tensor(scales).view(1, 1, -1)
    return Tiles(*(codes.view(1, 1, -1, head_dim),) * 2, scale, scale)


def exponent_bytes(layout: PageLayout, pages: torch.Tensor) -> list[int]:
    return pages[0, layout.k_token_scales : layout.v_token_scales].tolist()


def test_token_scale_bytes_by_hand():
    layout = PageLayout.uniform(1, 8, 16, 8, True)
    # 1.75 is below S = 2 by 2 of 16 steps (1.75 = 1 + 12/16: 16 - 12 = 4 below 2).
    block = scaled([1.75, 1.0, 1.9375, 0.5, 2.0**-14, 2.0**-10 * 1.5] + [1.0] * 10)
    pages = encode_pages(layout, block, False)
    assert pages[0, layout.k_scales : layout.k_scales + 4].tolist() == [0, 0, 0, 0x40]  # 2.0
    assert exponent_bytes(layout, pages)[:6] == [4, 16, 1, 32, 240, 168]
    assert decode_pages(layout, pages).k_scale.flatten().tolist()[:6] == [
        1.75,
        1.0,
        1.9375,
        0.5,
        2.0**-14,
        1.5 * 2.0**-10,
    ]


@given(st.lists(st.tuples(st.integers(16, 31), st.integers(-14, 0)), min_size=16, max_size=16), st.integers(-80, 80))
def test_token_scales_on_the_grid_are_exact(parts, exponent):
    """All within a factor of 2^15 of the largest: bytes below 255 hold every one of them."""
    scales = [m / 16 * 2.0 ** (e + exponent) for m, e in parts]
    layout = PageLayout.uniform(1, 8, 16, 8, True)
    block = scaled(scales)
    got = decode_pages(layout, encode_pages(layout, block, False))
    assert torch.equal(bits_of(got.k_scale), bits_of(block.k_scale))
    assert torch.equal(got.k8, block.k8)


def test_rows_more_than_2_to_the_16_apart_are_requantized():
    """The smallest scale a page holds beside S = 1 is 255 steps below it: 2^-16 * 17/16."""
    least = 2.0**-16 * 17 / 16
    layout = PageLayout.uniform(1, 8, 16, 8, True)
    block = scaled([1.0, 2.0**-17, 2.0**-40, least, 2.0**-16] + [0.5] * 11)
    pages = encode_pages(layout, block, False)
    got = decode_pages(layout, pages)
    assert exponent_bytes(layout, pages)[:5] == [0, 255, 255, 255, 255]
    assert got.k_scale.flatten().tolist()[:5] == [1.0, least, least, least, least]
    codes = block.k8[0, 0].double()
    assert torch.equal(got.k8[0, 0, 1].double(), (codes[1] * (8 / 17)).round())
    assert got.k8[0, 0, 2].tolist() == [0] * 8
    assert torch.equal(got.k8[0, 0, 3], block.k8[0, 0, 3])  # fits as it is
    assert torch.equal(got.k8[0, 0, 4].double(), (codes[4] * (16 / 17)).round())
    assert torch.equal(got.k8[0, 0, 5:], block.k8[0, 0, 5:])
    # What is lost is at most half the smallest unit, 2^-16 of the largest row's.
    lost = (got.floats()[0] - block.floats()[0]).abs()
    assert float(lost.max()) <= least / 2


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("token_scales", [True, False])
def test_zero_rows_stay_small_beside_others(bits, token_scales):
    codes = torch.randint(-119, 120, (16, 8), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    codes[3] = codes[9] = 0
    scale = 2.0**-9 if token_scales else 0.25
    block = scaled([scale] * 16, codes)
    block.k_scale[0, 0, 3] = block.k_scale[0, 0, 9] = 1.0  # what stage 1 gives a zero row
    layout = PageLayout.uniform(1, 8, 16, bits, token_scales)
    got = decode_pages(layout, encode_pages(layout, block, False))
    # Their scale of 1 must not become the head's: the others keep theirs.
    assert got.k_scale[0, 0, 0] == scale
    if bits == 8:
        assert torch.equal(got.floats()[0][0, 0, ::3], codes[::3] * scale)
    if token_scales:
        # Stage 2 may give a zero row up to half a step; under the smallest scale that is nothing.
        assert float(got.floats()[0][0, 0, 3].abs().max()) <= 126 * scale * 2.0**-15


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("token_scales", [True, False])
def test_a_block_of_zeros(bits, token_scales):
    layout = PageLayout.uniform(2, 16, 16, bits, token_scales)
    zero = torch.zeros(1, 2, 16, 16, dtype=torch.int8)
    got = decode_pages(layout, encode_pages(layout, Tiles(zero, zero, *(torch.ones(1, 2, 16),) * 2), True))
    assert torch.equal(got.k8, zero)
    assert torch.equal(got.v8, zero)
    assert bool(got.k_scale.isfinite().all())


def test_tiles_that_a_crop_brought_together_get_one_scale():
    """Without token scales a block has one: rows of a smaller one are requantized to the largest."""
    layout = PageLayout.uniform(1, 8, 16, 8, False)
    block = scaled([0.5] * 10 + [0.125] * 6)
    got = decode_pages(layout, encode_pages(layout, block, False))
    assert got.k_scale.flatten().tolist() == [0.5] * 16
    assert torch.equal(got.k8[0, 0, :10], block.k8[0, 0, :10])
    assert torch.equal(got.k8[0, 0, 10:].double(), (block.k8[0, 0, 10:].double() / 4).round())


def test_blocks_are_encoded_alone():
    layout = PageLayout(16, 32, *MIXED, True)
    block = tiles(3, 5, 32, 16)
    together = encode_pages(layout, block, True)
    for n in range(3):
        assert torch.equal(encode_pages(layout, block.map(lambda x: x[n : n + 1]), True), together[n : n + 1])  # noqa: B023


def test_pages_may_lie_anywhere():
    """Steps and scales are read at any offset of a larger tensor."""
    layout = PageLayout(24, 16, (4, 2), (3, 8), True)
    pages = encode_pages(layout, tiles(2, 2, 16, 24), False)
    odd = torch.zeros(2, layout.page_bytes + 7, dtype=torch.uint8)
    odd[:, 3 : 3 + layout.page_bytes] = pages
    got, want = decode_pages(layout, odd[:, 3 : 3 + layout.page_bytes]), decode_pages(layout, pages)
    for name in ("k8", "v8", "k_scale", "v_scale"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_floats_and_cat():
    block = scaled([0.5] * 16)
    k, v = block.floats()
    assert torch.equal(k, block.k8 * 0.5)
    assert torch.equal(v, block.v8 * 0.5)
    both = Tiles.cat([block, block.map(lambda x: x + x)], 1)
    assert both.k8.shape == (1, 2, 16, 8)
    assert both.v_scale[0, :, 0].tolist() == [0.5, 1.0]
