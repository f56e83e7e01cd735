"""Copies pages so that the slabs they came from can be freed. Page numbers change, contents do not."""

from __future__ import annotations

from collections.abc import Sequence

from .page_pools import PagePools
from .pool import PagePool


def leave_sparse_slabs(pools: PagePools, tables: list[list[int]], left: list[list[int]], singly: bool) -> None:
    """Copy pages so that no slab is mostly unused, or used by other caches only.

    tables: page numbers of each sequence, changed in place. left: page numbers of each sequence with those that the
    sequences have just left, which are not released yet. singly: one slab per page.
    """
    for sinks in (True, False) if pools.compressed is not None else (True,):
        pool, part = pools.of(sinks), pools.part(sinks)
        used: set[int] = set().union(*(table[part] for table in tables))
        groups = pool.sparse(used, set().union(*(table[part] for table in left)) - used)
        if groups:
            copies = _copied(pool, [page for group in groups for page in group], pool, [*map(len, groups)], singly)
            _exchange(tables, part, pool, pool, copies)


def move_to_own_pools(old: PagePools, new: PagePools, tables: list[list[int]], singly: bool) -> None:
    """Copy all pages of `tables` from the pools `old` to `new`; a page that sequences share is copied once."""
    moves = []
    for sinks in (True, False) if old.compressed is not None else (True,):
        part, runs, seen = old.part(sinks), [], set[int]()
        for table in tables:
            runs.append([page for page in table[part] if page >= 0 and page not in seen])
            seen.update(runs[-1])
        pages = [page for run in runs for page in run]
        copies = _copied(old.of(sinks), pages, new.of(sinks), [len(run) for run in runs], singly)
        moves.append((part, old.of(sinks), new.of(sinks), copies))
    for move in moves:
        _exchange(tables, *move)


def _copied(old: PagePool, pages: list[int], new: PagePool, runs: Sequence[int], singly: bool) -> dict[int, int]:
    """Copy `pages` of `old` to new pages of `new` with a reference count of 1; returns old -> new numbers."""
    fresh = new.allocate([1] * len(pages) if singly else runs)
    new.write(fresh, old.gather(pages))
    return dict(zip(pages, fresh, strict=True))


def _exchange(tables: list[list[int]], part: slice, old: PagePool, new: PagePool, copies: dict[int, int]) -> None:
    """Replace pages by their copies in all tables."""
    for table in tables:
        gone = [page for page in table[part] if page in copies]
        table[part] = [copies.get(page, page) for page in table[part]]
        new.retain(copies[page] for page in gone)
        old.release(gone)
    new.release(copies.values())  # the reference held since `allocate`
