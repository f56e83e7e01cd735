"""What the host counts, step by step: which blocks a step fills, without asking the device."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.inputs import BLOCK
from ..kv.growth import Growing


@dataclass(frozen=True)
class Fills:
    """What the device does at the end of a step beside counting: fill pages, INT8 ones among them or others,
    and take the mean of keys from first blocks."""

    pages: bool = False
    sinks: bool = False
    means: bool = False


@dataclass(frozen=True)
class Plan:
    """What a step changes. counts: new tokens of each sequence; filled: sequences whose first open block becomes
    a page, `sinks` those of them where it stays INT8, `learned` those that a mean is taken from; freezes:
    whether a page is the first that needs widths."""

    counts: list[int]
    filled: list[int]
    sinks: list[int]
    learned: list[int]
    freezes: bool

    @property
    def fills(self) -> Fills:
        return Fills(len(self.filled) > len(self.sinks), bool(self.sinks), bool(self.learned))


class Tally:
    """Lengths and open rows of a cache's sequences, as lists; a buffer has `rows` rows."""

    def __init__(self, cache: Growing, rows: int):
        self._rows, self._lag, self._sinks = rows, cache.config.flush_lag, cache.sink_blocks
        self._learns, self._frozen = cache.learns_mean, cache.store is not None and cache.store.head_bits is not None
        self._lengths: list[int] = cache.lengths.tolist()
        self._open: list[int] = (cache.lengths - cache.page_counts * BLOCK).tolist()

    @property
    def paged(self) -> bool:
        """Whether a sequence has a page."""
        return self._lengths != self._open

    def plan(self, counts: list[int]) -> Plan | None:
        """What so many new tokens of each sequence change; None where that takes more than a step: tokens that
        the buffer has no row for, or behind a first block that the mean is still to be taken from."""
        after = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        rows = [held + count for held, count in zip(self._open, counts, strict=True)]
        if max(rows) > self._rows:
            return None
        learned: list[int] = []
        if self._learns:
            reaching = [b for b, length in enumerate(self._lengths) if length < BLOCK <= after[b]]
            if any(after[b] > BLOCK for b in reaching):
                return None
            learned = reaching
        # No more than one block each: a buffer has less than two blocks' rows beside those that wait.
        filled = [b for b, held in enumerate(rows) if held - self._lag >= BLOCK]
        sinks = [b for b in filled if self._lengths[b] - self._open[b] < self._sinks * BLOCK]
        return Plan(counts, filled, sinks, learned, len(filled) > len(sinks) and not self._frozen)

    def count(self, plan: Plan) -> None:
        """The step was taken."""
        for b, count in enumerate(plan.counts):
            self._lengths[b] += count
            self._open[b] += count
        for b in plan.filled:
            self._open[b] -= BLOCK
        self._frozen = self._frozen or plan.freezes
