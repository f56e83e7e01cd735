"""Shared by tests of the C++ attention: a call on both backends, and the bounds of their difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import turboattention as ta
from turboattention.kv.cache import KVCache

# Both backends quantize to the same bits. What differs is the order of float32 sums and the exponentials' last bits:
# 1e-7 of the output. Where that carries a weight over half a level, its row is off by a level of at least 127: about
# one weight in 60,000, mostly 1e-5 to 2e-4 of a call's output, more of a row with few keys or unequal values.
# A wrong key, scale or position costs a row 0.1 and more.
OUT, LSE = 1e-3, 1e-3
OUT_OF_SUCH_ROWS, LSE_OF_SUCH_ROWS = 5e-2, 1.1 / 127
# The results' own rounding, of which some values fall to the other side.
ROUNDING = {torch.float32: 0.0, torch.float16: 2e-4, torch.bfloat16: 1e-3}

Pair = tuple[Tensor, Tensor]


def unequal(k: Tensor) -> Tensor:
    """Keys [..., D] whose channels differ as much as it takes for two widths (`kv.channel_order`)."""
    head_dim = k.shape[-1]
    return (
        k
        * torch.linspace(1.2, -1.2, head_dim).exp2()[
            torch.randperm(head_dim, generator=torch.Generator().manual_seed(0))
        ]
    )


def assert_close(got: Pair, want: Pair, flips: int = 0) -> None:
    """out and lse of a call; rows that see nothing are 0 and -inf in both. One row in a hundred may be off by
    a level, and `flips` more."""
    (out, lse), (want_out, want_lse) = got, want
    assert (out.dtype, out.shape) == (want_out.dtype, want_out.shape)
    assert (lse.dtype, lse.shape) == (torch.float32, want_lse.shape)
    unseen = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen)
    assert not bool(out[unseen].any())
    assert not bool(want_out[unseen].any())
    if unseen.all():
        return
    out, want_out = out[~unseen].double(), want_out[~unseen].double()
    error, size = (out - want_out).norm(dim=-1), want_out.norm(dim=-1)
    rest = len(error) - len(error) // 100 - flips
    best = (error / size.clamp(min=1e-30)).argsort()[:rest]
    bound = OUT + ROUNDING[got[0].dtype]
    assert bool((error <= (OUT_OF_SUCH_ROWS + bound) * size).all())
    assert float(error[best].norm()) <= bound * float(size[best].norm())
    # Logits of any size, in float32.
    off = ((lse - want_lse).abs() - 5e-7 * want_lse.abs())[~unseen].sort().values
    assert float(off[-1]) <= LSE_OF_SUCH_ROWS
    assert bool((off[:rest] <= LSE).all())


def prefill_both(q: Tensor, k: Tensor, v: Tensor, *args: Any, flips: int = 0, **options: Any) -> Pair:
    """`turbo_attention` by the kernels, checked against the reference."""
    got = ta.turbo_attention(q, k, v, *args, return_lse=True, backend="cpu", **options)
    assert_close(got, ta.turbo_attention(q, k, v, *args, return_lse=True, backend="reference", **options), flips)
    return got


def cache_both(q: Tensor, cache: KVCache, *new: Tensor, **options: Any) -> Pair:
    """`turbo_attention_with_kvcache` by the kernels, checked against the reference on a clone."""
    other = cache.clone()
    got = ta.turbo_attention_with_kvcache(q, cache, *new, return_lse=True, backend="cpu", **options)
    assert_close(got, ta.turbo_attention_with_kvcache(q, other, *new, return_lse=True, backend="reference", **options))
    assert torch.equal(cache.seq_lens, other.seq_lens)
    return got
