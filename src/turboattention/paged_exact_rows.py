"""The first queries of a server's sequences, computed in floating point (`TailBlocks.exact_rows`, `exact_rows.py`).

A scheduler may end the first chunk of a prompt anywhere, so the slots keep the keys and values of these tokens: a
query's result is the same however the prompt is split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .float_attention import float_attention, float_lse, visible
from .kv.paged import PagedBatch, TailBlocks
from .params import AttentionParams
from .softmax import sink_share
from .uploads import upload


@dataclass(frozen=True)
class _Firsts:
    """First tokens in a step, of S sequences with n positions each.

    slots: int64 [S], the spare slot for sequences without such tokens. here: bool [S, n], positions of this step.
    tokens: int64 [S, n], their rows of the flat tokens; any others where not `here`.
    """

    slots: Tensor
    here: Tensor
    tokens: Tensor


def write_exact_rows(
    layer: int,
    batch: PagedBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    tail_blocks: TailBlocks,
    params: AttentionParams,
    sinks: Tensor | None,
) -> None:
    """Keep the keys and values of first tokens in `tail_blocks.first`, and write their queries' attention to `out`.

    Arguments as in `turboattention.paged.paged_attention`. Rows that are not finite stay as they are. Does not wait for
    a GPU; there, steps of one token per sequence (`max_query_len`) have no such rows.
    """
    size = tail_blocks.exact_rows
    firsts = batch.once(("first", size), lambda: _firsts(batch, len(q), size, tail_blocks.num_slots))
    if firsts is None:
        return
    here = firsts.here[..., None, None]
    kept = []
    for new, first in zip((k, v), tail_blocks.first, strict=True):
        rows = torch.where(here, new[firsts.tokens].to(first.dtype), first[layer][firsts.slots])
        rows = torch.where(rows.isfinite(), rows, 0)
        first[layer][firsts.slots] = rows
        kept.append(rows.transpose(1, 2))
    seen = upload(visible(torch.arange(size), size, replace(params, is_causal=True)), q.device)
    first_q = q[firsts.tokens].transpose(1, 2)
    got = float_attention(first_q, kept[0], kept[1], seen, params)
    if sinks is not None:
        got = got * sink_share(float_lse(first_q, kept[0], seen, params), sinks)
    got = got.transpose(1, 2).to(out.dtype)
    here = firsts.here & got.isfinite().flatten(2).all(2)
    if not q.is_cuda:
        out[firsts.tokens[here]] = got[here]
        return
    # Without knowing how many there are: through a copy with one row more, for those that are not here.
    target = torch.where(here, firsts.tokens, len(out)).flatten()
    longer = out.new_zeros(len(out) + 1, *out.shape[1:]).index_copy_(0, target, got.flatten(0, 1))
    marked = torch.zeros(len(out) + 1, dtype=torch.bool, device=out.device).index_fill_(0, target, True)
    out.copy_(torch.where(marked[:-1, None, None], longer[:-1], out))


def _firsts(batch: PagedBatch, tokens: int, size: int, spare: int) -> _Firsts | None:
    """The first tokens among a step's flat `tokens`; None if there are none, as far as this is known."""
    on_gpu = batch.seq_lens.is_cuda
    if not tokens or (on_gpu and batch.max_query_len == 1):
        return None
    start, lengths, slots = batch.query_start.long(), batch.seq_lens.long(), batch.tail_slots.long()
    count = start[1:] - start[:-1]
    before = lengths - count
    begins = (count > 0) & (before < size)
    if not on_gpu:  # look only at sequences that have such tokens
        if not bool(begins.any()):
            return None
        start, before, count, slots, begins = (x[begins] for x in (start[:-1], before, count, slots, begins))
    else:
        start = start[:-1]
    ahead = torch.arange(size, device=start.device) - before[:, None]
    here = begins[:, None] & (ahead >= 0) & (ahead < count[:, None])
    return _Firsts(torch.where(begins, slots, spare), here, (start[:, None] + ahead).clamp(0, tokens - 1))
