"""`KVCache`: sequences as compressed pages with an INT8 buffer behind them, and how they change."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ShapeError
from ..modes import in_own_modes
from .cropping import check_crop, rows_behind
from .growth import Growing
from .handle import leave_graph, new_handle


class KVCache(Growing):
    """Quantized keys and values of `batch_size` sequences (the format is in kv/layout.py).

    The first `config.sink_tokens` of a sequence are pages of INT8, then follow pages of 2 to 8 bits
    a head, then an INT8 buffer of fewer than `block_size + flush_lag` tokens.

    Args:
        batch_size, num_kv_heads, head_dim: at least 0, at least 1, a multiple of 8 up to 512 (256 on GPUs, where the
            reference computes wider heads).
        config: `TurboConfig()` by default.
        head_bits: widths per KV head, [Hkv] or [2, Hkv] (K, V). Without them they follow
            `config.bits`, decided when the first block is compressed and frozen from then on.
        max_tokens: tokens per sequence to reserve memory for; more may be appended.
        device, dtype: where the cache lives, and what `dequantize` returns; by default those of
            the first tokens appended.
        window_size: for sliding-window layers. Blocks that no later query can see are released,
            16 tokens late, so that a crop of so many stays possible.
        k_mean: float [Hkv, D], a calibrated mean of K for smoothing; by default it is taken from
            each sequence's first block.
        v_head_dim: head_dim of values, where it is not that of keys: likewise a multiple of 8 up to 512. Not computed
            by the GPU kernels; the reference takes such caches there.

    Raises:
        ConfigError, ShapeError, DtypeError for arguments out of range.
    """

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """k [B, Hkv, len(self), D] and v [..., Dv] as attended, for inspection and tests; zeros past each
        sequence's length and where blocks were evicted."""
        from .inspection import dequantize

        leave_graph()
        return dequantize(self)

    # -- changing sequences ---------------------------------------------------------------------------

    @in_own_modes
    def crop(self, length: int | Tensor) -> None:
        """Forget tokens past `length` (an int for all sequences, or int64 [B]); shorter ones stay.

        A crop that cuts into a compressed block returns that block's INT8 values to the buffer.

        Raises:
            InputError: negative, or where a sliding window has released what would be needed.
        """
        leave_graph()
        target, kept = self._crop_target(length)
        if self._store is None or self._buffer is None or torch.equal(target, self._lengths):
            return
        self.check_crop(length)
        self.kept = None
        rows = rows_behind(self._store, self._buffer, target, kept)
        self._buffer.take(rows, torch.zeros_like(target), target - kept * self.config.block_size, self._seen(target))
        self._store.truncate(kept.tolist())
        self._lengths = target.clone()

    def check_crop(self, length: int | Tensor) -> None:
        """Raises what `crop` would raise, and changes nothing."""
        target, kept = self._crop_target(length)
        if self._store is not None and not torch.equal(target, self._lengths):
            check_crop(self._store, self._lengths, target, kept, self.window_size)

    def _crop_target(self, length: int | Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B] twice: the new lengths, and the pages that are left of each sequence."""
        target = torch.as_tensor(length).cpu()
        if target.is_floating_point() or target.dtype == torch.bool or target.shape not in ((), (self.batch_size,)):
            raise InputError(f"length: expected an integer or int64 [{self.batch_size}], got {length!r}")
        target = target.to(torch.int64).expand(self.batch_size)
        if bool((target < 0).any()):
            raise InputError(f"length: expected at least 0, got {int(target.min())}")
        target = torch.minimum(target, self._lengths)
        return target, torch.minimum(target // self.config.block_size, self.page_counts)

    @in_own_modes
    def reorder(self, index: Tensor) -> None:
        """Make sequence `i` what sequence `index[i]` was (int64 [B'], repeats allowed). Pages are shared."""
        leave_graph()
        index = torch.as_tensor(index).cpu()
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ShapeError(f"index: expected a vector of integers, got {index.dtype} of shape {tuple(index.shape)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise InputError(f"index: expected values from 0 to {self.batch_size - 1}, got {index.tolist()}")
        self._take_sequences(self, index.to(torch.int64))

    @in_own_modes
    def clone(self) -> KVCache:
        """An independent cache with the same content. Pages are shared: they never change."""
        leave_graph()
        copy = object.__new__(KVCache)
        copy.__setstate__(self.__dict__)
        copy._take_sequences(self, torch.arange(self.batch_size))
        return copy

    def __copy__(self) -> KVCache:
        """`clone`: two caches that shared memory would write into each other's."""
        return self.clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None, "exact_past": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of any kind have handles of their own."""
        self.__dict__.update(state)
        self._handle = new_handle(self)
        self.notice = None if self.notice is None else self.notice.copied()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file (kv/storage.py)."""
        from .storage import save_cache

        save_cache(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> KVCache:
        """Read what `save` wrote. Raises `FormatError` for a damaged, foreign or newer file."""
        from .storage import load_cache

        return load_cache(path, device)

    def _take_sequences(self, source: KVCache, index: Tensor) -> None:
        if source._store is None or source._buffer is None:
            self._lengths, self.kept = source._lengths[index], None
            return
        store, buffer = source._store.select(index.tolist()), source._buffer.select(index)
        if len(index) < source.batch_size:  # which may need less
            lengths = source._lengths[index]
            rows = lengths - store.counts * self.config.block_size
            buffer.memory(buffer.rows_for(int(rows.max()) if len(rows) else 0, self._seen(lengths)))
            if store.reserved:
                store.apart(self.max_tokens or 0, self.window_size)
        rows = index.to(store.device)
        self._k_mean = None if source._k_mean is None else source._k_mean[rows]
        self._universal = None if source._universal is None else source._universal[:, rows]
        self._lengths, self._store, self._buffer, self.kept = source._lengths[index], store, buffer, None
