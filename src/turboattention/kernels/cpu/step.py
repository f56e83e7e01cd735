"""A decode step or a prompt in one call: the launcher of csrc/cpu/step.cpp."""

from __future__ import annotations

import ctypes
import importlib

import torch
from torch import Tensor

from ...config import TurboConfig
from ...kv.channel_order import ChannelOrder
from ...params import AttentionParams
from ..inputs import BLOCK, Pages
from .attention import Arguments, channel_table, fill_call, fill_pages, fill_queries, refuse_non_finite
from .rows import check_size, float_rows, mean_address
from .store import Store

_cpu = importlib.import_module("turboattention._cpu")


LARGEST = BLOCK
"""The largest number of tokens of a step that may fill blocks, so that no sequence fills two."""


class Step:
    """The arguments that steps of a cache share, valid until pages or sequences change.

    pages: as for attention. start: int64 [B], position of row 0 of the buffer. codes: int8 keys and values [B, H,
    capacity, D or Dv], scales: bfloat16 [B, H, capacity], or float32 with `universal`; both written to. mean: bfloat16
    [B, H, D], subtracted from the keys from position `mean_from` on, or None. order: of the channels of K in compressed
    pages, or None. universal: float32 [2, B, H], the scales of all new rows of K and V; None for a scale per row. The
    caller may change the page addresses, page counts and starts in place between steps.
    """

    def __init__(
        self,
        config: TurboConfig,
        pages: Pages | None,
        start: Tensor,
        codes: tuple[Tensor, Tensor],
        scales: tuple[Tensor, Tensor],
        mean: Tensor | None,
        mean_from: int,
        order: ChannelOrder | None = None,
        universal: Tensor | None = None,
    ):
        self.config, self._order, self._mean = config, channel_table(order), mean
        self._none = torch.zeros_like(start)
        self._kept = (pages, start, codes, scales, universal)  # what the addresses below point into
        args = self._arguments = _Arguments()
        a, s = args.attend, args.store
        s.batch, s.heads, args.capacity, s.head_dim = codes[0].shape
        s.value_dim = codes[1].shape[3]
        a.batch, a.heads, a.head_dim, a.value_dim = s.batch, s.heads, s.head_dim, s.value_dim
        a.page_counts = self._none.data_ptr()
        if pages is not None:
            fill_pages(a, pages)
            s.layout, s.page_bytes, s.search = a.compressed, (pages.compressed or pages.sinks).page_bytes, config.search
            s.sinks, s.sink_bytes, s.sink_blocks = a.sinks, pages.sinks.page_bytes, pages.sink_blocks
        s.tail.start, s.rotate = start.data_ptr(), config.rotate
        s.mean, s.mean_from = mean_address(mean), mean_from
        if universal is not None:
            s.universal[:] = universal[0].data_ptr(), universal[1].data_ptr()
        s.order = None if self._order is None else self._order.data_ptr()
        a.mean_from_block = mean_from // config.block_size
        args.codes[:] = [x.data_ptr() for x in codes]
        args.scales[:] = [x.data_ptr() for x in scales]

    def append(self, k: Tensor, v: Tensor, before: Tensor, fresh: Tensor | None) -> None:
        """Store k, v like `run`, without queries."""
        args = self._copy()
        self._call(args, k, v, before, fresh)

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        before: Tensor,
        fresh: Tensor | None,
        params: AttentionParams,
    ) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, Lq, D], with new tokens k, v [B, H, T, D or Dv], if any, after `before` (int64 [B])
        stored ones: out [B, Hq, Lq, Dv] in the dtype of q and lse float32 [B, Hq, Lq]. The last query is at the last
        token.

        fresh: int64 [B, F], addresses of pages for the blocks that a sequence fills, 0 after the last, and for blocks
        that are not kept; None if no sequence fills any. The rest of the buffer moves to its front.

        Raises NonFiniteError if q, k or v is not finite; buffer and pages are then unchanged.
        """
        heads, count = q.shape[1], q.shape[2]
        args = self._copy()
        a = args.attend
        out = torch.empty(*q.shape[:-1], a.value_dim, dtype=q.dtype)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32)
        a.group, a.queries = heads // a.heads, count
        mask = fill_call(a, self.config, params)
        alive = fill_queries(a, self.config, q, out, self._order, params.scale, self._mean)
        a.lse = lse.data_ptr()
        self._call(args, k, v, before, fresh)
        del alive, mask
        return out, lse

    def _call(self, args: _Arguments, k: Tensor | None, v: Tensor | None, before: Tensor, fresh: Tensor | None) -> None:
        s, alive = args.store, None
        s.before = before.data_ptr()
        if k is not None and v is not None:
            s.tokens = k.shape[2]
            s.k, alive_k = float_rows(k)
            s.v, alive_v = float_rows(v)
            alive = alive_k, alive_v
        s.fill_blocks(fresh)
        args.attend.threads = s.threads = torch.get_num_threads()
        non_finite = _cpu.step(ctypes.addressof(args))
        del alive
        refuse_non_finite(non_finite)

    def _copy(self) -> _Arguments:
        """A copy for every call, because several threads may read one cache."""
        return _Arguments.from_buffer_copy(self._arguments)


class _Arguments(ctypes.Structure):
    """`StepArgs` of csrc/cpu/step.h, field by field."""

    _fields_ = [
        ("attend", Arguments),
        ("store", Store),
        ("codes", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        ("capacity", ctypes.c_int64),
    ]


check_size(_Arguments, _cpu.step_bytes)
