"""Calls over pages that a server manages, for compiling (kernels.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from turboattention.config import TurboConfig
from turboattention.kernels.triton.paged import Ragged, Slots, attend, store
from turboattention.kv.layout import PageLayout

SEQUENCES, KV_HEADS, GROUP = 4, 8, 4
CONFIG = TurboConfig.serving()

Work = Callable[[], object]


def decode(head_dim: int, bits: int, group: int) -> Work:
    """A token of every sequence."""
    return _step(head_dim, bits, group, 1, SEQUENCES, {})


def mixed(head_dim: int, bits: int, **options: float) -> Work:
    """Decoding beside prefill."""
    return _step(head_dim, bits, GROUP, 512, 1024, options)


def _step(head_dim: int, bits: int, group: int, most: int, tokens: int, options: dict[str, float]) -> Work:
    layout = PageLayout.uniform(KV_HEADS, head_dim, 64, bits, True)
    asked = {"scale": 0.1, "window": None, "softcap": None} | options

    def work() -> None:
        q, out = (torch.zeros(tokens, KV_HEADS * group, head_dim, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.zeros(tokens, KV_HEADS, head_dim, dtype=torch.bfloat16) for _ in range(2))
        numbers = torch.zeros(SEQUENCES + 1, dtype=torch.int32)
        table = torch.zeros(SEQUENCES, 2048, dtype=torch.int32)
        batch = Ragged(numbers, numbers[1:], numbers[1:], table, tokens, most)
        codes = [torch.zeros(8, KV_HEADS, 64, head_dim, dtype=torch.int8) for _ in range(2)]
        scales = [torch.zeros(8, KV_HEADS, 64) for _ in range(2)]
        slots, flag = Slots((codes[0], codes[1]), (scales[0], scales[1]), 64), numbers[:1]
        pages = torch.zeros(2, -(-layout.page_bytes // 64) * 64, dtype=torch.uint8)
        opened = store(CONFIG, layout, batch, k, v, None, pages, slots, flag)
        attend(CONFIG, layout, batch, q, out, None, pages, slots, opened, flag, **asked)

    return work
