"""Every width of the format has a kernel, and any other width raises an error instead of being read as one of them."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.config import WIDTHS
from turboattention.kernels.inputs import BLOCK, Pages, QueryPositions
from turboattention.kv.layout import K_HALVES, PageLayout
from turboattention.params import AttentionParams

from .tools import every_isa

attention = pytest.importorskip("turboattention.kernels.cpu.attention", exc_type=ImportError)
quantize = pytest.importorskip("turboattention.kernels.cpu.quantize", exc_type=ImportError)

D = 16
DECODE, PREFILL = 1, 40  # query rows: packed codes are read in place, or unpacked first

every_call = pytest.mark.parametrize("queries", [DECODE, PREFILL], ids=["decode", "prefill"])


def layout_of(k_bits: int, v_bits: int, halved: bool = False) -> PageLayout:
    return PageLayout(D, BLOCK, (k_bits,), (v_bits,), token_scales=True, k_halves=(halved,))


def attend(layout: PageLayout, queries: int) -> torch.Tensor:
    """Attention over one page of zeros."""
    page = torch.zeros(layout.page_bytes, dtype=torch.uint8)
    first, valid, length, one = (torch.tensor([n]) for n in (BLOCK - queries, queries, BLOCK, 1))
    pages = Pages(torch.tensor([[page.data_ptr()]]), one, 0, layout, layout, alive=(page,))
    q, params = torch.ones(1, 1, queries, D), AttentionParams(True, 1.0, None, None, None)
    return attention.attend(
        ta.TurboConfig(), q, QueryPositions(first, valid, length), pages, None, params, kv_heads=1, v_head_dim=D,
        mean=None, mean_from_block=1,
    )[0]  # fmt: skip


@every_isa
@every_call
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_of_the_format_has_kernels(isa, queries, bits, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    for halved in {False, bits in K_HALVES}:
        assert not attend(layout_of(bits, bits, halved), queries).any()


@every_isa
@every_call
@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 9])
def test_values_of_another_width_raise(isa, queries, bits, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    expected = rf"^bits: expected a width of this CPU kernel \(8, 4, 3, 2\), got {bits}$"
    with pytest.raises(ValueError, match=expected):
        attend(layout_of(4, bits), queries)


@every_isa
@pytest.mark.parametrize("bits", [1, 5, 6])
def test_keys_of_another_pair_of_widths_raise(isa, bits, monkeypatch):
    """5 and 1 bits exist as halves of a head only."""
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    pairs = r"\(8/8, 5/3, 4/4, 4/2, 3/3, 3/1, 2/2\)"
    with pytest.raises(
        ValueError, match=rf"^bits: expected widths of K of this CPU kernel {pairs}, got {bits}/{bits}$"
    ):
        attend(layout_of(bits, 4), DECODE)


@every_isa
def test_keys_that_prefill_cannot_unpack_raise(isa, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    with pytest.raises(ValueError, match=r"^bits: expected a width of this CPU kernel \(8, 5, 4, 3, 2, 1\), got 6$"):
        attend(layout_of(6, 4), PREFILL)


@every_isa
@pytest.mark.parametrize("bits", [6, 7])
@pytest.mark.parametrize("search", [False, True])
def test_pages_of_another_width_raise(isa, bits, search):
    layout = layout_of(bits, bits)
    codes, scales = torch.ones(1, 1, BLOCK, D, dtype=torch.int8), torch.ones(1, 1, BLOCK)
    expected = rf"^bits: expected a width of this CPU kernel \(8, 5, 4, 3, 2, 1\), got {bits}$"
    with pytest.raises(ValueError, match=expected):
        quantize.encode_pages(layout, codes, codes, scales, scales, search, isa=isa)
    with pytest.raises(ValueError, match=expected):
        quantize.decode_pages(layout, torch.zeros(1, layout.page_bytes, dtype=torch.uint8), isa=isa)
