"""The requests of the current step. vLLM passes the length of each row to metadata builders, but not its request.

The second model runner passes the index of each row's request (`req_idx`). The first one, which CPUs use, does not, so
its `execute_model` is wrapped when an engine with this backend starts, and `sample_tokens`, in which draft models run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from .tail_slots import TailSlotAllocator, ring_for

_slots: WeakKeyDictionary[Any, TailSlotAllocator] = WeakKeyDictionary()
_current: ContextVar[Step | None] = ContextVar("turboattention_step", default=None)


@dataclass(frozen=True)
class Step:
    """The current step of `runner`."""

    runner: Any
    slots: TailSlotAllocator

    def row_slots(self, rows: int) -> list[int]:
        """The slots of the rows of the batch, without its padding.

        Raises:
            RuntimeError: the rows are an unknown part of the step's requests.
        """
        names = self.runner.input_batch.req_ids
        if rows < len(names):
            raise RuntimeError(f"a batch of {rows} rows in a step of {len(names)} requests")
        return self.slots.of(names)


def current_step() -> Step | None:
    """None outside of steps, when vLLM profiles memory or warms up."""
    return _current.get()


def follow_steps() -> None:
    """Wrap `GPUModelRunner.execute_model` and `sample_tokens` in this process, so that they set `current_step`.
    Idempotent."""
    if not hasattr(GPUModelRunner.execute_model, "followed"):
        GPUModelRunner.execute_model = _executing(GPUModelRunner.execute_model)
        GPUModelRunner.sample_tokens = _sampling(GPUModelRunner.sample_tokens)


def _executing(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(execute_model)
    def follow(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Pages are always written completely. In models with recurrent layers, vLLM zeroes new blocks, and its CPU
        # runner uses their numbers as page numbers: with several pages per block, it would zero pages and states that
        # are in use.
        scheduler_output.new_block_ids_to_zero = None
        slots = _slots_of(self)
        slots.update(scheduler_output)
        with _during(Step(self, slots)):
            return execute_model(self, scheduler_output, *args, **kwargs)

    follow.followed = execute_model  # type: ignore[attr-defined]
    return follow


def _sampling(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    """A draft model runs after the target model, over the same requests: their slots are still those of the step."""

    @wraps(sample_tokens)
    def follow(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _during(Step(self, _slots_of(self))):
            return sample_tokens(self, *args, **kwargs)

    return follow


def _slots_of(runner: Any) -> TailSlotAllocator:
    slots = _slots.get(runner)
    if slots is None:
        ring = ring_for(runner.speculative_config is not None)
        slots = _slots[runner] = TailSlotAllocator(runner.scheduler_config.max_num_seqs, ring)
    return slots


@contextmanager
def _during(step: Step) -> Iterator[None]:
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)
