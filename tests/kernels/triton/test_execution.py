"""Backend "triton" behind the two calls: steps whose state stands on the device, caches that change hands, graphs."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.interpreter import GridExecutor

import turboattention as ta
from turboattention import dispatch
from turboattention.errors import ConfigError, DtypeError, InputError, NonFiniteError, ShapeError, UnsupportedError
from turboattention.impl.triton import device as triton_device
from turboattention.impl.triton import quantizer as triton_quantizer
from turboattention.impl.triton import state as triton_state
from turboattention.impl.triton import steps as triton_steps
from turboattention.impl.triton import tables as triton_tables
from turboattention.impl.triton.deferred_error import NonFiniteFlag
from turboattention.impl.triton.graph import DecodeGraph
from turboattention.impl.triton.state import Steps
from turboattention.kernels.triton import decode_rows
from turboattention.kernels.triton.page_offsets import all_page_offsets, head_page_offsets
from turboattention.kv.layout import PageLayout
from turboattention.params import AttentionParams
from turboattention.uploads import upload

from ...helpers import normals, qkv
from ...kv.tools import append_by_stages, content, filled, live_pages, stage_of
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
        before = cache.backend_state
        cache_both(q, cache, k, v)
        assert isinstance(cache.backend_state, Steps)
        assert turn == 0 or cache.backend_state is before
        append_by_stages(want, k, v)
        assert content(cache) == content(want)


def test_appending_alone(monkeypatch):
    cache, *_ = filled([130, 191], config=NO_SINKS)
    want = cache.clone()
    for turn in range(2):
        _, k, v = tokens_of(2, 1, turn)
        assert triton_steps.append(cache, k, v)
        append_by_stages(want, k, v)
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
    plan = steps.host_lengths.plan([1, 1])
    steps.tables.take(plan)
    with NoReads():
        steps.run(q, k, v, AttentionParams(True, 0.25), fills=plan.fills)
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
    with pytest.raises(
        NonFiniteError, match=r"^q, k_new, v_new, attn_mask: expected finite values .* got others in an earlier"
    ):
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


# -- steps that take the long way, or fail ------------------------------------------------------------------


def test_a_table_that_is_full_grows():
    """More blocks than a page table has room for when it is made."""
    cache, *_ = filled([64], heads=1, config=NO_SINKS)
    want = cache.clone()
    k, v = (normals(1, 1, 70 * 64, 16, seed=i) for i in range(2))
    for at in range(0, k.shape[2], 64):
        assert triton_steps.append(cache, k[:, :, at : at + 64], v[:, :, at : at + 64])
    append_by_stages(want, k, v)
    assert content(cache) == content(want)
    assert live_pages(cache) == 1 + 2 * 70


@pytest.mark.parametrize(("where", "broken"), [(triton_tables, "upload"), (triton_state, "flush_blocks")])
@pytest.mark.parametrize("attends", [False, True])
def test_a_step_that_fails_keeps_no_page(monkeypatch, where, broken, attends):
    cache, *_ = filled([191, 130], config=NO_SINKS)
    q, k, v = tokens_of(2, 1, 0)
    pages = live_pages(cache)

    def fail(*args, **kwargs):
        raise MemoryError

    call = ta.turbo_attention_with_kvcache if attends else lambda q, cache, k, v, backend: cache.append(k, v)
    with monkeypatch.context() as m:
        m.setattr(where, broken, fail)
        m.setattr(dispatch, "quantizer_on", lambda device: triton_quantizer)
        with pytest.raises(MemoryError):
            call(q, cache, k, v, backend="triton")
    assert live_pages(cache) == pages
    assert cache.seq_lens.tolist() == [191, 130]
    cache_both(q, cache, k, v)


def test_some_sequences_have_pages_reserved():
    cache, *_ = filled([191, 191], config=NO_SINKS)
    want = cache.clone()
    steps = triton_steps.steps_of(cache)
    steps.tables.reserve([0, 2])
    for turn, count in enumerate((1, 64, 64)):
        _, k, v = tokens_of(2, count, turn)
        assert triton_steps.append(cache, k, v)
        append_by_stages(want, k, v)
    assert content(cache) == content(want)
    assert cache.backend_state is steps
    assert steps.tables._reserved == [[], []]


def test_what_is_uploaded_without_waiting_is_pinned():
    class Recorder:
        device = torch.device("cpu")
        calls: ClassVar = []

        def pin_memory(self):
            self.calls.append("pin")
            return self

        def to(self, device, non_blocking=False):
            self.calls.append((device, non_blocking))
            return self

    upload(Recorder(), torch.device("cuda", 1))
    assert Recorder.calls == ["pin", (torch.device("cuda", 1), True)]


def test_kernels_run_under_their_tensors_device(monkeypatch):
    """Triton launches on the current device."""
    current, launches, run = [], [], GridExecutor.__call__

    @contextlib.contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    def launched(self, *args, **kwargs):
        assert current[-1:] == [torch.device("cpu")]
        launches.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton_device, "guard", guard)
    monkeypatch.setattr(GridExecutor, "__call__", launched)
    q, k, v = tokens_of(2, 66, 0)
    ta.turbo_attention(q, k, v, backend="triton")
    monkeypatch.setattr(dispatch, "quantizer_on", lambda device: triton_quantizer)
    cache = ta.KVCache(2, 2, 16, config=NO_SINKS, max_tokens=256)
    cache.append(k, v)
    q, k, v = tokens_of(2, 1, 1)
    cache.append(k, v)
    ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
    ta.turbo_attention_with_kvcache(q, cache, attn_mask=torch.ones(1, dtype=torch.bool), backend="triton")
    DecodeGraph(cache, 4, capture=False).step(q, k, v)
    cache.dequantize()
    assert {"_tokens_kernel", "_encode_kernel", "_decode_kernel", "_mean_kernel", "store_rows"} <= {*launches}


# -- values that are not finite -----------------------------------------------------------------------------

TELLING = {
    "storing": lambda cache, q, k, v: triton_steps.append(cache, k, v),
    "storing some": lambda cache, q, k, v: cache.append(k, v, torch.tensor([1, 0])),
    "attending": lambda cache, q, k, v: ta.turbo_attention_with_kvcache(q, cache, backend="triton"),
    "attending with a mask": lambda cache, q, k, v: ta.turbo_attention_with_kvcache(
        q, cache, attn_mask=torch.ones(1, dtype=torch.bool), backend="triton"
    ),
    "another backend": lambda cache, q, k, v: ta.turbo_attention_with_kvcache(q, cache, k, v, backend="reference"),
}
EARLIER = r"^q, k_new, v_new, attn_mask: expected finite values .* got others in an earlier step \(layer 3\)"


def flagged() -> ta.KVCache:
    """After a step that had a NaN."""
    cache, *_ = filled([130, 191], config=NO_SINKS)
    cache.label = "layer 3"
    q, k, v = tokens_of(2, 1, 0)
    k[0, 0, 0, 0] = torch.nan
    ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
    return cache


@pytest.mark.parametrize("call", TELLING.values(), ids=TELLING.keys())
def test_any_call_tells_of_values_that_were_not_finite(call):
    cache, new = flagged(), tokens_of(2, 1, 1)
    with pytest.raises(NonFiniteError, match=EARLIER):
        call(cache, *new)
    assert cache.seq_lens.tolist() == [131, 192]
    call(cache, *new)  # told once


@pytest.mark.parametrize(
    "duplicate",
    [ta.KVCache.clone, copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["clone", "copy", "deepcopy", "pickle"],
)
def test_copies_are_told_on_their_own(duplicate):
    cache = flagged()
    _, k, v = tokens_of(2, 1, 1)
    for x in (duplicate(cache), cache):
        with pytest.raises(NonFiniteError, match=EARLIER):
            stage_of(x, k, v)
        stage_of(x, k, v)


@pytest.mark.parametrize("graph", [False, True])
def test_the_flag_is_on_its_way_when_a_call_returns(graph):
    """As on a GPU, where the host's copy is another."""
    cache, *_ = filled([130, 190], config=NO_SINKS, max_tokens=256)
    cache.deferred_error = NonFiniteFlag(torch.device("cpu"))
    cache.deferred_error._here = torch.zeros(1, dtype=torch.int32)
    q, k, v = tokens_of(2, 1, 0)
    q[0, 0, 0, 0] = torch.nan
    if graph:
        DecodeGraph(cache, 4, capture=False).step(q, k, v)
    else:
        ta.turbo_attention_with_kvcache(q, cache, backend="triton")
    with pytest.raises(NonFiniteError):
        cache.look()


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
    used = {page for x in (cache, want) for table in x.page_table.pages for page in table}
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
        append_by_stages(want, k, v)
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
    with pytest.raises(InputError, match=r"^cache: expected no change since the graph's last step"):
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


def test_of_two_graphs_the_latest_steps():
    cache, *_ = filled([126, 190], config=NO_SINKS, max_tokens=256)
    want, pages = cache.clone(), live_pages(cache)
    first = DecodeGraph(cache, 4, capture=False)
    table = first._steps.tables.on_device.addresses
    second = DecodeGraph(cache, 4, capture=False)
    assert first._steps.tables.on_device.addresses is table  # whatever it captured lives as long as it does
    assert second._steps.tables.on_device.addresses is not table
    q, k, v = tokens_of(2, 1, 0)
    with pytest.raises(InputError, match=r"^cache: expected no change since the graph's last step"):
        first.step(q, k, v)
    first.close()
    for turn in range(3):
        q, k, v = tokens_of(2, 1, turn)
        second.step(q, k, v)
        append_by_stages(want, k, v)
        assert content(cache) == content(want)
    second.close()
    assert live_pages(cache) == pages + 2 * 2  # blocks that filled: two of each cache


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 3}, ShapeError, "num_heads: expected a multiple of the 2 KV heads, got 3"),
        ({"num_heads": 0}, ShapeError, "num_heads: expected a multiple of the 2 KV heads, got 0"),
        ({"num_heads": 4.0}, ShapeError, "num_heads: expected a multiple of the 2 KV heads, got 4.0"),
        ({"softcap": -1.0}, ConfigError, "softcap: expected a positive number"),
        ({"scale": float("nan")}, ConfigError, "scale: expected a number"),
        ({"window_size": 0}, ConfigError, "window_size: expected an integer of at least 1, got 0"),
        ({"window_size": 41}, InputError, "window_size: expected at most the cache's own 40, got 41"),
    ],
)
def test_a_graph_checks_its_arguments(options, error, message):
    cache, *_ = filled([126, 190], config=NO_SINKS, max_tokens=256, window_size=40)
    pages = live_pages(cache)
    with pytest.raises(error, match=f"^{message}"):
        DecodeGraph(cache, **{"num_heads": 4, "capture": False, **options})
    assert live_pages(cache) == pages


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_graph_checks_tensors_before_it_counts(name):
    cache, *_ = filled([126, 190], config=NO_SINKS, max_tokens=256)
    graph = DecodeGraph(cache, 4, capture=False)
    good = dict(zip("qkv", tokens_of(2, 1, 0), strict=True))
    x = good[name]
    for bad, error, message in (
        (x[:1], ShapeError, rf"^{name}: expected shape \(2, "),
        (x.repeat(1, 1, 2, 1), ShapeError, rf"^{name}: expected shape \(2, "),
        (x[:, :1], ShapeError, rf"^{name}: expected shape \(2, "),
        (x.half(), DtypeError, r"^[qkv]: expected torch.float"),
        (x.to("meta"), DtypeError, r"^[qkv]: expected torch.float"),
        (x.clone().requires_grad_(), UnsupportedError, rf"^{name}: expected a tensor without gradients"),
    ):
        with pytest.raises(error, match=message):
            graph.step(**{**good, name: bad})
    with pytest.raises(DtypeError, match=r"^q: expected torch.float32 on cpu, as the cache is, got torch.float16"):
        graph.attend(*(x.half() for x in good.values()))
    assert cache.seq_lens.tolist() == [126, 190]


def test_tables_that_captured_graphs_read_live_for_ever():
    cpu = torch.device("cpu")
    layouts = [PageLayout.uniform(heads, 16, 64, 4, True) for heads in range(1, 71)]
    made = [(all_page_offsets(x, cpu), blank(x, cpu)) for x in layouts]
    assert all(all_page_offsets(layout, cpu) is x for layout, (x, _) in zip(layouts, made, strict=True))
    assert all(blank(layout, cpu) is x for layout, (_, x) in zip(layouts, made, strict=True))
    assert head_page_offsets.cache_info().maxsize is None


def blank(layout: PageLayout, device: torch.device) -> torch.Tensor:
    return decode_rows._blank(layout.page_bytes, device)
