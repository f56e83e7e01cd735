"""The kernels against the reference and PyTorch's stage 1 and 2, at the sizes that are timed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chained
import torch
from architecture import changed
from paging import paged, piece
from plan import Plan
from problem import device, dtype, filled_cache, normals
from timing import on_gpu, relative_error, said
from torch import Tensor

import turboattention as ta
from turboattention.errors import NonFiniteError
from turboattention.impl.triton.graph import DecodeGraph
from turboattention.kernels.triton import pages, quantize
from turboattention.kv import quantizer
from turboattention.kv.channel_order import ChannelOrder
from turboattention.kv.layout import PageLayout

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.kernels.cpu.attending import assert_close

OFF = ta.TurboConfig(guard="off", softmax="exp")  # what GPUs take, also in the interpreter


Check = Callable[[], float | None]


def checks(plan: Plan) -> dict[str, dict[str, Check]]:
    """By gate, by name: each returns a figure, or raises."""
    real = on_gpu()
    tokens = 4096 if real else 70
    gates: dict[str, dict[str, Check]] = {
        "stages": {
            "stage 1 is PyTorch's to the bit": lambda: _stage_one(plan),
            "pages are PyTorch's to the bit": lambda: _pages(plan),
            "values that are not finite": lambda: _flagged(plan),
            "a prompt without a cache waits for nothing": lambda: _launched_alone(plan),
        },
        "chained products": {
            f"chained INT8 products, {rows} rows, head_dim {size}, {stages} stages": functools.partial(
                chained.check, rows, size, warps, stages
            )
            for rows, warps in (((16, 1), (64, 4), (128, 8)) if real else ((16, 1),))
            for size, stages in (((64, 2), (128, 3), (256, 1), (256, 3)) if real else ((64, 1),))
        },
        "prefill": {
            f"prefill, {form}": lambda form=form: _prefill(plan, tokens, OFF.replace(softmax=form), is_causal=True)
            for form in (("sas", "sas2", "exp") if real else ("sas",))
        }
        | {"prefill, a static scale": lambda: _prefill(plan, tokens, OFF.replace(p_scale="static"), is_causal=True)},
        "decode": {
            f"decode, {bits} bits": lambda bits=bits: _decode(plan, 8191 if real else 191, OFF.replace(bits=bits))
            for bits in ((8, *plan.bits) if real else plan.bits)
        }
        | {
            f"decode, {bits} bits, keys in order": lambda bits=bits: _decode(
                plan, 8191 if real else 191, OFF.replace(bits=bits, reorder_k=True)
            )
            for bits in ((3, 2) if real else (3,))
        }
        | {
            "decode, 4 bits, a static scale": lambda: _decode(
                plan, 8191 if real else 191, OFF.replace(bits=4, p_scale="static")
            )
        },
        "paged": {
            f"pages that a server manages, {bits} bits, head_dim {size}": lambda size=size, bits=bits: paged(
                replace(plan, head_dim=size), bits
            )
            for size, bits in (((128, 4), (128, 2)) if real else ((64, 4),))
        },
        "pages restored once": {
            "pages that a server manages, 4 bits, restored once per step": lambda: _restored_once(plan),
            "pages that a server manages, 4 bits, restored as they are read": lambda: _as_read(plan),
        },
        "pages of other sizes": {
            f"pages that a server manages, {bits} bits, head_dim {size}": lambda size=size, bits=bits: paged(
                replace(plan, head_dim=size), bits
            )
            for size, bits in (((256, 3), (64, 3)) if real else ())
        },
        "steps": {
            "masks, lengths, first blocks and lags": lambda: _other_steps(plan),
            "a step's graph over a flush": lambda: _graph(plan, 8190 if real else 190),
            "many steps of a graph": lambda: _many_graph_steps(plan, 190, 1000 if real else 3),
            "saved, loaded on the CPU, and back": lambda: _moved(plan, 1023 if real else 191),
        },
        "streams": {
            "on a second stream": lambda: _on_a_second_stream(plan),
        },
        "repeats": {
            "50 runs of prefill are equal to the bit": lambda: _repeated(_prefill_call(plan, tokens)),
            "50 runs of decode are equal to the bit": lambda: _repeated(_decode_call(plan, 8191 if real else 191)),
        }
        | {
            f"50 runs of {new} tokens over pages that a server manages are equal to the bit": functools.partial(
                _paged_repeats, plan, before, new
            )
            for before, new in (((4096, 1), (4096, 3), (2048, 500)) if real else ((64, 1), (64, 70)))
        },
    }
    if real:
        gates["prefill"] |= {
            "prefill, full": lambda: _prefill(plan, tokens, OFF),
            "prefill, window": lambda: _prefill(plan, tokens, OFF, is_causal=True, window_size=500),
            "prefill, softcap": lambda: _prefill(plan, tokens, OFF, is_causal=True, softcap=20.0),
            "prefill, mask": lambda: _prefill(plan, 1024, OFF, attn_mask=normals(1024, 1024, seed=8)),
            "prefill, head_dim 64": lambda: _prefill(replace(plan, head_dim=64), tokens, OFF, is_causal=True),
            "prefill, head_dim 256": lambda: _prefill(replace(plan, head_dim=256), tokens, OFF, is_causal=True),
        }
    return gates


def outcome(name: str, check: Check) -> dict[str, Any]:
    """name, whether it passed (None: something is missing here), a figure or what was wrong."""
    try:
        with torch.inference_mode():
            return {"name": name, "passed": True, "error": check()}
    except ModuleNotFoundError as problem:
        return {"name": name, "passed": None, "problem": str(problem)}
    except Exception as problem:  # a failure is a result here
        return {"name": name, "passed": False, "problem": said(problem)}


def _launched_alone(plan: Plan) -> None:
    """The host waits for nothing, and what is not finite is NaN in the results."""
    q = normals(1, plan.heads, 130, plan.head_dim, seed=1)
    k, v = (normals(1, plan.kv_heads, 130, plan.head_dim, seed=seed) for seed in (2, 3))
    ta.turbo_attention(q, k, v, is_causal=True, backend="triton")
    if not on_gpu():
        return  # at once, as a test of the interpreter says
    worse = v.clone()
    worse[0, 0, 5, 3] = torch.inf
    with _never_waiting():
        out = ta.turbo_attention(q, k, v, is_causal=True, backend="triton")
        bad = ta.turbo_attention(q, k, worse, is_causal=True, backend="triton")
    assert bool(out.isfinite().all()), "NaN from finite values"
    assert bool(bad.isnan().all()), "no NaN where a value is infinite"


def _prefill_call(plan: Plan, tokens: int) -> Callable[[], Tensor]:
    q = normals(1, plan.heads, tokens, plan.head_dim, seed=1)
    k, v = (normals(1, plan.kv_heads, tokens, plan.head_dim, seed=seed) for seed in (2, 3))
    return lambda: ta.turbo_attention(q, k, v, is_causal=True, config=OFF, backend="triton")


def _decode_call(plan: Plan, tokens: int) -> Callable[[], Tensor]:
    cache = filled_cache(2, plan.kv_heads, plan.head_dim, tokens, OFF)
    q = normals(2, plan.heads, 1, plan.head_dim, seed=1)
    return lambda: ta.turbo_attention_with_kvcache(q, cache, backend="triton")


def _paged_repeats(plan: Plan, before: int, new: int) -> None:
    """A step of few rows is the decode kernel's, one of many prefill's."""
    call = piece(plan, 4, before, new)
    _repeated(lambda: call().clone())


def _repeated(call: Callable[[], Tensor], times: int = 50) -> None:
    """Races show as results that change from run to run."""
    first = call()
    others = [not torch.equal(call(), first) for _ in range(times - 1 if on_gpu() else 1)]
    assert not any(others), f"{sum(others)} of {len(others)} runs differ from the first"


def _compared(call: Callable[[str], tuple[Tensor, Tensor]]) -> float:
    got, want = call("triton"), call("reference")
    assert_close(got, want)
    return relative_error(got[0], want[0])


def _prefill(plan: Plan, tokens: int, config: ta.TurboConfig, **options: Any) -> float:
    q = normals(1, plan.heads, tokens, plan.head_dim, seed=1)
    k, v = (normals(1, plan.kv_heads, tokens, plan.head_dim, seed=seed) for seed in (2, 3))
    return _compared(lambda name: ta.turbo_attention(q, k, v, config=config, return_lse=True, backend=name, **options))


def _decode(plan: Plan, tokens: int, config: ta.TurboConfig) -> float:
    """Steps that fill a block, add a token, then 62, and fill the next; those of one token may not wait for the device
    once their kernels are compiled and their tables stand."""
    cache = filled_cache(2, plan.kv_heads, plan.head_dim, tokens, config)
    other, worst = cache.clone(), 0.0
    for turn, count in enumerate((1, 1, 62, 1)):
        q, k, v = _new(plan, 2, turn, count)
        want = ta.turbo_attention_with_kvcache(q, other, k, v, return_lse=True, backend="reference")
        with _never_waiting() if turn in (1, 3) else contextlib.nullcontext():
            got = ta.turbo_attention_with_kvcache(q, cache, k, v, return_lse=True, backend="triton")
        assert_close(got, want)
        worst = max(worst, relative_error(got[0], want[0]))
    _assert_same(cache, other)
    return worst


def _other_steps(plan: Plan) -> float:
    """Steps with a mask and `lengths`, over the end of a first block and over one that waits: none may wait for the
    device once their kernels are compiled."""
    worst = 0.0
    for config, tokens in ((OFF, 62), (OFF.replace(flush_lag=2), 191)):
        held = filled_cache(2, plan.kv_heads, plan.head_dim, tokens, config)
        for compiled in (False, True):
            cache, other = held.clone(), held.clone()
            for turn in range(4):
                q, k, v = _new(plan, 2, turn)
                options: dict[str, Any] = {"lengths": torch.tensor([1, turn % 2]), "return_lse": True}
                options["attn_mask"] = normals(1, 1, 1, tokens + turn + 1, seed=9) > -1
                want = ta.turbo_attention_with_kvcache(q, other, k, v, **options, backend="reference")
                with _never_waiting() if compiled else contextlib.nullcontext():
                    got = ta.turbo_attention_with_kvcache(q, cache, k, v, **options, backend="triton")
                assert_close(got, want)
                worst = max(worst, relative_error(got[0], want[0]))
            _assert_same(cache, other)
    return worst


def _graph(plan: Plan, tokens: int) -> float:
    cache = filled_cache(2, plan.kv_heads, plan.head_dim, tokens, OFF, max_tokens=tokens + 64)
    other, worst = cache.clone(), 0.0
    graph = DecodeGraph(cache, plan.heads, capture=on_gpu())
    for turn in range(4):
        q, k, v = _new(plan, 2, turn)
        want = ta.turbo_attention_with_kvcache(q, other, k, v, return_lse=True, backend="reference")
        got = graph.step(q, k, v)
        assert_close(got, want)
        worst = max(worst, relative_error(got[0], want[0]))
    graph.close()
    _assert_same(cache, other)
    return worst


def _many_graph_steps(plan: Plan, tokens: int, count: int) -> float:
    """Over many flushes a graph's steps store what eager ones do, and give the same up to what splits change."""
    cache = filled_cache(2, plan.kv_heads, plan.head_dim, tokens, OFF, max_tokens=tokens + count + 64)
    other, worst = cache.clone(), 0.0
    graph = DecodeGraph(cache, plan.heads, capture=on_gpu())
    q, k, v = _new(plan, 2, 0, count)
    for turn in range(count):
        new = [x[:, :, turn : turn + 1].contiguous() for x in (q, k, v)]
        want = ta.turbo_attention_with_kvcache(new[0], other, *new[1:], return_lse=True, backend="triton")
        got = graph.step(*new)
        if turn % 50 == count % 50 or turn == count - 1:
            assert_close(got, want)
            worst = max(worst, relative_error(got[0], want[0]))
    graph.close()
    _assert_same(cache, other)
    return worst


def _on_a_second_stream(plan: Plan) -> None:
    """Prompts, steps over a flush and prefill on a stream of their own give what they do on the default one, to the
    bit, and the host waits for nothing, while the default stream is held up: what ran there would come too late."""
    tokens = [_new(plan, 2, turn, count) for turn, count in enumerate((126, 70, 1, 1))]

    def calls() -> tuple[list[Tensor], ta.KVCache]:
        cache = ta.KVCache(2, plan.kv_heads, plan.head_dim, config=OFF, device=device())
        results = [ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton") for q, k, v in tokens]
        return [*results, ta.turbo_attention(*tokens[0], is_causal=True, config=OFF, backend="triton")], cache

    want, other = calls()  # compiles
    if on_gpu():
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        torch.cuda._sleep(1 << 30)  # about half a second
        with torch.cuda.stream(stream), _never_waiting():
            got, cache = calls()
        stream.synchronize()
        with torch.cuda.stream(stream):
            same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        torch.cuda.synchronize()
    else:
        got, cache = calls()
        same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert same, "results differ from those of the default stream"
    _assert_same(cache, other)


def _restored_once(plan: Plan) -> float:
    with changed(restores_pages=True):
        return paged(plan, 4)


def _as_read(plan: Plan) -> float:
    with changed(restores_pages=False):
        return paged(plan, 4)


def _moved(plan: Plan, tokens: int) -> float:
    import safetensors  # noqa: F401 (a plain machine may lack it)

    same = OFF.replace(softmax="sas")  # on both devices
    cache = filled_cache(1, plan.kv_heads, plan.head_dim, tokens, same)
    q, k, v = _new(plan, 1, 0)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(f"{folder}/here")
        there = ta.KVCache.load(f"{folder}/here", "cpu")
        want = ta.turbo_attention_with_kvcache(q.cpu(), there, k.cpu(), v.cpu(), return_lse=True, backend="reference")
        there.save(f"{folder}/there")
        back = ta.KVCache.load(f"{folder}/there", q.device)
    ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
    _assert_same(cache, back)
    got = ta.turbo_attention_with_kvcache(q, back, return_lse=True, backend="triton")
    other = ta.turbo_attention_with_kvcache(q.cpu(), there, return_lse=True, backend="reference")
    del want
    assert_close((got[0].cpu(), got[1].cpu()), other)
    return relative_error(got[0].cpu(), other[0])


def _flagged(plan: Plan) -> None:
    cache = filled_cache(1, plan.kv_heads, plan.head_dim, 130, OFF)
    q, k, v = _new(plan, 1, 0)
    k[0, 0, 0, 0] = torch.nan
    ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
    if on_gpu():
        torch.cuda.synchronize()
    assert all(bool(x.isfinite().all()) for x in cache.dequantize()), "the cache holds NaN"
    try:
        cache.look()
    except NonFiniteError:
        return
    raise AssertionError("nothing was told")


def _stage_one(plan: Plan) -> None:
    count = 512 if on_gpu() else 70
    x = normals(2, plan.kv_heads, count, plan.head_dim, seed=4)
    none, mean = torch.zeros(2, dtype=torch.int64), normals(2, plan.kv_heads, plan.head_dim, seed=5).bfloat16()
    for rotate in (True, False):
        results = []
        for provider in (quantize, quantizer.PYTORCH):
            codes = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
            scales = torch.zeros(x.shape[:3], device=x.device)
            provider.quantize_tokens(x, (none, none + count), none, mean, 64, rotate, codes, scales, none)
            results.append((codes, scales))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"


def _pages(plan: Plan) -> None:
    widths = (8, 4, 3, 2) * plan.kv_heads
    bits = widths[: plan.kv_heads], widths[1 : plan.kv_heads + 1]
    halves = (False, True, True, True, False, False, False, True) * plan.kv_heads
    x = normals(4, plan.kv_heads, 64, plan.head_dim, seed=6).float() * 30
    k8, v8 = (x.round().clamp(-119, 119).to(torch.int8), (-x).round().clamp(-119, 119).to(torch.int8))
    scale = torch.full(x.shape[:3], 0.25, device=x.device)
    for search, some in itertools.product((False, True), ((), halves[: plan.kv_heads])):
        layout = PageLayout(plan.head_dim, 64, *bits, token_scales=True, k_halves=some)
        order = None
        if some:
            permutation = normals(plan.kv_heads, plan.head_dim, seed=7).argsort(-1).to(torch.uint8)
            order = ChannelOrder(permutation, torch.tensor(some))
        given = layout, k8, v8, scale, scale, search, order, True
        got, want = pages.encode_pages(*given), quantizer.PYTORCH.encode_pages(*given)
        assert torch.equal(got, want), f"{int((got != want).sum())} of {got.numel()} bytes differ"
        decoded = pages.decode_pages(layout, want), quantizer.PYTORCH.decode_pages(layout, want)
        assert all(torch.equal(a, b) for a, b in zip(*decoded, strict=True)), "decoded pages differ"


def _assert_same(cache: ta.KVCache, other: ta.KVCache) -> None:
    assert torch.equal(cache.seq_lens, other.seq_lens), "lengths differ"
    for a, b in zip(cache.dequantize(), other.dequantize(), strict=True):
        assert torch.equal(a, b), "stored values differ"


def _new(plan: Plan, batch: int, turn: int, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    q = normals(batch, plan.heads, count, plan.head_dim, seed=20 + turn)
    k, v = (normals(batch, plan.kv_heads, count, plan.head_dim, seed=seed + turn) for seed in (40, 60))
    return q, k, v.to(dtype())


@contextlib.contextmanager
def _never_waiting() -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    if not on_gpu():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
