"""Launcher of integer attention over INT8 rows and packed pages, for few or many query rows.

The host does not read values of tensors: grids follow from shapes; lengths and page tables stay on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import TurboConfig
from ...errors import UnsupportedError
from ...params import AttentionParams
from .. import inputs
from ..inputs import BLOCK, Int8Queries, Pages, QueryPositions, TailRows
from . import configs
from .call import FORMS, AttentionCall, Fresh, with_positive_unit
from .decode_rows import attend_decode_rows
from .ordering import Order
from .prefill_rows import attend_prefill_rows
from .quantize import quantize_queries


def refusal(config: TurboConfig, dtype: torch.dtype) -> str | None:
    """Why these kernels do not support this configuration or dtype, or None."""
    return inputs.refusal(config, dtype, stored_prefill=(False,), softmax=FORMS)


def attend(
    config: TurboConfig,
    q: Tensor,
    query_positions: QueryPositions,
    pages: Pages | None,
    rows: TailRows | None,
    params: AttentionParams,
    *,
    kv_heads: int,
    mean: Tensor | None,
    mean_from_block: int,
    order: Order | None = None,
    quantized: Int8Queries | None = None,
    fresh: Fresh | None = None,
    v_head_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Lq, D] over pages, then rows -> out [B, Hq, Lq, Dv] in q's dtype and lse float32 [B, Hq, Lq].

    `fresh`: keys and values instead of pages and rows, for calls for which `takes_prefill_rows` is true.

    mean: bfloat16 [B, Hkv, D] (in the space of INT8 rows) that keys from block `mean_from_block` on are stored without,
    or None; order: that of K's channels in compressed pages, or None; `quantized`: used instead of q's values;
    v_head_dim: Dv, None if it is D. All tensors on one device. Only `quantize_queries` checks whether q is finite.

    Raises UnsupportedError if `refusal` or `configs.refusal` returns a reason.
    """
    reason = refusal(config, q.dtype) or configs.refusal(q.device)
    if reason:
        raise UnsupportedError(f'backend: expected a configuration that "triton" computes, got one where {reason}')
    out = torch.empty(*q.shape[:-1], v_head_dim or q.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    if quantized is None:
        quantized, _ = quantize_queries(q, kv_heads, query_positions.valid, mean, params.scale, config.rotate, order)
    blocks = (pages.addresses.shape[1] if pages else 0) + (-(-rows.k8.shape[2] // BLOCK) if rows else 0)
    if fresh is not None:
        blocks = -(-fresh.k.shape[2] // BLOCK)
    call = AttentionCall(
        config, with_positive_unit(quantized, params.scale), query_positions, pages, rows, fresh, kv_heads, blocks,
        mean_from_block, params, out, lse,
    )  # fmt: skip
    if takes_prefill_rows(call.group, call.queries):
        attend_prefill_rows(call)
    else:
        attend_decode_rows(call)
    return out, lse


def takes_prefill_rows(group: int, queries: int) -> bool:
    """Whether the prefill kernel (tiles of rows, blocks unpacked first) is used for this number of queries, rather
    than split-KV decode over pages."""
    return queries > 1 and group * queries > configs.LARGEST_DECODE_ROWS
