"""The requests of the current step. vLLM passes the length of each row to metadata builders, but not its request.

The second model runner passes the index of each row's request (`req_idx`). The first one, which CPUs use, does not, so
its `execute_model` is wrapped when an engine with this backend starts.
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
    """The current step of `runner`."""

    runner: Any
    slots: Slots

    def row_slots(self, rows: int) -> list[int]:
        """The slots of the rows of the batch, without its padding.

        Raises:
            RuntimeError: the rows are a part of the step's requests, and it is not known which.
        """
        names = self.runner.input_batch.req_ids
        if rows < len(names):
            raise RuntimeError(f"a batch of {rows} rows in a step of {len(names)} requests")
        return self.slots.of(names)


def current_step() -> Step | None:
    """None outside of steps, when vLLM profiles memory or warms up."""
    return _current.get()


def follow_steps() -> None:
    """Wrap `GPUModelRunner.execute_model` in this process, so that it sets `current_step`. Idempotent."""
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
