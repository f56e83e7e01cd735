"""The guard without a `TurboCache`: a layer's first prompt against exact attention, on a few rows.

INT8 keys and queries cannot represent layers whose logits are far beyond 100, without any sign of it. The first call
of a layer that reads a whole prompt compares sampled rows of one sequence, and warns once of heads beyond the
bound of 8 bits (numerics.md, The guard). Nothing is changed: there is no width to raise.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import GuardWarning
from ...guard import BOUNDS
from ...modes import in_own_modes
from ...reference.exact import exact_attention
from .call import LayerCall
from .masks import MaskPlan

_ROWS = 32
_TOKENS = 512
_FEWEST = 64  # a prompt of fewer tokens says little
_BOUND = BOUNDS[8]

_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@in_own_modes
def check_first_prompt(
    module: nn.Module,
    out: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: MaskPlan | None,
    causal: bool,
    call: LayerCall,
) -> None:
    """`out` [B, Hq, Lq, D] as `attend_dense` gave it for q, k, v. Warns `GuardWarning`, once for each module."""
    q, k, v = qkv
    guard = "adapt" if call.config is None else call.config.guard
    causal = causal if plan is None else plan.is_causal
    if guard == "off" or module in _looked_at or not causal or not len(q) or not _FEWEST <= q.shape[2] == k.shape[2]:
        return
    _looked_at.add(module)
    length = min(q.shape[2], _TOKENS)
    row, visible = 0, torch.ones(length, dtype=torch.bool)
    if plan is not None and plan.visible is not None:  # the sequence with the least padding
        row = int(plan.visible.sum(1).argmax())
        visible = plan.visible[row, :length]
    rows = torch.arange(length // 2, length)[visible[length // 2 :]]
    if not len(rows):
        return
    rows = rows[torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long()]
    keys = torch.arange(length)
    mask = visible & (keys <= rows[:, None]) & (keys > rows[:, None] - (call.window or length))
    at = rows.to(q.device)
    q, k, v, out = (x[row : row + 1] for x in (q, k[:, :, :length], v[:, :, :length], out))
    exact = exact_attention(q.index_select(2, at), k, v, mask, False, call.scale, softcap=call.softcap)
    lost = out.index_select(2, at).double() - call.with_sinks(exact if call.sinks is not None else exact[0])
    _warn(module, _errors(lost, exact[0], k.shape[1]))


def _errors(lost: Tensor, whole: Tensor, kv_heads: int) -> Tensor:
    """Relative error per KV head, float64 [Hkv]."""
    lost, whole = ((x.unflatten(1, (kv_heads, -1)) ** 2).sum((0, 2, 3, 4)) for x in (lost, whole))
    return (lost / whole.clamp(min=1e-300)).sqrt().nan_to_num(nan=torch.inf).cpu()


def _warn(module: Any, errors: Tensor) -> None:
    failing = (~(errors <= _BOUND)).nonzero().flatten().tolist()
    if failing:
        worst = max(failing, key=lambda head: float(errors[head]))
        warnings.warn(
            f"layer {getattr(module, 'layer_idx', '?')}: KV heads {', '.join(map(str, failing))} lose too much in INT8 "
            f"attention (head {worst} has relative error {float(errors[worst]):.2f}, bound {_BOUND:.2f}); 8 bits are "
            "too few for them: compare with another attn_implementation before you rely on the answers",
            GuardWarning,
            stacklevel=2,
        )
