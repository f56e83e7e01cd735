"""The guard's sample of a cache's first blocks: the error that quantization causes in attention over them."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from .flashq import rotate
from .float_attention import float_attention, visible
from .kv.cache import KVCache
from .kv.channel_order import restore_keys
from .kv.compression import Compression
from .kv.growth import encode
from .kv.pages import Tiles
from .kv.stage1 import Stage
from .params import AttentionParams
from .uploads import upload
from .validation import check_finite

QUERIES = 32
"""Query rows sampled per head."""
TOKENS = 512
"""The largest number of keys that they attend to."""


def relative_errors(got: Tensor, exact: Tensor, kv_heads: int) -> Tensor:
    """Relative error (Frobenius norm) per KV head, float64 [Hkv] on the CPU, of outputs [B, Hq, Lq, D]; NaN is inf."""
    got, exact = got.double(), exact.double()
    lost, whole = ((x.unflatten(1, (kv_heads, -1)) ** 2).sum((0, 2, 3, 4)) for x in (got - exact, exact))
    return (lost / whole.clamp(min=1e-300)).sqrt().nan_to_num(nan=torch.inf).cpu()


def causal_attention(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, lengths: Tensor, params: AttentionParams
) -> Tensor:
    """`float_attention` of q [B, Hq, Lq, D] at `positions` (int64 [B, Lq]), causal, over the first `lengths[b]` tokens
    of k [B, Hkv, L, D] and v [B, Hkv, L, Dv] -> [B, Hq, Lq, Dv]. The mask of `params` does not apply."""
    seen = visible(positions, k.shape[2], replace(params, is_causal=True))
    seen &= torch.arange(k.shape[2]) < lengths[:, None, None]
    return float_attention(q, k, v, upload(seen, q.device), params)


class Sample:
    """The sampled queries, and the keys and values they attend to: exact, and as stored at given widths. Only the first
    `TOKENS` tokens are encoded, however long the call is.

    A product does not change if both of its factors are rotated. So keys and values are compared as they are stored:
    the queries are rotated instead, and the outputs back. Only pages whose keys have an order of channels, and are not
    rotated, need all keys in the model's space.
    """

    def __init__(
        self,
        cache: KVCache,
        staged: Stage,
        compression: Compression,
        q: Tensor,
        positions: Tensor,
        valid: Tensor,
        new: tuple[Tensor, Tensor],
        params: AttentionParams,
    ):
        self.params = params
        # Sequences whose first compressed block is in this flush; in a ragged batch, those with the start of the first.
        flush = compression.flush
        batch = flush.batch[flush.block == cache.sink_blocks].unique()
        starts = staged.start[batch]
        batch, self.start = batch[starts == starts[0]], int(starts[0])
        self.cache, self.batch = cache, batch
        self.length = staged.lengths[batch].clamp(max=TOKENS)
        self.tokens = int(self.length.max())
        size = cache.config.block_size
        self.blocks = -(-(self.tokens - self.start) // size)
        self.stored = staged.stored.map(lambda x: self._of(x)[:, :, : self.blocks * size])
        self.mean = None if staged.k_mean is None else self._of(staged.k_mean)
        # The pages before the stage: fewer than the sinks if a call ended among these.
        self.pages = cache.page_tiles(0, self.start // size).map(self._of) if self.start else None
        sampled = torch.isin(flush.batch, batch) & (flush.block * size < self.tokens)
        self.compression = compression.of(flush.where(sampled))
        self.rotated = cache.config.rotate and compression.order is None
        self.q, self.positions = self._queries(q, positions, valid)
        # Calls that store at once have not looked yet; on a GPU, where looking waits, there are none.
        if q.device.type == "cpu" and not bool(torch.isfinite(self.q).all()):
            check_finite("q", q, valid.sum(1))
        exact = self._exact(staged, new)
        self.wanted = causal_attention(self.q, self.positions, *exact, self.length, params)

    def _of(self, x: Tensor) -> Tensor:
        """The rows of the sampled sequences; without a copy if all of them are sampled."""
        return x if len(x) == len(self.batch) else x.index_select(0, upload(self.batch, x.device))

    def errors(self, bits: Tensor) -> Tensor:
        """Relative error per KV head, float64 [Hkv], with the blocks stored at `bits`."""
        k, v = (x.clone() for x in self._rows)
        size, rotated = self.cache.config.block_size, self.rotated
        for part in encode(self.cache, self.compression.at(bits)):
            device = part.pages.device
            row = torch.searchsorted(self.batch, part.flush.batch)
            at = upload(row, device), slice(None), upload(part.flush.block - self.start // size, device)
            part_k, part_v = part.floats()
            part_k = part_k if rotated else restore_keys(part_k, part.order, part.rotated)
            for target, values in ((k, part_k), (v, part_v)):
                target.unflatten(2, (-1, size))[at] = values.to(target.dtype)
        k, v = self._behind_pages(self._with_mean(k, self.start, True), v, True)
        q = rotate(self.q.float()) if rotated else self.q
        got = self.cache.restore(causal_attention(q, self.positions, k, v, self.length, self.params))
        return relative_errors(got, self.wanted, self.cache.num_kv_heads)

    @functools.cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """The INT8 rows behind the pages as floats, keys without their mean. Rows of blocks that are encoded are not
        set."""
        if len(self.compression.flush.batch) == len(self.batch) * self.blocks:
            k, v, dtype = self.stored.k8, self.stored.v8, self.stored.k_scale.dtype
            return torch.empty_like(k, dtype=dtype), torch.empty_like(v, dtype=dtype)
        return self._floats(self.stored, True)

    def _queries(self, q: Tensor, positions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Up to `QUERIES` rows, spread over the later half of the sampled tokens, with their positions."""
        past = self.cache.exact_past
        if past is not None and past.q.shape[2]:
            q = torch.cat((past.q.to(q.dtype), q), 2)
            positions, valid = torch.cat((past.positions, positions), 1), torch.cat((past.valid, valid), 1)
        valid = valid & self._sees_all(positions)
        inside = valid & (positions < self.tokens)
        useful = (inside & (positions >= self.tokens // 2))[self.batch].all(0)
        rows = (useful if bool(useful.any()) else valid[self.batch].all(0)).nonzero().flatten()
        rows = rows[torch.linspace(0, max(0, len(rows) - 1), min(QUERIES, len(rows))).long()]
        chosen = self._of(q).index_select(2, upload(rows, q.device))
        return chosen, positions[self.batch][:, rows]

    def _sees_all(self, positions: Tensor) -> Tensor:
        """bool [B, n]: whether a query's keys are all there: a window has released pages that earlier ones attended."""
        if self.params.window_size is None or not self.start:
            return torch.ones_like(positions, dtype=torch.bool)
        assert self.cache.page_table is not None  # which has pages before the stage
        released = torch.tensor(self.cache.page_table.evicted())[:, None] * self.cache.config.block_size
        return positions - self.params.window_size + 1 >= released

    def _exact(self, staged: Stage, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """k and v [b, Hkv, tokens, D] of the sampled tokens: the call's own at full precision, and older ones as INT8
        unless they are kept."""
        before = staged.before[self.batch]
        k_new, v_new = (self._of(x)[:, :, : self.tokens] for x in new)
        if not bool(before.any()) and bool((self.length == self.tokens).all()):
            return k_new, v_new
        counts = (self.length - before).clamp(min=0)
        row, token = (torch.arange(k_new.shape[2]) < counts[:, None]).nonzero(as_tuple=True)
        position = before[row] + token
        stored = staged.tiles.map(lambda x: self._of(x)[:, :, : self.stored.k8.shape[2]])
        k, v = self._with_past(self._frame(stored), before)
        k[row, :, position], v[row, :, position] = (x[row, :, token].to(k.dtype) for x in (k_new, v_new))
        return k, v

    def _with_past(self, frame: tuple[Tensor, Tensor], before: Tensor) -> tuple[Tensor, Tensor]:
        """The frame with the tokens of earlier calls, `before[b]` of them, at full precision if they are kept."""
        past = self.cache.exact_past
        if past is None:
            return frame
        length = min(frame[0].shape[2], past.k.shape[2])
        known = torch.arange(length) < before[:, None]
        mixed = []
        for stored, floats in zip(frame, (past.k, past.v), strict=True):
            at, here = self.batch.to(stored.device), known.to(stored.device)[:, None, :, None]
            first = torch.where(here, floats[at][:, :, :length].to(stored.dtype), stored[:, :, :length])
            mixed.append(torch.cat((first, stored[:, :, length:]), 2))
        return mixed[0], mixed[1]

    def _frame(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """k and v [b, Hkv, tokens, D] in the model's space: the pages, then the tiles [b, Hkv, W, D] behind them."""
        k, v = self._floats(tiles, False)
        return self._behind_pages(self._with_mean(k, self.start, False), v, False)

    def _behind_pages(self, k: Tensor, v: Tensor, stored: bool) -> tuple[Tensor, Tensor]:
        """Keys and values that follow the pages, with these before them; `stored` as in `_floats`."""
        if self.pages is not None:
            pages = self.pages.map(lambda x: x.transpose(1, 2).flatten(2, 3))
            page_k, page_v = self._floats(pages, stored)
            k, v = torch.cat((self._with_mean(page_k, 0, stored), k), 2), torch.cat((page_v, v), 2)
        return k[:, :, : self.tokens], v[:, :, : self.tokens]

    def _floats(self, tiles: Tiles, stored: bool) -> tuple[Tensor, Tensor]:
        """INT8 rows as floats, keys without their mean: `stored`, as they are compared, or in the model's space."""
        k, v = tiles.floats()
        k = k if stored and self.rotated else self.cache.restore(k)
        return k, v if stored else self.cache.restore(v)

    def _with_mean(self, k: Tensor, start: int, stored: bool) -> Tensor:
        """Keys whose first token is at position `start`, with their mean."""
        if self.mean is None:
            return k
        mean = self.mean.to(k.dtype)
        smoothed = upload(start + torch.arange(k.shape[2]) >= self.cache.mean_from, k.device)
        return k + (mean if stored and self.rotated else self.cache.restore(mean))[:, :, None] * smoothed[:, None]
