"""Caches under `torch.inference_mode` and outside of it, in every order."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import pytest
import torch

import turboattention as ta

from .tools import PLAIN, content, tokens


def saved_and_loaded(cache: ta.KVCache, path) -> ta.KVCache:
    cache.save(path)
    return ta.KVCache.load(path)


COPIES = {
    "itself": lambda cache, path: cache,
    "clone": lambda cache, path: cache.clone(),
    "copy": lambda cache, path: copy.copy(cache),
    "deepcopy": lambda cache, path: copy.deepcopy(cache),
    "pickle": lambda cache, path: pickle.loads(pickle.dumps(cache)),
    "file": saved_and_loaded,
}
CHANGES = {
    "append a few": lambda cache: cache.append(*tokens(2, 2, 3, 16, seed=3)),
    "append a block": lambda cache: cache.append(*tokens(2, 2, 64, 16, seed=3)),
    "append many": lambda cache: cache.append(*tokens(2, 2, 300, 16, seed=3)),
    "crop": lambda cache: cache.crop(100),
    "reorder": lambda cache: cache.reorder(torch.tensor([1, 1, 0])),
    "steps": lambda cache: [step(cache, i) for i in range(50)],
}


def step(cache: ta.KVCache, seed: int) -> None:
    k, v = tokens(cache.batch_size, 2, 1, 16, seed=seed)
    ta.turbo_attention_with_kvcache(k, cache, k, v)


def walk(make, changes, modes, path) -> dict[str, object]:
    """Two changes around a copy, each in a mode of its own; what the cache holds at the end."""
    with modes[0]():
        cache = ta.KVCache(2, 2, 16, config=PLAIN, max_tokens=640)
        cache.append(*tokens(2, 2, 150, 16))
        step(cache, 5)
    with modes[1]():
        changes[0](cache)
        cache = make(cache, path)
    with modes[2]():
        changes[1](cache)
        step(cache, 6) if cache.batch_size == 2 else None
    return content(cache)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_order_of_modes(make, change, tmp_path):
    want = walk(make, (CHANGES["append a few"], change), [contextlib.nullcontext] * 3, tmp_path / "cache")
    for modes in itertools.product((torch.no_grad, torch.inference_mode), repeat=3):
        assert walk(make, (CHANGES["append a few"], change), modes, tmp_path / "cache") == want


@pytest.mark.parametrize("options", [{"window_size": 70}, {"k_mean": torch.ones(2, 16)}], ids=["window", "mean"])
@pytest.mark.parametrize("config", [PLAIN, ta.TurboConfig.paper(), PLAIN.replace(flush_lag=40)])
def test_a_cache_filled_in_inference_mode_goes_on_outside(options, config):
    if "k_mean" in options and not config.smooth_k:
        options = {}
    caches = []
    for mode in (torch.inference_mode, contextlib.nullcontext):
        with mode():
            cache = ta.KVCache(2, 2, 16, config=config, device="cpu", **options)
            cache.append(*tokens(2, 2, 250, 16))
        cache.append(*tokens(2, 2, 100, 16, seed=1))
        cache.crop(340)
        cache.append(*tokens(2, 2, 60, 16, seed=2))
        caches.append(cache)
    assert content(caches[0]) == content(caches[1])
