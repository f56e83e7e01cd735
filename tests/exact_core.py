"""An exact replacement for the core, without quantization, so that any mistake of an integration is visible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 8


class ExactCache:
    """The part of `KVCache` that integrations use, with floats. Evicted tokens become NaN."""

    head_bits = ()  # there is nothing to decide

    def __init__(
        self,
        batch_size,
        num_kv_heads,
        head_dim,
        *,
        v_head_dim=None,
        window_size=None,
        device=None,
        dtype=None,
        **_: Any,
    ):
        self.num_kv_heads, self.head_dim, self.v_head_dim = num_kv_heads, head_dim, v_head_dim or head_dim
        self.window_size, self.label, self.max_tokens = window_size, None, None
        empty = tuple(
            torch.zeros(num_kv_heads, 0, width, device=device, dtype=dtype) for width in (head_dim, self.v_head_dim)
        )
        self.rows = [empty] * batch_size

    @property
    def token_shape(self) -> tuple[int, int, int, int]:
        return self.batch_size, self.num_kv_heads, self.head_dim, self.v_head_dim

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor([k.shape[1] for k, _ in self.rows], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.rows)

    def append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        self.rows = [
            tuple(torch.cat([old, new[b, :, :n]], 1) for old, new in zip(self.rows[b], (k, v), strict=True))
            for b, n in enumerate(counts)
        ]

    def evict(self) -> None:
        if self.window_size is not None:
            for b, length in enumerate(self.seq_lens.tolist()):
                gone = max(0, (length - self.window_size + 1) // BLOCK - 1) * BLOCK
                self.rows[b] = tuple(torch.cat([x[:, :gone] * torch.nan, x[:, gone:]], 1) for x in self.rows[b])

    def check_crop(self, length: int | Tensor) -> None:
        pass

    def crop(self, length: int | Tensor) -> None:
        kept = torch.as_tensor(length).expand(self.batch_size).tolist()
        self.rows = [(k[:, :n], v[:, :n]) for (k, v), n in zip(self.rows, kept, strict=True)]

    def reorder(self, index: Tensor) -> None:
        self.rows = [self.rows[i] for i in index.tolist()]

    def clone(self) -> ExactCache:
        other = object.__new__(ExactCache)
        other.__dict__ = {**self.__dict__, "rows": list(self.rows)}
        return other


def exact_attention(
    q, k, v, attn_mask=None, is_causal=False, scale=None, *, window_size=None, softcap=None, return_lse=False, **_: Any
):
    """`turbo_attention` in floats, one row of the batch at a time."""
    masks = [None] * len(q) if attn_mask is None else attn_mask.expand(len(q), -1, -1, -1)
    first = k.shape[2] - q.shape[2]
    parts = [
        _attend(q[b], k[b], v[b], first, q.shape[2], masks[b], is_causal, scale, window_size, softcap)
        for b in range(len(q))
    ]
    out, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def exact_attention_with_cache(
    q,
    cache: ExactCache,
    k_new=None,
    v_new=None,
    *,
    lengths=None,
    attn_mask=None,
    is_causal=True,
    scale=None,
    window_size=None,
    softcap=None,
    return_lse=False,
    **_: Any,
):
    """`turbo_attention_with_kvcache` in floats."""
    batch, count = len(q), q.shape[2]
    counts = [count] * batch if lengths is None else lengths.tolist()
    if k_new is not None:
        cache.append(k_new, v_new, counts)
    ends = cache.seq_lens.tolist()
    if attn_mask is not None:
        assert attn_mask.shape[3] == max(ends), "columns are the positions of the longest sequence"
        attn_mask = attn_mask.expand(batch, -1, -1, -1)
    parts = []
    for b, (k, v) in enumerate(cache.rows):
        mask = None if attn_mask is None else attn_mask[b, :, :, : ends[b]]
        first = ends[b] - counts[b]
        parts.append(_attend(q[b], k, v, first, counts[b], mask, is_causal, scale, window_size, softcap))
    if k_new is not None:
        cache.evict()
    out, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _attend(q, k, v, first, rows, mask, causal, scale, window, softcap) -> tuple[Tensor, Tensor]:
    """One sequence: query i has position `first + i`; rows from `rows` on are padding."""
    position, key = first + torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    seen = (torch.arange(q.shape[1]) < rows)[:, None] & torch.ones_like(key, dtype=torch.bool)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
    seen, bias = seen[None], torch.zeros(())
    if mask is not None:
        seen, bias = (seen & mask, bias) if mask.dtype == torch.bool else (seen, mask)
    used = seen.any(0).any(0)[:, None]
    k, v = (torch.where(used, x, 0.0).repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    logits = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits + bias).masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = torch.where(lse[..., None] > -torch.inf, torch.softmax(logits, -1), 0.0)
    return weights @ torch.nan_to_num(v), lse


STANDINS = {
    "call.turbo_attention": exact_attention,
    "call.turbo_attention_with_kvcache": exact_attention_with_cache,
    "layer.KVCache": ExactCache,
}
"""By the name, in the transformers integration, that each takes the place of."""
