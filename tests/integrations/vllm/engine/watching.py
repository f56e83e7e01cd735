"""Counts the scheduler's decisions about drafts in an engine in another process."""

from __future__ import annotations

from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

BLOCK = 64


class Watch:
    """vLLM joins it to its worker: `start(worker_extension_cls=NAME)` with `FOLDER` in `sys.path`, then `watch(llm)`,
    and `seen(llm)` later on."""

    def watch_drafts(self) -> None:
        """Count from now on."""
        from turboattention.integrations.vllm.tail_slots import TailSlotAllocator

        counting = self.counting = Counting()
        step = TailSlotAllocator.update

        @wraps(step)
        def watched(self: TailSlotAllocator, output: Any) -> None:
            counting.update(output)
            step(self, output)

        TailSlotAllocator.update = watched

    def drafts_seen(self) -> dict[str, int]:
        """The counts since the last call."""
        seen, self.counting.seen = self.counting.seen, Counter()
        return dict(seen)


NAME, FOLDER = f"{Path(__file__).stem}.{Watch.__qualname__}", str(Path(__file__).parent)


def watch(llm: Any) -> None:
    llm.collective_rpc("watch_drafts")


def seen(llm: Any) -> Counter[str]:
    """Since it was last asked:

    preempted: requests. accepted, rejected: drafts. reopened: times that rejected drafts led back into a block that
    they had filled. drafts: the most that one request had in a step. padded: requests that vLLM gave drafts to reject
    in their first step. beside pieces: steps with drafts, and with a piece of a prompt that begins inside a block.
    shared: tokens that a request found in blocks, those it had itself before a preemption included.
    """
    (counted,) = llm.collective_rpc("drafts_seen")
    return Counter(counted)


class Counting:
    """`seen`, from vLLM's SchedulerOutput of each step."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._stored: dict[str, tuple[int, int]] = {}
        """Of each request that runs: where its last step ended, and how many drafts were in it."""

    def update(self, output: Any) -> None:
        cached, preempted = output.scheduled_cached_reqs, output.preempted_req_ids or ()
        self.seen["preempted"] += len(preempted)
        for name in {*preempted, *output.finished_req_ids, *cached.resumed_req_ids}:
            self._stored.pop(name, None)
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        drafts = output.scheduled_spec_decode_tokens
        pieces = 0
        for name, start in starts.items():
            if name in self._stored:
                self._goes_on(start, *self._stored[name])
                pieces += name not in drafts and start % BLOCK > 0 and output.num_scheduled_tokens[name] > 1
            else:
                self.seen["shared"] += start
                self.seen["padded"] += name in drafts
            mine = len(drafts.get(name, ()))
            self.seen["drafts"] = max(self.seen["drafts"], mine)
            self._stored[name] = start + output.num_scheduled_tokens[name], mine
        self.seen["beside pieces"] += bool(drafts) and pieces > 0

    def _goes_on(self, start: int, end: int, drafts: int) -> None:
        self.seen["rejected"] += end - start
        self.seen["accepted"] += drafts - (end - start)
        self.seen["reopened"] += start % BLOCK > 0 and start // BLOCK < end // BLOCK
