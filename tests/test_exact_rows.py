"""The first queries of a sequence, in floating point: without a cache, over a cache, and over a server's pages."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.config import TurboConfig
from turboattention.errors import ConfigError
from turboattention.exact_rows import with_exact_rows
from turboattention.paged import TailBlocks
from turboattention.params import AttentionParams
from turboattention.reference.exact import exact_attention

from .helpers import normals, qkv
from .paging import HEADS, MIXED, Server, random_schedule, serve, tokens

ROWS = TurboConfig().exact_rows
OFF = TurboConfig(guard="off")
NONE = OFF.replace(exact_rows=0)
TIGHT = {"rtol": 1e-5, "atol": 2e-6}
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def close(got, want) -> bool:
    """Both of out and lse."""
    return all(torch.allclose(x.double(), y, **TIGHT) for x, y in zip(got, want, strict=True))


def part(result, rows: slice):
    return tuple(x[:, :, rows] for x in result)


@BACKENDS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 3},
        {"softcap": 2.0, "scale": 0.4},
        {"attn_mask": normals(2, 6, 50, 50, seed=9) > -1},
        {"attn_mask": normals(6, 1, 50, seed=9)},
        {"attn_mask": torch.where(normals(50, 50, seed=9) > 0, 0.0, -torch.inf)},
    ],
    ids=lambda options: "-".join(f"{k}{getattr(v, 'dim', str)()}" for k, v in options.items()) or "plain",
)
def test_the_first_rows_are_exact_and_the_others_as_before(backend, options):
    q, k, v = qkv(2, 6, 2, 50, 50, 32)
    got, without = (
        ta.turbo_attention(q, k, v, is_causal=True, return_lse=True, config=config, backend=backend, **options)
        for config in (OFF, NONE)
    )
    want = exact_attention(q, k, v, is_causal=True, **options)
    first, rest = slice(0, ROWS), slice(ROWS, None)
    assert close(part(got, first), part(want, first))
    assert not close(part(without, first), part(want, first))
    assert all(torch.equal(x, y) for x, y in zip(part(got, rest), part(without, rest), strict=True))


@BACKENDS
@pytest.mark.parametrize("queries, keys, rows", [(3, 9, 3), (8, 20, 4), (20, 8, 20), (1, 1, 1), (5, 40, 0)])
def test_rows_count_from_the_first_key(backend, queries, keys, rows):
    """Bottom-right alignment: the first query is at position keys - queries; those before the first key see nothing."""
    q, k, v = qkv(1, 2, 2, queries, keys, 16)
    got, without = (
        ta.turbo_attention(q, k, v, is_causal=True, return_lse=True, config=config, backend=backend)
        for config in (OFF, NONE)
    )
    assert close(part(got, slice(0, rows)), part(exact_attention(q, k, v, is_causal=True), slice(0, rows)))
    assert torch.equal(got[0][:, :, rows:], without[0][:, :, rows:])


@BACKENDS
def test_a_mask_of_rows_before_the_first_key(backend):
    q, k, v = qkv(1, 2, 2, 20, 8, 16)
    mask = normals(20, 8, seed=9) > -1
    got = ta.turbo_attention(q, k, v, mask, True, return_lse=True, config=OFF, backend=backend)
    assert close(got, exact_attention(q, k, v, mask, True))


@BACKENDS
def test_not_without_causality(backend):
    q, k, v = qkv(1, 2, 2, 20, 20, 16)
    got, without = (ta.turbo_attention(q, k, v, config=config, backend=backend) for config in (OFF, NONE))
    assert torch.equal(got, without)


@BACKENDS
def test_over_a_cache_only_of_a_sequence_that_begins(backend):
    q, k, v = qkv(2, 4, 2, 90, 90, 16)
    caches = [ta.KVCache(2, 2, 16, config=config) for config in (OFF, NONE)]
    for start, end in ((0, 30), (30, 80), (80, 81), (81, 90)):
        new = tuple(x[:, :, start:end] for x in (q, k, v))
        got, without = (ta.turbo_attention_with_kvcache(new[0], cache, *new[1:], backend=backend) for cache in caches)
        if start == 0:
            want = exact_attention(*new, is_causal=True)[0]
            assert torch.allclose(got[:, :, :ROWS].double(), want[:, :, :ROWS], **TIGHT)
            got, without = got[:, :, ROWS:], without[:, :, ROWS:]
        assert torch.equal(got, without)
    assert all(torch.equal(x, y) for x, y in zip(*(cache.dequantize() for cache in caches), strict=True))


@BACKENDS
def test_of_the_sequences_that_begin_in_a_batch(backend):
    """Sequence 0 has tokens already; of sequence 2, the padding is NaN."""
    q, k, v = qkv(3, 4, 2, 40, 40, 16)
    counts = torch.tensor([40, 40, 7])
    for x in (k, v):  # not q: rows of padding must give 0 because they are padding
        x[2, :, 7:] = torch.nan
    results = []
    for config in (OFF, NONE):
        cache = ta.KVCache(3, 2, 16, config=config)
        some = (k[:, :, :5].nan_to_num(), v[:, :, :5].nan_to_num())
        cache.append(*some, lengths=torch.tensor([5, 0, 0]))
        results.append(
            ta.turbo_attention_with_kvcache(q, cache, k, v, lengths=counts, return_lse=True, backend=backend)
        )
    (got, lse), (without, _) = results
    assert torch.equal(got[0], without[0])
    assert torch.equal(got[1, :, ROWS:], without[1, :, ROWS:])
    for row, count in ((1, ROWS), (2, 7)):
        tensors = (x[row : row + 1, :, :count] for x in (q, k, v))
        want = exact_attention(*tensors, is_causal=True)
        assert close((got[row : row + 1, :, :count], lse[row : row + 1, :, :count]), want)
    assert not got[2, :, 7:].any()
    assert bool((lse[2, :, 7:] == -torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_batch_does_not_change_a_bit(dtype):
    q, k, v = qkv(5, 6, 2, 40, 40, 64, dtype=dtype)
    counts = torch.tensor([40, 3, 16, 17, 1])
    cache = ta.KVCache(5, 2, 64, config=OFF)
    together = ta.turbo_attention_with_kvcache(q, cache, k, v, lengths=counts)
    for row, count in enumerate(counts.tolist()):
        own = [x[row : row + 1, :, :count] for x in (q, k, v)]
        alone = ta.turbo_attention_with_kvcache(own[0], ta.KVCache(1, 2, 64, config=OFF), *own[1:])
        assert torch.equal(together[row : row + 1, :, :count], alone)


@BACKENDS
def test_splits_of_a_prompt_change_nothing_with_stored_prefill(backend):
    config = OFF.replace(stored_prefill=True)
    q, k, v = qkv(1, 2, 2, 40, 40, 16)
    whole = ta.turbo_attention_with_kvcache(q, ta.KVCache(1, 2, 16, config=config), k, v, backend=backend)
    cache, parts = ta.KVCache(1, 2, 16, config=config), []
    for start, end in ((0, 5), (5, 12), (12, 40)):
        new = [x[:, :, start:end] for x in (q, k, v)]
        parts.append(ta.turbo_attention_with_kvcache(new[0], cache, *new[1:], backend=backend))
    assert torch.allclose(torch.cat(parts, 2), whole, rtol=0, atol=1e-6)


def test_the_paper_has_none_and_values_are_checked():
    assert TurboConfig.paper().exact_rows == 0
    for value in (-1, 1.0, True, None):
        with pytest.raises(ConfigError, match=r"exact_rows: expected an integer of at least 0, got"):
            TurboConfig(exact_rows=value)  # type: ignore[arg-type]


TOTALS = {7: 100, 3: 40, 5: 16, 1: 1, 2: 5}


def server(seed: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float32, ring: int = 64) -> Server:
    found = Server(MIXED, seed=seed, slots=len(TOTALS))
    found.tail_blocks = TailBlocks(1, len(TOTALS), HEADS, 16, exact_rows=rows, dtype=dtype, ring=ring)
    for first in found.tail_blocks.first:
        first.fill_(1e4)  # of a sequence that had the slot before
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": 4}, {"softcap": 3.0, "scale": 0.5}, {"sinks": torch.tensor([-1.0, 0.5, 2.0, 9.0])}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_of_pages_under_any_schedule(options, dtype):
    sequences = {key: tokens(10 * key, count, dtype=dtype) for key, count in TOTALS.items()}
    whole = serve(server(dtype=dtype), sequences, [TOTALS], **options)
    without = serve(server(rows=0), sequences, [TOTALS], **options)
    more = dict(options)
    sinks = more.pop("sinks", None)
    for key, (q, k, v) in sequences.items():
        want, lse = (x[0] for x in exact_attention(q[None], k[None], v[None], is_causal=True, **more))
        if sinks is not None:
            want = want * torch.sigmoid(lse - sinks[:, None])[..., None]
        accurate = {"rtol": 0.01, "atol": 0.01} if dtype == torch.bfloat16 else TIGHT
        assert torch.allclose(whole[key][:, :ROWS].double(), want[:, :ROWS], **accurate)
        assert torch.equal(whole[key][:, ROWS:], without[key][:, ROWS:])
    for seed in range(4):
        small = [{key: 1} for key in sequences] + [dict.fromkeys((7, 3), 2), {2: 1, 5: 3, 7: 8}]
        rest = {key: count - sum(step.get(key, 0) for step in small) for key, count in TOTALS.items()}
        got = serve(server(seed, dtype=dtype), sequences, small + random_schedule(seed, rest), **options)
        assert all(torch.equal(got[key][:, :ROWS], whole[key][:, :ROWS]) for key in sequences)


def test_of_pages_with_rejected_tokens():
    """Positions 3 to 9 are computed twice: with drafts that are rejected, then with the tokens that follow."""
    right, wrong = tokens(1, 30), tokens(2, 30)
    own = server(ring=128)
    own.step({0: tuple(torch.cat((a[:, :3], b[:, :7]), 1) for a, b in zip(right, wrong, strict=True))})
    own.lengths[0] = 3
    got = own.step({0: tuple(x[:, 3:] for x in right)})[0]
    want = exact_attention(*(x[None] for x in right), is_causal=True)[0][0]
    assert torch.allclose(got[:, : ROWS - 3].double(), want[:, 3:ROWS], **TIGHT)


def test_of_pages_with_values_that_are_not_finite():
    q, k, v = tokens(1, 20)
    clean = server().step({0: (q, k, v)})[0]
    bad = [x.clone() for x in (q, k, v)]
    bad[0][:, 5], bad[1][:, 9], bad[2][:, 9] = torch.nan, torch.inf, torch.nan
    own = server()
    got = own.step({0: tuple(bad)})[0]
    assert not own.finite
    assert bool(got.isfinite().all())
    assert all(bool(first.isfinite().all()) for first in own.tail_blocks.first)
    assert torch.equal(got[:, :5], clean[:, :5])
    assert torch.equal(got[:, 6:9], clean[:, 6:9])


def test_slots_count_what_they_keep():
    plain, more = TailBlocks(2, 3, HEADS, 16), TailBlocks(2, 3, HEADS, 16, exact_rows=ROWS, dtype=torch.bfloat16)
    assert more.nbytes - plain.nbytes == 2 * 2 * (3 + 1) * ROWS * HEADS * 16 * 2


def test_rows_that_are_not_finite_stay_as_the_kernel_left_them():
    """Kernels on a GPU read such values as zeros, or make the whole result NaN, and the host learns of it later."""
    q, k, v = qkv(2, 2, 2, 8, 8, 16)
    q[0, 0, 3] = torch.nan
    out, lse = torch.ones(2, 2, 8, 16), torch.ones(2, 2, 8)
    out[0, 1, 5], lse[0, 1, 5] = torch.nan, torch.nan
    params = AttentionParams(True, 0.25, None, None, None)
    begins = torch.tensor([True, False])
    got, got_lse = with_exact_rows(OFF, (out.clone(), lse.clone()), q, k, v, params, begins, with_lse=True)
    want = exact_attention(q, k, v, is_causal=True)
    kept = torch.zeros(2, 2, 8, dtype=torch.bool)
    kept[1], kept[0, 0, 3], kept[0, 1, 5] = True, True, True
    assert close((got[~kept], got_lse[~kept]), (want[0][~kept], want[1][~kept]))
    assert torch.equal(got[kept].nan_to_num(7), out[kept].nan_to_num(7))
    assert torch.equal(got_lse[kept].nan_to_num(7), lse[kept].nan_to_num(7))
