"""The two calls: attention like SDPA's, and attention over a quantized cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch, ops
from .checked_call import check_call
from .config import TurboConfig
from .exact_heads import with_exact_heads
from .exact_rows import with_exact_rows
from .guard import guarded
from .guard_sample import TOKENS
from .impl.contract import Availability, Backend, CheckedCall, Result
from .kv.cache import KVCache
from .kv.channel_order import query_energy
from .kv.compression import Compression, compression_of
from .kv.growth import commit, observe, stage, token_counts
from .kv.in_place import Decided, deciding_tokens
from .kv.stage1 import Stage
from .kv.window import check_pages_kept
from .modes import in_own_modes
from .params import AttentionParams
from .softmax import logit_scale
from .validation import (
    check_causal,
    check_config,
    check_finite,
    check_mask,
    check_mask_values,
    check_qkv,
    check_softmax,
    check_window,
    refuse_gradients,
)


@in_own_modes
def turbo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window_size: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    config: TurboConfig | None = None,
    backend: str = "auto",
) -> Any:
    """INT8 attention over q, k and v: FlashQ's stage 1 and the softmax of `config`, without compression (stage 2).

    A replacement for `torch.nn.functional.scaled_dot_product_attention` in inference, with these differences:

    - There is no `dropout_p`; the fifth positional argument is `is_causal`.
    - Causal masks are aligned to the bottom right (SDPA's are aligned to the top left, which differs if Lq and Lk do),
      and can be combined with `attn_mask`.
    - Grouped-query attention follows from the shapes, without a flag.
    - Inputs that require gradients are refused while grad mode is on.

    Args:
        q: [B, Hq, Lq, D]. float32, bfloat16, float16 (or float64), any strides; D a multiple of 8 up to 512.
        k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, Dv] of the same dtype and device; Hkv divides Hq.
        attn_mask: bool (True attends) or additive float, broadcastable to [B, Hq, Lq, Lk].
        is_causal: query i is at position `Lk - Lq + i` and attends to keys up to that position. May be combined with
            `attn_mask`.
        scale: factor of the logits, `1 / sqrt(D)` by default.
        window_size: in tokens. With `is_causal`, a query attends to the last `window_size` keys up to its own
            position; without, to the keys less than `window_size` positions away on either side.
        softcap: logits become `softcap * tanh(logits / softcap)`, before masks.
        return_lse: also return the log-sum-exp of the logits.
        config: `TurboConfig()` by default; its `bits` have no effect here.
        backend: "auto", or a name from `turboattention.backends()`; a backend that cannot run the call raises.

    Returns:
        [B, Hq, Lq, Dv] in the inputs' dtype; with `return_lse` also float32 [B, Hq, Lq] (natural
        log; float64 for float64 inputs). Rows without any key to attend to give 0 and -inf.

    Raises:
        ShapeError, DtypeError, ConfigError, InputError, NonFiniteError, UnsupportedError
        (gradients), BackendError.

    Source: TurboAttention (arXiv 2412.08585), algorithm 1; docs/numerics.md lists what the default changes.

    Examples:
        Rows are queries, columns are keys, 1 is attended to::

            is_causal=True, Lq=2, Lk=5
            1 1 1 1 0
            1 1 1 1 1

            is_causal=True, Lq=4, Lk=2
            0 0
            0 0
            1 0
            1 1

            is_causal=True, Lq=2, Lk=5, attn_mask=[1, 1, 0, 1, 1]
            1 1 0 1 0
            1 1 0 1 1

            is_causal=True, Lq=4, Lk=6, window_size=3
            1 1 1 0 0 0
            0 1 1 1 0 0
            0 0 1 1 1 0
            0 0 0 1 1 1

            Lq=4, Lk=6, window_size=2
            0 1 1 1 0 0
            0 0 1 1 1 0
            0 0 0 1 1 1
            0 0 0 0 1 1
    """
    check_causal(is_causal)
    if torch.compiler.is_dynamo_compiling():
        refuse_gradients(q=q, k=k, v=v, attn_mask=attn_mask)
        text = "" if config is None else config.text
        result = ops.attention(q, k, v, attn_mask, is_causal, scale, window_size, softcap, text, backend)
        return result if return_lse else result[0]
    config = check_config(config)
    check_qkv(q, k, v)
    check_softmax(scale, softcap)
    window_size = check_window(window_size)
    mask = check_mask(attn_mask, q, k.shape[2])
    check_mask_values(mask)
    chosen = dispatch.choose(
        backend, dispatch.CallTraits(config, q.dtype, q.device, q.shape[2], (q.shape[3], v.shape[3]))
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if name not in chosen.checks_finite:
            check_finite(name, x)
    params = AttentionParams(is_causal, logit_scale(scale, q.shape[3]), window_size, softcap, mask)
    result = chosen.prefill(q, k, v, config, params)
    begins = torch.ones(len(q), dtype=torch.bool)
    result = with_exact_rows(config, result, q, k, v, params, begins, with_lse=return_lse)
    out, lse = with_exact_heads(config, result, q, k, v, params, with_lse=return_lse)
    return (out, lse) if return_lse else out


@in_own_modes
def turbo_attention_with_kvcache(
    q: Tensor,
    cache: KVCache,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Append new tokens, if any, to a quantized cache, and attend to all of its tokens.

    The same call serves prefill, chunked prefill and decode. Compressed blocks are read in their packed form, the
    buffer and the new tokens as INT8. Code compiled by torch.compile can call this function, `cache.append` and
    `cache.seq_lens`; other uses of a cache break the graph.

    Args:
        q: [B, Hq, Lq, D], dtypes as in `turbo_attention`.
        cache: the previous tokens; `k_new` and `v_new` are appended to it.
        k_new, v_new: [B, Hkv, T, D] and [B, Hkv, T, Dv], or None.
        lengths: int64 [B], how many of the T tokens to append to each sequence (left-aligned); by default
            all. With lengths, Lq must be T: query row i belongs to token i, and rows from
            `lengths[b]` on give 0. Padding is never read, in q either.
        attn_mask: as in `turbo_attention`, broadcastable to [B, Hq, Lq, Lk] with Lk = `len(cache)` after appending;
            column j is position j of each sequence.
        is_causal: the last query is at the last position of its sequence; with `lengths`, query i is at the position
            of token i.
        scale, softcap, return_lse, backend: as in `turbo_attention`.
        window_size: as in `turbo_attention`; by default that of the cache.

    Returns:
        [B, Hq, Lq, Dv] in the dtype of q; with `return_lse` also the log-sum-exp, as in `turbo_attention`.

    Raises:
        As `turbo_attention`; the cache is then unchanged. On a GPU, a later call raises NonFiniteError instead, unless
        the cache's format is decided in this one (docs/gpu.md). Warns `GuardWarning` (see guard.py).

    Source: TurboAttention (arXiv 2412.08585), algorithm 2.

    Examples:
        Each matrix is a sequence, with queries as rows and positions as columns; 1 is attended to. `past` is the number
        of tokens that a sequence has before the call::

            past=[3], T=2
            1 1 1 1 0
            1 1 1 1 1

            past=[3], T=2, window_size=2
            0 0 1 1 0
            0 0 0 1 1

            past=[3, 3], T=2, lengths=[2, 1]
            1 1 1 1 0    1 1 1 1 0
            1 1 1 1 1    0 0 0 0 0

            past=[5, 4], T=1
            1 1 1 1 1 1    1 1 1 1 1 0

            past=[3, 1], T=2, attn_mask=[0, 1, 1, 1, 1]
            0 1 1 1 0    0 1 0 0 0
            0 1 1 1 1    0 1 1 0 0
    """
    check_causal(is_causal)
    if torch.compiler.is_dynamo_compiling():
        refuse_gradients(q=q, k_new=k_new, v_new=v_new, attn_mask=attn_mask)
        result = ops.attention_with_kvcache(
            cache.handle,
            q,
            k_new,
            v_new,
            lengths,
            attn_mask,
            is_causal,
            scale,
            window_size,
            softcap,
            backend,
            cache.v_head_dim,
        )
        return result if return_lse else result[0]
    call = check_call(q, cache, k_new, v_new, lengths, attn_mask, is_causal, scale, window_size, softcap)
    head_dims = cache.head_dim, cache.v_head_dim
    chosen = dispatch.choose(backend, dispatch.CallTraits(cache.config, q.dtype, q.device, q.shape[2], head_dims))
    begins = cache.lengths == 0 if 0 in cache.lengths.tolist() else None
    # Queries without new tokens may need keys that a window has evicted; the general path checks this.
    result = chosen.step(call, cache) if k_new is not None or cache.window_size is None else None
    if result is None and k_new is not None:
        result = chosen.prompt(call, cache, lambda: _decided(call, cache))
    if result is None:
        result = _attend_and_store(chosen, call, cache)
    elif k_new is not None and cache.learns_order:
        positions, valid = _rows(call, cache.lengths - _counts(call), cache.lengths)
        observe(cache, _energy(q, cache, positions, valid))
    if begins is not None and call.k is not None and call.v is not None:
        new = call.k, call.v, call.params, begins, call.counts
        result = with_exact_rows(cache.config, result, q, *new, with_lse=return_lse)
    return result if return_lse else result[0]


def _decided(call: CheckedCall, cache: KVCache) -> Decided | None:
    """`contract.Decide` for a call whose sequences take all new tokens."""
    tokens = call.q.shape[2]
    first = deciding_tokens(cache, tokens, 0 if cache.config.guard == "off" else TOKENS)
    if not first:
        return None
    positions, valid = _rows(call, cache.lengths, cache.lengths + tokens)
    staged, compression = _staged(call, cache, None, positions, valid, first)
    return Decided(staged.k_mean, compression)


def _attend_and_store(backend: Backend, call: CheckedCall, cache: KVCache) -> Result:
    """Attend over INT8 rows and pages, then store the new tokens in the cache."""
    q, params = call.q, call.params
    counts = _counts(call)
    positions, valid = _rows(call, cache.lengths, cache.lengths + counts)
    check_mask_values(params.attn_mask)
    check_finite("q", q, valid.sum(1))
    check_pages_kept(cache, positions, valid, params.window_size)
    staged, compression = None, None
    if call.k is not None:
        staged, compression = _staged(call, cache, counts, positions, valid)
    result = backend.attend_cache(call, cache, staged, compression=compression, positions=positions, valid=valid)
    if staged is not None and compression is not None:
        commit(cache, staged, compression)
    return result


def _staged(
    call: CheckedCall, cache: KVCache, counts: Tensor | None, positions: Tensor, valid: Tensor, first: int | None = None
) -> tuple[Stage, Compression]:
    """The call's new tokens, or the `first` of them, as INT8, and what committing these compresses, at widths that the
    guard finds wide enough."""
    k, v = call.k, call.v
    assert k is not None and v is not None
    energy = _energy(call.q, cache, positions, valid) if cache.learns_order else None
    staged = stage(cache, k[:, :, :first], v[:, :, :first], counts, energy, ("k_new", "v_new"))
    planned = compression_of(cache, staged)
    return staged, guarded(cache, staged, planned, call.q, positions, valid, (k, v), call.params)


def _counts(call: CheckedCall) -> Tensor:
    """int64 [B] (CPU): the new tokens that each sequence takes."""
    return token_counts(call.counts, len(call.q), 0 if call.k is None else call.k.shape[2])


def _rows(call: CheckedCall, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Positions int64 [B, Lq] of the query rows in sequences of `before` and `after` tokens (int64 [B]), and which rows
    are not padding, bool [B, Lq]."""
    row = torch.arange(call.q.shape[2]).expand(len(before), -1)
    if call.counts is not None:  # row i is token i
        return row + before[:, None], row < call.counts[:, None]
    first = after - call.q.shape[2]  # the last row is at the end
    return row + first[:, None], torch.ones_like(row, dtype=torch.bool)


def _energy(q: Tensor, cache: KVCache, positions: Tensor, valid: Tensor) -> Tensor:
    """`query_energy` of the rows before the end of the first compressed block, from which the order of K's channels is
    learned. They do not depend on how a prompt is split into calls."""
    end = (cache.sink_blocks + 1) * cache.config.block_size
    return query_energy(q, valid & (positions < end), cache.num_kv_heads)


def backends() -> dict[str, Availability]:
    """All backends by name: whether each can run on this machine and, if not, why."""
    return dispatch.backends()


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window_size: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    config: TurboConfig | None = None,
    backend: str = "auto",
) -> dispatch.Explanation:
    """The backend that `turbo_attention` would choose for this call, and why; `print` shows it.

    Takes the arguments of `turbo_attention` and raises the same errors, except those that depend on the values in q, k
    and v (NonFiniteError). Nothing is computed.
    """
    config = check_config(config)
    check_causal(is_causal)
    check_qkv(q, k, v)
    check_softmax(scale, softcap)
    check_window(window_size)
    check_mask_values(check_mask(attn_mask, q, k.shape[2]))
    call = dispatch.CallTraits(config, q.dtype, q.device, q.shape[2], (q.shape[3], v.shape[3]))
    return dispatch.explain_choice(backend, call)
