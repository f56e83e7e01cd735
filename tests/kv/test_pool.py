"""The page allocator: numbers, counts, slabs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from turboattention.kv.layout import PageLayout
from turboattention.kv.pool import LARGEST, PagePool

LAYOUT = PageLayout.uniform(1, 8, 16, 4, True)
SIZE = LAYOUT.page_bytes


def new_pool() -> PagePool:
    return PagePool(LAYOUT, torch.device("cpu"))


def content(count: int, first: int = 1) -> torch.Tensor:
    """Rows that are all `first`, all `first + 1`, ..."""
    return (torch.arange(count) + first).to(torch.uint8)[:, None].expand(count, SIZE)


def addresses(pool: PagePool) -> dict[int, int]:
    return {page: pool.address(page) for page in pool._pages}


def idle(pool: PagePool) -> set[int]:
    """Addresses of reserved memory that is not used."""
    return {slab.memory.data_ptr() + row * SIZE for slab, row in pool._idle}


def test_pages_hold_what_was_written():
    pool = new_pool()
    first, second = pool.allocate([3]), pool.allocate([2])
    assert len({*first, *second}) == 5
    pool.write(first, content(3))
    pool.write(second, content(2, 100))
    assert torch.equal(pool.gather([first[2], second[0], first[0]])[:, 0], torch.tensor([3, 100, 1], dtype=torch.uint8))
    assert torch.equal(pool.gather(first), content(3))


def test_an_evicted_page_reads_as_zeros():
    pool = new_pool()
    (page,) = pool.allocate([1])
    pool.write([page], content(1))
    got = pool.gather([-1, page, -1])
    assert got[:, 0].tolist() == [0, 1, 0]
    assert not bool(got[0].any())


def test_nbytes_counts_pages():
    pool = new_pool()
    assert pool.nbytes == 0
    pool.allocate([3])
    assert pool.nbytes == 3 * SIZE


def test_growth_keeps_pages_where_they_are():
    pool = new_pool()
    pages = pool.allocate([2])
    pool.write(pages, content(2))
    before = addresses(pool)
    for _ in range(50):
        pool.allocate([1])
    assert {page: addresses(pool)[page] for page in before} == before
    assert torch.equal(pool.gather(pages), content(2))


def test_growth_wastes_nothing():
    pool = new_pool()
    for used in range(1, 400):
        pool.allocate([1])
        assert pool.nbytes == used * SIZE


def test_a_slab_that_nobody_uses_is_freed():
    """With the last of its pages; every run is one."""
    pool = new_pool()
    pages = pool.allocate([3, 0, 2, 1])
    assert len({id(slab) for slab, _ in pool._pages.values()}) == 3
    pool.release([pages[1], pages[3], pages[5]])
    assert (pool.nbytes, pool.idle_nbytes) == (5 * SIZE, 0)
    pool.release([pages[4]])
    assert pool.nbytes == 3 * SIZE
    pool.release([pages[0], pages[2]])
    assert pool.nbytes == 0
    assert (pool._pages, pool._counts) == ({}, {})


def test_a_long_run_is_several_slabs():
    pool = new_pool()
    pages = pool.allocate([2 * LARGEST + 1])
    assert len({id(slab) for slab, _ in pool._pages.values()}) == 3
    pool.write(pages, content(len(pages)))
    assert torch.equal(pool.gather(pages), content(len(pages)))
    pool.release(pages[LARGEST:])
    assert pool.nbytes == LARGEST * SIZE


def test_what_is_kept_of_a_slab_is_copied_unless_little_is_lost():
    pool = new_pool()
    pages, other = pool.allocate([60]), pool.allocate([4])
    assert pool.sparse(pages[:20], pages[20:]) == [pages[:20]]
    assert pool.sparse([*other[:1], *pages[:20]], [*pages[20:], *other[1:]]) == [pages[:20], other[:1]]
    assert pool.sparse([*other, *pages[:20]], pages[20:]) == [pages[:20]]
    assert pool.sparse([*other, *pages[:57]], pages[57:]) == []
    assert pool.sparse(pages, other) == pool.sparse([], pages) == pool.sparse(pages, [-1]) == []
    assert pool.extent(pages[:20]) == pool.extent([*pages, *pages]) == 60 * SIZE
    assert pool.extent([-1, other[0], pages[3]]) == 64 * SIZE


def test_memory_that_cannot_be_had_changes_nothing(monkeypatch):
    pool = new_pool()
    pages = pool.allocate([2])

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(MemoryError):
        pool.reserve(9)
    with pytest.raises(MemoryError):
        pool.allocate([3])
    assert (pool.reserved, pool.nbytes, pool.idle_nbytes, [*pool._pages]) == (0, 2 * SIZE, 0, pages)


def test_a_number_never_stands_for_another_page():
    pool = new_pool()
    pages = pool.allocate([4])
    pool.release(pages[:3])
    assert not set(pool.allocate([3])) & set(pages)


def test_shared_pages_live_until_the_last_user_is_gone():
    pool = new_pool()
    pages = pool.allocate([1, 1])
    pool.write(pages, content(2))
    pool.retain([pages[0], -1])
    pool.release(pages)
    assert pool.nbytes == SIZE
    assert torch.equal(pool.gather(pages[:1]), content(1))
    pool.release([-1, pages[0]])
    assert pool.nbytes == 0


def test_releasing_what_is_not_held_is_an_error():
    pool = new_pool()
    (page,) = pool.allocate([1])
    pool.release([page])
    with pytest.raises(KeyError):
        pool.release([page])
    with pytest.raises(KeyError):
        pool.retain([page])


def test_reserved_memory_stays_and_is_used_first():
    pool = new_pool()
    pool.reserve(5)
    assert pool.nbytes == pool.idle_nbytes == 5 * SIZE
    before = idle(pool)
    pages = pool.allocate([5])
    assert set(addresses(pool).values()) == before
    assert pool.idle_nbytes == 0
    pool.release(pages)
    assert pool.nbytes == 5 * SIZE
    assert idle(pool) == before


def test_a_reservation_counts_pages_in_use():
    pool = new_pool()
    pages = pool.allocate([3])
    pool.reserve(5)
    assert (pool.nbytes, pool.idle_nbytes) == (5 * SIZE, 2 * SIZE)
    more = pool.allocate([1, 2])
    assert (pool.nbytes, pool.idle_nbytes) == (6 * SIZE, 0)
    pool.release(pages + more)
    assert pool.nbytes == pool.idle_nbytes == 5 * SIZE


def test_copies_share_nothing_and_can_be_written():
    pool = new_pool()
    pool.reserve(3)
    pages = pool.allocate([2])
    pool.write(pages, content(2))
    with torch.inference_mode():
        copies = [copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))]
    for other in copies:
        assert torch.equal(other.gather(pages), content(2))
        other.write(other.allocate([2]), content(2, 9))
        other.write(pages, content(2, 7))
    assert torch.equal(pool.gather(pages), content(2))


@pytest.mark.parametrize("pages", [0, -3])
def test_reserving_nothing(pages):
    pool = new_pool()
    pool.reserve(pages)
    assert pool.nbytes == 0


def test_writing_too_few_rows_is_an_error():
    pool = new_pool()
    pages = pool.allocate([2])
    with pytest.raises(ValueError, match="content: expected a row for each of 2 pages, got 1"):
        pool.write(pages, content(1))
