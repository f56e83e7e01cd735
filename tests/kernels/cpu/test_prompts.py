"""Prompts in one call, which fill any number of blocks, beside stages: the same bytes, outputs and decisions."""

from __future__ import annotations

import warnings

import pytest
import torch

import turboattention as ta
from turboattention.impl.cpu import prompts as cpu_prompts
from turboattention.impl.cpu import steps as cpu_steps
from turboattention.kv.cache import KVCache
from turboattention.kv.pool import PagePool

from ...helpers import normals, qkv
from ...kv.tools import append_by_stages, content, live_pages
from .attending import unequal
from .tools import every_isa

OFF = ta.TurboConfig(guard="off")
CACHES = {
    "plain": (OFF, {}),
    "3 bits": (OFF.replace(bits=3, reorder_k=True), {}),
    "mixed": (OFF.replace(bits="mixed"), {}),
    "no sinks": (OFF.replace(bits=2, reorder_k=True, sink_tokens=0), {}),
    "three sinks": (OFF.replace(sink_tokens=192), {}),
    "no smoothing": (OFF.replace(smooth_k=False, rotate=False), {}),
    "window": (OFF.replace(reorder_k=True), {"window_size": 100}),
    "means": (OFF, {"k_mean": torch.linspace(-2, 2, 32).view(2, 16)}),
    "values": (OFF.replace(bits=3, reorder_k=True), {"v_head_dim": 24}),
    "reserved": (OFF, {"max_tokens": 700}),
}
caches = pytest.mark.parametrize("kind", CACHES)


def empty(kind: str, batch: int = 2, guard: str = "off") -> KVCache:
    config, options = CACHES[kind]
    return KVCache(batch, 2, 16, config=config.replace(guard=guard), **options)


def tokens(cache: KVCache, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v; the values of some tokens and some channels of keys stand out."""
    batch, heads, head_dim, v_head_dim = cache.token_shape
    q, k, _ = qkv(batch, 2 * heads, heads, count, count, head_dim, seed=seed)
    v = normals(batch, heads, count, v_head_dim, seed=seed + 50)
    v[:, :, ::3] *= 50.0
    return q, unequal(k), v


def everything(cache: KVCache) -> dict[str, object]:
    order, energy = cache.k_order, cache.query_energy
    learned = {
        "order": None if order is None else order.table.tolist(),
        "energy": None if energy is None else energy.tolist(),
        "memory": (cache.nbytes, live_pages(cache)),
    }
    return content(cache) | learned


@caches
@every_isa
def test_appended_prompts_give_the_bytes_of_stages(isa, kind, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    cache, want = empty(kind), empty(kind)
    for turn, count in enumerate((150, 64, 300, 1, 129)):
        _, k, v = tokens(cache, count, turn)
        assert cpu_steps.append(cache, k, v)
        append_by_stages(want, k, v)
        assert everything(cache) == everything(want)


@pytest.mark.parametrize("guard", ["off", "adapt"])
@caches
def test_prompts_attend_and_store_like_stages(kind, guard, monkeypatch):
    """Also after sequences of unequal lengths, of which the prompt decides means and widths."""
    for lengths, counts in (((0, 0), (40, 700, 70)), ((90, 10), (200, 65)), ((30, 63), (130,))):
        cache = empty(kind, guard=guard)
        if any(lengths):
            _, k, v = tokens(cache, max(lengths), 9)
            cache.append(k, v, torch.tensor(lengths))
        want = cache.clone()
        for turn, count in enumerate(counts):
            q, k, v = tokens(cache, count, turn)
            got = ta.turbo_attention_with_kvcache(q, cache, k, v, return_lse=True, backend="cpu")
            with monkeypatch.context() as patch:
                patch.setattr(cpu_prompts, "fills_at_once", lambda *_: False)
                patch.setattr(cpu_steps, "_steps_of", lambda _: None)
                expected = ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="cpu")
            assert all(map(torch.equal, got, expected))
            assert everything(cache) == everything(want)


@pytest.mark.parametrize("options", [{"is_causal": False}, {"window_size": 90}, {"softcap": 2.0}], ids=str)
def test_options_of_attention(options, monkeypatch):
    cache, want = empty("3 bits"), empty("3 bits")
    q, k, v = tokens(cache, 330)
    got = ta.turbo_attention_with_kvcache(q, cache, k, v, backend="cpu", **options)
    monkeypatch.setattr(cpu_prompts, "fills_at_once", lambda *_: False)
    assert torch.equal(got, ta.turbo_attention_with_kvcache(q, want, k, v, backend="cpu", **options))
    assert everything(cache) == everything(want)


def test_the_guard_promotes_the_same_heads(monkeypatch):
    """The keys of head 1 swing along a direction that no query looks at."""
    promoted = []
    q, k, v = qkv(1, 4, 4, 700, 700, 64)
    q[..., 0] = 0
    q[:, 1] *= 3
    k[:, 1, ::2, 0] += 120.0
    k[:, 1, 1::2, 0] -= 120.0
    for at_once in (True, False):
        monkeypatch.setattr(cpu_prompts, "fills_at_once", lambda *_, at_once=at_once: at_once)
        cache = KVCache(1, 4, 64)
        with pytest.warns(ta.errors.GuardWarning, match="KV head 1 loses") as caught:
            out = ta.turbo_attention_with_kvcache(q, cache, k, v, backend="cpu")
        assert [warning.filename for warning in caught] == [__file__]
        promoted.append((out.tolist(), everything(cache), str(caught[0].message)))
    assert promoted[0] == promoted[1]


@pytest.mark.parametrize("held", [0, 40, 300])
@pytest.mark.parametrize("place", [2, 599])
@pytest.mark.parametrize("bad", ["q", "k_new", "v_new"])
def test_a_refused_prompt_changes_nothing(bad, place, held):
    cache = empty("3 bits", 1, "adapt")
    cache.append(*tokens(cache, held, 3)[1:])
    call = dict(zip(("q", "k_new", "v_new"), tokens(cache, 600), strict=True))
    call[bad][0, 1, place, 3] = torch.inf
    before, frozen = everything(cache), cache.frozen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ta.errors.NonFiniteError, match=bad):
            ta.turbo_attention_with_kvcache(cache=cache, backend="cpu", **call)
    assert (everything(cache), cache.frozen) == (before, frozen)
    call[bad][0, 1, place, 3] = 0.0
    other = empty("3 bits", 1, "adapt")
    other.append(*tokens(other, held, 3)[1:])
    got, want = (ta.turbo_attention_with_kvcache(cache=x, backend="cpu", **call) for x in (cache, other))
    assert torch.equal(got, want)
    assert content(cache) == content(other)


def test_a_prompt_without_memory_for_its_pages_changes_nothing(monkeypatch):
    cache = empty("plain")
    cache.append(*tokens(cache, 30)[1:])
    before, allocate = everything(cache), PagePool.allocate

    def failing(pool: PagePool, runs) -> list[int]:
        if pool.layout.k_bits[0] == 4:
            raise MemoryError
        return allocate(pool, runs)

    monkeypatch.setattr(PagePool, "allocate", failing)
    q, k, v = tokens(cache, 200)
    with pytest.raises(MemoryError):
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend="cpu")
    assert everything(cache) == before
    assert not cache.frozen
