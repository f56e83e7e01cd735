"""The guard: compares attention over a cache's first compressed blocks with exact attention, head by head.

Low-bit storage can make the output of single heads useless without any visible error. When a cache compresses its
first block, sampled queries attend its tokens twice: at full precision, and as the tokens would be stored. A head
whose relative error is beyond the bound of its width is promoted to the next wider one, with one `GuardWarning`
(`guarded_bits`). Heads that 8 bits do not cure are beyond the cache: whoever still has its tokens at full precision
learns by `BeyondInt8Error` (`KVCache.exact_past`). Where widths cannot change, as in vLLM's pages, there is only the
warning (`fixed_widths_message`). Bounds and procedure: numerics.md, The guard.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .config import TurboConfig
from .errors import GuardWarning
from .impl.contract import AttentionParams
from .kv.cache import KVCache
from .kv.channel_order import ChannelOrder
from .kv.compression import Compression, compression_of
from .kv.growth import encode
from .kv.pages import Tiles
from .kv.stage1 import Stage
from .reference.exact import exact_attention

BOUNDS = {8: 0.05, 4: 0.3, 3: 0.6, 2: 0.7}
"""Bits -> largest relative error (Frobenius norm) of a head's output. Well above that of normal data, and below 1,
which is the error of an output of zeros."""

EARLY_BOUND = 3 * BOUNDS[8]
"""Bound of INT8's own error in front of the first compressed block, where few tokens make a noisy estimate; half of
the planned width's bound if that is larger: an exact layer takes 16 bits or more, too many for a small error."""

_WIDER = {2: 3, 3: 4, 4: 8, 8: 8}
QUERIES = 32
"""Query rows sampled per head."""
_TOKENS = 512  # keys that they attend to at most


class BeyondInt8Error(Exception):
    """Heads of a cache with `exact_past` stay beyond their bound at 8 bits; the text names them. The cache is
    unchanged."""


def guarded_bits(
    cache: KVCache,
    staged: Stage,
    q: Tensor,
    positions: Tensor,
    valid: Tensor,
    new: tuple[Tensor, Tensor],
    params: AttentionParams,
) -> Tensor | None:
    """Widths int64 [2, Hkv] for the blocks that committing `staged` compresses first; None where it
    compresses none, or the guard is off.

    Widths given by the user are never changed, only warned about.

    Args:
        q: [B, Hq, Lq, D], at `positions` (int64 [B, Lq]), of which rows marked in `valid` (bool [B, Lq]) are real.
        new: the call's k and v, each [B, Hkv, T, D].
        params: of the call; its mask is not applied.

    Raises:
        BeyondInt8Error: the cache has `exact_past`, widths may change, and 8 bits are not enough.
    """
    if cache.config.guard == "off":
        return None
    compression = compression_of(cache, staged)
    planned = compression.head_bits
    if not compression.decides or planned is None:
        return None
    sample = _Sample(cache, staged, compression, q, positions, valid, new, params)
    first = errors = sample.errors(planned)
    bits, beyond = planned, _beyond(errors, planned)
    failing = beyond.clone()
    if cache.config.guard == "adapt" and cache.given_bits is None:
        if cache.exact_past is not None:
            _check_int8(cache.first_head, sample, failing, planned)
        while bool(beyond.any()) and bool((bits[:, beyond] < 8).any()):
            bits = widen(bits, beyond)
            errors = sample.errors(bits)
            beyond = _beyond(errors, bits)
    if bool(failing.any()):
        message = _message(cache.first_head, failing, beyond, first, planned, bits)
        advice = _advice(sample, planned, failing)
        warnings.warn(f"{cache.label or 'cache'}: {message}; {advice}", GuardWarning, stacklevel=5)
    return bits


def fixed_widths_message(
    config: TurboConfig,
    head_bits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_mean: Tensor | None = None,
    k_order: ChannelOrder | None = None,
    first_head: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    window_size: int | None = None,
) -> str | None:
    """The warning for storage whose widths cannot change; None if every head is within its bound.

    Also None if a value is not finite, which the caller reports on its own.

    Args:
        head_bits: int64 [2, Hkv], the widths of K and V.
        q, k, v: [T, Hq, D], [T, Hkv, D] twice: one sequence from its first token, at least a block long.
        k_mean, k_order: calibrated means of K, float [Hkv, D], and order of its channels.
        first_head: index in the model of the first KV head here.
        scale, softcap, window_size: as in `turbo_attention`.
    """
    tokens = min(len(k) // config.block_size * config.block_size, _TOKENS)
    q, k, v = (x[:tokens].transpose(0, 1)[None].float() for x in (q, k, v))
    if not all(bool(x.isfinite().all()) for x in (q, k, v)):
        return None
    heads, head_dim = k.shape[1], k.shape[3]
    config = config.replace(guard="off")
    cache = KVCache(1, heads, head_dim, config=config, head_bits=head_bits, k_mean=k_mean, k_order=k_order)
    cache.append(k, v)
    exact, stored = (
        exact_attention(q[:, :, -QUERIES:], *kv, is_causal=True, scale=scale, softcap=softcap, window_size=window_size)
        for kv in ((k, v), cache.dequantize())
    )
    errors = _relative_errors(stored[0], exact[0], heads)
    beyond = _beyond(errors, head_bits)
    if not bool(beyond.any()):
        return None
    message = _message(first_head, beyond, beyond, errors, head_bits, head_bits)
    return f"{message}; calibrate the model, or serve it with more bits"


def bound_of(bits: Tensor) -> Tensor:
    """Bound per head for widths int64 [2, Hkv]: that of the narrower of K and V."""
    return torch.tensor([BOUNDS[int(b)] for b in bits.amin(0)], dtype=torch.float64)


def _beyond(errors: Tensor, bits: Tensor) -> Tensor:
    return ~(errors <= bound_of(bits))


def _relative_errors(got: Tensor, exact: Tensor, kv_heads: int) -> Tensor:
    """Relative error (Frobenius norm) per KV head, float64 [Hkv] on the CPU, of outputs [B, Hq, Lq, D]; NaN is inf."""
    lost, whole = ((x.unflatten(1, (kv_heads, -1)) ** 2).sum((0, 2, 3, 4)) for x in (got - exact, exact))
    return (lost / whole.clamp(min=1e-300)).sqrt().nan_to_num(nan=torch.inf).double().cpu()


def widen(bits: Tensor, heads: Tensor) -> Tensor:
    """`bits` (int64 [2, Hkv]) with the next width for the narrower of K and V, or both if equal, of `heads` (bool)."""
    wider = torch.tensor([[_WIDER[int(b)] for b in row] for row in bits])
    return torch.where(heads & (bits == bits.amin(0)), wider, bits)


def _message(first_head: int, failing: Tensor, beyond: Tensor, errors: Tensor, planned: Tensor, bits: Tensor) -> str:
    """Names the heads that are `failing` at the `planned` widths, and those still `beyond` their bound at `bits`."""
    heads = failing.nonzero().flatten().tolist()
    worst = max(heads, key=lambda head: float(errors[head]))
    what = f"KV heads {_numbers(first_head, heads)} lose too much in the quantized cache"
    how = (
        f"head {first_head + worst} has relative error {float(errors[worst]):.2f} at K {int(planned[0, worst])} "
        f"and V {int(planned[1, worst])} bits, bound {float(bound_of(planned)[worst]):.2f}"
    )
    if torch.equal(bits, planned):
        return f"{what} ({how}); widths kept as configured"
    widths = ", ".join(f"{first_head + head}: {int(bits[0, head])}/{int(bits[1, head])}" for head in heads)
    rest = beyond.nonzero().flatten().tolist()
    still = f"; heads {_numbers(first_head, rest)} remain beyond their bound" if rest else ""
    return f"{what} ({how}); raised to K/V bits {widths}{still}"


def _check_int8(first_head: int, sample: _Sample, failing: Tensor, planned: Tensor) -> None:
    """Raises `BeyondInt8Error` where heads are `failing` at the planned widths and 8 bits do not cure them, or where
    INT8's own error is beyond `EARLY_BOUND` and half of the planned width's bound."""
    errors = sample.errors(torch.full((2, len(failing)), 8))
    bound = (bound_of(planned) / 2).clamp(min=EARLY_BOUND)
    hopeless = ~(errors <= bound) | (failing & ~(errors <= BOUNDS[8]))
    if bool(hopeless.any()):
        raise BeyondInt8Error(_int8_message(first_head, errors, hopeless, BOUNDS[8]))


def early_int8_message(got: Tensor, exact: Tensor, kv_heads: int, first_head: int, bits: int) -> str | None:
    """Names the KV heads whose INT8 attention is beyond the bound for planned widths of `bits` (see `EARLY_BOUND`);
    None if there is none.

    got, exact: outputs [B, Hq, Lq, D] over the same tokens, before any block is compressed.
    """
    bound = max(EARLY_BOUND, BOUNDS[bits] / 2)
    errors = _relative_errors(got.double(), exact.double(), kv_heads)
    beyond = ~(errors <= bound)
    return _int8_message(first_head, errors, beyond, bound) if bool(beyond.any()) else None


def _int8_message(first_head: int, errors: Tensor, heads: Tensor, bound: float) -> str:
    named = heads.nonzero().flatten().tolist()
    worst = max(named, key=lambda head: float(errors[head]))
    return (
        f"INT8 loses too much in KV heads {_numbers(first_head, named)} (head {first_head + worst} has relative error "
        f"{float(errors[worst]):.2f} at 8 bits, bound {bound:.2f})"
    )


def _advice(sample: _Sample, planned: Tensor, failing: Tensor) -> str:
    """What the user can do: the fewest 8-bit sides that bring every failing head within its bound."""
    k, v = (int(bits[failing].min()) for bits in planned)
    for wide in (([8], [v]), ([k], [8]), ([8], [8])):
        bits = torch.where(failing, torch.tensor(wide), planned)
        if not torch.equal(bits, planned) and not bool(_beyond(sample.errors(bits), bits).any()):
            (k,), (v,) = wide
            return f"pass bits=({k}, {v}) (--bits {k},{v}), or calibrate the model"
    return "8 bits are not enough for them: keep the layer in the model's own dtype (exact_layers of a TurboCache)"


def _numbers(first_head: int, heads: list[int]) -> str:
    return ", ".join(str(first_head + head) for head in heads)


class _Sample:
    """The sampled queries, and the keys and values they attend to: exact, and as stored at given widths. Only the first
    `_TOKENS` tokens are restored and encoded, however long the call is."""

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
        self.length = staged.lengths[batch].clamp(max=_TOKENS)
        self.tokens = int(self.length.max())
        size = cache.config.block_size
        self.blocks = -(-(self.tokens - self.start) // size)
        at = batch.to(staged.stored.k8.device)
        self.stored = staged.stored.map(lambda x: x[at][:, :, : self.blocks * size])
        self.mean = None if staged.k_mean is None else staged.k_mean[at]
        self.sinks = cache.page_tiles(0, cache.sink_blocks).map(lambda x: x[at]) if self.start else None
        sampled = torch.isin(flush.batch, batch) & (flush.block * size < self.tokens)
        self.compression = compression.of(flush.where(sampled))
        self.q, self.positions = self._queries(q, positions, valid)
        self.wanted = self._attend(*self._exact(staged, new))

    def errors(self, bits: Tensor) -> Tensor:
        """Relative error per KV head, float64 [Hkv], with the blocks stored at `bits`."""
        k, v = self._floats(self.stored)
        size = self.cache.config.block_size
        for part in encode(self.cache, self.compression.of(self.compression.flush, bits)):
            device = part.pages.device
            row = torch.searchsorted(self.batch, part.flush.batch)
            at = row.to(device), slice(None), (part.flush.block - self.start // size).to(device)
            for target, values in zip((k, v), part.floats(), strict=True):
                target.unflatten(2, (-1, size))[at] = values.to(target.dtype)
        k = self._with_mean(k, self.start)
        return _relative_errors(self._attend(*self._behind_sinks(k, v)), self.wanted, self.cache.num_kv_heads)

    def _queries(self, q: Tensor, positions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Up to `QUERIES` rows, spread over the later half of the sampled tokens, with their positions."""
        past = self.cache.exact_past
        if past is not None and past.q.shape[2]:
            q = torch.cat((past.q.to(q.dtype), q), 2)
            positions, valid = torch.cat((past.positions, positions), 1), torch.cat((past.valid, valid), 1)
        inside = valid & (positions < self.tokens)
        useful = (inside & (positions >= self.tokens // 2))[self.batch].all(0)
        rows = (useful if bool(useful.any()) else valid[self.batch].all(0)).nonzero().flatten()
        rows = rows[torch.linspace(0, max(0, len(rows) - 1), min(QUERIES, len(rows))).long()]
        chosen = q.index_select(0, self.batch.to(q.device)).index_select(2, rows.to(q.device))
        return chosen, positions[self.batch][:, rows]

    def _exact(self, staged: Stage, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """k and v [b, Hkv, tokens, D] of the sampled tokens: the call's own at full precision, and older ones as INT8
        unless they are kept."""
        at = self.batch.to(self.q.device)
        before = staged.before[self.batch]
        k_new, v_new = (x[at][:, :, : self.tokens] for x in new)
        if not bool(before.any()) and bool((self.length == self.tokens).all()):
            return k_new, v_new
        counts = (self.length - before).clamp(min=0)
        row, token = (torch.arange(k_new.shape[2]) < counts[:, None]).nonzero(as_tuple=True)
        position = before[row] + token
        stored = staged.tiles.map(lambda x: x[at][:, :, : self.stored.k8.shape[2]])
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
        """k and v [b, Hkv, tokens, D] in the model's space: sink pages, then the tiles [b, Hkv, W, D] behind them."""
        k, v = self._floats(tiles)
        return self._behind_sinks(self._with_mean(k, self.start), v)

    def _behind_sinks(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that follow the sink pages, with these before them."""
        if self.sinks is not None:
            sink_k, sink_v = self._floats(self.sinks.map(lambda x: x.transpose(1, 2).flatten(2, 3)))
            k, v = torch.cat((self._with_mean(sink_k, 0), k), 2), torch.cat((sink_v, v), 2)
        return k[:, :, : self.tokens], v[:, :, : self.tokens]

    def _floats(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """INT8 rows as floats in the model's space, keys without their mean."""
        k, v = tiles.floats()
        return self.cache.restore(k), self.cache.restore(v)

    def _with_mean(self, k: Tensor, start: int) -> Tensor:
        """Keys whose first token is at position `start`, with their mean."""
        if self.mean is None:
            return k
        smoothed = (start + torch.arange(k.shape[2]) >= self.cache.mean_from).to(k.device)
        return k + self.cache.restore(self.mean.to(k.dtype))[:, :, None] * smoothed[:, None]

    def _attend(self, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.arange(k.shape[2])
        behind = self.positions[..., None] - keys
        mask = (behind >= 0) & (keys < self.length[:, None, None])
        if self.params.window_size is not None:
            mask &= behind < self.params.window_size
        scale, softcap = self.params.scale, self.params.softcap
        return exact_attention(self.q, k, v, mask[:, None], scale=scale, softcap=softcap)[0]
