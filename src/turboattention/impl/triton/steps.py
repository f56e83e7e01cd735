"""Decode steps of backend "triton", without waiting for the device.

The host counts tokens, so it knows which blocks fill and allocates their pages. Lengths and page tables on the device
are never read back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from ...kernels.inputs import gpu_refusal
from ...kernels.triton.attention import refusal
from ...kv.cache import KVCache
from ...kv.in_place import backend_state_of
from ...modes import in_own_modes
from ...params import AttentionParams
from .deferred_error import flag_of
from .host_lengths import StepPlan
from .state import Steps


@in_own_modes
def step(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None,
    v: Tensor | None,
    params: AttentionParams,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Attend and append, if the buffer has room for the new tokens. Shapes are checked.

    q: [B, Hq, Lq, D]; k, v: [B, Hkv, Lq, D] or None; counts: int64 [B] (CPU), new tokens and rows of q of each
    sequence, default all. Returns out and lse, or None, with the cache unchanged, if the call needs the general path.

    Does not wait for the device: values that are not finite are read as zeros, and a later call raises NonFiniteError.
    """
    tokens = k.shape[2] if k is not None else 0
    if k is not None and q.shape[2] != tokens:
        return None
    found = _planned(cache, tokens, counts, attends=True)
    if found is None:
        return None
    steps, plan = found
    with _taken(steps, cache, plan):
        return steps.run(q, k, v, params, fills=plan.fills, counts=counts)


@in_own_modes
def append(cache: KVCache, k: Tensor, v: Tensor, counts: Tensor | None = None) -> bool:
    """`kv.quantizer.Quantizer.append`."""
    tokens = k.shape[2]
    if refusal(cache.config, k.dtype) or not tokens:
        return False
    found = _planned(cache, tokens, counts, attends=False)
    if found is None:
        return False
    steps, plan = found
    with _taken(steps, cache, plan):
        steps.store(k, v, fills=plan.fills, counts=counts)
    return True


def _planned(cache: KVCache, tokens: int, counts: Tensor | None, attends: bool) -> tuple[Steps, StepPlan] | None:
    cache.look()
    steps = steps_of(cache)
    if steps is None:
        return None
    plan = steps.host_lengths.plan([tokens] * cache.batch_size if counts is None else counts.tolist())
    if plan is None or not plan.freezes:
        return None if plan is None else (steps, plan)
    return None if tokens_decide(cache, attends) else (steps, plan)


def tokens_decide(cache: KVCache, attends: bool) -> bool:
    """Whether a call that compresses the first page after the sinks needs the general path. That fixes channel orders
    and widths that depend on tokens, and runs the guard, which compares the first compressed blocks with exact
    attention."""
    return cache.config.reorders_k or cache.configured_bits is None or (attends and cache.config.guard != "off")


@contextlib.contextmanager
def _taken(steps: Steps, cache: KVCache, plan: StepPlan) -> Iterator[None]:
    """Allocate pages for the blocks that fill, and count the step afterwards.

    If the step fails, all its pages are released, and the device's state is discarded, since it may be incomplete.
    """
    if plan.freezes:
        steps.tables.freeze(cache)
    pages = steps.tables.take(plan)
    try:
        yield
    except BaseException:
        steps.tables.give_back(plan, pages)
        cache.backend_state = None
        raise
    if any(plan.counts):
        steps.count(cache, plan, pages)
    flag_of(cache).send()


def steps_of(cache: KVCache) -> Steps | None:
    """The cache's `Steps`, newly created if something else changed the cache; None for caches without such steps."""
    if cache.page_table is None or cache.dtype is None or not cache.batch_size or not cache.config.token_scales:
        return None
    if refusal(cache.config, cache.dtype) or gpu_refusal((cache.head_dim, cache.v_head_dim)):
        return None
    steps = backend_state_of(cache, Steps)
    if steps is None:
        cache.backend_state = steps = new_steps(cache)
    return steps


def new_steps(cache: KVCache) -> Steps:
    """New `Steps` for a cache; the existing ones release the pages they reserved."""
    if isinstance(cache.backend_state, Steps):
        cache.backend_state.tables.release()
    return Steps(cache)
