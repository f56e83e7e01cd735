"""Appending on the device against stage 1 and the page codec in PyTorch, to the last bit."""

from __future__ import annotations

import pytest
import torch

from . import tools  # noqa: F401  (skips without Triton)  # isort: skip

import turboattention as ta
from turboattention.errors import DtypeError, UnsupportedError
from turboattention.flashq import quantize_tokens
from turboattention.kernels.triton.append import flush_blocks, store_tokens
from turboattention.kernels.triton.ordering import Order
from turboattention.kv.channel_order import ChannelOrder
from turboattention.kv.layout import PageLayout
from turboattention.kv.quantizer import PYTORCH

from ...helpers import normals

BATCH, HEADS, D = 3, 3, 24  # pages then end in padding
LAYOUT = PageLayout(D, 64, (4, 2, 4), (3, 8, 2), True)


def buffer(width: int, dtype: torch.dtype, fill: int = 0) -> tuple:
    """Codes and scales of keys and values."""
    codes = tuple(torch.full((BATCH, HEADS, width, D), fill, dtype=torch.int8) for _ in range(2))
    scales = tuple(torch.full((BATCH, HEADS, width), float(fill), dtype=dtype) for _ in range(2))
    return codes, scales


def staged(x, lengths, start, mean, mean_from, rotate, codes, scales):
    """What PyTorch's stage 1 makes of a buffer."""
    codes, scales = codes.clone(), scales.float()
    zeros = torch.zeros(BATCH, dtype=torch.int64)
    span = (zeros, zeros + x.shape[2])
    PYTORCH.quantize_tokens(x, span, lengths, mean, mean_from, rotate, codes, scales, lengths - start)
    return codes, scales


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("rotate, smooth", [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_storing_tokens(tokens, rotate, smooth, dtype):
    k = normals(BATCH, tokens, HEADS, D, seed=1).transpose(1, 2)  # heads and tokens change places
    v = normals(BATCH, HEADS, tokens, 2 * D, seed=2).bfloat16()[..., D:]
    lengths, start = torch.tensor([62, 190, 64]), torch.tensor([0, 128, 64])
    mean = normals(BATCH, HEADS, D, seed=3).bfloat16() if smooth else None
    codes, scales = buffer(66, dtype, fill=7)
    config = ta.TurboConfig(rotate=rotate)
    want = [
        staged(x, lengths, start, m, 64, rotate, c, s)
        for x, m, c, s in zip((k, v), (mean, None), codes, scales, strict=True)
    ]
    flag = torch.zeros(1, dtype=torch.int32)
    store_tokens(
        config,
        (k, v),
        lengths,
        torch.full((BATCH,), tokens),
        start,
        mean,
        64,
        codes,
        scales,
        flag,
    )
    for (want_codes, want_scales), c, s in zip(want, codes, scales, strict=True):
        assert torch.equal(c, want_codes)
        assert torch.equal(s.float(), want_scales)
    assert flag.tolist() == [0]


def test_what_has_no_room_is_dropped():
    codes, scales = buffer(64, torch.float32)
    guard = [x.clone() for x in (*codes, *scales)]
    k, v = normals(2, BATCH, HEADS, 2, D, seed=1)
    lengths, flag = torch.tensor([63, 64, 70]), torch.zeros(1, dtype=torch.int32)
    store_tokens(ta.TurboConfig(), (k, v), lengths, torch.full((BATCH,), 2), lengths * 0, None, 0, codes, scales, flag)
    for x, before in zip((*codes, *scales), guard, strict=True):
        assert bool((x[0, :, 63] != 0).any())
        x[0, :, 63] = 0
        assert torch.equal(x, before)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -2e18])
def test_rows_that_are_not_finite_become_zeros(side, bad):
    new = list(normals(2, BATCH, HEADS, 2, D, seed=4))
    lengths, start, flag = torch.full((BATCH,), 130), torch.full((BATCH,), 128), torch.zeros(1, dtype=torch.int32)
    mean = normals(BATCH, HEADS, D, seed=3).bfloat16()
    want, want_scales = buffer(64, torch.bfloat16)
    store_tokens(
        ta.TurboConfig(), tuple(new), lengths, torch.full((BATCH,), 2), start, mean, 0, want, want_scales, flag
    )
    assert flag.tolist() == [0]
    want[side][1, 1, 3], want_scales[side][1, 1, 3] = 0, 1
    new[side][1, 1, 1, 5] = bad
    codes, scales = buffer(64, torch.bfloat16)
    store_tokens(ta.TurboConfig(), tuple(new), lengths, torch.full((BATCH,), 2), start, mean, 0, codes, scales, flag)
    assert flag.tolist() == [1]
    for got, expected in zip((*codes, *scales), (*want, *want_scales), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("width, dtype", [(64, torch.bfloat16), (70, torch.float32), (150, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("search", [True, False])
def test_full_blocks_move_into_their_pages(width, dtype, search):
    codes, scales = buffer(width, dtype)
    zeros, flag = torch.zeros(BATCH, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    new = normals(2, BATCH, HEADS, width, D, seed=5)
    new[:, :, :, 3] *= 1e7  # rows so far apart are requantized
    store_tokens(ta.TurboConfig(), tuple(new), zeros, zeros + width, zeros, None, 0, codes, scales, flag)
    before = [x.clone() for x in (*codes, *scales)]
    tiles = [x[:, :, :64].clone() for x in (*codes, *(s.float() for s in scales))]
    want = PYTORCH.encode_pages(LAYOUT, *tiles, search)
    pages = torch.full((BATCH, LAYOUT.page_bytes + 16), 7, dtype=torch.uint8)
    fresh = torch.tensor([pages[0].data_ptr(), 0, pages[2].data_ptr()])
    flush_blocks(LAYOUT, codes, scales, fresh, search)
    for b in (0, 2):
        assert torch.equal(pages[b, :-16], want[b])
    assert bool((pages[1] == 7).all())
    assert bool((pages[:, -16:] == 7).all())
    for x, old in zip((*codes, *scales), before, strict=True):
        moved = torch.cat((old[:, :, 64:], torch.zeros_like(old[:, :, :64])), 2)
        moved[1] = old[1]
        assert torch.equal(x, moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotated", [True, False])
def test_blocks_whose_keys_have_an_order(dtype, rotated):
    """Of one head; rows of sequences that fill no block, and rows behind a block, stay as they are."""
    layout = PageLayout(2 * D, 64, (3,) * HEADS, (4,) * HEADS, True, (True,) + (False,) * (HEADS - 1))
    order = ChannelOrder(normals(HEADS, 2 * D, seed=4).argsort(-1).to(torch.uint8), torch.tensor(layout.k_halves))
    rows = [quantize_tokens(normals(BATCH, HEADS, 70, 2 * D, seed=seed) * 3) for seed in (5, 6)]
    codes, scales = tuple(x for x, _ in rows), tuple(x.to(dtype) for _, x in rows)
    tiles = [x[:, :, :64].clone() for x in (*codes, *(s.float() for s in scales))]
    old = [x.clone() for x in (*codes, *scales)]
    want = PYTORCH.encode_pages(layout, *tiles, True, order, rotated)
    pages = torch.full((BATCH, layout.page_bytes), 7, dtype=torch.uint8)
    fresh = torch.tensor([pages[0].data_ptr(), 0, pages[2].data_ptr()])
    flush_blocks(layout, codes, scales, fresh, True, Order.of(order, codes[0]), rotated)
    for b in (0, 2):
        assert torch.equal(pages[b], want[b])
    for x, before in zip((*codes, *scales), old, strict=True):
        assert torch.equal(x[1], before[1])
        assert torch.equal(x[0, :, :6], before[0, :, 64:])


def test_an_empty_batch():
    codes, scales = buffer(64, torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    cut = tuple(x[:0] for x in codes), tuple(x[:0] for x in scales)
    k = torch.zeros(0, HEADS, 1, D)
    store_tokens(ta.TurboConfig(), (k, k), none, none, none, None, 0, *cut, torch.zeros(1, dtype=torch.int32))
    flush_blocks(LAYOUT, *cut, none, True)


def test_refusals():
    codes, scales = buffer(64, torch.float16)
    none, k = torch.zeros(BATCH, dtype=torch.int64), torch.zeros(BATCH, HEADS, 1, D)
    with pytest.raises(DtypeError, match=r"^codes, scales: expected int8 and .* got torch.int8 and torch.float16"):
        store_tokens(
            ta.TurboConfig(), (k, k), none, none, none, None, 0, codes, scales, torch.zeros(1, dtype=torch.int32)
        )
    with pytest.raises(DtypeError, match=r"^codes, scales"):
        flush_blocks(LAYOUT, codes, scales, none, True)
    with pytest.raises(UnsupportedError, match=r"^block_size"):
        flush_blocks(PageLayout.uniform(HEADS, D, 48, 4, True), codes, scales, none, True)
