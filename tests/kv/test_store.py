"""Page tables over shared pools: append, read, truncate, evict, share."""

from __future__ import annotations

import gc

import pytest
import torch

from turboattention.kv.pages import Tiles, decode_pages
from turboattention.kv.store import EVICTED, Flush, PageStore

from .test_pages import tiles
from .tools import PLAIN

CPU = torch.device("cpu")
BITS = torch.tensor([[4, 2], [3, 4]])


def new_store(batch: int = 2) -> PageStore:
    store = PageStore(PLAIN, batch, 2, 8, CPU)
    store.freeze(BITS)
    return store


def flush(batch: list[int], block: list[int], seed: int = 0) -> Flush:
    return Flush(torch.tensor(batch), torch.tensor(block), tiles(len(batch), 2, 64, 8, seed=seed))


def filled_store() -> tuple[PageStore, Flush]:
    """Sequence 0 with blocks 0 to 2, sequence 1 with block 0; one sink block each."""
    store, content = new_store(), flush([0, 0, 0, 1], [0, 1, 2, 0])
    store.append(store.encode(content, None if store.head_bits is None else store.head_bits))
    return store, content


def row(content: Tiles, index: int) -> Tiles:
    return content.map(lambda x: x[index])


def test_encode_splits_sinks_from_the_rest():
    store = PageStore(PLAIN, 2, 2, 8, CPU)
    parts = store.encode(flush([0, 0, 1], [0, 1, 0]), BITS)
    assert [part.layout.k_bits for part in parts] == [(8, 8), (4, 2)]
    assert [part.layout.v_bits for part in parts] == [(8, 8), (3, 4)]
    assert [part.flush.batch.tolist() for part in parts] == [[0, 1], [0]]
    assert [part.flush.block.tolist() for part in parts] == [[0, 0], [1]]
    assert [len(part.pages) for part in parts] == [2, 1]
    assert store.encode(flush([], []), BITS) == []
    assert store.counts.tolist() == [0, 0]  # nothing is stored by encoding


def test_tables_and_counts():
    store, _ = filled_store()
    assert store.counts.tolist() == [3, 1]
    assert [len(table) for table in store.tables] == [3, 1]
    assert store.sinks.nbytes == 2 * store.sinks.layout.page_bytes
    assert store.compressed.nbytes == 2 * store.compressed.layout.page_bytes
    assert store.nbytes == store.sinks.nbytes + store.compressed.nbytes + BITS.nbytes


def test_tiles_are_what_was_appended():
    store, content = filled_store()
    got = store.tiles(0, 3)
    assert got.k8.shape == (2, 3, 2, 64, 8)
    for block in range(3):
        layout = store.sinks.layout if block == 0 else store.compressed.layout
        (part,) = store.encode(content.where((content.batch == 0) & (content.block == block)), BITS)
        want = decode_pages(layout, part.pages)
        for name in ("k8", "v8", "k_scale", "v_scale"):
            assert torch.equal(getattr(got, name)[0, block], getattr(want, name)[0])
    assert torch.equal(got.k8[0, 0], content.tiles.k8[0])  # the sink is exact
    assert torch.equal(got.k8[1, 0], content.tiles.k8[3])


def test_blocks_that_are_not_there_have_scale_zero():
    store, _ = filled_store()
    got = store.tiles(0, 3)
    assert not bool(got.k_scale[1, 1:].any())
    assert not bool(got.v_scale[1, 1:].any())
    assert store.present(4).tolist() == [[True, True, True, False], [True, False, False, False]]
    assert store.present(0).shape == (2, 0)


@pytest.mark.parametrize("first, last", [(0, 1), (1, 2), (1, 3), (2, 3), (0, 2)])
def test_any_span(first, last):
    store, _ = filled_store()
    whole, part = store.tiles(0, 3), store.tiles(first, last)
    for name in ("k8", "v8", "k_scale", "v_scale"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, first:last])


def test_truncate_releases_pages():
    store, _ = filled_store()
    store.truncate([1, 1])
    assert store.counts.tolist() == [1, 1]
    assert store.compressed.nbytes == 0
    store.truncate([0, 1])
    assert store.sinks.nbytes == store.sinks.layout.page_bytes  # sequence 1 has its own still
    store.truncate([0, 0])
    assert store.sinks.nbytes == 0


def test_evict_keeps_places():
    store, content = filled_store()
    store.evict([2, 0])
    assert store.counts.tolist() == [3, 1]
    assert store.tables[0][:2] == [EVICTED, EVICTED]
    assert store.present(3).tolist() == [[False, False, True], [True, False, False]]
    assert not bool(store.tiles(0, 2).k_scale[0].any())
    assert torch.equal(store.tiles(0, 1).k8[1, 0], content.tiles.k8[3])
    store.evict([9, 9])  # no more than there is
    assert store.present(3).any().item() is False
    assert store.sinks.nbytes + store.compressed.nbytes == 0


def test_selected_sequences_share_pages():
    store, content = filled_store()
    before = store.nbytes
    other = store.select([1, 0, 0])
    assert other.counts.tolist() == [1, 3, 3]
    assert other.sinks is store.sinks
    assert store.nbytes == before
    other.truncate([0, 0, 3])
    assert torch.equal(store.tiles(0, 1).k8[0, 0], content.tiles.k8[0])
    assert torch.equal(other.tiles(0, 1).k8[2, 0], content.tiles.k8[0])
    other.tables[1].append(EVICTED)
    assert store.counts.tolist() == [3, 1]  # tables are copies


def test_the_last_user_frees_the_memory():
    store, _ = filled_store()
    sinks, compressed = store.sinks, store.compressed
    other = store.select([0])
    del store
    gc.collect()
    # Sequence 1's sink lies in a slab with sequence 0's.
    assert len(sinks._counts) == 1
    assert len(compressed._counts) == 2
    del other
    gc.collect()
    assert sinks.nbytes + compressed.nbytes == 0


def test_reserve_leaves_out_what_is_there():
    store = PageStore(PLAIN, 2, 2, 8, CPU)
    store.append(store.encode(flush([0, 1], [0, 0]), None))
    store.freeze(BITS)
    store.reserve(64 * 5 + 63, None)
    assert store.sinks.nbytes == 2 * store.sinks.layout.page_bytes
    assert store.compressed.nbytes == 2 * 4 * store.compressed.layout.page_bytes


def test_where_picks_rows():
    content = flush([0, 0, 1], [4, 5, 4])
    picked = content.where(content.block == 4)
    assert (picked.batch.tolist(), picked.block.tolist()) == ([0, 1], [4, 4])
    assert torch.equal(picked.tiles.k8, content.tiles.k8[[0, 2]])
    assert torch.equal(picked.tiles.v_scale, content.tiles.v_scale[[0, 2]])


def test_frozen_widths_are_a_copy():
    store, bits = PageStore(PLAIN, 1, 2, 8, CPU), BITS.clone()
    store.freeze(bits)
    bits.fill_(8)
    assert torch.equal(store.head_bits, BITS)
    assert (store.compressed.layout.k_bits, store.compressed.layout.v_bits) == ((4, 2), (3, 4))
