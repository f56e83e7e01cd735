"""Where the host waits for the device: a stand-in for a GPU records it (`stand_in`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import turboattention as ta
from turboattention.errors import NonFiniteError
from turboattention.impl.triton import prompts
from turboattention.paged import PagedBatch, TailBlocks, paged_attention

from ...helpers import normals, qkv
from ...kv.tools import append_by_stages, content
from ...paging import HEADS, Server
from .stand_in import DEVICE, Waits, stand_in
from .tools import assert_close, cache_both

OFF = ta.TurboConfig(guard="off")
PIECES = (130, 40, 70, 1)
"""A prompt, two pieces of another, of which one ends within a block, and a step."""

# Once per cache, in the call that fills its first block behind the sinks: what is computed there is used on the host.
FINITE = {("validation.py", "check_finite"): 1, ("kernels/triton/quantize.py", "quantize_tokens"): 3}
GUARD = {("guard_sample.py", "relative_errors"): 1}
MIXED = {("kv/widths.py", "<listcomp>"): 2}
ORDER = {("kv/channel_order.py", "order_by"): 1, ("kv/channel_order.py", "packed"): 1}


def new(waits: Waits, tokens: int, turn: int = 0) -> list[Tensor]:
    return [waits.put(x) for x in qkv(1, 2, 1, tokens, tokens, 16, seed=turn)]


def waits_of(waits: Waits) -> Counter[tuple[str, str]]:
    """How often each function has waited since the last call."""
    found = Counter((file, function) for file, function, _ in waits.found)
    waits.found.clear()
    return found


@pytest.mark.parametrize(
    ("config", "deciding"),
    [
        (OFF, {}),
        (OFF.replace(bits=(3, 2), flush_lag=2, smooth_k=False), {}),
        (OFF.replace(bits="mixed"), FINITE | MIXED),
        (OFF.replace(bits=3, reorder_k=True), FINITE | ORDER),
        (ta.TurboConfig(), FINITE | GUARD),
    ],
    ids=["widths given", "with a lag", "widths by tokens", "an order of channels", "a guard"],
)
def test_a_prompt_into_a_cache_waits_only_for_what_decides_its_format(config, deciding, monkeypatch):
    cache = ta.KVCache(1, 1, 16, config=config)
    with stand_in(monkeypatch) as waits:
        found = []
        for turn, tokens in enumerate(PIECES):
            q, k, v = new(waits, tokens, turn)
            ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
            found.append(waits_of(waits))
    assert found == [Counter(deciding), Counter(), Counter(), Counter()]
    assert len(cache) == sum(PIECES)


def test_no_other_call_waits(monkeypatch):
    """Storing alone, masks, lengths, windows, a mean and attention without a cache."""
    with stand_in(monkeypatch) as waits:
        cache = ta.KVCache(1, 1, 16, config=OFF, window_size=100, k_mean=normals(1, 16), device=DEVICE)
        for tokens in (130, 70, 1):
            q, k, v = new(waits, tokens)
            mask = waits.put(normals(tokens, 1))
            ta.turbo_attention_with_kvcache(q, cache, k, v, attn_mask=mask, lengths=torch.tensor([tokens - 1]))
            cache.append(k, v)
        ta.turbo_attention(*new(waits, 70), is_causal=True)
        assert waits.found == []


def test_pages_of_a_server_wait_for_nothing(monkeypatch):
    with stand_in(monkeypatch) as waits:
        blocks = TailBlocks(1, 2, HEADS, 16, device=DEVICE)
        pages = waits.put(torch.zeros(16, 8192, dtype=torch.uint8))
        table = waits.put(torch.arange(8, dtype=torch.int32)[None])
        slots = waits.put(torch.zeros(1, dtype=torch.int32))
        before = 0
        for tokens in (300, 70, 1):
            start, lengths = (waits.put(torch.tensor(x, dtype=torch.int32)) for x in ([0, tokens], [before + tokens]))
            batch = PagedBatch(start, lengths, table, slots, tokens)
            q, k, v = (waits.put(normals(tokens, heads, 16)) for heads in (2 * HEADS, HEADS, HEADS))
            assert paged_attention(Server().fmt, 0, batch, q, k, v, torch.empty_like(q), pages, blocks)
            before += tokens
        assert waits.found == []


READS: dict[str, Any] = {
    "item": lambda x, host: x[0].item(),
    "tolist": lambda x, host: x.tolist(),
    "__bool__": lambda x, host: bool(x[0] > 0),
    "__int__": lambda x, host: int(x[0]),
    "nonzero": lambda x, host: x.nonzero(),
    "equal": lambda x, host: torch.equal(x, x),
    "unique": lambda x, host: x.unique(),
    "__getitem__": lambda x, host: x[x > 0],
    "__setitem__": lambda x, host: x.__setitem__(slice(None), host),
    "cpu": lambda x, host: x.cpu(),
    "to": lambda x, host: host.to(x.device),
    "copy_": lambda x, host: host.copy_(x, non_blocking=True),
    "tensor": lambda x, host: torch.tensor([1], device=x.device),
}


@pytest.mark.parametrize("name", READS)
def test_the_stand_in_notices(name, monkeypatch):
    with stand_in(monkeypatch) as waits:
        READS[name](waits.put(torch.arange(3)), torch.arange(3))
    assert [what for *_, what in waits.found] == [name]


def test_the_stand_in_lets_pass_what_does_not_wait(monkeypatch):
    with stand_in(monkeypatch) as waits:
        x, host = waits.put(torch.arange(3)), torch.arange(3)
        there = host.pin_memory().to(x.device, non_blocking=True)
        back = torch.zeros(3, dtype=torch.int64, pin_memory=True)
        back.copy_(there, non_blocking=True)
        assert (x + there + torch.zeros_like(x)).device == DEVICE
        assert back.device.type == "cpu"
        assert waits.found == []
        with pytest.raises(AssertionError, match="on the device and on the CPU"):
            torch.add(x, host)


# -- what prompts store and tell ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [OFF, OFF.replace(sink_tokens=0, bits=3), OFF.replace(flush_lag=3, smooth_k=False)], ids=str
)
def test_prompts_give_and_store_what_the_general_path_does(config, monkeypatch):
    """Ragged ones too; first blocks, whose mean is learned, within them and before."""
    cache = ta.KVCache(2, 2, 16, config=config)
    want = cache.clone()
    taken, prompt = [], prompts.prompt

    def seen(*given):
        taken.append(prompt(*given))
        return taken[-1]

    monkeypatch.setattr(prompts, "prompt", seen)
    for turn, (tokens, lengths) in enumerate(((70, [70, 30]), (150, None), (90, [0, 90]))):
        q, k, v = qkv(2, 4, 2, tokens, tokens, 16, seed=turn)
        counts = None if lengths is None else torch.tensor(lengths)
        cache_both(q, cache, k, v, lengths=counts, is_causal=True)
        append_by_stages(want, k, v, counts)
        assert content(cache) == content(want)
    assert len(taken) == 3
    assert None not in taken


@pytest.mark.parametrize("name", ["q", "k_new", "v_new", "attn_mask"])
def test_values_of_a_prompt_that_are_not_finite_are_told_later_and_never_stored(name):
    cache = ta.KVCache(1, 2, 16, config=OFF.replace(smooth_k=False))
    q, k, v = qkv(1, 4, 2, 150, 150, 16, seed=1)
    tensors = {"q": q, "k_new": k, "v_new": v, "attn_mask": normals(150, 150, seed=2)}
    clean = {key: x.clone() for key, x in tensors.items()}
    place = (0, 1, 70, 3) if name != "attn_mask" else (70, 3)
    row = place[:-1] if name != "attn_mask" else place
    tensors[name][place], clean[name][row] = torch.nan, 0
    results = []
    for given in (tensors, clean):
        own = cache.clone()
        rest = {"attn_mask": given["attn_mask"], "return_lse": True, "backend": "triton"}
        results.append((ta.turbo_attention_with_kvcache(given["q"], own, given["k_new"], given["v_new"], **rest), own))
    (got, told), (want, other) = results
    assert_close(got, want)
    assert content(told) == content(other)
    other.look()
    with pytest.raises(NonFiniteError, match=r"^q, k_new, v_new, attn_mask: expected finite values .* in an earlier"):
        told.look()
