"""Every instruction set, number of threads and caller gives the same bits of attention."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import turboattention as ta
from turboattention.kv.cache import KVCache

from ...helpers import bits_of, normals, qkv
from .attending import Pair, unequal
from .tools import ISAS

OFF = ta.TurboConfig(guard="off")
ROW = OFF.replace(p_scale="row")
PAPER = ta.TurboConfig.paper()
others = pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "serial"])


def prefill(shape, *args, config=OFF, dtype=torch.float32, spread=1.0, **options) -> Pair:
    q, k, v = qkv(*shape, dtype=dtype)
    v[:, :, ::7] *= 30.0
    return ta.turbo_attention(q * spread, k, v, *args, config=config, return_lse=True, backend="cpu", **options)


def decode(lengths, head_dim, tokens, bits=4, heads=4, dtype=torch.float32, config=OFF, counts=None, **options) -> Pair:
    cache = KVCache(len(lengths), 2, head_dim, config=config.replace(bits=bits))
    k, v = normals(2, len(lengths), 2, max(lengths), head_dim, seed=9)
    cache.append(unequal(k).to(dtype), v.to(dtype), torch.tensor(lengths))
    q, k, v = qkv(len(lengths), heads, 2, tokens, tokens, head_dim, dtype=dtype)
    if counts:
        options["lengths"] = torch.tensor(counts)
    return ta.turbo_attention_with_kvcache(q, cache, k, v, return_lse=True, backend="cpu", **options)


PREFILLS = {
    "causal": lambda: prefill((2, 4, 2, 193, 193, 64), is_causal=True),
    "few rows": lambda: prefill((2, 4, 2, 3, 150, 40), is_causal=True, dtype=torch.float16),
    "one row": lambda: prefill((1, 1, 1, 1, 1, 8)),
    "one row of a long context": lambda: prefill((1, 2, 1, 1, 3000, 128)),
    "many rows of a long context": lambda: prefill((1, 2, 1, 30, 2200, 24), is_causal=True),
    "odd head_dim": lambda: prefill((1, 4, 2, 70, 130, 72), window_size=50, dtype=torch.bfloat16),
    "head_dim 256": lambda: prefill((1, 2, 2, 40, 130, 256), is_causal=True, window_size=30),
    "head_dim 200": lambda: prefill((1, 2, 2, 5, 130, 200), is_causal=True, softcap=1.0),
    "several tiles": lambda: prefill((1, 8, 1, 100, 100, 16), is_causal=True),
    "softcap": lambda: prefill((1, 4, 2, 70, 70, 24), softcap=2.0, spread=5.0),
    "mask": lambda: prefill((1, 4, 2, 20, 150, 24), normals(1, 4, 20, 150) > 0),
    "additive mask": lambda: prefill((1, 4, 2, 6, 150, 24), normals(1, 1, 6, 150), is_causal=True),
    "sas2": lambda: prefill((1, 4, 2, 40, 150, 16), config=OFF.replace(softmax="sas2"), spread=3.0),
    "exp": lambda: prefill((1, 4, 2, 40, 150, 16), config=OFF.replace(softmax="exp"), spread=20.0),
    "exp, few": lambda: prefill((1, 4, 2, 2, 150, 16), config=OFF.replace(softmax="exp"), spread=20.0),
    "a scale per row": lambda: prefill((1, 4, 2, 40, 150, 16), is_causal=True, config=ROW, spread=3.0),
    "a scale per row, few": lambda: prefill((1, 4, 2, 3, 150, 24), config=ROW.replace(softmax="sas2"), spread=3.0),
    "a scale per row, exp": lambda: prefill((1, 4, 2, 20, 150, 72), config=ROW.replace(softmax="exp"), spread=9.0),
    "threshold": lambda: prefill((1, 4, 2, 40, 150, 16), config=OFF.replace(sas_threshold=-1.0)),
    "by tile": lambda: prefill((1, 4, 2, 70, 150, 16), config=OFF.replace(token_scales=False)),
    "paper": lambda: prefill((2, 4, 2, 193, 193, 64), is_causal=True, config=PAPER, spread=3.0),
    "paper, one row": lambda: prefill((1, 7, 1, 1, 3000, 72), config=PAPER, dtype=torch.bfloat16),
    "paper, several tiles": lambda: prefill((1, 8, 1, 300, 300, 16), config=PAPER.replace(rescale="exact")),
    "paper, mask": lambda: prefill((1, 4, 2, 20, 150, 24), normals(1, 4, 20, 150) > 0, config=PAPER),
    "paper, sas2": lambda: prefill((1, 4, 2, 70, 150, 16), config=PAPER.replace(softmax="sas2"), softcap=2.0),
    "paper, sas16": lambda: prefill((1, 4, 2, 70, 150, 16), config=PAPER.replace(softmax="sas16"), spread=3.0),
    "paper, exp": lambda: prefill((1, 4, 2, 1, 150, 16), config=PAPER.replace(softmax="exp"), spread=3.0),
    "more queries than keys": lambda: prefill((2, 4, 2, 70, 9, 16), is_causal=True),
}
DECODES = (
    {
        f"{bits} bits, {head_dim}, {tokens} tokens": lambda b=bits, d=head_dim, t=tokens: decode([5, 64, 300], d, t, b)
        for bits in (8, 4, 3, 2, (8, 2), (3, 4))
        for head_dim in (8, 24, 64, 80, 128)
        for tokens in (1, 5, 20)
    }
    | {
        f"{bits} bits in order, {head_dim}, {tokens} tokens": lambda b=bits, d=head_dim, t=tokens: decode(
            [5, 64, 300], d, t, b, config=OFF.replace(reorder_k=True)
        )
        for bits in (3, 2)
        for head_dim in (24, 96, 256)
        for tokens in (1, 20)
    }
    | {
        "mixed": lambda: decode([400, 1], 64, 3, "mixed"),
        "long": lambda: decode([2500, 70], 32, 1),
        "long, many rows": lambda: decode([1500], 32, 30),
        "bfloat16": lambda: decode([200, 100], 96, 2, dtype=torch.bfloat16),
        "by tile": lambda: decode([200, 100], 16, 2, config=OFF.replace(token_scales=False)),
        "paper": lambda: decode([200, 100, 300], 64, 1, config=PAPER, heads=14),
        "paper, long": lambda: decode([2500, 70], 32, 1, config=PAPER),
        "paper, several rows": lambda: decode([200, 100], 64, 5, "mixed", config=PAPER),
        "paper, ragged": lambda: decode([200, 100], 16, 70, config=PAPER, counts=[0, 66]),
        "a scale per row": lambda: decode([200, 100], 64, 2, config=ROW),
        "a scale per row, many": lambda: decode([200, 100], 64, 20, config=ROW.replace(stored_prefill=True)),
        "window": lambda: decode([700, 100], 16, 2, window_size=130),
        "ragged": lambda: decode([200, 100], 16, 6, counts=[0, 4]),
        "eight heads a head": lambda: decode([200, 100], 16, 2, heads=16),
    }
)
CASES = PREFILLS | DECODES


def same(a: Pair, b: Pair) -> bool:
    return all(
        x.dtype == y.dtype and torch.equal(bits_of(x.float()), bits_of(y.float())) for x, y in zip(a, b, strict=True)
    )


@functools.cache
def by_serial_kernels(case: str) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBOATTENTION_ISA", "serial")
        return CASES[case]()


@others
@pytest.mark.parametrize("case", CASES)
def test_bits_of_the_serial_kernels(case, isa, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    want = by_serial_kernels(case)
    assert same(CASES[case](), want)
    assert same(CASES[case](), want)  # nothing of the first call is left behind


SEVERAL_TASKS = ("causal", "one row of a long context", "many rows of a long context", "several tiles", "mixed", "long")
SEVERAL_TASKS += ("paper", "paper, several tiles", "paper, long")


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_of_threads(isa, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = {case: CASES[case]() for case in SEVERAL_TASKS}
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(same(CASES[case](), want[case]) for case in SEVERAL_TASKS)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", [*ISAS[:1], "serial"])
def test_calls_at_the_same_time(isa, monkeypatch):
    """Four callers, each with its own sizes, that change from call to call."""
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    cases = [*PREFILLS, *list(DECODES)[::5]]
    want = {case: CASES[case]() for case in cases}
    start = threading.Barrier(4)

    def calls(shift: int) -> list[str]:
        start.wait()
        return [case for case in cases[shift:] + cases[:shift] if not same(CASES[case](), want[case])]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(calls, (0, 5, 10, 15))) == [[]] * 4


def test_other_threads_of_python_run_meanwhile(monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", "serial")  # slow enough that attention is most of the call
    q, k, v = qkv(1, 4, 4, 512, 512, 64)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        begin = time.perf_counter()
        ta.turbo_attention(q, k, v, config=OFF, backend="cpu")
        end = time.perf_counter()
    finally:
        done.set()
        ticker.join()
    # If the GIL were held, the interpreter would be blocked for nearly all of the call.
    moments = [begin, *(t for t in ticks if begin <= t <= end), end]
    assert max(b - a for a, b in itertools.pairwise(moments)) < 0.75 * (end - begin)
