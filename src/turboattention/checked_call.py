"""Validates a call of attention over a cache. Later code does not repeat these checks."""

from __future__ import annotations

from torch import Tensor

from .errors import InputError, ShapeError
from .impl.contract import CheckedCall
from .kv.cache import KVCache
from .kv.window import check_window_kept
from .params import AttentionParams
from .softmax import logit_scale
from .validation import (
    check_floats,
    check_lengths,
    check_mask,
    check_query,
    check_softmax,
    check_token_shapes,
    check_window,
)

_NAMES = "k_new", "v_new"


def check_call(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
) -> CheckedCall:
    """The call, if its arguments fit each other and the cache. Arguments and errors as in
    `turbo_attention_with_kvcache`, except NonFiniteError: the code that reads the values checks them."""
    table, shape = cache.page_table, cache.token_shape
    if k is None or v is None:
        if k is not v:
            want, have = ("a tensor", "None") if v is None else ("None", "a tensor")
            raise InputError(f"v_new: expected {want}, as k_new is, got {have}")
        if lengths is not None:
            raise InputError("lengths: expected None without k_new and v_new, got a tensor")
        check_floats(q=q)
    else:
        check_floats(q=q, k_new=k, v_new=v)
        check_token_shapes(shape, None if table is None else table.device, k, v, _NAMES)
    check_query(shape[:3], q)
    check_softmax(scale, softcap)
    window_size = check_window(cache.window_size if window_size is None else window_size)
    check_window_kept(cache, window_size)
    counts, tokens = None, 0 if k is None else k.shape[2]
    if lengths is not None:
        if q.shape[2] != tokens:
            raise ShapeError(f"q: expected as many rows as k_new has tokens, with lengths, got {q.shape[2]} rows")
        counts = check_lengths(lengths, shape[0], tokens)
    if attn_mask is not None:
        ends = cache.lengths + (tokens if counts is None else counts)
        attn_mask = check_mask(attn_mask, q, int(ends.max()) if len(ends) else 0)
    params = AttentionParams(is_causal, logit_scale(scale, cache.head_dim), window_size, softcap, attn_mask)
    return CheckedCall(q, k, v, counts, params)
