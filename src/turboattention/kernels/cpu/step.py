"""A decode step in one call: the launcher of csrc/cpu/step.cpp."""

from __future__ import annotations

import ctypes
import importlib

import torch
from torch import Tensor

from ...config import TurboConfig
from ...kv.channel_order import ChannelOrder
from ..inputs import BLOCK, Pages
from .attention import Arguments, channel_table, fill_call, fill_pages, fill_queries, fill_space
from .rows import FloatRows, float_rows

_cpu = importlib.import_module("turboattention._cpu")


LARGEST = BLOCK
"""Tokens of a step that may fill blocks: no sequence then fills two."""


class Step:
    """What stays the same from step to step of a cache: kept until pages or sequences change.

    pages: as for attention. start: int64 [B], position of the buffer's row 0. codes: int8 keys and
    values [B, H, capacity, D or Dv], scales: bfloat16 [B, H, capacity], both written into. mean: float32
    [B, H, D] or None, off the keys from position `mean_from` on. order: that of K's
    channels in compressed pages, or None. The caller may change the page
    addresses, page counts and starts in place between steps.
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
    ):
        self.config, self._order = config, channel_table(order)
        self._none = torch.zeros_like(start)
        self._kept = (pages, start, codes, scales, mean)  # what the addresses below point into
        s = self._arguments = _Arguments()
        a = s.attend
        a.batch, a.heads, s.capacity, a.head_dim = codes[0].shape
        a.value_dim = codes[1].shape[3]
        a.mean_from = mean_from // config.block_size
        a.page_counts = self._none.data_ptr()
        if pages is not None:
            fill_pages(a, pages)
            s.page_bytes, s.search = (pages.compressed or pages.sinks).page_bytes, config.search
        a.start = start.data_ptr()
        s.mean_from, self._mean = mean_from, mean
        s.codes[:] = [x.data_ptr() for x in codes]
        s.scales[:] = [x.data_ptr() for x in scales]

    def append(self, k: Tensor, v: Tensor, before: Tensor, fresh: Tensor | None) -> bool:
        """Stores k, v as `run` does, without queries; False where one is not finite."""
        s = self._copy()
        a = s.attend
        a.queries, a.threads = 0, torch.get_num_threads()
        fill_space(a, self.config, self._order)
        a.mean = None if self._mean is None else self._mean.data_ptr()
        kept = _fill_new(s, k, v, before, fresh)
        bad = _cpu.step(ctypes.addressof(s))
        del kept
        return not bad

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        before: Tensor,
        fresh: Tensor | None,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor] | int:
        """q [B, Hq, Lq, D] and new tokens k, v [B, H, T, D or Dv], if any, behind `before` (int64 [B]) stored ones ->
        out [B, Hq, Lq, Dv] in q's dtype and lse float32 [B, Hq, Lq]; or 0, 1, 2 where q, k, v is not
        finite, and the buffer is as it was. The last query stands at the last token.

        fresh: int64 [B], addresses of pages for the block that a sequence fills, 0 where it fills none;
        None where none does. The rest of the buffer moves to its front.
        """
        heads, count = q.shape[1], q.shape[2]
        out = torch.empty(*q.shape[:-1], self._arguments.attend.value_dim, dtype=q.dtype)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32)
        s = self._copy()
        a = s.attend
        a.group, a.queries = heads // a.heads, count
        fill_call(a, self.config, causal=causal, window=window, softcap=softcap, mask=None)
        kept = [fill_queries(a, self.config, q, out, self._order, scale, self._mean)]
        kept += _fill_new(s, k, v, before, fresh)
        a.lse, a.threads = lse.data_ptr(), torch.get_num_threads()
        bad = _cpu.step(ctypes.addressof(s))
        del kept
        return bad - 1 if bad else (out, lse)

    def _copy(self) -> _Arguments:
        """Of its own for every call: several threads may read one cache."""
        return _Arguments.from_buffer_copy(self._arguments)


def _fill_new(s: _Arguments, k: Tensor | None, v: Tensor | None, before: Tensor, fresh: Tensor | None) -> list[Tensor]:
    """The tokens to store. Returns what must outlive the call."""
    s.before, s.tokens = before.data_ptr(), 0
    s.fresh = None if fresh is None else fresh.data_ptr()
    if k is None or v is None:
        return []
    s.tokens = k.shape[2]
    s.k, kept_k = float_rows(k)
    s.v, kept_v = float_rows(v)
    return [kept_k, kept_v]


class _Arguments(ctypes.Structure):
    """`StepArgs` of csrc/cpu/step.h, field by field."""

    _fields_ = [
        ("attend", Arguments),
        ("k", FloatRows),
        ("v", FloatRows),
        ("tokens", ctypes.c_int64),
        ("mean_from", ctypes.c_int64),
        ("before", ctypes.c_void_p),
        ("codes", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        ("capacity", ctypes.c_int64),
        ("fresh", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
        ("search", ctypes.c_int64),
    ]


if ctypes.sizeof(_Arguments) != _cpu.step_bytes:
    raise ImportError("turboattention._cpu: expected the build of this version, got another: build it anew")
