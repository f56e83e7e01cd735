"""`StoreArgs` of csrc/cpu/store.h: the new tokens of a step, for caches and for pages that a server manages."""

from __future__ import annotations

import ctypes
import importlib

from torch import Tensor

from .attention import PageSections
from .rows import FloatRows, Int8Rows, check_size

_cpu = importlib.import_module("turboattention._cpu")


class Store(ctypes.Structure):
    """Field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "head_dim", "value_dim", "tokens", "rotate")),
        ("k", FloatRows),
        ("v", FloatRows),
        ("mean", ctypes.c_void_p),
        ("mean_from", ctypes.c_int64),
        ("universal", ctypes.c_void_p * 2),
        ("before", ctypes.c_void_p),
        ("tail", Int8Rows),
        ("fresh", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("fresh_blocks", "page_bytes", "search")),
        ("layout", PageSections),
        *((name, ctypes.c_int64) for name in ("sink_blocks", "sink_bytes")),
        ("sinks", PageSections),
        ("order", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]

    def fill_blocks(self, fresh: Tensor | None) -> None:
        """fresh: int64 [B, F], page addresses for the blocks that the step fills, from the block on that contains the
        first tail row of a sequence; 0 after the last, and for blocks that are not kept. None if none fills. It must
        outlive the call."""
        self.fresh = None if fresh is None else fresh.data_ptr()
        self.fresh_blocks = 0 if fresh is None else fresh.shape[1]


check_size(Store, _cpu.store_bytes)
