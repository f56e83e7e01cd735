"""Heads of a call without a cache that INT8 keys and queries cannot represent, computed in floating point.

The error of a logit grows with the norms of its query and key. Where their product is large, sampled queries are
compared with attention in floating point; where it is not, INT8 is known to be enough (numerics.md, The guard).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .config import TurboConfig
from .errors import GuardWarning
from .float_attention import float_attention, float_lse, visible
from .guard import BOUNDS, lose_too_much, stacklevel_outside
from .guard_sample import QUERIES, relative_errors
from .params import AttentionParams

LARGE = 60.0
"""Logits, scale * rms |q| * rms |k|, from which a head is compared."""
_MEASURED = 1024  # rows whose norms are taken
_LOGITS = 1 << 24  # computed at once: 64 MiB in float32


def with_exact_heads(
    config: TurboConfig,
    result: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: AttentionParams,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`result` (out [B, Hq, Lq, Dv], lse [B, Hq, Lq]) with the KV heads computed in floating point, in place, whose
    relative error exceeds the bound of 8 bits; lse only `with_lse`.

    With `guard="warn"`, warns `GuardWarning` about these heads instead; with "off", nothing is compared. Tensors on a
    GPU are not compared, since the host would have to wait for the device.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D], v: [B, Hkv, Lk, Dv]: finite.
    """
    if config.guard == "off" or q.device.type != "cpu" or not q.numel() or not k.numel():
        return result
    heads = (_logits(q, k, params) >= LARGE).nonzero().flatten()
    if not len(heads):
        return result
    queries = q.shape[2]
    sampled = torch.linspace(queries // 2, queries - 1, min(QUERIES, queries - queries // 2)).long()
    (exact,) = _attend(q, k, v, params, heads, sampled, with_lse=False)
    got = result[0].index_select(1, _queries_of(heads, q, k)).index_select(2, sampled)
    heads = heads[relative_errors(got, exact, len(heads)) > BOUNDS[8]]
    if not len(heads):
        return result
    if config.guard == "warn":
        message = f"{lose_too_much(heads.tolist())} in INT8 attention (relative error above {BOUNDS[8]})"
        warnings.warn(
            f'{message}; guard="adapt" computes such heads in floating point',
            GuardWarning,
            stacklevel=stacklevel_outside(),
        )
        return result
    at = _queries_of(heads, q, k)[:, None]
    rows = max(1, _LOGITS // (len(q) * len(at) * k.shape[2]))
    for part in torch.arange(queries).split(rows):
        for target, values in zip(result, _attend(q, k, v, params, heads, part, with_lse), strict=False):
            target[:, at, part] = values.to(target.dtype)
    return result


def _logits(q: Tensor, k: Tensor, params: AttentionParams) -> Tensor:
    """scale * rms |q| * rms |k| of each KV head, floats [Hkv]: over all queries of the head and its GQA group."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q2, k2 = (
        torch.linalg.vector_norm(x[:, :, :: -(-x.shape[2] // _MEASURED)], dim=3, dtype=dtype).square() for x in (q, k)
    )
    return abs(params.scale) * (q2.unflatten(1, (k.shape[1], -1)).mean((0, 2, 3)) * k2.mean((0, 2))).sqrt()


def _queries_of(heads: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The query heads of KV `heads`, group by group."""
    group = q.shape[1] // k.shape[1]
    return (heads[:, None] * group + torch.arange(group)).flatten()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, params: AttentionParams, heads: Tensor, rows: Tensor, with_lse: bool
) -> list[Tensor]:
    """`float_attention` of the queries `rows` of KV `heads`, and `with_lse` also their `float_lse`."""
    of_q = _queries_of(heads, q, k)
    seen = visible(k.shape[2] - q.shape[2] + rows, k.shape[2], params)
    mask = params.attn_mask
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, of_q]
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, rows]
    q, k = q[:, of_q][:, :, rows], k[:, heads]
    found = [float_attention(q, k, v[:, heads], seen, params, mask)]
    return [*found, float_lse(q, k, seen, params, mask)] if with_lse else found
