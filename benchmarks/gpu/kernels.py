"""Calls that launch every kernel in every configuration that is shipped: for compiling (assembly.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import paged_kernels
import torch

from turboattention.config import TurboConfig
from turboattention.kernels.inputs import Pages, QueryPositions, TailRows
from turboattention.kernels.triton import append, attention, fresh, pages, quantize, smoothing
from turboattention.kernels.triton.call import Fresh, padded
from turboattention.kernels.triton.ordering import Order
from turboattention.kv.layout import PageLayout
from turboattention.params import AttentionParams

BATCH, KV_HEADS, GROUP = 2, 8, 4
CONFIG = TurboConfig(softmax="exp")  # what GPUs take
PARAMS = AttentionParams(is_causal=True, scale=0.1)

MASKS = {"bool mask": torch.bool, "16-bit mask": torch.bfloat16, "32-bit mask": torch.float32}
VISIBILITY = {
    "full": {"is_causal": False},
    "window": {"window_size": 100},
    "softcap": {"softcap": 30.0},
    "window, softcap, 32-bit mask": {"window_size": 100, "softcap": 30.0, "attn_mask": torch.zeros(1, 1, 256, 256)},
}

EVERY = (True,) * KV_HEADS
SOME = (True, False) * (KV_HEADS // 2)
HALVES = {"": (), ", two widths of K": EVERY, ", two widths of some heads": SOME}
"""Heads with two widths of K: none where nothing is said."""

Work = Callable[[], object]


def calls(quick: bool = False) -> Iterator[tuple[str, Work]]:
    """What a call is for, and the call. `quick`: every entry of configs.py, in the default softmax, without masks
    and under those of every size of element, and with a softcap where that has entries of its own."""
    widths = {1: 4, 8: 3, 16: 2}
    for head_dim in (64, 128, 256):
        yield f"prefill d{head_dim}", _prefill(CONFIG, head_dim)
        for name, dtype in MASKS.items():
            yield f"prefill d{head_dim}, {name}", _prefill(CONFIG, head_dim, attn_mask=_mask(dtype, 256))
    for head_dim, (group, bits) in itertools.product((128, 256), widths.items()):
        purpose = f"decode d{head_dim} int{bits}, group {group}"
        yield purpose, _decode(CONFIG, head_dim, (bits,) * KV_HEADS, group)
        for name, dtype in MASKS.items():
            mask = _mask(dtype, 1, 4097)
            yield f"{purpose}, {name}", _decode(CONFIG, head_dim, (bits,) * KV_HEADS, group, attn_mask=mask)
    for bits, (name, halves) in itertools.product((4, 3, 2), HALVES.items()):  # what is measured
        work = _decode(CONFIG, 128, (bits,) * KV_HEADS, GROUP, halves)
        yield f"decode d128 int{bits}, group {GROUP}{name}", work
    for group, bits in widths.items():
        work = _decode(CONFIG, 128, (bits,) * KV_HEADS, group, softcap=30.0)
        yield f"decode d128 int{bits}, group {group}, softcap", work
    yield "stage 1 d128", _stage_one(128)
    yield "append d128", _append(128, (2, 4) * (KV_HEADS // 2))
    yield from paged_kernels.calls(quick=True)
    if quick:
        return
    yield from paged_kernels.calls(quick=False)
    for head_dim, softmax in itertools.product((64, 128, 256), ("sas", "sas2")):
        yield f"prefill d{head_dim} {softmax}", _prefill(CONFIG.replace(softmax=softmax), head_dim)
    for head_dim, (name, options) in itertools.product((64, 128, 256), VISIBILITY.items()):
        yield f"prefill d{head_dim}, {name}", _prefill(CONFIG, head_dim, **options)
    for head_dim, bits in (*itertools.product((64, 256), (8, 4, 3, 2)), (128, 8)):
        yield f"decode d{head_dim} int{bits}, group 4", _decode(CONFIG, head_dim, (bits,) * KV_HEADS, GROUP)
    for group, bits in widths.items():
        work = _decode(CONFIG, 256, (bits,) * KV_HEADS, group, softcap=30.0)
        yield f"decode d256 int{bits}, group {group}, softcap", work
    for softmax in ("sas", "sas2"):
        config = CONFIG.replace(softmax=softmax)
        yield f"decode d128 int4, group 4, {softmax}", _decode(config, 128, (4,) * KV_HEADS, GROUP)
    yield "pages for prefill d128", _chunk(128)
    yield "page codec d128", _codec(128)
    yield from _narrower_values()


def _narrower_values() -> Iterator[tuple[str, Work]]:
    """Keys of 192 and values of 128 channels, as in models with latent attention."""
    yield "prefill d192, values of 128", _prefill(CONFIG, 192, v_head_dim=128)
    for bits, name in itertools.product((4, 3, 2), ("", ", two widths of K")):
        widths = (bits,) * KV_HEADS
        work = _decode(CONFIG, 192, widths, GROUP, HALVES[name], v_head_dim=128)
        yield f"decode d192, values of 128, int{bits}, group {GROUP}{name}", work
    yield "append d192, values of 128", _append(192, (2, 4) * (KV_HEADS // 2), 128)
    yield "pages for prefill d192, values of 128", _chunk(192, 128)


def _prefill(config: TurboConfig, head_dim: int, *, v_head_dim: int | None = None, **options: Any) -> Work:
    tokens = 256
    q = torch.zeros(BATCH, KV_HEADS * GROUP, tokens, head_dim, dtype=torch.bfloat16)
    params, given = replace(PARAMS, **options), _given(head_dim) | {"v_head_dim": v_head_dim}
    dims = head_dim, v_head_dim or head_dim
    k, v = (torch.zeros(BATCH, KV_HEADS, tokens, size, dtype=torch.bfloat16) for size in dims)
    flag = torch.zeros(1, dtype=torch.int32)

    def work() -> None:
        fresh.mean_of_first_block(k, 4, padded(head_dim), config.rotate, flag)
        keys = Fresh(k, v, given["mean"], flag)
        attention.attend(config, q, _query_positions(tokens, 0), None, None, params, fresh=keys, **given)

    return work


def _decode(
    config: TurboConfig,
    head_dim: int,
    bits: tuple[int, ...],
    group: int,
    halves: tuple[bool, ...] = (),
    v_head_dim: int | None = None,
    **options: Any,
) -> Work:
    q = torch.zeros(BATCH, KV_HEADS * group, 1, head_dim, dtype=torch.bfloat16)
    params, given = replace(PARAMS, **options), _given(head_dim) | {"v_head_dim": v_head_dim}
    table = _table(head_dim, bits, halves, v_head_dim)
    if halves:
        given["order"] = _order(head_dim)
    rows = _rows(head_dim, 64, torch.bfloat16, v_head_dim)
    return lambda: attention.attend(config, q, _query_positions(1, 4096), table, rows, params, **given)


def _chunk(head_dim: int, v_head_dim: int | None = None) -> Work:
    """Many query rows over a cache."""
    q = torch.zeros(BATCH, KV_HEADS * GROUP, 256, head_dim, dtype=torch.bfloat16)
    table = _table(head_dim, (2, 4) * (KV_HEADS // 2), SOME, v_head_dim)
    given = _given(head_dim) | {"order": _order(head_dim), "v_head_dim": v_head_dim}
    rows = _rows(head_dim, 256, torch.float32, v_head_dim)
    return lambda: attention.attend(CONFIG, q, _query_positions(256, 4096), table, rows, PARAMS, **given)


def _stage_one(head_dim: int) -> Work:
    def work() -> None:
        none = torch.zeros(BATCH, dtype=torch.int64)
        mean, order = torch.zeros(BATCH, KV_HEADS, head_dim, dtype=torch.bfloat16), _order(head_dim)
        for tokens in (1, 4096):
            x = torch.zeros(BATCH, KV_HEADS, tokens, head_dim, dtype=torch.bfloat16)
            rows = _rows(head_dim, tokens, torch.float32)
            span = none, none + tokens
            quantize.quantize_tokens(x, span, none, mean, 64, True, rows.k8, rows.k_scale, none)
            quantize.quantize_tokens(x, span, none, None, 0, True, rows.k8, rows.k_scale, none)
            q = torch.zeros(BATCH, KV_HEADS * GROUP, tokens, head_dim, dtype=torch.bfloat16)
            quantize.quantize_queries(q, KV_HEADS, none + tokens, mean, 0.1, True)
            quantize.quantize_queries(q, KV_HEADS, none + tokens, mean, 0.1, True, order)
        smoothing.first_block_mean(rows.k8, rows.k_scale, 4, 64, none > 0, mean)

    return work


def _append(head_dim: int, bits: tuple[int, ...], v_head_dim: int | None = None) -> Work:
    layout = PageLayout(head_dim, 64, bits, bits, True, EVERY, v_head_dim=v_head_dim or 0)

    def work() -> None:
        rows, none = _rows(head_dim, 64, torch.bfloat16, v_head_dim), torch.zeros(BATCH, dtype=torch.int64)
        k = torch.zeros(BATCH, KV_HEADS, 1, head_dim, dtype=torch.bfloat16)
        v = torch.zeros(BATCH, KV_HEADS, 1, v_head_dim or head_dim, dtype=torch.bfloat16)
        codes, scales = (rows.k8, rows.v8), (rows.k_scale, rows.v_scale)
        mean = torch.zeros(BATCH, KV_HEADS, head_dim, dtype=torch.bfloat16)
        flag = torch.zeros(1, dtype=torch.int32)
        order = _order(head_dim)
        append.store_tokens(CONFIG, (k, v), none, none + 1, none, mean, 64, codes, scales, flag)
        append.flush_blocks(layout, codes, scales, none, True)
        append.flush_blocks(layout, codes, scales, none, True, order, True)

    return work


def _codec(head_dim: int) -> Work:
    def work() -> None:
        for bits, halves in itertools.product((8, 4, 3, 2), ((), EVERY)):
            widths = (bits,) * KV_HEADS
            layout = PageLayout(head_dim, 64, widths, widths, True, halves)
            k8, v8 = (torch.zeros(4, KV_HEADS, 64, head_dim, dtype=torch.int8) for _ in range(2))
            scale = torch.ones(4, KV_HEADS, 64)
            pages.encode_pages(layout, k8, v8, scale, scale, True)
            pages.decode_pages(layout, torch.zeros(4, layout.page_bytes, dtype=torch.uint8))

    return work


def _query_positions(queries: int, before: int) -> QueryPositions:
    first = torch.full((BATCH,), before)
    return QueryPositions(first, torch.full((BATCH,), queries), first + queries)


def _rows(head_dim: int, tokens: int, dtype: torch.dtype, v_head_dim: int | None = None) -> TailRows:
    dims = head_dim, v_head_dim or head_dim
    k8, v8 = (torch.zeros(BATCH, KV_HEADS, tokens, size, dtype=torch.int8) for size in dims)
    scales = torch.ones(BATCH, KV_HEADS, tokens, dtype=dtype)
    return TailRows(k8, v8, scales, scales.clone(), torch.zeros(BATCH, dtype=torch.int64))


def _table(head_dim: int, bits: tuple[int, ...], halves: tuple[bool, ...], v_head_dim: int | None = None) -> Pages:
    compressed = PageLayout(head_dim, 64, bits, bits, True, halves, v_head_dim=v_head_dim or 0)
    sinks = PageLayout.uniform(KV_HEADS, head_dim, 64, 8, True, v_head_dim or 0)
    counts = torch.full((BATCH,), 64)
    return Pages(torch.zeros(BATCH, 128, dtype=torch.int64), counts, 1, sinks, compressed)


def _order(head_dim: int) -> Order:
    return Order(torch.zeros(KV_HEADS, head_dim, dtype=torch.uint8), torch.ones(KV_HEADS, dtype=torch.uint8))


def _mask(dtype: torch.dtype, queries: int, keys: int | None = None) -> torch.Tensor:
    return torch.zeros(1, 1, queries, keys or queries, dtype=dtype)


def _given(head_dim: int) -> dict[str, Any]:
    mean = torch.zeros(BATCH, KV_HEADS, head_dim, dtype=torch.bfloat16)
    return dict(kv_heads=KV_HEADS, mean=mean, mean_from_block=1)
