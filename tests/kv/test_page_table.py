"""Page tables over shared pools: append, read, truncate, evict, share."""

from __future__ import annotations

import gc

import pytest
import torch

from turboattention.kv.compression import Compression, Encoded, Flush
from turboattention.kv.page_table import EVICTED, PageTable
from turboattention.kv.pages import Tiles, decode_pages

from .test_pages import tiles
from .tools import PLAIN

CPU = torch.device("cpu")
BITS = torch.tensor([[4, 2], [3, 4]])


def new_table(batch: int = 2) -> PageTable:
    table = PageTable(PLAIN, batch, 2, 8, CPU)
    table.pools.freeze(BITS)
    return table


def flush(batch: list[int], block: list[int], seed: int = 0) -> Flush:
    return Flush(torch.tensor(batch), torch.tensor(block), tiles(len(batch), 2, 64, 8, seed=seed))


def encoded(table: PageTable, content: Flush, bits: torch.Tensor | None) -> list[Encoded]:
    return table.pools.encode(Compression(content, bits, None, False))


def filled_table() -> tuple[PageTable, Flush]:
    """Sequence 0 with blocks 0 to 2, sequence 1 with block 0; one sink block each."""
    table, content = new_table(), flush([0, 0, 0, 1], [0, 1, 2, 0])
    table.append(encoded(table, content, BITS))
    return table, content


def row(content: Tiles, index: int) -> Tiles:
    return content.map(lambda x: x[index])


def test_encode_splits_sinks_from_the_rest():
    table = PageTable(PLAIN, 2, 2, 8, CPU)
    parts = encoded(table, flush([0, 0, 1], [0, 1, 0]), BITS)
    assert [part.layout.k_bits for part in parts] == [(8, 8), (4, 2)]
    assert [part.layout.v_bits for part in parts] == [(8, 8), (3, 4)]
    assert [part.flush.batch.tolist() for part in parts] == [[0, 1], [0]]
    assert [part.flush.block.tolist() for part in parts] == [[0, 0], [1]]
    assert [len(part.pages) for part in parts] == [2, 1]
    assert encoded(table, flush([], []), BITS) == []
    assert table.counts.tolist() == [0, 0]  # nothing is stored by encoding


def test_tables_and_counts():
    table, _ = filled_table()
    assert table.counts.tolist() == [3, 1]
    assert list(map(len, table.pages)) == [3, 1]
    assert table.pools.sinks.nbytes == 2 * table.pools.sinks.layout.page_bytes
    assert table.pools.compressed.nbytes == 2 * table.pools.compressed.layout.page_bytes
    assert table.nbytes == table.pools.sinks.nbytes + table.pools.compressed.nbytes  # widths are no tensor


def test_tiles_are_what_was_appended():
    table, content = filled_table()
    got = table.tiles(0, 3)
    assert got.k8.shape == (2, 3, 2, 64, 8)
    for block in range(3):
        layout = table.pools.sinks.layout if block == 0 else table.pools.compressed.layout
        (part,) = encoded(table, content.where((content.batch == 0) & (content.block == block)), BITS)
        want = decode_pages(layout, part.pages)
        for name in ("k8", "v8", "k_scale", "v_scale"):
            assert torch.equal(getattr(got, name)[0, block], getattr(want, name)[0])
    assert torch.equal(got.k8[0, 0], content.tiles.k8[0])  # the sink is exact
    assert torch.equal(got.k8[1, 0], content.tiles.k8[3])


def test_blocks_that_are_not_there_have_scale_zero():
    table, _ = filled_table()
    got = table.tiles(0, 3)
    assert not bool(got.k_scale[1, 1:].any())
    assert not bool(got.v_scale[1, 1:].any())
    assert table.present(4).tolist() == [[True, True, True, False], [True, False, False, False]]
    assert table.present(0).shape == (2, 0)


@pytest.mark.parametrize("first, last", [(0, 1), (1, 2), (1, 3), (2, 3), (0, 2)])
def test_any_span(first, last):
    table, _ = filled_table()
    whole, part = table.tiles(0, 3), table.tiles(first, last)
    for name in ("k8", "v8", "k_scale", "v_scale"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, first:last])


def test_truncate_releases_pages():
    table, _ = filled_table()
    table.truncate([1, 1])
    assert table.counts.tolist() == [1, 1]
    assert table.pools.compressed.nbytes == 0
    table.truncate([0, 1])
    assert table.pools.sinks.nbytes == table.pools.sinks.layout.page_bytes  # sequence 1 has its own still
    table.truncate([0, 0])
    assert table.pools.sinks.nbytes == 0


def test_evict_keeps_places():
    table, content = filled_table()
    table.evict([2, 0])
    assert table.counts.tolist() == [3, 1]
    assert table.pages[0][:2] == [EVICTED, EVICTED]
    assert table.present(3).tolist() == [[False, False, True], [True, False, False]]
    assert not bool(table.tiles(0, 2).k_scale[0].any())
    assert torch.equal(table.tiles(0, 1).k8[1, 0], content.tiles.k8[3])
    table.evict([9, 9])  # no more than there is
    assert table.present(3).any().item() is False
    assert table.pools.sinks.nbytes + table.pools.compressed.nbytes == 0


def test_selected_sequences_share_pages():
    table, content = filled_table()
    before = table.nbytes
    other = table.select([1, 0, 0])
    assert other.counts.tolist() == [1, 3, 3]
    assert other.pools.sinks is table.pools.sinks
    assert table.nbytes == before
    other.truncate([0, 0, 3])
    assert torch.equal(table.tiles(0, 1).k8[0, 0], content.tiles.k8[0])
    assert torch.equal(other.tiles(0, 1).k8[2, 0], content.tiles.k8[0])
    other.pages[1].append(EVICTED)
    assert table.counts.tolist() == [3, 1]  # tables are copies


def test_the_last_user_frees_the_memory():
    table, _ = filled_table()
    sinks, compressed = table.pools.sinks, table.pools.compressed
    other = table.select([0])
    del table
    gc.collect()
    # Sequence 1's sink lies in a slab with sequence 0's.
    assert len(sinks._counts) == 1
    assert len(compressed._counts) == 2
    del other
    gc.collect()
    assert sinks.nbytes + compressed.nbytes == 0


def test_reserve_leaves_out_what_is_there():
    table = PageTable(PLAIN, 2, 2, 8, CPU)
    table.append(encoded(table, flush([0, 1], [0, 0]), None))
    table.pools.freeze(BITS)
    table.reserve(64 * 5 + 63, None)
    assert table.pools.sinks.nbytes == 2 * table.pools.sinks.layout.page_bytes
    assert table.pools.compressed.nbytes == 2 * 4 * table.pools.compressed.layout.page_bytes


def test_where_picks_rows():
    content = flush([0, 0, 1], [4, 5, 4])
    picked = content.where(content.block == 4)
    assert (picked.batch.tolist(), picked.block.tolist()) == ([0, 1], [4, 4])
    assert torch.equal(picked.tiles.k8, content.tiles.k8[[0, 2]])
    assert torch.equal(picked.tiles.v_scale, content.tiles.v_scale[[0, 2]])


def test_frozen_widths_are_a_copy():
    table, bits = PageTable(PLAIN, 1, 2, 8, CPU), BITS.clone()
    table.pools.freeze(bits)
    bits.fill_(8)
    assert torch.equal(table.pools.head_bits, BITS)
    assert (table.pools.compressed.layout.k_bits, table.pools.compressed.layout.v_bits) == ((4, 2), (3, 4))
