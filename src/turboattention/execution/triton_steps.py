"""Backend "triton", step by step: what a decode step needs stands on the device, and nothing waits for it.

The host counts along. It knows how many tokens a step adds, and so which blocks fill and the pages they take;
lengths and page tables are never read back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from ..kernels.triton.attention import refusal
from ..kv.cache import KVCache
from ..kv.growth import Growing
from ..modes import in_own_modes
from ..reference.queries import logit_scale
from .triton_notice import notice_of
from .triton_state import Call, Steps
from .triton_tally import Plan


@in_own_modes
def step(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None,
    v: Tensor | None,
    *,
    counts: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor] | None:
    """A step that the buffer has room for: attends and appends (k and v may be None) for tensors whose shapes
    were checked; of each sequence `counts[b]` tokens (int64 [B], CPU), where given. None where it is not such a
    step.

    Nothing waits for the device: values that are not finite become zeros, and a later call raises NonFiniteError.
    """
    tokens = k.shape[2] if k is not None else 0
    if k is not None and q.shape[2] != tokens:
        return None
    found = _planned(cache, tokens, counts, attends=True)
    if found is None:
        return None
    steps, plan = found
    call = Call(logit_scale(scale, q.shape[3]), is_causal, window_size, softcap)
    with _taken(steps, cache, plan):
        return steps.run(q, k, v, call, fills=plan.fills, counts=counts, mask=attn_mask)


@in_own_modes
def append(cache: Growing, k: Tensor, v: Tensor, counts: Tensor | None = None) -> bool:
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


def _planned(cache: Growing, tokens: int, counts: Tensor | None, attends: bool) -> tuple[Steps, Plan] | None:
    cache.look()
    steps = steps_of(cache)
    if steps is None:
        return None
    plan = steps.tally.plan([tokens] * cache.batch_size if counts is None else counts.tolist())
    if plan is None or not plan.freezes:
        return None if plan is None else (steps, plan)
    # Widths that depend on tokens, and the guard, which compares the first compressed blocks with exact
    # attention: the host decides.
    decides = cache.known_bits is None or (attends and cache.config.guard != "off")
    return None if decides else (steps, plan)


@contextlib.contextmanager
def _taken(steps: Steps, cache: Growing, plan: Plan) -> Iterator[None]:
    """Pages for the blocks that fill, and the step counted; all pages given back after one that failed: how far
    it came is unknown, so that the next call starts from what the host knows."""
    if plan.freezes:
        steps.tables.freeze(cache)
    pages = steps.tables.take(plan)
    try:
        yield
    except BaseException:
        steps.tables.give_back(plan, pages)
        cache.kept = None
        raise
    if any(plan.counts):
        steps.count(cache, plan, pages)
    notice_of(cache).send()


def steps_of(cache: Growing) -> Steps | None:
    """Those kept, or new ones where something else has changed the cache; None for caches that
    do not take steps."""
    if cache.store is None or cache.dtype is None or not cache.batch_size or not cache.config.token_scales:
        return None
    if refusal(cache.config, cache.dtype):
        return None
    kept = cache.kept
    if not isinstance(kept, Steps) or kept.tables.host is not cache.store.addresses():
        cache.kept = kept = new_steps(cache)
    return kept


def new_steps(cache: Growing) -> Steps:
    """In place of those kept, which give back the pages they reserved."""
    if isinstance(cache.kept, Steps):
        cache.kept.tables.release()
    return Steps(cache)
