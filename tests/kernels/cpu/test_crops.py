"""Pages made of rows that a crop brought back: INT8 values beyond those of stage 1."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.kv.cache import KVCache

from ...helpers import normals, qkv
from .attending import cache_both, unequal
from .tools import every_isa

OFF = ta.TurboConfig(guard="off")


def cropped(bits: int, seed: int, search: bool, reorder_k: bool = True) -> KVCache:
    """Crops into a page and fills it again, three times, each time at another token."""
    cache = KVCache(1, 2, 64, config=OFF.replace(bits=bits, search=search, reorder_k=reorder_k))
    for turn, length in enumerate((200, 150, 190, 170)):
        cache.crop(length - 30)
        k, v = normals(2, 1, 2, 70 if turn else 200, 64, seed=10 * seed + turn)
        cache.append(unequal(k), v)
    return cache


@pytest.mark.parametrize("reorder_k", [True, False], ids=["reordered", "rotated"])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_decode_and_prefill_read_them_alike(bits, search, reorder_k):
    for seed in range(6):
        cache = cropped(bits, seed, search, reorder_k)
        for tokens in (1, 20):
            cache_both(*_with_new(cache, tokens))


@every_isa
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_every_instruction_set_reads_them_alike(isa, bits, monkeypatch):
    for seed in range(6):
        results = []
        for name in (isa, "serial"):
            monkeypatch.setenv("TURBOATTENTION_ISA", name)
            results.append(ta.turbo_attention_with_kvcache(*_with_new(cropped(bits, seed, False), 1), backend="cpu"))
        assert torch.equal(*results)


def _with_new(cache: KVCache, tokens: int):
    q, k, v = qkv(1, 4, 2, tokens, tokens, 64, seed=7)
    return q, cache.clone(), k, v
