"""Padding is not stored in a cache: finds the positions that are tokens, and attends over these only."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...kv.cache import KVCache
from ...words import number_of
from .call import LayerCall
from .masks import MaskPlan
from .ragged import pack_index, put_back, take, take_columns, take_rows


def valid_after(plan: MaskPlan | None, known: Tensor | None, past: int, new: int, batch: int) -> Tensor | None:
    """Which positions are tokens after this call: bool [B, past + new]; None if all are.

    Args:
        known: the same for the `past` positions stored before, bool [B, past] or None.

    Raises:
        InputError: the mask contradicts the stored padding.
    """
    if plan is not None and plan.width != past + new:
        raise InputError(
            f"attention_mask: expected {number_of(past + new, 'position')} ({past} in the TurboCache, {new} new), got "
            f"{plan.width}"
        )
    visible = plan.visible if plan is not None else None
    if visible is None and known is None:
        return None
    known, visible = (
        torch.ones(batch, length, dtype=torch.bool) if x is None else x.expand(batch, -1)
        for x, length in ((known, past), (visible, past + new))
    )
    shown = visible[:, :past] & ~known
    _check_agreement(shown, "shows padding, which was not stored")
    if plan is None or plan.is_causal:
        _check_agreement(known & ~visible[:, :past], "hides tokens that were stored")
    valid = torch.cat([known, visible[:, past:]], 1)
    return None if bool(valid.all()) else valid


def _check_agreement(wrong: Tensor, what: str) -> None:
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        raise InputError(
            "attention_mask: expected the padding under which the TurboCache stored its tokens, got a mask that "
            f"{what}, in row {row}, {int(wrong[row].sum())} of {wrong.shape[1]} positions"
        )


def attend_tokens(
    query: Tensor,
    kv: KVCache,
    new: tuple[Tensor, Tensor] | None,
    plan: MaskPlan | None,
    valid: Tensor | None,
    is_causal: bool,
    call: LayerCall,
) -> Tensor:
    """query [B, Hq, Lq, D] over `kv` and the `new` keys and values, which are then appended.

    Tokens are packed to one side, so that padding does not enter tiles, means or sinks; rows of padded queries are
    zero. `valid`: as returned by `valid_after`.
    """
    causal = plan.is_causal if plan is not None else is_causal
    mask = plan.matrix if plan is not None else None
    if valid is None:
        return call.cached(query, kv, new, None, mask, causal)
    if mask is not None:
        mask = take_columns(mask, valid, False if mask.dtype == torch.bool else float("-inf"))
    own = valid[:, valid.shape[1] - query.shape[2] :]
    if bool(own.all()):
        return call.cached(query, kv, new, None, mask, causal)
    index, lengths = pack_index(own, "right" if new is None else "left")
    if not index.shape[1]:
        return query.new_zeros(*query.shape[:3], kv.v_head_dim)
    if mask is not None:
        mask = take_rows(mask, index)
    packed = take(query, index)
    if new is None:
        out = call.cached(packed, kv, None, None, mask, causal)
    else:
        out = call.cached(packed, kv, (take(new[0], index), take(new[1], index)), lengths, mask, causal)
    return put_back(out, index, own)
