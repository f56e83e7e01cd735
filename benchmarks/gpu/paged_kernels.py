"""Calls over pages that a server manages, for compiling (kernels.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from architecture import changed

from turboattention.config import TurboConfig
from turboattention.kernels.triton.paged import LayerTail, Ragged, attend, store
from turboattention.kv.layout import PageLayout
from turboattention.params import AttentionParams

SEQUENCES, KV_HEADS, GROUP = 4, 8, 4
CONFIG = TurboConfig.serving(softmax="exp")  # what GPUs take
VISIBILITY = {
    "window": {"window_size": 1000},
    "softcap": {"softcap": 30.0},
    "both": {"window_size": 1000, "softcap": 30.0},
}

Work = Callable[[], object]


def calls(quick: bool) -> Iterator[tuple[str, Work]]:
    """What a call is for, and the call: every launch configuration in the default softmax, or (not `quick`) beside
    them other widths, forms and visible ranges."""
    if quick:
        for head_dim, bits in ((64, 4), (128, 4), (256, 3)):
            yield f"paged step d{head_dim} int{bits}", mixed(head_dim, bits)
            yield f"paged step d{head_dim} int{bits}, restored once", restored(head_dim, bits)
        for head_dim, group, bits in ((128, 1, 4), (128, 8, 3), (256, 1, 4), (256, 8, 2)):
            yield f"paged decode d{head_dim} int{bits}, group {group}", _decode(head_dim, bits, group)
        return
    for head_dim, bits in itertools.product((64, 128, 256), (8, 4, 3, 2)):
        yield f"paged step d{head_dim} int{bits}", mixed(head_dim, bits)
    for head_dim, (name, options) in itertools.product((64, 128, 256), VISIBILITY.items()):
        yield f"paged step d{head_dim} int4, {name}", mixed(head_dim, 4, **options)
        for group in (1, 8):
            yield f"paged decode d{head_dim} int3, group {group}, {name}", _decode(head_dim, 3, group, **options)
    for softmax in ("sas", "sas2"):
        yield f"paged step d128 int4, {softmax}", mixed(128, 4, config=CONFIG.replace(softmax=softmax))


def _decode(head_dim: int, bits: int, group: int, **options: Any) -> Work:
    """A token of every sequence."""
    return _step(head_dim, bits, group, 1, SEQUENCES, **options)


def mixed(head_dim: int, bits: int, once: bool = False, **options: Any) -> Work:
    """Decoding beside prefill. once: also the launches that restore pages once per step and read them."""
    work = _step(head_dim, bits, GROUP, 512, 1024, **options)

    def changed_work() -> None:
        with changed(restores_pages=once):
            work()

    return changed_work


def restored(head_dim: int, bits: int) -> Work:
    return mixed(head_dim, bits, once=True)


def _step(
    head_dim: int, bits: int, group: int, most: int, tokens: int, config: TurboConfig = CONFIG, **options: Any
) -> Work:
    layout = PageLayout.uniform(KV_HEADS, head_dim, 64, bits, True)
    params = AttentionParams(True, 0.1, **options)
    mean = torch.zeros(KV_HEADS, head_dim, dtype=torch.bfloat16)

    def work() -> None:
        q, out = (torch.zeros(tokens, KV_HEADS * group, head_dim, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.zeros(tokens, KV_HEADS, head_dim, dtype=torch.bfloat16) for _ in range(2))
        starts, lengths, tail_slots = (torch.zeros(SEQUENCES + more, dtype=torch.int32) for more in (1, 0, 0))
        table = torch.zeros(SEQUENCES, 2048, dtype=torch.int32)
        batch = Ragged(starts, lengths, tail_slots, table, tokens, most)
        codes = [torch.zeros(8, KV_HEADS, 64, head_dim, dtype=torch.int8) for _ in range(2)]
        scales = [torch.zeros(8, KV_HEADS, 64) for _ in range(2)]
        layer_tail = LayerTail((codes[0], codes[1]), (scales[0], scales[1]), 64)
        flag = torch.zeros(1, dtype=torch.int32)
        pages = torch.zeros(2, -(-layout.page_bytes // 64) * 64, dtype=torch.uint8)
        tail = store(config, layout, batch, k, v, mean, pages, layer_tail, flag)
        attend(config, layout, batch, q, out, mean, pages, layer_tail, tail, flag, params)

    return work
