"""Widths, means and channel orders of each layer's KV heads, sliced for a tensor-parallel rank; the bytes of a page."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ...calibration import Calibration
from ...config import Bits, TurboConfig
from ...errors import ConfigError
from ...kv.channel_order import ChannelOrder
from ...paged import HeadBits, PagedFormat, reserved_bytes
from ...words import number_of
from .settings import Settings

WITHOUT_ORDERS = (
    "reorder_k: expected a calibration with orders of K's channels (turboattention calibrate --model MODEL --out "
    "FOLDER), got %s: keys are stored with one width per head, as without reorder_k, and lose its accuracy"
)


@dataclass(frozen=True)
class Rank:
    """The KV heads of one process: rank `index` of `size`, with `heads` heads."""

    index: int
    size: int
    heads: int

    def of(self, total: int) -> slice:
        """The range of `total` heads. If there are fewer heads than ranks, several ranks share a head."""
        first = self.index * self.heads if total >= self.size else self.index * total // self.size
        return slice(first, first + self.heads)


class Widths:
    """Widths, means and channel orders of every layer under `settings`, the same for all sequences."""

    def __init__(self, settings: Settings):
        self.settings = settings

    @cached_property
    def calibration(self) -> Calibration | None:
        folder = self.settings.calibration
        return None if folder is None else Calibration.load(folder)

    @cached_property
    def config(self) -> TurboConfig:
        """The serving configuration (numerics.md), with smoothing only if the means are calibrated, and K's channels in
        order only if the orders are. One object for all layers, so that a step can share work between them."""
        means = self.calibration is not None and self.calibration.means
        bits: Bits = self.settings.bits or ("mixed" if self.settings.calibrated_widths else 4)
        config = TurboConfig.serving(bits=bits, smooth_k=means, reorder_k=self.settings.reorder_k)
        return config if config.reorders_k and self._orders is not None else config.replace(reorder_k=False)

    @cached_property
    def _orders(self) -> list[ChannelOrder] | None:
        """The orders per layer; None, with a warning, if the calibration has none. An order derived from the first
        prompt would make the bytes of a shared prefix depend on that prompt."""
        orders = None if self.calibration is None else self.calibration.k_order
        if orders is None:
            given = "no calibration" if self.calibration is None else f"{self.settings.calibration}, which has none"
            logging.getLogger("vllm.turboattention").warning(WITHOUT_ORDERS, given)
        return orders

    def head_bits(self, layer: int, rank: Rank) -> HeadBits:
        """Widths of K and of V, one per KV head of the rank.

        Raises:
            ConfigError: the calibration has no such layer, or other heads.
        """
        if not self.settings.calibrated_widths:
            k, v = self.config.kv_bits
            return (k,) * rank.heads, (v,) * rank.heads
        chosen = self._of_layer(layer).head_bits[layer]
        part = chosen[:, rank.of(chosen.shape[1])]
        if part.shape[1] != rank.heads:
            raise ConfigError(
                f"calibration: expected {number_of(rank.heads, 'KV head')} per rank in layer {layer}, got "
                f"{chosen.shape[1]} in all for {rank.size} ranks"
            )
        k_bits, v_bits = part.tolist()
        return tuple(k_bits), tuple(v_bits)

    def mean(self, layer: int, rank: Rank) -> Tensor | None:
        """float32 [Hkv, D] of the rank; None if the calibration has no means."""
        if self.calibration is None or not self.calibration.means:
            return None
        mean = self._of_layer(layer).layers[layer].k_mean
        return mean[rank.of(mean.shape[0])].contiguous()

    def order(self, layer: int, rank: Rank) -> ChannelOrder | None:
        """The order of K's channels in the heads of the rank; None if they are not reordered."""
        if not self.config.reorder_k or self._orders is None:
            return None
        self._of_layer(layer)
        order = self._orders[layer]
        return order.of_heads(rank.of(len(order.halved)))

    def page_bytes(self, heads: int, head_dim: int) -> int:
        """Bytes of a block: enough for every layer and rank with `heads` heads, rounded up to `PAGE_UNIT`.

        vLLM asks for the size without a layer, and the pages of all ranks have the same size.
        """
        return reserved_bytes(head_dim, self._all(heads))

    def format(self, layer: int, rank: Rank, head_dim: int, device: torch.device) -> PagedFormat:
        """The format of one layer's pages on `device`."""
        mean, order = self.mean(layer, rank), self.order(layer, rank)
        return PagedFormat(
            config=self.config,
            head_dim=head_dim,
            head_bits=(self.head_bits(layer, rank),),
            page_bytes=self.page_bytes(rank.heads, head_dim),
            means=(None if mean is None else mean.to(device),),
            orders=() if order is None else (order,),
        )

    def _all(self, heads: int) -> set[HeadBits]:
        if not self.settings.calibrated_widths:
            return {self.head_bits(0, Rank(0, 1, heads))}
        assert self.calibration is not None
        totals = [bits.shape[1] for bits in self.calibration.head_bits]
        return {
            self.head_bits(layer, Rank(index, max(1, total // heads), heads))
            for layer, total in enumerate(totals)
            for index in range(max(1, total // heads))
        }

    def _of_layer(self, layer: int) -> Calibration:
        calibration = self.calibration
        assert calibration is not None
        if not 0 <= layer < len(calibration.layers):
            raise ConfigError(
                f"calibration: expected one with layer {layer}, got {number_of(len(calibration.layers), 'layer')}"
            )
        return calibration


@lru_cache(maxsize=8)
def widths_of(settings: Settings) -> Widths:
    """Shared by all layers, so that a calibration is read once."""
    return Widths(settings)
