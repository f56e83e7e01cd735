"""Prefill and decode beside their peers, with achieved rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import contenders
import torch
from plan import Plan
from problem import device, dtype, exact, filled_cache, normals
from timing import (
    WRONG,
    Work,
    attempted,
    copies_past_cache,
    graphed,
    in_turns,
    relative_error,
    rotated,
    said,
    wrong,
)
from torch import Tensor

import turboattention as ta
from turboattention.benchmarking.records import Rival, Row
from turboattention.impl.triton.host_lengths import Fills
from turboattention.impl.triton.steps import steps_of
from turboattention.params import AttentionParams

_ROWS = 64  # last query rows that errors are taken over


def prefill(plan: Plan, form: str = "sas") -> Iterator[Row]:
    """`form`: the softmax that is taken."""
    with torch.inference_mode():
        for batch, tokens in plan.prefill:
            for causal in (True, False):
                row = functools.partial(_prefill, plan, batch, tokens, causal, form, contenders.prefill(causal))
                yield attempted(row, "prefill", _shape(plan, batch, tokens, tokens, causal))


def flex(plan: Plan) -> Iterator[Row]:
    """Prefill beside FlexAttention alone."""
    with torch.inference_mode():
        batch, tokens = plan.prefill[0]
        row = functools.partial(_prefill, plan, batch, tokens, True, "sas", contenders.flex(True))
        yield attempted(row, "prefill", _shape(plan, batch, tokens, tokens, True))


def decode(plan: Plan, peaks: dict[str, float]) -> Iterator[Row]:
    with torch.inference_mode():
        for batch, tokens in plan.decode:
            yield from _decode(plan, batch, tokens, peaks)


def _prefill(plan: Plan, batch: int, tokens: int, causal: bool, form: str, ways: dict[str, contenders.Attend]) -> Row:
    shape = _shape(plan, batch, tokens, tokens, causal) | {"softmax": form}
    size = (plan.heads + 2 * plan.kv_heads) * batch * tokens * plan.head_dim * dtype().itemsize
    sets = [_qkv(plan, batch, tokens, tokens, seed) for seed in range(copies_past_cache(size))]
    config = ta.TurboConfig(softmax=form)
    own = functools.partial(ta.turbo_attention, is_causal=causal, backend="triton", config=config)
    q, k, v = (x[:1] for x in sets[0])
    want = exact(q[:, :, -_ROWS:], k, v, causal)

    def last(way: Callable[..., Tensor], tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return way(*(x[:1] for x in tensors))[:, :, -_ROWS:]

    operations = 4 * batch * plan.heads * plan.head_dim * tokens**2 / (2 if causal else 1)
    return _compared("prefill", shape, None, own, ways, sets, last, want, operations)


def _decode(plan: Plan, batch: int, tokens: int, peaks: dict[str, float]) -> Iterator[Row]:
    q, k, v = _qkv(plan, batch, 1, tokens, 0)
    want = exact(q[:1], k[:1], v[:1], False)
    rivals: dict[str, Work] = {}
    entries: list[Rival] = []
    for name, way in (contenders.decode() | contenders.decode_fp8()).items():
        work, rival = _accepted(name, way, (q, k, v), _first_of, want)
        if work is not None:
            try:
                rivals[name] = graphed(work)
            except Exception as problem:
                rival = replace(rival, refused=said(problem))
        entries.append(rival)
    shape = _shape(plan, batch, 1, tokens, False)
    for bits in plan.bits:
        config = ta.TurboConfig(bits=bits, guard="off")
        row = functools.partial(_decode_at, plan, shape, str(bits), config, q, rivals, entries, peaks)
        yield attempted(row, "decode", shape, str(bits))
        beside = {f"{bits}, a static scale": config.replace(p_scale="static")}
        if bits in (4, 3, 2):
            beside[f"{bits}, keys in order"] = config.replace(reorder_k=True)
        for name, other in beside.items():
            row = functools.partial(_decode_at, plan, shape, name, other, q, {}, [], peaks)
            yield attempted(row, "decode", shape, name)


def _decode_at(
    plan: Plan,
    shape: dict,
    bits: str,
    config: ta.TurboConfig,
    q: Tensor,
    rivals: dict[str, Work],
    entries: list[Rival],
    peaks: dict[str, float],
) -> Row:
    batch, tokens = shape["batch"], shape["keys"]
    cache = filled_cache(batch, plan.kv_heads, plan.head_dim, tokens, config)
    steps = steps_of(cache)
    assert steps is not None
    params = AttentionParams(True, plan.head_dim**-0.5)
    own = graphed(functools.partial(steps.run, q, None, None, params, fills=Fills()))
    error = None
    if batch * tokens <= 1 << 18:  # memory of floats
        error = relative_error(own()[0][:1], exact(q[:1], *(x[:1] for x in cache.dequantize()), False))
        if not error <= WRONG:
            return wrong("decode", shape, bits, error)
    timed, failed = in_turns({"own": own} | rivals)
    seconds, _ = timed["own"]
    pools = cache.page_table.pools  # type: ignore[union-attr]
    layers_bytes = sum(pool.nbytes for pool in (pools.sinks, pools.compressed) if pool)
    rate = layers_bytes / seconds.median / 1e9
    figures = {"GB/s": rate} | ({"of measured bandwidth": rate / peaks["GB/s"]} if peaks else {})
    return Row(
        "decode", shape, bits, "turboattention triton", str(dtype()),
        error, seconds, 4 * batch * plan.heads * plan.head_dim * tokens / seconds.median / 1e9,
        [_with_times(rival, timed, failed) for rival in entries], figures,
    )  # fmt: skip


def _first_of(way: contenders.Attend, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return way(*tensors)[:1]


def _compared(
    work: str,
    shape: dict,
    bits: str | None,
    own: Callable[..., Tensor],
    ways: dict[str, contenders.Attend],
    sets: list[tuple[Tensor, Tensor, Tensor]],
    last: Callable[..., Tensor],
    want: Tensor,
    operations: float,
) -> Row:
    works: dict[str, Work] = {"own": rotated([functools.partial(own, *tensors) for tensors in sets])}
    rivals = []
    for name, way in ways.items():
        _, rival = _accepted(name, way, sets[0], last, want)
        tensors = sets
        if rival.refused is not None and rival.error is None:  # groups of query heads, perhaps
            tensors = [_expanded(*each) for each in sets]
            name = f"{name}, heads expanded"
            _, rival = _accepted(name, way, tensors[0], last, want)
        if rival.refused is None:
            works[name] = rotated([functools.partial(way, *each) for each in tensors])
        rivals.append(rival)
    error = relative_error(last(own, sets[0]), want)
    if not error <= WRONG:
        return wrong(work, shape, bits, error)
    timed, failed = in_turns(works)
    seconds, _ = timed["own"]
    figures = {"TOPS": operations / seconds.median / 1e12}
    return Row(
        work, shape, bits, "turboattention triton", str(dtype()), error, seconds, operations / seconds.median / 1e9,
        [_with_times(rival, timed, failed, operations) for rival in rivals], figures,
    )  # fmt: skip


def _accepted(
    name: str,
    way: contenders.Attend,
    tensors: tuple[Tensor, Tensor, Tensor],
    last: Callable[..., Tensor],
    want: Tensor,
) -> tuple[Work | None, Rival]:
    """The contender's work, and its entry; refused where it does not run, or is wrong."""
    try:
        error = relative_error(last(way, tensors), want)
        way(*tensors)
    except Exception as problem:  # of whatever kind: it is said, and the others are measured
        return None, Rival(name, name, refused=said(problem))
    if not error <= WRONG:
        return None, Rival(name, name, error=error, refused="wrong result")
    return functools.partial(way, *tensors), Rival(name, name, error=error)


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every query head with KV heads of its own, made outside of what is timed."""
    group = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def _with_times(rival: Rival, timed: dict, failed: dict[str, str], operations: float | None = None) -> Rival:
    if rival.name in failed:
        return replace(rival, refused=failed[rival.name])
    if rival.name not in timed:
        return rival
    seconds, ratio = timed[rival.name]
    gops = operations / seconds.median / 1e9 if operations else None
    return Rival(rival.name, rival.peer, rival.detail, rival.error, seconds, gops, ratio)


def _qkv(plan: Plan, batch: int, queries: int, keys: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q = normals(batch, plan.heads, queries, plan.head_dim, seed=3 * seed)
    k, v = (normals(batch, plan.kv_heads, keys, plan.head_dim, seed=3 * seed + side) for side in (1, 2))
    return q, k, v


def _shape(plan: Plan, batch: int, queries: int, keys: int, causal: bool) -> dict:
    names = {"heads": plan.heads, "kv_heads": plan.kv_heads, "head_dim": plan.head_dim}
    return names | {"batch": batch, "queries": queries, "keys": keys, "causal": causal, "device": str(device())}
