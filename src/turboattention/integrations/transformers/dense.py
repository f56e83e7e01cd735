"""Attention over a model's own full-precision cache (no `TurboCache`): dynamic, static, or none at all."""

from __future__ import annotations

from torch import Tensor

from ...errors import ShapeError
from ...words import number_of
from .call import LayerCall
from .masks import MaskPlan
from .ragged import alike


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan | None, is_causal: bool, call: LayerCall
) -> Tensor:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv] -> [B, Hq, Lq, Dv].

    Keys that no query may see (padding, the empty part of a static cache) are removed before quantization. Rows of
    padded queries are zero.
    """
    if plan is None:
        return call.dense(query, key, value, None, is_causal)
    if plan.is_causal and plan.from_function and plan.width < key.shape[2]:
        # A sliding layer that records its past may return keys older than those in its mask.
        key, value = key[:, :, -plan.width :], value[:, :, -plan.width :]
    plan = _fit(plan, key.shape[2])
    if plan.visible is None:
        return call.dense(query, key, value, plan.matrix, plan.is_causal)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    length = query.shape[2]
    for rows, columns in alike(plan.visible.expand(len(query), -1)):
        rows, columns = rows.to(query.device), columns.to(query.device)
        if not len(columns):
            continue
        q, (k, v) = query[rows], (x[rows].index_select(2, columns) for x in (key, value))
        if plan.is_causal:
            own = columns - (key.shape[2] - length)
            own = own[own >= 0]
            if len(own):
                out[rows[:, None], :, own] = call.dense(q.index_select(2, own), k, v, None, True).transpose(1, 2)
        else:
            mask = plan.matrix
            if mask is not None:
                mask = (mask if mask.shape[0] == 1 else mask[rows]).index_select(3, columns)
            out[rows] = call.dense(q, k, v, mask, False)
    return out


def _fit(plan: MaskPlan, keys: int) -> MaskPlan:
    if plan.width == keys:
        return plan
    if plan.is_causal or plan.width < keys:
        raise ShapeError(f"attention_mask: expected {number_of(keys, 'key position')}, got {plan.width}")
    return MaskPlan(plan.mask[..., :keys], plan.window, plan.from_function)
