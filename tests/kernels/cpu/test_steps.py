"""Steps and appends of few tokens in one call: blocks that fill, callers side by side, threads."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import turboattention as ta
from turboattention import _cpu
from turboattention.impl.cpu import steps as cpu_steps
from turboattention.kv import quantizer
from turboattention.kv.cache import KVCache

from ...helpers import normals, qkv
from ...kv.tools import append_by_stages, content, filled, live_pages
from .attending import cache_both
from .test_attention_cache import filled as of_unequal_keys
from .tools import every_isa

OFF = ta.TurboConfig(guard="off")
WIDTHS = (8, 4, 3, 2, "mixed", (8, 2))


@every_isa
@pytest.mark.parametrize("reorder_k", [True, False], ids=["reordered", "rotated"])
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
def test_tokens_few_by_few_give_the_bytes_of_stages(isa, bits, reorder_k, monkeypatch):
    """Ragged sequences, whose blocks fill at different calls, also two calls in a row."""
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    cache = of_unequal_keys([130, 257, 191, 128], config=OFF.replace(bits=bits, reorder_k=reorder_k))
    want = cache.clone()
    for turn, count in enumerate((1, 1, 62, 64, 5, 63, 1, 64, 64, 2)):
        k, v = normals(2, 4, 2, count, 16, seed=turn)
        v[:, :, ::3] *= 50.0
        assert cpu_steps.append(cache, k, v)
        append_by_stages(want, k, v)
        assert content(cache) == content(want)


@pytest.mark.parametrize("reorder_k", [True, False], ids=["reordered", "rotated"])
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_steps_that_fill_blocks_attend_like_the_reference(bits, tokens, reorder_k):
    cache = of_unequal_keys([128 + 63, 128 + 60, 128], config=OFF.replace(bits=bits, reorder_k=reorder_k))
    for turn in range(4):
        before = cache.clone()
        q, k, v = qkv(3, 4, 2, tokens, tokens, 16, seed=turn)
        cache_both(q, cache, k, v)
        before.append(k, v)
        assert content(cache) == content(before)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("sink_tokens", [0, 64])
def test_steps_before_and_after_the_order_of_channels_is_fixed(tokens, sink_tokens):
    """What steps keep of a cache is of the old order until the step that fixes it, and of the new one from then on."""
    cache, *_ = filled(
        [sink_tokens + 40, sink_tokens + 3], config=OFF.replace(sink_tokens=sink_tokens, bits=3, reorder_k=True)
    )
    fixed = []
    for turn in range(90 // tokens):
        q, k, v = qkv(2, 4, 2, tokens, tokens, 16, seed=turn)
        k[..., 2] *= 3.0
        cache_both(q, cache, k, v)
        fixed.append(cache.k_order is not None)
    assert fixed == sorted(fixed)
    assert 0 < sum(fixed) < len(fixed)


def test_the_paper_and_a_lag_take_the_general_path():
    """Whose blocks have scales of their own, and wait."""
    k, v = normals(2, 1, 2, 64, 16)
    refused = {
        "paper": filled([200], config=ta.TurboConfig.paper())[0],
        "lag": filled([200], config=OFF.replace(flush_lag=8))[0],
    }
    for cache in refused.values():
        before = content(cache)
        assert not cpu_steps.append(cache, k, v)
        assert content(cache) == before
    assert quantizer.quantizer_for(torch.device("cpu")).append(filled([200], config=OFF)[0], k, v)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("bad", ["q", "k_new", "v_new"])
def test_a_refused_step_leaves_pages_and_buffer(tokens, bad):
    cache, *_ = filled([191, 190])
    cache.append(*normals(2, 2, 2, 1, 16))  # the buffers are full, or one short
    step = dict(zip(("q", "k_new", "v_new"), qkv(2, 4, 2, tokens, tokens, 16), strict=True))
    step[bad][1, 0, tokens - 1, 3] = torch.nan
    before, bytes_before, pages = content(cache), cache.nbytes, live_pages(cache)
    with pytest.raises(ta.errors.NonFiniteError, match=bad):
        ta.turbo_attention_with_kvcache(cache=cache, backend="cpu", **step)
    assert content(cache) == before
    assert (cache.nbytes, live_pages(cache)) == (bytes_before, pages)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_after_a_step(duplicate):
    cache, *_ = filled([200])
    q, k, v = qkv(1, 4, 2, 1, 1, 16)
    ta.turbo_attention_with_kvcache(q, cache, k, v, backend="cpu")
    other = duplicate(cache)
    assert content(other) == content(cache)
    got, want = (ta.turbo_attention_with_kvcache(q, x, backend="cpu") for x in (other, cache))
    assert torch.equal(got, want)


def test_threads_that_read_one_cache_at_the_same_time():
    cache, *_ = filled([3000], head_dim=32)
    queries = normals(4, 1, 4, 1, 32)
    want = [ta.turbo_attention_with_kvcache(q, cache, backend="cpu") for q in queries]
    start = threading.Barrier(4)

    def wrong(i: int) -> int:
        start.wait()
        outs = (ta.turbo_attention_with_kvcache(queries[i], cache, backend="cpu") for _ in range(200))
        return sum(not torch.equal(out, want[i]) for out in outs)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wrong, range(4))) == [0] * 4


def work(name: str, batch: int = 1, size: int = 4096) -> Callable[[], object]:
    """A call whose kernels take a while."""
    k, v = normals(2, batch, 1, size, 64)
    cache = KVCache(batch, 1, 64, config=OFF.replace(bits=3))
    if name == "append":
        return lambda: cache.clone().append(k, v)
    cache.append(k, v)
    if name == "decode":
        return lambda: ta.turbo_attention_with_kvcache(k[:, :, :1], cache, backend="cpu")
    if name == "few tokens":
        cache.append(k[:, :, :130], v[:, :, :130])
        return lambda: cache.clone().append(k[:, :, :64], v[:, :, :64])
    return lambda: ta.turbo_attention(k, k, v, config=OFF, backend="cpu")


@pytest.mark.parametrize("name", ["prefill", "decode", "append", "few tokens"])
def test_the_threads_that_torch_has_share_the_work(name, monkeypatch):
    """Of one sequence and head where that has parts enough."""
    monkeypatch.setenv("TURBOATTENTION_ISA", "serial")  # slow enough for a second thread to come in time
    call, before = work(name, 16 if name == "few tokens" else 1), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            most, until = 0, time.monotonic() + (60 if threads == 2 else 0.1)  # a busy machine lets the second one wait
            while most < 2 and time.monotonic() < until:
                _cpu.take_most_workers()
                call()
                most = max(most, _cpu.take_most_workers())
            assert most == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["decode", "append", "few tokens"])
def test_other_threads_of_python_run_meanwhile(name, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", "serial")  # slow enough that the kernels are most of the call
    batch = {"decode": 64, "append": 4, "few tokens": 64}[name]
    call = work(name, batch, 1024)
    call()
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0002)

    ticker = threading.Thread(target=tick)
    ticker.start()
    shares = []
    try:
        for _ in range(5):
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
            moments = [begin, *(t for t in list(ticks) if begin <= t <= end), end]
            shares.append(max(b - a for a, b in itertools.pairwise(moments)) / (end - begin))
    finally:
        done.set()
        ticker.join()
    # If the GIL were held, the interpreter would be blocked for nearly all of the call.
    assert min(shares) < 0.75


def test_one_openmp_runtime_carries_all_threads():
    assert _cpu.threads() == "openmp"
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if "omp" in line.rsplit("/", 1)[-1]}
    assert len(libraries) == 1
