"""Measurements of a layer, head by head: the error of each width, and its cost for the model's predictions.

Errors are those of decode: a query reads its own block exactly, like the buffer, and earlier blocks in their stored
form. A head that attends to recent tokens therefore has a small error, even if its keys quantize badly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import WIDTHS, TurboConfig
from ..errors import InputError, ShapeError
from ..flashq import head_priority
from ..kv.cache import KVCache
from ..kv.channel_order import ChannelOrder, key_spread, order_by, query_energy
from ..reference.exact import exact_attention
from ..softmax import sink_share

OUTLIER = 4.0
"""A channel of K is an outlier if its largest magnitude is this many times that of the head's median channel."""

_PLACES = 8  # blocks of a text whose queries are used


@dataclass(frozen=True)
class LayerStatistics:
    """Measurements per KV head; row 0 is K, row 1 is V, and W = len(WIDTHS): 2, 3, 4 and 8 bits.

    errors: float64 [2, Hkv, W], relative error of the head's attention output (Frobenius norm) with only K, or only V,
        quantized.
    costs: float64 [2, Hkv, W], the KL divergence in nats per token expected from this error:
        `1/2 E_t E_y [(sum_h g_th . delta_th)^2]`, with `delta` the error of a query head's output at token t and `g`
        the gradient of the log-likelihood of y, sampled from the model. (Second-order expansion of the divergence with
        the Fisher information; errors of different tokens and KV heads are assumed to be independent.)
    priority: float64 [2, Hkv], the paper's gap * std (section 3.2), mean over the texts.
    k_mean: float32 [Hkv, D], mean of each channel of K.
    outliers: per head the outlier channels of K (`OUTLIER`).
    k_weight: float64 [Hkv, D], `E[q_c^2] var(k_c)` of each channel of K, with the variance inside blocks. Caches with
        `reorder_k` sort the channels by it. None in files of version 1.
    """

    errors: Tensor
    costs: Tensor
    priority: Tensor
    k_mean: Tensor
    outliers: tuple[tuple[int, ...], ...]
    k_weight: Tensor | None = None


class LayerMeter:
    """Accumulates the statistics of one layer over several texts.

    Args:
        config: the configuration of caches; its `bits` are ignored.
    """

    def __init__(self, config: TurboConfig):
        self._config = config.replace(guard="off")  # widths are fixed here
        self._texts: list[tuple[Tensor, ...]] = []

    @property
    def least_tokens(self) -> int:
        """Length of the shortest text in which a compressed block is read."""
        return self._config.sink_tokens + 2 * self._config.block_size

    @torch.no_grad()
    def add(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gradient: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window_size: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Measure one text.

        Args:
            q: [1, Hq, L, D]; k: [1, Hkv, L, D], v: [1, Hkv, L, Dv], attended causally.
            gradient: [1, Hq, L, Dv] of the text's log-likelihood (summed over tokens) with respect to the attention
                output.
            sinks: learned sink logits [Hq].
            scale, softcap, window_size: as in `turbo_attention`.

        Raises:
            NonFiniteError: NaN or infinity in k or v. InputError: the text is shorter than `least_tokens`.
            ShapeError: shapes do not fit.
        """
        expected = (*q.shape[:3], v.shape[3])
        if gradient.shape != expected:
            raise ShapeError(f"gradient: expected shape {expected}, as q and v give it, got {tuple(gradient.shape)}")
        length, block = k.shape[2], self._config.block_size
        if length < self.least_tokens:
            raise InputError(f"text: expected at least {self.least_tokens} tokens, got {length}")
        energy, spread = self._channels(q, k)
        order = order_by(energy * spread) if self._config.reorder_k else None
        stored = [self._stored(k, v, width, order) for width in WIDTHS]
        lost, cost, whole = (torch.zeros(2, k.shape[1], len(WIDTHS), dtype=torch.float64) for _ in range(3))
        ends = torch.linspace(self.least_tokens, length, _PLACES).int().unique().tolist()
        for end in ends:
            place = _Place(q, end, block, k.shape[1], scale, softcap, window_size, sinks)
            slope = place.rows(gradient).double()
            exact = k[:, :, :end], v[:, :, :end]
            wanted = place.attend(*exact)
            whole += (wanted**2).sum((1, 2, 3)).cpu()[:, None]
            for width, pair in enumerate(stored):
                for which in (0, 1):
                    mixed = list(exact)
                    mixed[which] = torch.cat((pair[which][:, :, : end - block], exact[which][:, :, end - block :]), 2)
                    delta = place.attend(*mixed) - wanted
                    lost[which, :, width] += (delta**2).sum((1, 2, 3)).cpu()
                    cost[which, :, width] += 0.5 * ((delta * slope).sum((1, 3)) ** 2).mean(-1).cpu() / len(ends)
        priority = torch.stack([head_priority(x).double() for x in (k, v)]).cpu()
        of_keys = k[0].double().mean(1).cpu(), k[0].float().abs().amax(1).cpu()
        self._texts.append((lost, whole, cost, priority, *of_keys, energy, spread))

    def statistics(self) -> LayerStatistics:
        """The statistics, averaged over all texts.

        Raises:
            InputError: no text was added.
        """
        if not self._texts:
            raise InputError("text: expected at least one, got none")
        parts = (torch.stack(x) for x in zip(*self._texts, strict=True))
        lost, whole, cost, priority, mean, peaks, energy, spread = parts
        highest = peaks.amax(0)
        stands_out = highest > OUTLIER * highest.median(-1, keepdim=True).values
        return LayerStatistics(
            # A head with zero output has no error.
            errors=(lost.sum(0) / whole.sum(0).clamp(min=1e-300)).sqrt(),
            costs=cost.mean(0),
            priority=priority.mean(0),
            k_mean=mean.mean(0).float(),
            outliers=tuple(tuple(row.nonzero().flatten().tolist()) for row in stands_out),
            k_weight=energy.mean(0) * spread.mean(0),
        )

    def _channels(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """float64 [Hkv, D] twice: the mean square of each channel of q, and the variance of k's inside the blocks that
        caches compress."""
        length, block, sinks = k.shape[2], self._config.block_size, self._config.sink_tokens
        heads, every = k.shape[1], torch.ones(1, length, dtype=torch.bool)
        energy = query_energy(q, every, heads) / (length * q.shape[1] // heads)
        blocks = k[:, :, sinks : length // block * block].unflatten(2, (-1, block))[0].transpose(0, 1)
        return energy.cpu(), key_spread(blocks).cpu()

    def _stored(self, k: Tensor, v: Tensor, width: int, order: ChannelOrder | None) -> tuple[Tensor, Tensor]:
        """k and v after quantization to this width and dequantization."""
        config = self._config.replace(bits=width)
        batch, heads, _, head_dim = k.shape
        cache = KVCache(batch, heads, head_dim, config=config, k_order=order, v_head_dim=v.shape[3])
        cache.append(k, v)
        return cache.dequantize()


@dataclass(frozen=True)
class _Place:
    """The attention output of the block of queries that ends at `end`, over the text up to there."""

    q: Tensor
    end: int
    block: int
    kv_heads: int
    scale: float | None
    softcap: float | None
    window_size: int | None
    sinks: Tensor | None

    def rows(self, x: Tensor) -> Tensor:
        """[1, Hq, L, D] -> [Hkv, g, block, D]."""
        return x[0, :, self.end - self.block : self.end].unflatten(0, (self.kv_heads, -1))

    def attend(self, k: Tensor, v: Tensor) -> Tensor:
        """float64 [Hkv, g, block, D], from k and v [1, Hkv, end, D]."""
        q = self.rows(self.q).flatten(0, 1)[None]
        out, lse = exact_attention(
            q, k, v, is_causal=True, scale=self.scale, softcap=self.softcap, window_size=self.window_size
        )
        if self.sinks is not None:
            out = out * sink_share(lse, self.sinks)
        return out[0].unflatten(0, (self.kv_heads, -1))
