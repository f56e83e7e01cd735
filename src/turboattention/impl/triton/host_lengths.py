"""Token counts on the host, from which it knows the blocks that a step fills without reading the device."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.inputs import BLOCK
from ...kv.cache import KVCache


@dataclass(frozen=True)
class Fills:
    """What the device does at the end of a step besides counting.

    pages, sinks: compress blocks into pages after the sinks, or into sink pages. means: compute the mean of K from
    first blocks.
    """

    pages: bool = False
    sinks: bool = False
    means: bool = False


@dataclass(frozen=True)
class StepPlan:
    """What a step changes.

    counts: new tokens of each sequence. filled: sequences whose first buffered block becomes a page; sinks: those of
    them where it becomes a sink page. learned: sequences whose mean of K is computed. freezes: whether a page is the
    first that needs widths.
    """

    counts: list[int]
    filled: list[int]
    sinks: list[int]
    learned: list[int]
    freezes: bool

    @property
    def fills(self) -> Fills:
        return Fills(len(self.filled) > len(self.sinks), bool(self.sinks), bool(self.learned))


class HostLengths:
    """Lengths and numbers of buffered rows of a cache's sequences; the buffer has `rows` rows per sequence."""

    def __init__(self, cache: KVCache, rows: int):
        self._rows, self._lag, self._sinks = rows, cache.config.flush_lag, cache.sink_blocks
        self._learns, self._frozen = cache.learns_mean, cache.frozen
        self._lengths: list[int] = cache.lengths.tolist()
        self._tail_lengths: list[int] = (cache.lengths - cache.page_counts * BLOCK).tolist()

    @property
    def paged(self) -> bool:
        """Whether any sequence has a page."""
        return self._lengths != self._tail_lengths

    def plan(self, counts: list[int]) -> StepPlan | None:
        """The effect of `counts[b]` new tokens per sequence.

        None if that needs the general path: the tokens do not fit in the buffer, or some of them follow a first block
        whose mean is not known yet.
        """
        after = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        rows = [held + count for held, count in zip(self._tail_lengths, counts, strict=True)]
        if max(rows) > self._rows:
            return None
        learned: list[int] = []
        if self._learns:
            reaching = [b for b, length in enumerate(self._lengths) if length < BLOCK <= after[b]]
            if any(after[b] > BLOCK for b in reaching):
                return None
            learned = reaching
        # At most one block each: without the flush_lag rows, the buffer has fewer than two blocks of rows.
        filled = [b for b, held in enumerate(rows) if held - self._lag >= BLOCK]
        sinks = [b for b in filled if self._lengths[b] - self._tail_lengths[b] < self._sinks * BLOCK]
        return StepPlan(counts, filled, sinks, learned, len(filled) > len(sinks) and not self._frozen)

    def count(self, plan: StepPlan) -> None:
        """Count a step."""
        for b, count in enumerate(plan.counts):
            self._lengths[b] += count
            self._tail_lengths[b] += count
        for b in plan.filled:
            self._tail_lengths[b] -= BLOCK
        self._frozen = self._frozen or plan.freezes
