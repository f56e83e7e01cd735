"""Steps that store on the device: masks, ragged counts, first blocks, blocks that wait, pages that a window evicts.

Each is held to the reference, and what the cache holds afterwards to staging, to the last bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import turboattention as ta
from turboattention.errors import InputError, NonFiniteError
from turboattention.impl.triton import steps as triton_steps
from turboattention.impl.triton.graph import DecodeGraph
from turboattention.impl.triton.host_lengths import Fills
from turboattention.impl.triton.state import Steps
from turboattention.kv import growth
from turboattention.kv.channel_order import ChannelOrder
from turboattention.params import AttentionParams

from ...helpers import normals, qkv
from ...kv.tools import append_by_stages, content, filled
from .attending import filled as of_two_widths
from .test_boundary import nothing_read
from .tools import assert_close, cache_both

OFF = ta.TurboConfig(guard="off")
NO_SINKS = OFF.replace(sink_tokens=0)
ORDERED = NO_SINKS.replace(bits=3, reorder_k=True)


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch):
    """Makes staging of a cache fail: what it takes from then on are steps."""

    def make(cache: ta.KVCache) -> ta.KVCache:
        stage = growth.stage

        def refused(own: ta.KVCache, *args, **options):
            assert own is not cache, "staged"
            return stage(own, *args, **options)

        for caller in ("api", "kv.cache"):
            monkeypatch.setattr(f"turboattention.{caller}.stage", refused)
        return cache

    return make


def new(batch: int, tokens: int, turn: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(batch, 4, 2, tokens, tokens, 16, seed=200 + turn)


# -- ragged counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts", [[[1, 0, 1], [0, 1, 0], [3, 2, 0], [0, 0, 0]], [[62, 1, 5], [1, 0, 50]]], ids=["few", "many"]
)
def test_ragged_counts_are_steps(counts, stepping):
    """Some of them fill a block; padding is never read, and its rows of the result are empty."""
    cache, *_ = filled([130, 191, 70], config=NO_SINKS)
    want = cache.clone()
    stepping(cache)
    for turn, some in enumerate(counts):
        q, k, v = new(3, max(1, *some), turn)
        lengths = torch.tensor(some)
        padding = (torch.arange(q.shape[2]) >= lengths[:, None])[:, None, :, None]
        q, k, v = (x.masked_fill(padding, torch.nan) for x in (q, k, v))
        out, lse = cache_both(q, cache, k, v, lengths=lengths)
        assert bool((out.masked_select(padding) == 0).all())
        assert bool((lse.masked_select(padding[..., 0]) == -torch.inf).all())
        append_by_stages(want, k, v, lengths)
        assert content(cache) == content(want)
    cache.look()


def test_ragged_counts_are_appended(stepping):
    cache, *_ = filled([130, 191, 70], config=NO_SINKS)
    want = cache.clone()
    stepping(cache)
    _, k, v = new(3, 4, 0)
    lengths = torch.tensor([4, 1, 0])
    append_by_stages(want, k, v, lengths)
    assert triton_steps.append(cache, k, v, lengths)
    assert content(cache) == content(want)
    assert not triton_steps.append(cache, *new(3, 64, 1)[1:], torch.tensor([0, 0, 60]))  # past the block's end


# -- masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [None, [2, 0]])
def test_masks_are_steps(kind, lengths, stepping):
    cache, *_ = filled([130, 190], config=NO_SINKS)
    want = cache.clone()
    stepping(cache)
    counts = None if lengths is None else torch.tensor(lengths)
    for turn, tokens in enumerate((2, 2, 0)):
        q, k, v = new(2, max(tokens, 1), turn)
        keys = max(len(cache) + tokens if lengths is None else int((cache.seq_lens + counts).max()), len(cache))
        drawn = normals(2, 1, q.shape[2], keys, seed=turn)
        mask = drawn > -0.5 if kind == torch.bool else drawn.masked_fill(drawn > 1.0, -torch.inf).to(kind)
        if not tokens:
            cache_both(q, cache, attn_mask=mask)
            break
        cache_both(q, cache, k, v, attn_mask=mask, lengths=counts)
        append_by_stages(want, k, v, counts)
        assert content(cache) == content(want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_mask_that_may_not_be_is_told_of_later(bad):
    cache, *_ = filled([130, 190], config=NO_SINKS)
    q, *_ = new(2, 1, 0)
    mask = normals(2, 1, 1, 190, seed=1)
    want = ta.turbo_attention_with_kvcache(
        q, cache, attn_mask=mask.index_fill(3, torch.tensor([7]), 0.0), backend="triton"
    )
    mask[..., 7] = bad
    assert torch.equal(ta.turbo_attention_with_kvcache(q, cache, attn_mask=mask, backend="triton"), want)
    with pytest.raises(NonFiniteError, match=r"^q, k_new, v_new, attn_mask: expected finite values"):
        ta.turbo_attention_with_kvcache(q, cache, backend="triton")


def test_counts_and_masks_are_not_read_back(monkeypatch):
    cache, *_ = filled([190, 130], config=NO_SINKS)
    q, k, v = new(2, 2, 0)
    steps, counts = triton_steps.steps_of(cache), torch.tensor([2, 1])
    plan = steps.host_lengths.plan([2, 1])
    steps.tables.take(plan)
    masks = normals(1, 1, 2, 192, seed=1), normals(2, 1, 1, 192, seed=2) > 0
    with nothing_read(monkeypatch):
        for mask in masks:
            steps.copied().run(q, k, v, AttentionParams(True, 0.25, attn_mask=mask), fills=plan.fills, counts=counts)
        steps.store(k, v, fills=plan.fills, counts=counts)


# -- first blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (OFF, {}),
        (NO_SINKS, {"max_tokens": 256}),
        (OFF.replace(sink_tokens=128, bits=3), {}),
        (NO_SINKS.replace(smooth_k=False), {}),
        (OFF.replace(bits="mixed"), {"head_bits": [2, 4]}),
        (NO_SINKS, {"k_mean": torch.arange(32.0).view(2, 16)}),
        (OFF.replace(flush_lag=3), {}),
    ],
    ids=["sinks", "compressed", "two sinks", "unsmoothed", "widths given", "mean given", "waiting"],
)
@pytest.mark.parametrize("attends", [True, False])
def test_first_blocks_fill_without_staging(config, options, attends, stepping):
    """From a first token to the first compressed page: means, sinks, and widths that do not depend on tokens."""
    cache, *_ = filled([3, 61, 127], config=config, **options)
    want = cache.clone()
    stepping(cache)
    for turn, tokens in enumerate((1, 2, 58, 4, 2, 58)):
        q, k, v = new(3, tokens, turn)
        if attends and tokens < 5:
            cache_both(q, cache, k, v)
        else:
            assert triton_steps.append(cache, k, v)
        append_by_stages(want, k, v)
        assert content(cache) == content(want)
        assert isinstance(cache.backend_state, Steps)
    assert cache.head_bits is not None


@pytest.mark.parametrize(
    "fields", [{"bits": "mixed"}, {"guard": "adapt"}, {"guard": "warn"}, {"bits": 3, "reorder_k": True}], ids=str
)
def test_what_tokens_decide_is_staged(fields):
    """Widths, and the order of K's channels. The guard looks at calls that attend; all once a cache."""
    cache, *_ = filled([62, 50], config=NO_SINKS.replace(**fields))
    want = cache.clone()
    steps = []
    for turn, tokens in enumerate((1, 1, 1)):
        q, k, v = new(2, tokens, turn)
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
        steps.append(cache.backend_state is not None)
        ta.turbo_attention_with_kvcache(q, want, k, v, backend="reference")
        assert content(cache) == content(want)
    assert steps == [True, False, True]


def test_pages_take_a_given_order():
    """The first of them, which a step fills, and those that later steps fill."""
    order = ChannelOrder(torch.arange(16).flip(0).expand(2, -1), torch.tensor([False, True]))
    cache, *_ = filled([62, 50], config=ORDERED, k_order=order)
    want = cache.clone()
    for turn, tokens in enumerate((1, 1, 58, 12)):
        q, k, v = new(2, tokens, turn)
        got = ta.turbo_attention_with_kvcache(q, cache, k, v, return_lse=True, backend="triton")
        other = ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="reference")
        assert_close(got, other)
        assert content(cache) == content(want)
    assert cache.k_order is not None
    assert torch.equal(cache.k_order.permutation.long(), order.permutation)
    assert cache.page_table.pools.compressed.layout.k_halves == (False, True)


def test_queries_of_steps_count_for_the_order_of_channels():
    """Of those alone that are their tokens', however they come: in ragged steps, with padding that may hold anything;
    behind a prompt; not those that come without tokens. A head of two widths, and one of one."""
    q, k, v = qkv(3, 4, 2, 70, 70, 16, seed=6)
    q, k = q * torch.linspace(0.8, 1.4, 16), k.clone()
    k[:, 1, :, ::2] *= 4.0
    cache, want = (ta.KVCache(3, 2, 16, config=ORDERED) for _ in range(2))
    at = torch.zeros(3, dtype=torch.int64)
    for turn, some in enumerate(([40, 50, 9], [2, 0, 1], [1, 3, 4], [0, 1, 0], [20, 9, 12], [2, 2, 2])):
        counts, most = torch.tensor(some), max(some)
        rows = at[:, None] + torch.arange(most)
        mine = [x.gather(2, rows.clamp(max=69)[:, None, :, None].expand(-1, x.shape[1], -1, 16)) for x in (q, k, v)]
        padding = (torch.arange(most) >= counts[:, None])[:, None, :, None]
        mine = [x.masked_fill(padding, torch.nan) for x in mine]
        got = ta.turbo_attention_with_kvcache(
            mine[0], cache, *mine[1:], lengths=counts, return_lse=True, backend="triton"
        )
        other = ta.turbo_attention_with_kvcache(
            mine[0], want, *mine[1:], lengths=counts, return_lse=True, backend="reference"
        )
        assert_close(got, other)
        ta.turbo_attention_with_kvcache(normals(3, 4, 1, 16, seed=turn), cache, backend="triton")
        at += counts
        assert content(cache) == content(want)
        if want.k_order is None:
            assert torch.equal(cache.query_energy, want.query_energy)
        else:
            assert cache.page_table.pools.compressed.layout.k_halves == (False, True)
    assert isinstance(cache.backend_state, Steps)
    assert torch.equal(cache.k_order.permutation, want.k_order.permutation)


def test_queries_that_are_not_finite_leave_the_order_alone():
    cache, *_ = filled([50], config=ORDERED)
    for bad in (torch.nan, torch.inf, 1e30):
        q, k, v = new(1, 1, 0)
        q[0, 1, 0, 3] = bad
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
        q[0, 1] = 0.0
        assert torch.equal(cache.query_energy, q[0].double().square().unflatten(0, (2, 2)).sum((1, 2)))
        cache.query_energy = None
        with pytest.raises(NonFiniteError):
            cache.look()


def test_steps_behind_the_order_are_steps(stepping):
    cache = of_two_widths([130, 100], config=ORDERED)
    want = cache.clone()
    assert cache.page_table.pools.compressed.layout.k_halves == (True, False)
    stepping(cache)
    for turn, tokens in enumerate((20, 8)):  # the last fills a block
        q, k, v = new(2, tokens, turn)
        cache_both(q[:, :, :1], cache, k[:, :, :1], v[:, :, :1])
        assert triton_steps.append(cache, k[:, :, 1:], v[:, :, 1:])
        append_by_stages(want, k, v)
        assert content(cache) == content(want)


def test_a_graph_is_made_where_the_order_is_fixed():
    cache = of_two_widths([63, 63], config=ORDERED, max_tokens=128)
    with pytest.raises(InputError, match=r"^cache: expected max_tokens beyond its lengths and every sequence past its"):
        DecodeGraph(cache, 4, capture=False)
    q, k, v = new(2, 1, 0)
    ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
    assert cache.page_table.pools.compressed.layout.k_halves == (True, False)
    want, graph = cache.clone(), DecodeGraph(cache, 4, capture=False)
    q, k, v = new(2, 1, 1)
    other = ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="reference")
    assert_close(graph.step(q, k, v), other)
    assert content(cache) == content(want)


def test_tokens_behind_a_first_block_that_fills_are_staged():
    """They need the mean that the same call would take."""
    cache, *_ = filled([62, 62], config=NO_SINKS.replace(flush_lag=9))
    want = cache.clone()
    q, k, v = new(2, 3, 0)
    assert not triton_steps.append(cache, k, v)
    cache_both(q, cache, k, v)
    append_by_stages(want, k, v)
    assert content(cache) == content(want)


# -- blocks that wait -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 2, 64, 70])
def test_blocks_that_wait_are_steps(lag, stepping):
    cache, *_ = filled([130, 191], config=NO_SINKS.replace(flush_lag=lag))
    want = cache.clone()
    stepping(cache)
    for turn, tokens in enumerate((1, 2, 1, 1)):
        q, k, v = new(2, tokens, turn)
        if turn % 2:
            assert triton_steps.append(cache, k, v)
        else:
            cache_both(q, cache, k, v)
        append_by_stages(want, k, v)
        assert content(cache) == content(want)


def test_a_graph_of_blocks_that_wait():
    cache, *_ = filled([130, 191], config=OFF.replace(flush_lag=2), max_tokens=256)
    want = cache.clone()
    graph = DecodeGraph(cache, 4, capture=False)
    for turn in range(4):
        q, k, v = new(2, 1, turn)
        other = ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="reference")
        assert_close(graph.step(q, k, v), other)
        assert content(cache) == content(want)


# -- pages that a window evicts ---------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True])
def test_evicted_pages_leave_the_devices_table(graph, stepping):
    """The host hands them out again; what steps keep is not made anew."""
    cache, *_ = filled([273, 300], config=NO_SINKS, max_tokens=384, window_size=70)
    want = cache.clone()
    stepping(cache)
    steps = DecodeGraph(cache, 4, capture=False) if graph else None
    evicted, kept = [cache.page_table.evicted()], []
    for turn in range(5):
        q, k, v = new(2, 1, turn)
        if steps is not None:
            got = steps.step(q, k, v)
        else:
            got = ta.turbo_attention_with_kvcache(q, cache, k, v, return_lse=True, backend="triton")
        other = ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="reference")
        assert_close(got, other)
        evicted.append(cache.page_table.evicted())
        for row, count in zip(cache.backend_state.tables.on_device.addresses, evicted[-1], strict=True):
            assert not bool(row[:count].any())
            assert bool(row[count])
        kept.append(cache.backend_state)
    assert evicted == [[2, 3]] * 4 + [[3, 3]] * 2
    assert all(x is kept[0] for x in kept)
    assert content(cache) == content(want)


@pytest.mark.parametrize("rows", [1, 9])
def test_pages_behind_a_window_are_not_read(rows):
    """By few rows or many: whatever they hold, the result is the same to the last bit."""
    cache, *_ = filled([300, 250], config=NO_SINKS)
    steps, call = triton_steps.steps_of(cache), AttentionParams(True, 0.25, window_size=70)
    q = normals(2, 4, rows, 16, seed=1)
    want = steps.copied().run(q, None, None, call, fills=Fills())
    size, compressed = cache.config.block_size, cache.page_table.pools.compressed
    for table, length in zip(cache.page_table.pages, cache.seq_lens.tolist(), strict=True):
        behind = table[: (length - rows - 70 + 1) // size]
        compressed.write(behind, torch.full((len(behind), compressed.layout.page_bytes), 255).byte())
    got = steps.run(q, None, None, call, fills=Fills())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
