"""The page allocator: numbers, counts, slabs."""

from __future__ import annotations

import pytest
import torch

from turboattention.kv.layout import PageLayout
from turboattention.kv.pool import PagePool

LAYOUT = PageLayout.uniform(1, 8, 16, 4, True)
SIZE = LAYOUT.page_bytes


def new_pool() -> PagePool:
    return PagePool(LAYOUT, torch.device("cpu"))


def content(count: int, first: int = 1) -> torch.Tensor:
    """Rows that are all `first`, all `first + 1`, ..."""
    return (torch.arange(count) + first).to(torch.uint8)[:, None].expand(count, SIZE)


def addresses(pool: PagePool) -> dict[int, int]:
    return {page: row.data_ptr() for page, row in pool._pages.items()}


def test_pages_hold_what_was_written():
    pool = new_pool()
    first, second = pool.allocate(3), pool.allocate(2)
    assert len({*first, *second}) == 5
    pool.write(first, content(3))
    pool.write(second, content(2, 100))
    assert torch.equal(pool.gather([first[2], second[0], first[0]])[:, 0], torch.tensor([3, 100, 1], dtype=torch.uint8))
    assert torch.equal(pool.gather(first), content(3))


def test_an_evicted_page_reads_as_zeros():
    pool = new_pool()
    (page,) = pool.allocate(1)
    pool.write([page], content(1))
    got = pool.gather([-1, page, -1])
    assert got[:, 0].tolist() == [0, 1, 0]
    assert not bool(got[0].any())


def test_nbytes_counts_pages():
    pool = new_pool()
    assert pool.nbytes == 0
    pool.allocate(3)
    assert pool.nbytes == 3 * SIZE


def test_growth_keeps_pages_where_they_are():
    pool = new_pool()
    pages = pool.allocate(2)
    pool.write(pages, content(2))
    before = addresses(pool)
    for _ in range(50):
        pool.allocate(1)
    assert {page: addresses(pool)[page] for page in before} == before
    assert torch.equal(pool.gather(pages), content(2))


def test_growth_wastes_nothing():
    pool = new_pool()
    for used in range(1, 400):
        pool.allocate(1)
        assert pool.nbytes == used * SIZE


def test_a_page_that_nobody_uses_is_freed():
    """Whichever pages it was allocated with."""
    pool = new_pool()
    first, second = pool.allocate(3), pool.allocate(2)
    pool.release([first[1], second[0]])
    assert pool.nbytes == 3 * SIZE
    assert pool.idle_nbytes == 0
    pool.release([first[0], first[2], second[1]])
    assert pool.nbytes == 0
    assert (pool._pages, pool._counts) == ({}, {})


def test_a_number_never_stands_for_another_page():
    pool = new_pool()
    pages = pool.allocate(4)
    pool.release(pages[:3])
    assert not set(pool.allocate(3)) & set(pages)


def test_shared_pages_live_until_the_last_user_is_gone():
    pool = new_pool()
    pages = pool.allocate(2)
    pool.write(pages, content(2))
    pool.retain([pages[0], -1])
    pool.release(pages)
    assert pool.nbytes == SIZE
    assert torch.equal(pool.gather(pages[:1]), content(1))
    pool.release([-1, pages[0]])
    assert pool.nbytes == 0


def test_releasing_what_is_not_held_is_an_error():
    pool = new_pool()
    (page,) = pool.allocate(1)
    pool.release([page])
    with pytest.raises(KeyError):
        pool.release([page])
    with pytest.raises(KeyError):
        pool.retain([page])


def test_reserved_memory_stays_and_is_used_first():
    pool = new_pool()
    pool.reserve(5)
    assert pool.nbytes == pool.idle_nbytes == 5 * SIZE
    before = {memory.data_ptr() for memory in pool._idle}
    pages = pool.allocate(5)
    assert set(addresses(pool).values()) == before
    assert pool.idle_nbytes == 0
    pool.release(pages)
    assert pool.nbytes == 5 * SIZE
    assert {memory.data_ptr() for memory in pool._idle} == before


def test_a_reservation_counts_pages_in_use_and_can_shrink():
    pool = new_pool()
    pages = pool.allocate(3)
    pool.reserve(5)
    assert (pool.nbytes, pool.idle_nbytes) == (5 * SIZE, 2 * SIZE)
    pool.reserve(4)
    assert pool.nbytes == 4 * SIZE
    more = pool.allocate(3)
    assert (pool.nbytes, pool.idle_nbytes) == (6 * SIZE, 0)
    pool.release(pages + more)
    assert pool.nbytes == 4 * SIZE


@pytest.mark.parametrize("pages", [0, -3])
def test_reserving_nothing(pages):
    pool = new_pool()
    pool.reserve(pages)
    assert pool.nbytes == 0


def test_writing_too_few_rows_is_an_error():
    pool = new_pool()
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="shorter"):
        pool.write(pages, content(1))
