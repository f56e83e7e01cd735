"""Stage 1 for new tokens: rotate, smooth, quantize, and place them after the buffered rows.

The result is a `Stage`: INT8 tiles that start at each sequence's first block that is not a page. Attention reads it,
and compression takes full blocks from it. Nothing here changes a cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TurboConfig
from ..errors import NonFiniteError
from ..flashq import quantize_int8, rotate
from ..flashq.symmetric import CODE_MAX, SMALLEST_SCALE, compute_dtype
from ..uploads import upload
from ..validation import LARGEST, check_finite
from .pages import Tiles
from .quantizer import TokenQuantizer, quantizer_for

# The mean excludes the first tokens of a sequence, which are attention sinks in real models.
MEAN_SKIPS = 4


MEAN_DTYPE = torch.bfloat16
"""Any value near the mean smooths K as well as the mean itself, provided that the same value is added back."""


def stored_mean(config: TurboConfig, mean: Tensor) -> Tensor:
    """A mean of K [..., D] in the model's space -> in the space of INT8 rows, rounded to bfloat16."""
    mean = mean.float()
    return (rotate(mean) if config.rotate else mean).to(MEAN_DTYPE)


@dataclass(frozen=True)
class SequenceState:
    """The state of the sequences that stage 1 extends.

    lengths: int64 [B] (CPU), tokens so far.
    start: int64 [B] (CPU), position of the first block that is not a page.
    tail_tiles: the buffered rows from there on, [B, H, rows, D]; None without a buffer.
    k_mean: bfloat16 [B, H, D] in the space of INT8 rows (rotated), zero until it is known; None without smoothing.
    k_mean_fixed: whether k_mean is calibrated and applies from the first token on.
    universal: float32 [2, B, H], the paper's buffer scales of K and V, zero before the first append; None with token
        scales.
    """

    lengths: Tensor
    start: Tensor
    tail_tiles: Tiles | None
    k_mean: Tensor | None
    k_mean_fixed: bool
    universal: Tensor | None


@dataclass(frozen=True)
class Stage:
    """INT8 tiles [B, H, W, D or Dv] from position `start[b]` on; W is a multiple of the block size.

    before, lengths: int64 [B] (CPU), tokens without and with the new ones; rows past `lengths` are zero.
    tiles: what attention reads. stored: what the cache keeps, which differs only with the paper's universal buffer
        scale.
    k_mean, universal: as in `SequenceState`, after the new tokens.
    query_energy: float64 [H, D] of all queries so far (`channel_order`), until the order is fixed.
    """

    before: Tensor
    lengths: Tensor
    start: Tensor
    tiles: Tiles
    stored: Tiles
    k_mean: Tensor | None
    universal: Tensor | None
    query_energy: Tensor | None = None


def fresh_state(
    config: TurboConfig,
    batch: int,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    given_mean: Tensor | None = None,
) -> SequenceState:
    """The state of empty sequences; `dtype` (float32 or float64) is the precision of stage 1. given_mean: float
    [H, D], the calibrated mean of K in the model's space, or None."""
    lengths = torch.zeros(batch, dtype=torch.int64)
    mean = torch.zeros(batch, heads, head_dim, dtype=MEAN_DTYPE, device=device) if config.smooth_k else None
    if given_mean is not None:
        mean = stored_mean(config, upload(given_mean, device)).expand(batch, -1, -1).contiguous()
    universal = None if config.token_scales else torch.zeros(2, batch, heads, dtype=dtype, device=device)
    return SequenceState(lengths, lengths, None, mean, given_mean is not None, universal)


def stage(
    config: TurboConfig,
    state: SequenceState,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    names: tuple[str, str] = ("k", "v"),
    quantizer: TokenQuantizer | None = None,
) -> Stage:
    """Quantize the first `counts[b]` tokens of k [B, H, T, D] and v [B, H, T, Dv], which follow `state`.

    Computes in float64 if k and v are float64, else in float32. Raises NonFiniteError, with the `names` of k and v.
    quantizer: that of k's device by default.
    """
    size = config.block_size
    after = state.lengths + counts
    width = max(size, _round_up(int((after - state.start).max()) if len(after) else 0, size))
    place = _Placement(state, counts, width, k.device)
    quantizer = quantizer or quantizer_for(k.device, k.dtype)
    if not (config.token_scales and quantizer.checks_finite):
        _check_finite(names, k, v, counts)
    if not config.token_scales:
        return _stage_by_tile(config, state, k, v, counts, after, place)
    tiles = place.with_buffered(k, v)
    values = _Side(quantizer, state, v, config.rotate, tiles.v8, tiles.v_scale)
    keys = _Side(quantizer, state, k, config.rotate, tiles.k8, tiles.k_scale)
    try:
        values.quantize(torch.zeros_like(counts), counts, None, 0)
        mean = _quantize_keys(config, keys, counts, after)
    except NonFiniteError:
        _check_finite(names, k, v, counts)  # says which values
        raise
    return Stage(state.lengths, after, state.start, tiles, tiles, mean, None)


def _check_finite(names: tuple[str, str], k: Tensor, v: Tensor, counts: Tensor) -> None:
    for name, x in zip(names, (k, v), strict=True):
        check_finite(name, x, counts)


@dataclass(frozen=True)
class _Side:
    """New keys or values x [B, H, T, D], and the rows of the stage that receive them."""

    quantizer: TokenQuantizer
    state: SequenceState
    x: Tensor
    rotate: bool
    codes: Tensor
    scales: Tensor

    def quantize(self, begin: Tensor, end: Tensor, mean: Tensor | None, mean_from: int) -> None:
        """Quantize tokens `begin[b]` to `end[b]` (exclusive); subtract `mean` from position `mean_from` on.

        Raises NonFiniteError if the quantizer looks for values that are not finite and finds some."""
        first, row = self.state.lengths, self.state.lengths - self.state.start
        fine = self.quantizer.quantize_tokens(
            self.x, (begin, end), first, mean, mean_from, self.rotate, self.codes, self.scales, row
        )
        if not fine:
            raise NonFiniteError(f"expected finite values up to {LARGEST:.0e} in magnitude, got others")


def _quantize_keys(config: TurboConfig, keys: _Side, counts: Tensor, after: Tensor) -> Tensor | None:
    """Quantize the keys and return their mean.

    A calibrated mean is subtracted from all keys. Otherwise it is subtracted after the first block only, and computed
    from that block when it fills.
    """
    state, size = keys.state, config.block_size
    mean, none = state.k_mean, torch.zeros_like(counts)
    if not config.smooth_k:
        keys.quantize(none, counts, None, 0)
        return mean
    assert mean is not None
    if state.k_mean_fixed:
        keys.quantize(none, counts, mean, 0)
        return mean
    filled = (state.lengths < size) & (after >= size)
    if not bool(filled.any()):
        keys.quantize(none, counts, mean, size)
        return mean
    # The mean of the stored INT8 values does not depend on how the tokens were split into calls.
    split = torch.minimum((size - state.lengths).clamp(min=0), counts)
    keys.quantize(none, split, None, 0)
    mean = keys.quantizer.first_block_mean(keys.codes, keys.scales, MEAN_SKIPS, size, filled, mean)
    keys.quantize(split, counts, mean, size)
    return mean


def _stage_by_tile(
    config: TurboConfig,
    state: SequenceState,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    after: Tensor,
    place: _Placement,
) -> Stage:
    """The paper's stage 1: a scale per tile, and one universal scale per sequence and head for buffered rows."""
    valid = (torch.arange(k.shape[2]) < counts[:, None]).to(k.device)[:, None, :, None]
    k, v = (torch.where(valid, compute_dtype(x), 0.0) for x in (k, v))
    if config.rotate:
        k, v = rotate(k), rotate(v)
    mean, size = state.k_mean, config.block_size
    if config.smooth_k:
        # Quantized per token only to compute the mean.
        rows = place.with_buffered(k, v)
        keys = _Side(quantizer_for(k.device, k.dtype), state, k, False, rows.k8, rows.k_scale)
        mean = _quantize_keys(config, keys, counts, after)
        assert mean is not None
        positions = state.lengths[:, None] + torch.arange(k.shape[2])
        smoothed = (positions >= (0 if state.k_mean_fixed else size)).to(k.device)[:, None, :, None]
        k = torch.where(smoothed, k - mean[:, :, None].to(k.dtype), k)
    universal = state.universal
    assert universal is not None
    first = (state.lengths == 0).to(k.device)[:, None]
    peaks = torch.stack([x.abs().amax((-2, -1)) / CODE_MAX if x.shape[2] else universal[0] * 0 for x in (k, v)])
    universal = torch.where(first, torch.where(peaks > 0, peaks.clamp(min=SMALLEST_SCALE), 1.0), universal)

    # Blocks that begin among the new tokens have a tile scale. Older blocks have the universal scale, and in the
    # cache so have blocks that are incomplete.
    starts_here = state.lengths[:, None] <= place.block_starts(size)
    complete = place.block_starts(size) + size <= after[:, None]
    own_attended = starts_here & (complete | (state.lengths == 0)[:, None])
    sides = []
    for x, scale, names in ((k, universal[0], ("k8", "k_scale")), (v, universal[1], ("v8", "v_scale"))):
        buffered = place.open(*names)
        codes = (x / scale[:, :, None, None]).round_().clamp_(-CODE_MAX, CODE_MAX).to(torch.int8)
        general = place.fill(buffered, codes, scale[:, :, None].expand(codes.shape[:3]))
        (floats,) = place.scatter([x.new_zeros(*x.shape[:2], place.width, x.shape[3])], [x])
        tile_codes, tile_scales = quantize_int8(floats, size)
        by_tile = tile_codes, tile_scales.repeat_interleave(size, -1)
        sides.append([_choose(own, by_tile, general, size) for own in (own_attended, starts_here & complete)])
    attended, stored = (Tiles(ks[0], vs[0], ks[1], vs[1]) for ks, vs in zip(*sides, strict=True))
    return Stage(state.lengths, after, state.start, attended, stored, mean, universal)


def _choose(blocks: Tensor, yes: tuple[Tensor, Tensor], no: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    rows = blocks.repeat_interleave(size, 1).to(yes[0].device)[:, None]
    return torch.where(rows[..., None], yes[0], no[0]), torch.where(rows, yes[1], no[1])


class _Placement:
    """Places new token `t < counts[b]` in row `lengths[b] - start[b] + t` of the stage."""

    def __init__(self, state: SequenceState, counts: Tensor, width: int, device: torch.device):
        self.state, self.width = state, width
        self._counts, self._device = counts, device

    @functools.cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence, token and row of every new token."""
        longest = int(self._counts.max()) if len(self._counts) else 0
        batch, token = (torch.arange(longest) < self._counts[:, None]).nonzero(as_tuple=True)
        row = (self.state.lengths - self.state.start)[batch] + token
        return batch.to(self._device), token.to(self._device), row.to(self._device)

    def block_starts(self, size: int) -> Tensor:
        """Positions int64 [B, W / size] at which the stage's blocks begin."""
        return self.state.start[:, None] + torch.arange(0, self.width, size)

    def open(self, codes: str, scales: str) -> tuple[Tensor, Tensor] | None:
        """The buffered codes and scales with these names, or None."""
        tiles = self.state.tail_tiles
        return None if tiles is None else (getattr(tiles, codes), getattr(tiles, scales))

    def fill(self, buffered: tuple[Tensor, Tensor] | None, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Buffered rows followed by new ones: codes [B, H, W, D] and scales [B, H, W]."""
        batch, heads, _, head_dim = codes.shape
        out_codes = codes.new_zeros(batch, heads, self.width, head_dim)
        out_scales = scales.new_zeros(batch, heads, self.width)
        if buffered is not None:
            rows = min(self.width, buffered[0].shape[2])
            out_codes[:, :, :rows] = buffered[0][:, :, :rows]
            out_scales[:, :, :rows] = buffered[1][:, :, :rows].to(scales.dtype)
        out_codes, out_scales = self.scatter([out_codes, out_scales], [codes, scales])
        return out_codes, out_scales

    def scatter(self, targets: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
        batch, token, row = self._places
        for target, source in zip(targets, sources, strict=True):
            target[batch, :, row] = source[batch, :, token]
        return targets

    def with_buffered(self, k: Tensor, v: Tensor) -> Tiles:
        """Buffered rows followed by zeros; k and v [B, H, T, D or Dv] give shape, dtype and device."""
        rows, device = (*k.shape[:2], self.width), k.device
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        k8, v8 = (torch.zeros(*rows, x.shape[3], dtype=torch.int8, device=device) for x in (k, v))
        k_scale, v_scale = (torch.zeros(rows, dtype=dtype, device=device) for _ in "kv")
        tiles, buffered = Tiles(k8, v8, k_scale, v_scale), self.state.tail_tiles
        if buffered is not None:
            rows = min(self.width, buffered.k8.shape[2])
            for name in ("k8", "v8", "k_scale", "v_scale"):
                getattr(tiles, name)[:, :, :rows] = getattr(buffered, name)[:, :, :rows]
        return tiles


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
