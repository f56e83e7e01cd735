"""The guard without a `TurboCache`: a layer's first prompt against exact attention, on a few rows.

INT8 keys and queries silently fail to represent layers whose logits are far beyond 100. The first call of a layer with
at least 32 queries, over any cache of the model's own, compares sampled rows of one sequence with exact attention, and
issues one warning for heads beyond the bound of 8 bits (numerics.md, The guard). If calls are shorter (a short prompt,
a prompt in small pieces, decode steps), their rows that see more than 16 keys are pooled until there are 16 of them.
Results do not change, since there is no wider format. Compiled calls are not checked.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GuardWarning
from ...guard import BOUNDS, lose_too_much
from ...guard_sample import QUERIES, TOKENS
from ...modes import in_own_modes
from ...reference.exact import exact_attention
from .call import LayerCall
from .masks import MaskPlan, shown_by

_FEWEST = 32  # fewer queries give no reliable estimate
_ENOUGH = _FEWEST // 2
_BOUND = BOUNDS[8]


@dataclass
class _Sample:
    """Sums of squares per KV head, float64 [Hkv] on the CPU: of errors and of exact outputs; and the number of rows."""

    lost: Tensor | float = 0.0
    whole: Tensor | float = 0.0
    rows: int = 0


_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_begun: weakref.WeakKeyDictionary[nn.Module, _Sample] = weakref.WeakKeyDictionary()


@in_own_modes
def check_first_prompt(
    module: nn.Module,
    out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: MaskPlan | None,
    causal: bool,
    call: LayerCall,
) -> None:
    """`out`: [B, Hq, Lq, D], the result of `attend_dense` for q, k, v. Warns `GuardWarning`, once for each module."""
    q, k, v = qkv
    guard = "adapt" if call.config is None else call.config.guard
    if guard == "off" or module in _looked_at or not len(q) or q.shape[2] > k.shape[2]:
        return
    if q.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph cannot wait for the device
        return
    row, mask = _shown(q.shape[2], k.shape[2], plan, causal, call.window)
    rows, enough = _rows(mask, q.shape[2])
    if enough:
        _looked_at.add(module)
    if not len(rows):
        return
    keys = mask[rows].any(0).nonzero().flatten()
    mask, at, keys = mask[rows][:, keys], rows.to(q.device), keys.to(q.device)
    q, k, v, out = (x[row : row + 1] for x in (q, k, v, out))
    k, v = (x[:, :, -plan.width :] if plan is not None and plan.is_causal else x for x in (k, v))
    k, v = (x.index_select(2, keys) for x in (k, v))
    exact = exact_attention(q.index_select(2, at), k, v, mask, False, call.scale, softcap=call.softcap)
    lost = out.index_select(2, at).double() - call.with_sinks(exact if call.sinks is not None else exact[0])
    sample = _begun.pop(module, None) or _Sample()
    sample.lost, sample.whole = sample.lost + _squares(lost, k.shape[1]), sample.whole + _squares(exact[0], k.shape[1])
    sample.rows += len(rows)
    if enough or sample.rows >= _ENOUGH:
        _looked_at.add(module)
        _warn(module, sample)
    else:
        _begun[module] = sample


def _rows(mask: Tensor, queries: int) -> tuple[Tensor, bool]:
    """The rows to compare, given the visible keys `mask` bool [L, Lk], and whether they are enough. Rows of fewer keys
    than `_ENOUGH` are padding, or may be computed in floating point (`TurboConfig.exact_rows`)."""
    rows = (mask.sum(1) > _ENOUGH).nonzero().flatten()
    if queries < _FEWEST:
        return rows, False
    later = rows[rows >= len(mask) // 2]
    return later[torch.linspace(0, len(later) - 1, min(QUERIES, len(later))).long()], len(later) >= _ENOUGH


def _shown(queries: int, keys: int, plan: MaskPlan | None, causal: bool, window: int | None) -> tuple[int, Tensor]:
    """The sequence with the least padding, and which keys its first `TOKENS` queries see: bool [Lq, Lk] on the CPU, of
    the last Lk keys that a causal mask is for. Not of all queries: a long prompt's would take a gigabyte."""
    first = min(queries, TOKENS)
    if plan is not None and not plan.is_causal:
        shown = shown_by(plan.mask[..., :first, :keys]).any(1)  # by some head
        row = int(shown.sum((1, 2)).argmax())
        return row, shown[row].expand(first, -1).cpu()
    row, width = 0, keys if plan is None else min(plan.width, keys)
    at, positions = torch.arange(width), torch.arange(width - queries, width)[:first, None]
    shown = torch.ones(first, width, dtype=torch.bool)
    if causal or plan is not None:
        shown = (at <= positions) & (at > positions - (window or width))
    if plan is not None and plan.visible is not None:
        row = int(plan.visible.sum(1).argmax())
        visible = plan.visible[row, -width:]
        shown = shown & visible & visible[-queries:][:first, None]
    return row, shown


def _squares(x: Tensor, kv_heads: int) -> Tensor:
    """Sums of x [1, Hq, L, D] squared, float64 [Hkv] on the CPU."""
    return (x.double().unflatten(1, (kv_heads, -1)) ** 2).sum((0, 2, 3, 4)).cpu()


def _warn(module: Any, sample: _Sample) -> None:
    lost, whole = torch.as_tensor(sample.lost), torch.as_tensor(sample.whole)
    errors = (lost / whole.clamp(min=1e-300)).sqrt().nan_to_num(nan=torch.inf)
    failing = (~(errors <= _BOUND)).nonzero().flatten().tolist()
    if failing:
        worst = max(failing, key=lambda head: float(errors[head]))
        warnings.warn(
            f"layer {getattr(module, 'layer_idx', '?')}: {lose_too_much(failing)} in INT8 attention "
            f"(head {worst} has relative error {float(errors[worst]):.2f}, bound {_BOUND:.2f}); 8 bits are too few: "
            "compare with another attn_implementation before you rely on the answers",
            GuardWarning,
            stacklevel=2,
        )
