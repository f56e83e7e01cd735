"""Requests of the step that runs: vLLM tells metadata builders how long each row is, not whose it is.

The second model runner gives each row its request's index (`req_idx`); the first one, which CPUs have, keeps the
requests' names to itself. So, once an engine with this backend starts, its `execute_model` is followed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from .slots import Slots, ring_for

_slots: WeakKeyDictionary[Any, Slots] = WeakKeyDictionary()
_current: ContextVar[Step | None] = ContextVar("turboattention_step", default=None)


@dataclass(frozen=True)
class Step:
    """The step that `runner` runs now."""

    runner: Any
    slots: Slots

    def row_slots(self, rows: int) -> list[int]:
        """The slot of each row of the batch."""
        return self.slots.of(self.runner.input_batch.req_ids[:rows])


def current_step() -> Step | None:
    """None outside of steps: while vLLM measures memory or warms up."""
    return _current.get()


def follow_steps() -> None:
    """Keep `current_step` up to date in this process; again is the same as once."""
    execute_model = GPUModelRunner.execute_model
    if not hasattr(execute_model, "followed"):
        GPUModelRunner.execute_model = _followed(execute_model)


def _followed(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(execute_model)
    def follow(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        slots = _slots.get(self)
        if slots is None:
            slots = _slots[self] = Slots(
                self.scheduler_config.max_num_seqs, ring_for(self.speculative_config is not None)
            )
        slots.step(scheduler_output)
        token = _current.set(Step(self, slots))
        try:
            return execute_model(self, scheduler_output, *args, **kwargs)
        finally:
            _current.reset(token)

    follow.followed = execute_model  # type: ignore[attr-defined]
    return follow
