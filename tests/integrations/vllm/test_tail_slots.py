"""Tail slots against scripted steps of a scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from turboattention.integrations.vllm.tail_slots import TailSlotAllocator, ring_for


def step(
    new: dict[str, tuple[int, int]] | None = None,
    cached: dict[str, tuple[int, int]] | None = None,
    finished: tuple[str, ...] = (),
    preempted: tuple[str, ...] | None = None,
    resumed: tuple[str, ...] = (),
) -> Any:
    """A SchedulerOutput: of each request where it goes on, and with how many tokens."""
    new, cached = new or {}, cached or {}
    return SimpleNamespace(
        finished_req_ids=set(finished),
        preempted_req_ids=None if preempted is None else set(preempted),
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=at) for n, (at, _) in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[at for at, _ in cached.values()], resumed_req_ids=set(resumed)
        ),
        num_scheduled_tokens={name: count for name, (_, count) in (new | cached).items()},
    )


def test_a_request_keeps_its_slot_until_it_finishes() -> None:
    slots = TailSlotAllocator(2)
    slots.update(step(new={"a": (0, 70), "b": (0, 3)}))
    held = slots.of(["a", "b"])
    assert sorted(held) == [0, 1]
    slots.update(step(cached={"b": (3, 1), "a": (70, 1)}))
    assert slots.of(["b", "a"]) == held[::-1]
    slots.update(step(cached={"b": (4, 1)}, finished=("a",)))
    assert len(slots) == 1
    slots.update(step(new={"c": (0, 5)}, cached={"b": (5, 1)}))
    assert slots.of(["c", "b"]) == held


def test_what_is_not_scheduled_keeps_its_slot() -> None:
    slots = TailSlotAllocator(2)
    slots.update(step(new={"a": (0, 10), "b": (0, 10)}))
    a, b = slots.of(["a", "b"])
    slots.update(step(cached={"a": (10, 1)}))
    slots.update(step(cached={"b": (10, 1), "a": (11, 1)}))
    assert slots.of(["a", "b"]) == [a, b]


def test_a_slot_freed_in_a_step_can_be_taken_in_it() -> None:
    slots = TailSlotAllocator(1)
    slots.update(step(new={"a": (0, 10)}))
    slots.update(step(new={"b": (0, 4)}, finished=("a",)))
    assert slots.of(["b"]) == [0]


@pytest.mark.parametrize("told", [("a",), None], ids=["told when preempted", "told when resumed"])
def test_preempted_and_resumed_elsewhere(told: tuple[str, ...] | None) -> None:
    slots = TailSlotAllocator(2)
    slots.update(step(new={"a": (0, 100)}))
    slots.update(step(new={"b": (0, 10)}, preempted=told))
    assert len(slots) == (1 if told else 2)
    # Others have filled a block more of the same prompt meanwhile.
    slots.update(step(cached={"b": (10, 1), "a": (128, 9)}, resumed=("a",)))
    assert sorted(slots.of(["a", "b"])) == [0, 1]


def test_resumed_inside_a_block_raises() -> None:
    slots = TailSlotAllocator(2)
    slots.update(step(new={"a": (0, 100)}))
    slots.update(step(preempted=("a",)))
    with pytest.raises(RuntimeError, match="request a: continues at token 70, inside a block, without a slot"):
        slots.update(step(cached={"a": (70, 31)}, resumed=("a",)))


def test_aborted_and_sent_again_under_the_same_name() -> None:
    slots = TailSlotAllocator(1)
    slots.update(step(new={"a": (0, 10)}))
    slots.update(step(new={"a": (0, 20)}, finished=("a",)))
    slots.update(step(cached={"a": (20, 1)}))
    assert slots.of(["a"]) == [0]


def test_aborted_before_its_first_step() -> None:
    slots = TailSlotAllocator(1)
    slots.update(step(finished=("never seen",)))
    slots.update(step(new={"a": (0, 10)}))
    assert len(slots) == 1


def test_a_prefix_hit_starts_at_a_block() -> None:
    slots = TailSlotAllocator(1)
    slots.update(step(new={"a": (128, 10)}))
    with pytest.raises(RuntimeError, match="inside a block"):
        TailSlotAllocator(1).update(step(new={"a": (130, 10)}))


def test_more_requests_than_slots_raise() -> None:
    slots = TailSlotAllocator(1)
    slots.update(step(new={"a": (0, 1)}))
    with pytest.raises(RuntimeError, match="request b: all 1 slots are held"):
        slots.update(step(new={"b": (0, 1)}, cached={"a": (1, 1)}))


@pytest.mark.parametrize("start", [12, 64])
def test_a_gap_raises(start: int) -> None:
    slots = TailSlotAllocator(1)
    slots.update(step(new={"a": (0, 10)}))
    with pytest.raises(
        RuntimeError, match=f"request a: continues at token {start}, but its slot holds tokens up to 10"
    ):
        slots.update(step(cached={"a": (start, 1)}))


def test_rows_of_requests_that_hold_none_raise() -> None:
    with pytest.raises(RuntimeError, match="requests without a slot: x, y"):
        TailSlotAllocator(1).of(["x", "y"])


@pytest.mark.parametrize(
    "end, start, kept_by",
    [
        (70, 66, {64, 128}),  # inside the block that is open
        (128, 120, {64, 128}),  # into the block that just filled: its rows are all there
        (130, 126, {128}),  # the next block began over them
        (130, 128, {64, 128}),
        (192, 126, {128}),
        (193, 126, set()),
        (193, 128, {64, 128}),  # from a block's start nothing before is needed
    ],
)
def test_rejected_drafts(end: int, start: int, kept_by: set[int]) -> None:
    for ring in (64, 128):
        slots = TailSlotAllocator(1, ring)
        slots.update(step(new={"a": (0, end)}))
        if ring in kept_by:
            slots.update(step(cached={"a": (start, 3)}))
        else:
            with pytest.raises(RuntimeError, match=f"continues at token {start}, .* up to {end} in {ring} rows"):
                slots.update(step(cached={"a": (start, 3)}))


def test_rings() -> None:
    assert (ring_for(speculative=False), ring_for(speculative=True)) == (64, 128)
