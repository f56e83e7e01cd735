"""Steps over paged memory: the launchers of csrc/cpu/store.cpp, and of attention over concatenated sequences."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...config import TurboConfig
from ...kv.layout import PageLayout
from ...params import AttentionParams
from ..inputs import BLOCK
from .attention import Arguments, fill_call, page_sections, refuse_non_finite
from .rows import Int8Rows, flat_rows, mean_address
from .store import Store

_cpu = importlib.import_module("turboattention._cpu")


class TailSlots:
    """Tail blocks: codes int8 [..., D] and scales float32 [...] of K and V, contiguous. The rows of sequence b begin at
    row `first[b]`, with position `start[b]` (int64 [B]); each head has `head_rows`. `ring`: as in `Int8Rows` of
    csrc/cpu, 0 for none. `memory`: the argument of the kernels."""

    def __init__(
        self,
        codes: tuple[Tensor, Tensor],
        scales: tuple[Tensor, Tensor],
        start: Tensor,
        first: Tensor,
        head_rows: int,
        ring: int,
    ):
        self.codes, self.scales, self._kept = codes, scales, (start, first)
        sides = [(side[0].data_ptr(), side[1].data_ptr()) for side in (codes, scales)]
        self.memory = Int8Rows(*sides, start.data_ptr(), first.data_ptr(), 0, head_rows, ring)


@dataclass(frozen=True)
class FlatRows:
    """B sequences with `tokens` new tokens each, which begin at token `starts[b]` of the concatenated tensors and
    follow `before[b]` stored ones. Unless stated otherwise, tensors are int64 [B] and contiguous."""

    tokens: int
    starts: Tensor
    before: Tensor

    @cached_property
    def flat(self) -> Tensor:
        """int64 [B tokens], the indices of all their tokens, sequence by sequence."""
        return (self.starts[:, None] + torch.arange(self.tokens)).flatten()

    @cached_property
    def valid(self) -> Tensor:
        return torch.full_like(self.before, self.tokens)

    @cached_property
    def after(self) -> Tensor:
        """Tokens stored after the step."""
        return self.before + self.tokens

    @cached_property
    def full(self) -> Tensor:
        """Blocks that are full after the step."""
        return self.after // BLOCK

    @cached_property
    def tail_start(self) -> Tensor:
        """Position of the first block that the step writes to."""
        return self.before // BLOCK * BLOCK


class PagedCall:
    """The calls of a step for layers with equal shapes. Shared arguments are filled in once, because Python overhead is
    a considerable part of a step of few tokens.

    rows: the sequences; `group`: query heads per KV head.
    """

    def __init__(self, config: TurboConfig, layout: PageLayout, rows: FlatRows, params: AttentionParams, *, group: int):
        self._rows, batch, heads, sections = rows, len(rows.before), layout.num_kv_heads, page_sections(layout)
        s = Store(batch=batch, heads=heads, tokens=rows.tokens, rotate=config.rotate)
        s.head_dim = s.value_dim = layout.head_dim  # keys and values of servers have one
        s.before, s.page_bytes, s.search, s.layout = rows.before.data_ptr(), layout.page_bytes, config.search, sections
        a = Arguments(batch=batch, heads=heads, group=group, queries=rows.tokens)
        a.head_dim = a.value_dim = layout.head_dim
        a.rotate = config.rotate
        a.scale, a.sinks, a.compressed = params.scale, sections, sections
        a.first_position, a.valid_rows, a.lengths = (x.data_ptr() for x in (rows.before, rows.valid, rows.after))
        a.page_counts = rows.full.data_ptr()
        fill_call(a, config, params)
        s.threads = a.threads = torch.get_num_threads()
        self._store, self._attend = s, a

    def take_order(self, order: Tensor | None) -> None:
        """Set `ChannelOrder.table` of the pages for the calls that follow, or None; it must outlive them."""
        self._store.order = self._attend.order = None if order is None else order.data_ptr()

    def store(self, k: Tensor, v: Tensor, mean: Tensor | None, tail: TailSlots, fresh: Tensor | None) -> None:
        """Store k, v [T, H, D] in tail rows, then compress full blocks into pages; `fresh` as for `Store.fill_blocks`.

        mean: bfloat16 [B, H, D] in the stored space, or None. Raises NonFiniteError if k or v is not finite: no page is
        written then, and tail rows from `before` on have to be written again.
        """
        s, starts = self._store, self._rows.starts
        s.k, alive_k = flat_rows(k, starts)
        s.v, alive_v = flat_rows(v, starts)
        s.mean = mean_address(mean)
        s.tail = tail.memory
        s.fill_blocks(fresh)
        refuse_non_finite(_cpu.store(ctypes.addressof(s)))
        del alive_k, alive_v

    def attend(
        self,
        q: Tensor,
        out: Tensor,
        mean: Tensor | None,
        tail: TailSlots,
        addresses: Tensor,
        sinks: Tensor | None = None,
    ) -> bool:
        """Causal attention of q [T, Hq, D] over pages and tail rows, which include the new tokens -> out, like q.

        mean: as for `store`. addresses: int64 [B, P], of the pages. sinks: float [Hq], or None. Returns whether q is
        finite: rows that are not count as zeros.
        """
        a, starts = self._attend, self._rows.starts
        lse = None if sinks is None else torch.empty((len(starts), q.shape[1], self._rows.tokens))
        a.lse = None if lse is None else lse.data_ptr()
        a.q, alive = flat_rows(q, starts)
        a.out, _ = flat_rows(out, starts)
        a.mean = mean_address(mean)
        a.tail = tail.memory
        a.pages, a.page_stride = addresses.data_ptr(), addresses.shape[1]
        finite = _cpu.attend(ctypes.addressof(a))
        del alive
        if lse is not None and sinks is not None:
            # A softmax with an additional column of logit s is the softmax without it times sigmoid(lse - s).
            share = torch.sigmoid(lse.transpose(1, 2) - sinks.float())[..., None]
            flat = self._rows.flat
            out[flat] = (out[flat].float() * share.flatten(0, 1)).to(out.dtype)
        return finite
