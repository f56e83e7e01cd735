"""Tail slots of running requests: each slot has the INT8 rows of a request's incomplete block.

A request holds its slot from its first step until it finishes or is preempted, also in steps in which it is not
scheduled. Inconsistent scheduler output raises an error.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from ...paged import BLOCK


def ring_for(speculative: bool) -> int:
    """Rows of a slot: two blocks with speculative decoding, where rejected drafts may lead back into a full block."""
    return 2 * BLOCK if speculative else BLOCK


class TailSlotAllocator:
    """The tail slots of one engine's worker, updated from the scheduler's output of each step.

    Args:
        count: the largest number of concurrent requests.
        ring: rows of a slot, as in `TailBlocks`. With 64 rows, a new block overwrites the previous one.
    """

    def __init__(self, count: int, ring: int = BLOCK):
        self.count, self.ring = count, ring
        self._free = list(range(count))
        self._held: dict[str, int] = {}
        self._ends: dict[str, int] = {}

    def __len__(self) -> int:
        """The number of slots in use."""
        return len(self._held)

    def update(self, output: Any) -> None:
        """Assign and release slots according to `output`, vLLM's SchedulerOutput of the next step.

        Raises:
            RuntimeError: a request continues inside a block without a slot, or not at the end of its slot's rows; or
                more requests run than there are slots.
        """
        cached = output.scheduled_cached_reqs
        self._release(output.finished_req_ids)
        self._release(output.preempted_req_ids or ())
        self._release(cached.resumed_req_ids)
        for new in output.scheduled_new_reqs:
            self._place(new.req_id, new.num_computed_tokens, output.num_scheduled_tokens[new.req_id])
        for name, start in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._place(name, start, output.num_scheduled_tokens[name])

    def of(self, names: Sequence[str]) -> list[int]:
        """The slots of requests.

        Raises:
            RuntimeError: a request that is not part of this step.
        """
        missing = [name for name in names if name not in self._held]
        if missing:
            raise RuntimeError(f"requests without a slot: {', '.join(missing)}")
        return [self._held[name] for name in names]

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._held:
                heapq.heappush(self._free, self._held.pop(name))
                del self._ends[name]

    def _place(self, name: str, start: int, tokens: int) -> None:
        """Request `name` stores `tokens` tokens from position `start`."""
        if name not in self._held:
            if start % BLOCK:
                raise RuntimeError(f"request {name}: continues at token {start}, inside a block, without a slot")
            if not self._free:
                raise RuntimeError(f"request {name}: all {self.count} slots are held")
            self._held[name] = heapq.heappop(self._free)
        elif not self._reaches(start, self._ends[name]):
            raise RuntimeError(
                f"request {name}: continues at token {start}, but its slot holds tokens up to {self._ends[name]} "
                f"in {self.ring} rows"
            )
        self._ends[name] = start + tokens

    def _reaches(self, start: int, end: int) -> bool:
        """Whether a slot that was last written up to `end` still has the rows of `start`'s block before `start`."""
        if start % BLOCK == 0:
            return start <= end
        return start <= end and end - start // BLOCK * BLOCK <= self.ring
