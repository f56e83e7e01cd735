"""Exact layers, which INT8 cannot represent: keys and values in the model's own dtype, and the model's own attention.

`ExactKV` is immutable, so copies of a cache share it and a failed call does not change it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...errors import InputError, UnsupportedError
from ...guard_sample import QUERIES
from ...kv.attachments import ExactPast
from ...kv.window import CROPPED
from .call import LayerCall
from .masks import MaskPlan
from .ragged import pack_index, take
from .views import own_memory


@dataclass(frozen=True)
class ExactKV:
    """keys: [B, Hkv, n, D], values: [B, Hkv, n, Dv], all positions from `first` on, including padding (zeros).
    queries: [B, Hq, m, D], those of the last positions, at most `guard_sample.QUERIES`, while the guard may need them.
    """

    keys: Tensor
    values: Tensor
    first: int = 0
    queries: Tensor | None = None

    @classmethod
    def empty(cls, key: Tensor, value: Tensor) -> ExactKV:
        """An empty one, for keys and values like these [B, Hkv, T, D or Dv]."""
        keys, values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key, value))
        return cls(keys, values)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values) if self.queries is None else (self.keys, self.values, self.queries)

    @property
    def end(self) -> int:
        return self.first + self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(x.untyped_storage().nbytes() for x in self.tensors)

    def extended(self, key: Tensor, value: Tensor, query: Tensor | None = None) -> ExactKV:
        """A copy with new tokens appended; without a `query`, `queries` are dropped."""
        if query is not None:
            query = query if self.queries is None else torch.cat((self.queries, query), 2)
            query = query[:, :, -QUERIES:].clone()
        return ExactKV(torch.cat((self.keys, key), 2), torch.cat((self.values, value), 2), self.first, query)

    def past(self, valid: Tensor | None) -> ExactPast:
        """The tokens for the guard, before any are released. valid: bool [B, end], which positions are tokens."""
        asked = self.keys[:, :1, :0] if self.queries is None else self.queries
        if valid is None:
            valid = torch.ones(len(self.keys), self.end, dtype=torch.bool)
        index, last = pack_index(valid)[0], slice(self.end - asked.shape[2], self.end)
        positions = valid.cumsum(1) - 1
        return ExactPast(take(self.keys, index), take(self.values, index), asked, positions[:, last], valid[:, last])

    def behind(self, window: int | None) -> ExactKV:
        """Without positions before the window of the next query, 16 to 31 late so that a crop of 16 stays possible."""
        gone = 0 if window is None else self.end - window + 1 - CROPPED - self.first
        if gone < CROPPED:
            return self
        return ExactKV(self.keys[:, :, gone:].clone(), self.values[:, :, gone:].clone(), self.first + gone)

    def check_crop(self, length: int, window: int | None) -> None:
        """Raises `InputError` if later queries would see released positions."""
        if window is not None and max(length - window + 1, 0) < self.first:
            raise InputError(
                f"length: expected a crop of at most {CROPPED} tokens with a window of {window} (older ones were "
                f"released), got {length} of {self.end}"
            )

    def cropped(self, length: int) -> ExactKV:
        """The positions before `length`."""
        gone = max(self.end - max(length, self.first), 0)
        keys, values, *queries = (own_memory(x[:, :, : max(x.shape[2] - gone, 0)]) for x in self.tensors)
        return ExactKV(keys, values, self.first, *queries)

    def selected(self, index: Tensor) -> ExactKV:
        """Sequences `index`, int64 [B']."""
        keys, values, *queries = (x.index_select(0, index.to(x.device)) for x in self.tensors)
        return ExactKV(keys, values, self.first, *queries)


def without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [B, H, T, D] with zeros where `valid` (bool [B, T]) is False, because padding may contain NaN."""
    return x if valid is None else torch.where(valid.to(x.device)[:, None, :, None], x, 0.0)


def attend_exactly(
    module: nn.Module,
    query: Tensor,
    held: ExactKV,
    plan: MaskPlan | None,
    valid: Tensor | None,
    is_causal: bool,
    call: LayerCall,
) -> Tensor:
    """query [B, Hq, Lq, D], the last positions of `held` -> [B, Hq, Lq, Dv], by the model's own attention.

    This is SDPA, or the model's eager function for options that SDPA does not have. Rows of padded queries are zero.
    `valid`: which positions, from 0 on, are tokens (bool [B, L]); None: all.
    """
    causal = plan.is_causal if plan is not None else is_causal
    mask = _mask(query, held, plan, valid, causal, call.window)
    if call.softcap is None and call.sinks is None:
        attend, options = AttentionInterface()["sdpa"], {"is_causal": causal}
    else:
        attend, options = _eager(module), {"softcap": call.softcap, "s_aux": call.sinks}
        options = {name: value for name, value in options.items() if value is not None}
        mask = _additive(_causal(query, held, None) if mask is None and causal else mask, query.dtype)
    scale = query.shape[3] ** -0.5 if call.scale is None else call.scale
    out, _ = attend(module, query, held.keys, held.values, mask, scaling=scale, dropout=0.0, **options)
    return without_padding(out.transpose(1, 2), None if valid is None else valid[:, -query.shape[2] :])


def _mask(
    query: Tensor, held: ExactKV, plan: MaskPlan | None, valid: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """The mask [B or 1, H or 1, Lq, n] over the positions held, boolean or additive; None if a causal mask aligned to
    the first key is equivalent."""
    queries, keys = query.shape[2], held.keys.shape[2]
    given = None if plan is None else plan.matrix
    given = None if given is None else given[..., held.first : held.end]
    inside = window is None or keys <= window or not causal
    if given is None and valid is None and inside and (not causal or queries in (1, keys)):
        return None
    seen = _causal(query, held, window) if causal else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    if valid is not None:
        seen = seen & valid[:, None, None, held.first : held.end].to(query.device)
    if given is None or given.dtype == torch.bool:
        seen = seen if given is None else seen & given
        return (seen | ~seen.any(-1, keepdim=True)).expand(-1, -1, queries, keys)  # a row of nothing would be NaN
    hidden = torch.finfo(query.dtype).min / 2
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, hidden) + given.to(query.dtype).clamp(
        min=hidden
    )


def _causal(query: Tensor, held: ExactKV, window: int | None) -> Tensor:
    key = torch.arange(held.keys.shape[2], device=query.device)
    row = key[len(key) - query.shape[2] :, None]
    seen = key <= row
    return (seen if window is None else seen & (key > row - window))[None, None]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a boolean mask is True, else half the smallest number, so that the sum of two is finite."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min / 2)


def _eager(module: nn.Module) -> Callable[..., Any]:
    found = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if found is None:
        raise UnsupportedError(
            f"exact_layers: {type(module).__name__} has no eager attention function, which its softcap or sinks need"
        )
    return found
