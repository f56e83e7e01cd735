"""Adversarial tensors for a quantized cache: each head stays within its bound, or there is a warning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import turboattention as ta
from turboattention.errors import GuardWarning, NonFiniteError
from turboattention.guard import BOUNDS
from turboattention.reference.exact import exact_attention

from .helpers import normals, qkv, relative_error
from .kv.tools import content

HEADS, DIM, LENGTH = 4, 64, 400
BAD = (1, 3)
"""Heads that are made hard; the others are normal."""

QKV = tuple[Tensor, Tensor, Tensor]


def offset_channels(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    k[:, BAD, :, 5:9] += 200.0
    return q, k, v


def swinging_channels(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """As large as an offset, but no mean takes it away."""
    k[:, BAD, :, 5:9] += torch.where(torch.arange(LENGTH) % 2 == 0, -200.0, 200.0)[:, None]
    q[..., 5:9] = 0
    return q, k, v


def loud_value_channels(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    v[:, BAD, :, :2] *= 1000.0
    return q, k, v


def sink(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """The first key takes most of the attention, and its value is next to nothing."""
    direction = normals(DIM, seed=5)
    direction /= direction.norm()
    q[:, BAD] += 9 * direction
    k[:, BAD, 0] += 14 * direction
    v[:, BAD, 0] *= 0.05
    return q, k, v


def late_sink(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """The same where no INT8 block is reserved for it."""
    direction = normals(DIM, seed=5)
    direction /= direction.norm()
    q[:, BAD] += 9 * direction
    k[:, BAD, 100] += 14 * direction
    v[:, BAD, 100] *= 0.05
    return q, k, v


def huge_key(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    k[:, BAD, 90] *= 1000.0
    return q, k, v


def huge_value(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    v[:, BAD, 90] *= 1000.0
    return q, k, v


def constant_heads(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """Without any variance: the same key and value everywhere."""
    k[:, BAD], v[:, BAD] = 3.0, -0.5
    return q, k, v


def zero_heads(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    k[:, BAD], v[:, BAD] = 0.0, 0.0
    return q, k, v


def sharp_heads(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """Logits so far apart that a small error of a key changes which token is seen."""
    q[:, BAD] *= 30
    return q, k, v


def tiny_heads(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    k[:, BAD] *= 1e-20
    v[:, BAD] *= 1e-20
    return q, k, v


ADVERSARIES: tuple[Callable[[Tensor, Tensor, Tensor], QKV], ...] = (
    offset_channels,
    swinging_channels,
    loud_value_channels,
    sink,
    late_sink,
    huge_key,
    huge_value,
    constant_heads,
    zero_heads,
    sharp_heads,
    tiny_heads,
)


def fed(tensors: QKV, config: ta.TurboConfig, pieces: tuple[int, ...] = (LENGTH,)) -> tuple[ta.KVCache, list[str]]:
    cache, start = ta.KVCache(1, HEADS, DIM, config=config), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in pieces:
            q, k, v = (x[:, :, start : start + size] for x in tensors)
            out = ta.turbo_attention_with_kvcache(q, cache, k, v)
            assert bool(out.isfinite().all())
            start += size
    assert all(w.category is GuardWarning for w in caught)
    return cache, [str(w.message) for w in caught]


def named(said: list[str]) -> set[int]:
    """The heads that a warning names."""
    found = [re.search(r"KV heads ([\d, ]+) lose", text) for text in said]
    return {int(head) for match in found if match for head in match[1].split(", ")}


def unhelped(said: list[str]) -> set[int]:
    """Heads reported as remaining beyond their bound."""
    found = [re.search(r"; heads ([\d, ]+) remain beyond", text) for text in said]
    return {int(head) for match in found if match for head in match[1].split(", ")}


def stored_errors(cache: ta.KVCache, q: Tensor, k: Tensor, v: Tensor) -> list[float]:
    """Relative error of each head over the last 64 rows: exact attention over what is stored."""
    got, wanted = (exact_attention(q[:, :, -64:], *x, is_causal=True)[0] for x in (cache.dequantize(), (k, v)))
    return [
        relative_error(got[:, head], wanted[:, head]) if bool(wanted[:, head].any()) else float(got[:, head].norm())
        for head in range(HEADS)
    ]


@pytest.mark.parametrize("bits", [4, 3, 2, "mixed"])
@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda f: f.__name__)
def test_nothing_is_lost_in_silence(adversary, bits):
    """The guard samples rows and checks once; undetected errors are at most 1.5 times the bound."""
    tensors = adversary(*qkv(1, HEADS, HEADS, LENGTH, LENGTH, DIM))
    cache, said = fed(tensors, ta.TurboConfig(bits=bits))
    assert len(said) <= 1
    for head, error in enumerate(stored_errors(cache, *tensors)):
        bound = BOUNDS[int(cache.head_bits[:, head].min())]
        assert error <= 1.5 * bound or head in unhelped(said), (head, error, bound, said)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda f: f.__name__)
def test_normal_heads_keep_their_widths(adversary, bits):
    cache, said = fed(adversary(*qkv(1, HEADS, HEADS, LENGTH, LENGTH, DIM)), ta.TurboConfig(bits=bits))
    assert named(said) <= set(BAD)
    assert cache.head_bits[:, [0, 2]].tolist() == [[bits, bits]] * 2


@pytest.mark.parametrize("adversary", [swinging_channels, sharp_heads], ids=lambda f: f.__name__)
def test_what_must_be_noticed_is_noticed(adversary):
    cache, said = fed(adversary(*qkv(1, HEADS, HEADS, LENGTH, LENGTH, DIM, seed=1)), ta.TurboConfig())
    assert named(said) == set(BAD)
    assert cache.head_bits[:, BAD].unique().tolist() == [8]


@pytest.mark.parametrize(
    "adversary", [offset_channels, sink, constant_heads, zero_heads, tiny_heads], ids=lambda f: f.__name__
)
def test_what_the_default_copes_with_costs_nothing(adversary):
    """Means, rotation, token scales and the sink block are there for these."""
    cache, said = fed(adversary(*qkv(1, HEADS, HEADS, LENGTH, LENGTH, DIM)), ta.TurboConfig())
    assert said == []
    assert cache.head_bits.unique().tolist() == [4]


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=lambda f: f.__name__)
def test_small_calls_are_told_of_as_well(adversary):
    tensors = adversary(*qkv(1, HEADS, HEADS, LENGTH, LENGTH, DIM))
    cache, said = fed(tensors, ta.TurboConfig(), (63, 1, 66, *[54] * 5))
    assert len(said) <= 1
    for head in (0, 2):
        assert cache.head_bits[:, head].tolist() == [4, 4]
    if adversary is swinging_channels:
        assert named(said) == set(BAD)


# -- what is no number -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k_new", "v_new"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("before", [0, 1, 64, 150])
def test_no_number_never_reaches_the_cache(name, value, before):
    q, k, v = qkv(1, HEADS, HEADS, LENGTH, LENGTH, DIM)
    cache = ta.KVCache(1, HEADS, DIM)
    if before:
        ta.turbo_attention_with_kvcache(q[:, :, :before], cache, k[:, :, :before], v[:, :, :before])
    held = content(cache) if before else None
    new = {"q": q[:, :, before:].clone(), "k_new": k[:, :, before:].clone(), "v_new": v[:, :, before:].clone()}
    new[name][0, 2, -1, 7] = value
    with pytest.raises(NonFiniteError, match=rf"^{name}: "):
        ta.turbo_attention_with_kvcache(new.pop("q"), cache, **new)
    assert len(cache) == before
    assert held is None or content(cache) == held


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_padding_may_hold_anything(value):
    q, k, v = qkv(2, HEADS, HEADS, LENGTH, LENGTH, DIM)
    lengths = torch.tensor([LENGTH, 140])
    clean = ta.KVCache(2, HEADS, DIM)
    wanted = ta.turbo_attention_with_kvcache(q, clean, k, v, lengths=lengths)
    for x in (q, k, v):
        x[1, :, 140:] = value
    cache = ta.KVCache(2, HEADS, DIM)
    assert torch.equal(ta.turbo_attention_with_kvcache(q, cache, k, v, lengths=lengths), wanted)
    assert content(cache) == content(clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_numbers_of_a_dtype(dtype):
    """They are finite, and so is what becomes of them."""
    q, k, v = (x.to(dtype) for x in qkv(1, HEADS, HEADS, LENGTH, LENGTH, DIM))
    v[:, BAD, 100] = 30_000.0
    cache, _ = fed((q, k, v), ta.TurboConfig())
    assert all(bool(x.isfinite().all()) for x in cache.dequantize())
