"""Steps over paged memory: the launchers of csrc/cpu/store.cpp, and of attention over flat tokens."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...config import TurboConfig
from ...kv.layout import PageLayout
from ..inputs import BLOCK
from .attention import Arguments, check_fit, fill_call, page_sections
from .rows import Int8Rows, flat_rows, mean_address
from .store import Store

_cpu = importlib.import_module("turboattention._cpu")


class TailSlots:
    """Tail blocks: codes int8 [..., D] and scales float32 [...] of K and V, contiguous. Sequence b's begin at row
    `first[b]`, with position `start[b]` (int64 [B]), and have `head_rows` for each head; `ring`: see `Int8Rows` of
    csrc/cpu, 0 for none. `memory`: for kernels."""

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
    """B sequences that take `tokens` tokens each, from token `starts[b]` of the flat tensors on, behind `before[b]`
    stored ones. int64 [B], contiguous, as what follows from them."""

    tokens: int
    starts: Tensor
    before: Tensor

    @cached_property
    def flat(self) -> Tensor:
        """Indices of all their tokens, sequence by sequence."""
        return (self.starts[:, None] + torch.arange(self.tokens)).flatten()

    @cached_property
    def valid(self) -> Tensor:
        return torch.full_like(self.before, self.tokens)

    @cached_property
    def after(self) -> Tensor:
        """Tokens stored behind the step."""
        return self.before + self.tokens

    @cached_property
    def full(self) -> Tensor:
        """Blocks that are full then."""
        return self.after // BLOCK

    @cached_property
    def open_start(self) -> Tensor:
        """Where the first block begins that the step touches."""
        return self.before // BLOCK * BLOCK


class PagedCall:
    """What a step asks of layers of one kind. What these have in common is filled in once: Python's share of a step
    of few tokens is not small.

    rows: whose tokens; `group` query heads per KV head, `scale` of logits.
    """

    def __init__(
        self,
        config: TurboConfig,
        layout: PageLayout,
        rows: FlatRows,
        *,
        group: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ):
        self._rows, batch, heads, sections = rows, len(rows.before), layout.num_kv_heads, page_sections(layout)
        s = Store(batch=batch, heads=heads, tokens=rows.tokens, rotate=config.rotate)
        s.head_dim = s.value_dim = layout.head_dim  # keys and values of servers have one
        s.before, s.page_bytes, s.search, s.layout = rows.before.data_ptr(), layout.page_bytes, config.search, sections
        a = Arguments(batch=batch, heads=heads, group=group, queries=rows.tokens)
        a.head_dim = a.value_dim = layout.head_dim
        # Pages of servers have no order of channels.
        a.rotate = config.rotate
        a.scale, a.sinks, a.compressed = scale, sections, sections
        a.first_position, a.valid_rows, a.lengths = (x.data_ptr() for x in (rows.before, rows.valid, rows.after))
        a.page_counts = rows.full.data_ptr()
        fill_call(a, config, causal=True, window=window, softcap=softcap, mask=None)
        s.threads = a.threads = torch.get_num_threads()
        self._store, self._attend = s, a

    def store(self, k: Tensor, v: Tensor, mean: Tensor | None, tail: TailSlots, fresh: Tensor | None) -> None:
        """k, v [T, H, D] into tail rows, and blocks that are full then into pages; `fresh` as for `Store.fill_blocks`.

        mean: bfloat16 [B, H, D] in the stored space, or None. Raises NonFiniteError where k or v is not finite: no page
        is written then, and tail rows from `before` on are to be written anew.
        """
        s, starts = self._store, self._rows.starts
        s.k, kept_k = flat_rows(k, starts)
        s.v, kept_v = flat_rows(v, starts)
        s.mean = mean_address(mean)
        s.tail = tail.memory
        s.fill_blocks(fresh)
        check_fit(_cpu.store(ctypes.addressof(s)))
        del kept_k, kept_v

    def attend(
        self,
        q: Tensor,
        out: Tensor,
        mean: Tensor | None,
        tail: TailSlots,
        addresses: Tensor,
        sinks: Tensor | None = None,
    ) -> bool:
        """q [T, Hq, D] of these rows, causally, over pages and tail rows, which hold their own tokens -> out, likewise.

        mean: as for `store`. addresses: int64 [B, P], of the pages. sinks: float [Hq], or None. False where q is not
        finite: what is not counts as zeros.
        """
        a, starts = self._attend, self._rows.starts
        lse = None if sinks is None else torch.empty((len(starts), q.shape[1], self._rows.tokens))
        a.lse = None if lse is None else lse.data_ptr()
        a.q, kept = flat_rows(q, starts)
        a.out, _ = flat_rows(out, starts)
        a.mean = mean_address(mean)
        a.tail = tail.memory
        a.pages, a.page_stride = addresses.data_ptr(), addresses.shape[1]
        finite = _cpu.attend(ctypes.addressof(a))
        del kept
        if lse is not None and sinks is not None:
            # A softmax with an additional column of logit s is the softmax without it times sigmoid(lse - s).
            share = torch.sigmoid(lse.transpose(1, 2) - sinks.float())[..., None]
            flat = self._rows.flat
            out[flat] = (out[flat].float() * share.flatten(0, 1)).to(out.dtype)
        return finite
