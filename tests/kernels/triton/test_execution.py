"""Backend "triton" behind the two calls: steps whose state stands on the device, caches that change hands, graphs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

import turboattention as ta
from turboattention.errors import InputError, NonFiniteError
from turboattention.execution import triton_steps
from turboattention.execution.triton_graph import DecodeGraph

from ...helpers import normals, qkv
from ...kv.tools import content, filled, live_pages
from .tools import assert_close, cache_both, prefill_both

OFF = ta.TurboConfig(guard="off")
NO_SINKS = OFF.replace(sink_tokens=0)


def tokens_of(batch: int, count: int, turn: int, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return qkv(batch, 2 * heads, heads, count, count, 16, seed=100 + turn)


def test_prefill_and_explicit_choice():
    q, k, v = qkv(1, 4, 2, 70, 70, 16)
    prefill_both(q, k, v, is_causal=True)
    assert ta.explain(q, k, v, backend="triton").backend == "triton"


def test_auto_never_takes_the_interpreter():
    q, k, v = qkv(1, 2, 1, 3, 3, 16)
    explained = ta.explain(q, k, v)
    assert explained.backend != "triton"
    assert "interpreter" in explained.others["triton"]


@pytest.mark.parametrize(
    "config", [OFF, NO_SINKS.replace(bits="mixed"), NO_SINKS.replace(smooth_k=False, bits=3)], ids=str
)
def test_steps_store_and_attend_as_stages_do(config):
    """Ragged sequences, of which some fill a block in each of the first steps."""
    cache, *_ = filled([130, 190, 191], config=config)
    want = cache.clone()
    for turn, count in enumerate((1, 1, 2)):
        q, k, v = tokens_of(3, count, turn)
        before = cache.kept
        cache_both(q, cache, k, v)
        assert isinstance(cache.kept, triton_steps.Steps)
        assert turn == 0 or cache.kept is before
        want.commit(want.stage(k, v))
        assert content(cache) == content(want)


def test_appending_alone(monkeypatch):
    cache, *_ = filled([130, 191], config=NO_SINKS)
    want = cache.clone()
    for turn in range(2):
        _, k, v = tokens_of(2, 1, turn)
        assert triton_steps.append(cache, k, v)
        want.commit(want.stage(k, v))
    assert content(cache) == content(want)


def test_what_is_no_step_goes_the_long_way():
    """First tokens, tokens past a block's end, ragged counts: staged, with the same results."""
    cache = ta.KVCache(2, 2, 16, config=NO_SINKS)
    for turn, count in enumerate((3, 130, 70)):
        q, k, v = tokens_of(2, count, turn)
        cache_both(q, cache, k, v)
    q, k, v = tokens_of(2, 5, 9)
    cache_both(q, cache, k, v, lengths=torch.tensor([5, 0]))
    q, *_ = tokens_of(2, 4, 10)
    cache_both(q, cache)


class NoReads(TorchDispatchMode):
    """Fails where the host reads a tensor's value: on a GPU it would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read"
        return func(*args, **(kwargs or {}))


def test_the_devices_work_of_a_step_reads_nothing():
    cache, *_ = filled([191, 130], config=NO_SINKS)
    q, k, v = tokens_of(2, 1, 0)
    steps = triton_steps.steps_of(cache)
    steps.fresh(cache, steps.filled_by(1))
    with NoReads():
        steps.run(q, k, v, triton_steps.Call(0.25), fills=True)
    with pytest.raises(AssertionError, match="a tensor was read"), NoReads():
        bool(q.sum())


@pytest.mark.parametrize("name", ["q", "k_new", "v_new"])
def test_values_that_are_not_finite_are_told_later_and_never_stored(name):
    cache, *_ = filled([130, 191], config=NO_SINKS)
    tensors = dict(zip(("q", "k_new", "v_new"), tokens_of(2, 1, 0), strict=True))
    tensors[name][1, 1, 0, 3] = torch.nan
    out = ta.turbo_attention_with_kvcache(tensors["q"], cache, tensors["k_new"], tensors["v_new"], backend="triton")
    assert bool(out.isfinite().all())
    assert all(bool(x.isfinite().all()) for x in cache.dequantize())
    q, k, v = tokens_of(2, 1, 1)
    with pytest.raises(NonFiniteError, match=r"^q, k_new, v_new: expected finite values, got others in an earlier"):
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
    assert cache.seq_lens.tolist() == [131, 192]
    cache_both(q, cache, k, v)  # told once


def test_prefill_refuses_values_that_are_not_finite():
    q, k, v = qkv(1, 4, 2, 20, 20, 16)
    q[0, 0, 3, 3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^q: expected finite values, got infinity in 1 of"):
        ta.turbo_attention(q, k, v, backend="triton")


def test_a_cache_changes_hands(tmp_path):
    """Written here, saved, loaded and attended there, both ways; and one cache stepped by both."""
    cache, *_ = filled([130, 191], config=NO_SINKS.replace(bits=3))
    others = [name for name in ("cpu", "reference") if ta.backends()[name].usable]
    for turn in range(3):
        q, k, v = tokens_of(2, 1, turn)
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
        cache.save(tmp_path / "cache")
        loaded = ta.KVCache.load(tmp_path / "cache")
        assert content(loaded) == content(cache)
        for name in others:
            want = ta.turbo_attention_with_kvcache(q, loaded, return_lse=True, backend=name)
            assert_close(ta.turbo_attention_with_kvcache(q, cache, return_lse=True, backend="triton"), want)
        q, k, v = tokens_of(2, 1, 10 + turn)
        clone = loaded.clone()
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend=others[0])
        ta.turbo_attention_with_kvcache(q, loaded, k, v, backend="triton")
        ta.turbo_attention_with_kvcache(q, clone, k, v, backend="reference")
        assert content(cache) == content(loaded) == content(clone)


def test_compiled_whole():
    cache, *_ = filled([130, 191], config=NO_SINKS)
    want = cache.clone()

    @torch.compile(fullgraph=True, backend="eager")
    def decode(q, k, v):
        dense = ta.turbo_attention(q, k, v, backend="triton")
        return dense + ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")

    for turn in range(2):
        q, k, v = tokens_of(2, 1, turn)
        got = decode(q, k, v)
        dense = ta.turbo_attention(q, k, v, backend="triton")
        assert torch.equal(got, dense + ta.turbo_attention_with_kvcache(q, want, k, v, backend="triton"))
    assert content(cache) == content(want)


# -- graphs: the captured work run eagerly, over the same memory --------------------------------------------


def test_a_graph_steps_across_blocks():
    config = NO_SINKS.replace(bits=(4, 2))
    cache, *_ = filled([126, 190, 128], config=config, max_tokens=256)
    want = cache.clone()
    graph = DecodeGraph(cache, 4, capture=False)
    held = graph._inputs
    for turn in range(3):
        q, k, v = tokens_of(3, 1, turn)
        out, lse = graph.step(q, k, v)
        assert_close((out, lse), ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="reference"))
        assert content(cache) == content(want)
        assert all(x is y for x, y in zip(graph._inputs, held, strict=True))
    pages = live_pages(cache)
    graph.close()
    used = {page for x in (cache, want) for table in x._store.tables for page in table}
    assert pages > len(used)
    assert live_pages(cache) == len(used)


def test_a_graph_and_plain_calls_take_turns():
    cache, *_ = filled([126, 190], config=NO_SINKS, max_tokens=256)
    want = cache.clone()
    graph = DecodeGraph(cache, 4, capture=False)
    for turn in range(4):
        q, k, v = tokens_of(2, 1, turn)
        if turn % 2:
            ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
        else:
            graph.step(q, k, v)
        want.commit(want.stage(k, v))
        assert content(cache) == content(want)


def test_a_graph_refuses_what_it_cannot_hold():
    q, k, v = tokens_of(2, 1, 0)
    cache, *_ = filled([126, 190], config=NO_SINKS, max_tokens=191)
    graph = DecodeGraph(cache, 4, capture=False)
    graph.step(q, k, v)
    with pytest.raises(InputError, match=r"^cache: expected room in its max_tokens=191, got it full"):
        graph.step(q, k, v)
    assert cache.seq_lens.tolist() == [127, 191]
    cache.crop(100)
    with pytest.raises(InputError, match=r"^cache: expected it as the graph left it"):
        graph.step(q, k, v)
    for lengths, options in (([126, 190], {}), ([10, 190], {"max_tokens": 256})):
        cache, *_ = filled(lengths, config=NO_SINKS, **options)
        with pytest.raises(InputError, match=r"^cache: expected max_tokens beyond its lengths and every sequence"):
            DecodeGraph(cache, 4, capture=False)


def test_a_windowed_graph():
    cache, *_ = filled([200, 250], config=NO_SINKS, max_tokens=320, window_size=40)
    want = cache.clone()
    graph = DecodeGraph(cache, 4, capture=False)
    for turn in range(8):
        q, k, v = tokens_of(2, 1, turn)
        want_now = ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="reference")
        assert_close(graph.step(q, k, v), want_now)
    assert content(cache) == content(want)


def test_padded_head_dims_and_half_precision():
    cache = ta.KVCache(1, 1, 24, config=NO_SINKS)
    k, v = (normals(1, 1, 130, 24, seed=i).to(torch.float16) for i in (1, 2))
    cache.append(k, v)
    q = normals(1, 3, 1, 24, seed=3).to(torch.float16)
    cache_both(q, cache, k[:, :, :1], v[:, :, :1])
