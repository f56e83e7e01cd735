"""Which slot of the side pool each running request holds: the INT8 rows of its block that is not full yet.

A request holds its slot from its first step until it finishes or is preempted, whether or not it is scheduled in
between. Nothing is ever guessed: what does not fit raises.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

from ...paged import BLOCK


def ring_for(speculative: bool) -> int:
    """Rows of a slot: twice a block's where rejected drafts may lead back into a block that was full."""
    return 2 * BLOCK if speculative else BLOCK


class Slots:
    """Slots of one engine's worker, kept up by the scheduler's output of each step.

    Args:
        count: the most requests that run at once.
        ring: rows of a slot, as in `OpenBlocks`: of a block that is full, none is left in a ring of 64 as soon as the
            next block begins.
    """

    def __init__(self, count: int, ring: int = BLOCK):
        self.count, self.ring = count, ring
        self._free = list(range(count))
        self._held: dict[str, int] = {}
        self._ends: dict[str, int] = {}

    def __len__(self) -> int:
        """Slots that are held."""
        return len(self._held)

    def step(self, output: Any) -> None:
        """Take and give back slots as `output` says, vLLM's SchedulerOutput of the step that comes.

        Raises:
            RuntimeError: a request goes on inside a block without a slot, or elsewhere than its slot's rows end; or
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
        """The slots of the step's requests.

        Raises:
            RuntimeError: one that is not of this step.
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
        """`name` stores `tokens` from position `start` on."""
        if name not in self._held:
            if start % BLOCK:
                raise RuntimeError(f"request {name}: goes on at token {start}, inside a block, and holds no slot")
            if not self._free:
                raise RuntimeError(f"request {name}: all {self.count} slots are held")
            self._held[name] = heapq.heappop(self._free)
        elif not self._reaches(start, self._ends[name]):
            raise RuntimeError(
                f"request {name}: goes on at token {start}, but its slot holds tokens up to {self._ends[name]} "
                f"in {self.ring} rows"
            )
        self._ends[name] = start + tokens

    def _reaches(self, start: int, end: int) -> bool:
        """Whether the rows of `start`'s block that stand before it are those last stored up to `end`."""
        if start % BLOCK == 0:
            return start <= end
        return start <= end and end - start // BLOCK * BLOCK <= self.ring
