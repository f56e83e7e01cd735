"""The parameters of attention, from the public calls down to the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionParams:
    """Parameters of attention, as `turbo_attention` describes them; checked.

    scale: factor of the logits. window_size, softcap: None for none. attn_mask: [B or 1, Hq or 1, Lq or 1, Lk or 1],
    bool or additive float, or None.
    """

    is_causal: bool
    scale: float
    window_size: int | None = None
    softcap: float | None = None
    attn_mask: Tensor | None = None
