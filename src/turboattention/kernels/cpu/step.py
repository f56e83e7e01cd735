"""A decode step in one call: the launcher of csrc/cpu/step.cpp."""

from __future__ import annotations

import ctypes
import importlib

import torch
from torch import Tensor

from ...config import TurboConfig
from .attention import Arguments, Pages, fill_call, fill_pages, fill_queries
from .rows import FloatRows, float_rows

_cpu = importlib.import_module("turboattention._cpu")


class Step:
    """What stays the same from step to step of a cache: kept until pages or sequences change.

    pages: as for attention. start: int64 [B], position of the buffer's row 0. codes: int8 keys and
    values [B, H, capacity, D], scales: bfloat16 [B, H, capacity], both written into. mean: float32
    [B, H, D] or None, off the keys from position `mean_from` on.
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
    ):
        self.config = config
        self._none = torch.zeros_like(start)
        self._kept = (pages, start, codes, scales, mean)  # what the addresses below point into
        s = self._arguments = _Arguments()
        a = s.attend
        a.batch, a.heads, s.capacity, a.head_dim = codes[0].shape
        a.mean_from = mean_from // config.block_size
        a.page_counts = self._none.data_ptr()
        if pages is not None:
            fill_pages(a, pages)
        a.start = start.data_ptr()
        s.mean_from, self._mean = mean_from, mean
        s.codes[:] = [x.data_ptr() for x in codes]
        s.scales[:] = [x.data_ptr() for x in scales]

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        before: Tensor,
        *,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor] | int:
        """q [B, Hq, Lq, D] and new tokens k, v [B, H, T, D], if any, behind `before` (int64 [B]) stored ones ->
        out [B, Hq, Lq, D] in q's dtype and lse float32 [B, Hq, Lq]; or 0, 1, 2 where q, k, v is not
        finite, and the buffer is as it was. The last query stands at the last token."""
        heads, count = q.shape[1], q.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32)
        s = self._arguments
        a = s.attend
        a.group, a.queries, s.tokens = heads // a.heads, count, 0
        fill_call(a, self.config, causal=causal, window=window, softcap=softcap, mask=None)
        kept_q = fill_queries(a, q, out, self.config.rotate, scale, self._mean)
        kept = [kept_q]
        if k is not None and v is not None:
            s.tokens = k.shape[2]
            s.k, kept_k = float_rows(k)
            s.v, kept_v = float_rows(v)
            kept += [kept_k, kept_v]
        s.before = before.data_ptr()
        a.lse, a.threads = lse.data_ptr(), torch.get_num_threads()
        bad = _cpu.step(ctypes.addressof(s))
        del kept
        return bad - 1 if bad else (out, lse)


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
    ]


if ctypes.sizeof(_Arguments) != _cpu.step_bytes:
    raise ImportError("turboattention._cpu: expected the build of this version, got another: build it anew")
