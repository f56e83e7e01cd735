"""The first queries of a sequence, computed in floating point (`TurboConfig.exact_rows`).

The query at position i sees at most i + 1 keys. An INT8 error of a value averages out over hundreds of keys, not over
two; and the first tokens of many models are attention sinks, whose hidden states grow so large that later layers
amplify this error for the whole text. A few rows over as many keys cost next to nothing in floating point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .config import TurboConfig
from .float_attention import float_attention, float_lse, visible
from .params import AttentionParams
from .uploads import upload


def rows_of(config: TurboConfig) -> int:
    """How many first queries calls over tensors and caches compute in floating point."""
    return 0 if config.stored_prefill else config.exact_rows


def with_exact_rows(
    config: TurboConfig,
    result: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: AttentionParams,
    begins: Tensor,
    counts: Tensor | None = None,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`result` (out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]) with its first rows computed in floating point, in place; lse
    only `with_lse`.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, Dv]. The last query is at the last key unless there are
            counts.
        params: the mask is for these keys.
        begins: bool [B] (CPU): the sequences whose first token is their first key here.
        counts: int64 [B] (CPU), tokens of each sequence, and query i is at key i; None for all.
    """
    queries, keys = q.shape[2], k.shape[2]
    ahead = 0 if counts is not None else keys - queries  # keys before the first query
    size = rows_of(config)
    rows = slice(max(0, -ahead), max(0, min(queries, size - ahead)))
    if not params.is_causal or rows.start >= rows.stop or not bool(begins.any()):
        return result
    # Always `size` rows, so that a row is the same in any batch: a product's rounding depends on its shape.
    at = torch.arange(size)
    position = at + rows.start + ahead
    seen = visible(position, size, params) & (at < keys)
    if counts is not None:
        seen = seen & (torch.maximum(at, position[:, None]) < counts[:, None, None])
    device, seen = q.device, upload(seen, q.device)
    first_q, first_k, first_v = _padded(q[:, :, rows], size), _padded(k, size), _padded(v, size)
    if counts is not None:  # padding may hold NaN, which a weight of 0 would not remove
        unused = upload(at >= counts[:, None], device)[:, None, :, None]
        first_k, first_v = first_k.masked_fill(unused, 0), first_v.masked_fill(unused, 0)
    mask = _first(params.attn_mask, rows, size)
    found = [float_attention(first_q, first_k, first_v, seen, params, mask)]
    found += [float_lse(first_q, first_k, seen, params, mask)] if with_lse else []
    for target, values in zip(result, found, strict=False):
        part, values = target[:, :, rows], values[:, :, : rows.stop - rows.start].to(target.dtype)
        if device.type != "cpu" or counts is not None or not bool(begins.all()):
            chosen = upload(begins, device).view(-1, *[1] * (part.dim() - 1))
            values = torch.where(chosen & _finite(part) & _finite(values), values, part)
        part.copy_(values)
    return result


def _padded(x: Tensor, size: int) -> Tensor:
    """The first rows of x [B, H, n, D], padded with zeros to `size`."""
    return x[:, :, :size] if x.shape[2] >= size else pad(x, (0, 0, 0, size - x.shape[2]))


def _first(mask: Tensor | None, rows: slice, size: int) -> Tensor | None:
    """The part of a mask [B or 1, Hq or 1, Lq or 1, Lk or 1] for `rows` and the first keys, padded to `size` each."""
    if mask is None:
        return None
    if mask.shape[2] > 1:
        mask = mask[:, :, rows]
        mask = pad(mask, (0, 0, 0, size - mask.shape[2]))
    if mask.shape[3] > 1:
        mask = mask[..., :size]
        mask = pad(mask, (0, size - mask.shape[3]))
    return mask


def _finite(x: Tensor) -> Tensor:
    """Whether each row is finite or -inf: what a GPU reports later stays as its kernel left it."""
    return (x < torch.inf).all(-1, keepdim=True) if x.dim() == 4 else x < torch.inf
