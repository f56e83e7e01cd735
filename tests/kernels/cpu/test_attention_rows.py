"""Query rows, bit for bit: quantization to INT8, and results rotated back and rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import turboattention as ta
from turboattention import flashq
from turboattention.errors import NonFiniteError
from turboattention.kernels.inputs import Int8Queries, Pages, QueryPositions, TailRows
from turboattention.kv.channel_order import ChannelOrder
from turboattention.kv.layout import PageLayout
from turboattention.kv.queries import Queries, ordered_queries, quantize_queries
from turboattention.params import AttentionParams

from ...helpers import bits_of, normals
from .test_quantize import DTYPES, HEAD_DIMS, rows
from .tools import every_isa

kernels = pytest.importorskip("turboattention.kernels.cpu.attention", exc_type=ImportError)
codec = pytest.importorskip("turboattention.kernels.cpu.quantize", exc_type=ImportError)

PLAIN = ta.TurboConfig(rotate=False)
KEYS = 64


def keys(batch: int, head_dim: int) -> TailRows:
    """A block of INT8 rows of two heads."""
    (k8, k_scale), (v8, v_scale) = (flashq.quantize_tokens(x) for x in normals(2, batch, 2, KEYS, head_dim, seed=2))
    return TailRows(k8, v8, k_scale, v_scale, torch.zeros(batch, dtype=torch.int64))


def attend(config: ta.TurboConfig, q: Tensor, source: TailRows | Pages, valid: Tensor, **options) -> tuple:
    """q [B, Hq, Lq, D] over one block, not causally."""
    pages, tail_rows = (source, None) if isinstance(source, Pages) else (None, source)
    length = KEYS if tail_rows is None else tail_rows.k8.shape[2]
    query_positions = QueryPositions(torch.zeros_like(valid), valid, torch.full_like(valid, length))
    given = {"kv_heads": 2, "v_head_dim": q.shape[-1], "mean": None, "mean_from_block": 0, **options}
    params = AttentionParams(is_causal=False, scale=given.pop("scale", 0.3))
    return kernels.attend(config, q, query_positions, pages, tail_rows, params, **given)


def as_given(queries: Queries) -> Int8Queries:
    logit = None if queries.mean_logit is None else queries.mean_logit.contiguous()
    return Int8Queries(queries.codes.to(torch.int8).contiguous(), queries.scale.contiguous(), logit)


def assert_same(got: tuple, want: tuple) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(bits_of(a.float()), bits_of(b.float()))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group, queries", [(1, 3), (3, 2), (3, 9)])
def test_queries_become_the_codes_of_the_reference(isa, dtype, head_dim, group, queries, monkeypatch):
    """As a decode step and as a prefill take them; padding is not read."""
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    q = rows(2, 2 * group, queries, head_dim, dtype=dtype, seed=1)
    valid, source = torch.tensor([queries, queries - 1]), keys(2, head_dim)
    clean = q.clone()
    clean[1, :, -1:], q[1, :, -1:] = 0.0, torch.nan
    mean = normals(2, 2, head_dim, seed=4).bfloat16()
    for config in (ta.TurboConfig(), PLAIN):
        want = as_given(quantize_queries(config, clean, 2, 0.3, None))
        assert_same(attend(config, q, source, valid), attend(config, q, source, valid, quantized=want))
        # The mean's logits are sums in float64 in different orders.
        want = as_given(quantize_queries(config, clean, 2, 0.3, mean))
        lse = attend(config, q, source, valid, mean=mean)[1]
        assert torch.allclose(lse, attend(config, q, source, valid, mean=mean, quantized=want)[1], rtol=1e-6, atol=1e-5)


@every_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.1e18, -1.1e18])
@pytest.mark.parametrize("queries", [2, 9])
def test_queries_that_are_not_finite_or_too_large_are_refused(isa, bad, queries, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    q, source = rows(2, 6, queries, 24), keys(2, 24)
    q[1, 5, queries - 1, 7] = bad
    valid = torch.tensor([queries, queries])
    for x in (q, q.bfloat16()):
        with pytest.raises(NonFiniteError, match=r"^q: expected finite values up to 1e18 in magnitude"):
            attend(ta.TurboConfig(), x, source, valid)
        attend(ta.TurboConfig(), x, source, valid - torch.tensor([0, 1]))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 96, 256])
@pytest.mark.parametrize("queries", [2, 9])
def test_queries_over_pages_in_order_become_the_codes_of_the_reference(isa, dtype, head_dim, queries, monkeypatch):
    """One head's page has an order of channels, the other one's has none."""
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    q = rows(1, 6, queries, head_dim, dtype=dtype, seed=1)
    valid, tiles = torch.tensor([queries]), keys(1, head_dim)
    order = ChannelOrder(normals(2, head_dim, seed=6).argsort(-1), torch.tensor([True, False]))
    layout = PageLayout(head_dim, KEYS, (3, 3), (3, 3), True, (True, False))
    page = codec.encode_pages(layout, tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale, True, order, True)
    source = Pages(torch.tensor([[page.data_ptr()]]), torch.tensor([1]), 0, layout, layout)
    config = ta.TurboConfig()
    want = as_given(ordered_queries(config, q, 2, 0.3, order, quantize_queries(config, q, 2, 0.3, None)))
    assert_same(attend(config, q, source, valid, order=order), attend(config, q, source, valid, quantized=want))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("queries", [2, 9])
def test_results_are_rotated_back_as_by_the_reference(isa, dtype, head_dim, queries, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    q = rows(2, 6, queries, head_dim, seed=1)
    valid, source = torch.tensor([queries, queries]), keys(2, head_dim)
    given = {"quantized": as_given(quantize_queries(PLAIN, q, 2, 0.3, None))}
    plain, lse = attend(PLAIN, q, source, valid, **given)
    want = flashq.rotate(plain, inverse=True).to(dtype)
    assert_same(attend(ta.TurboConfig(), q.to(dtype), source, valid, **given), (want, lse))


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_even(isa, dtype, monkeypatch):
    """Ties and the floats beside them, from float16's denormals to its overflow: values of one key, times its scale."""
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    config = PLAIN.replace(p_scale="static")
    coarse = torch.arange(0, 128)[:, None] * (1 << 16) + torch.tensor([0, 0x7FFF, 0x8000, 0x8001])
    fine = torch.arange(0, 1024)[:, None] * (1 << 13) + torch.tensor([0xFFF, 0x1000, 0x1001])
    mantissa = torch.cat((coarse.flatten(), fine.flatten()))
    exponent = torch.arange(127 - 30, 127 + 13)[:, None] << 23
    scale = (exponent + mantissa).flatten()[::5].to(torch.int32).view(torch.float32)
    count = len(scale) // 2 * 2
    scale = scale[:count].view(-1, 2, 1)
    codes = torch.tensor([1, -2, 4, 8, 16, -32, 64, 127], dtype=torch.int8).expand(len(scale), 2, 1, 8).contiguous()
    source = TailRows(codes, codes, torch.ones_like(scale), scale, torch.zeros(len(scale), dtype=torch.int64))
    q, valid = torch.zeros(len(scale), 2, 1, 8), torch.ones(len(scale), dtype=torch.int64)
    exact = attend(config, q, source, valid)[0]
    assert torch.allclose(exact, codes * scale[..., None], rtol=1e-6, atol=0)
    half = 1 << (15 if dtype == torch.bfloat16 else 12)
    assert int((bits_of(exact) % (2 * half) == half).sum()) > 1000
    assert_same(attend(config, q.to(dtype), source, valid)[:1], (exact.to(dtype),))
