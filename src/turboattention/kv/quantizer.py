"""The quantization operations that stage 1 and the page table use.

`PYTORCH` implements them on every device. Backends have faster implementations with bit-identical results.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .. import flashq
from ..flashq.symmetric import compute_dtype
from .channel_order import ChannelOrder, ordered_rows
from .layout import PageLayout
from .pages import Tiles
from .pages import decode_pages as decode_tiles
from .pages import encode_pages as encode_tiles

if TYPE_CHECKING:
    from .cache import KVCache


class TokenQuantizer(Protocol):
    """Stage 1 of tokens, on tensors of one device.

    checks_finite: whether `quantize_tokens` detects values that are not finite or out of range. The check is free if
    the implementation reads the values anyway and returns to the host.
    """

    checks_finite: bool

    def quantize_tokens(
        self,
        x: Tensor,
        span: tuple[Tensor, Tensor],
        first: Tensor,
        mean: Tensor | None,
        mean_from: int,
        rotate: bool,
        codes: Tensor,
        scales: Tensor,
        target: Tensor,
    ) -> bool:
        """Rotate, smooth and quantize tokens `span[0][b] .. span[1][b]` of each sequence of x [B, H, T, D].

        Token t has position `first[b] + t`; from position `mean_from` on, mean [B, H, D] (rotated, if `rotate`) is
        subtracted. Token t is written to row `target[b] + t` of codes int8 [B, H, W, D] and scales [B, H, W]. Other
        tokens of x are not read. span, first and target are int64 [B] (CPU).

        Returns False if `checks_finite` and a value was not finite or out of range; the rows written are then invalid.
        """
        ...

    def first_block_mean(
        self, codes: Tensor, scales: Tensor, begin: int, end: int, wanted: Tensor, mean: Tensor
    ) -> Tensor:
        """For sequences in `wanted` (bool [B], CPU), the mean of rows `begin` to `end` (exclusive); else `mean`.

        codes: int8 [B, H, W, D], scales [B, H, W]; returns [B, H, D], rounded once to float32.
        """
        ...


class Quantizer(TokenQuantizer, Protocol):
    """Stage 1 of tokens and the page codec, on tensors of one device."""

    def encode_pages(
        self,
        layout: PageLayout,
        k8: Tensor,
        v8: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        search: bool,
        order: ChannelOrder | None = None,
        rotated: bool = False,
    ) -> Tensor:
        """Encode full blocks: k8, v8 int8 [N, H, B, D or Dv], scales [N, H, B] -> uint8 [N, page_bytes].

        Keys of heads that `order` applies to are brought into it first (`channel_order.ordered_rows`); rotated: whether
        INT8 rows are.
        """
        ...

    def decode_pages(self, layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode uint8 [N, page_bytes] -> k8, v8 int8 [N, H, B, D or Dv], k_scale, v_scale [N, H, B]."""
        ...

    def append(self, cache: KVCache, k: Tensor, v: Tensor, counts: Tensor | None) -> bool:
        """Append k, v [B, H, T, D or Dv] (shapes already checked) in one call: the first `counts[b]` tokens (int64 [B],
        CPU) of each sequence, or all.

        Returns False, without any change, if the call needs the general path: values that are not finite, blocks whose
        widths or means are undecided, or many tokens.
        """
        ...


class _PyTorch:
    """Works on any device and in float64."""

    checks_finite = False

    def quantize_tokens(
        self,
        x: Tensor,
        span: tuple[Tensor, Tensor],
        first: Tensor,
        mean: Tensor | None,
        mean_from: int,
        rotate: bool,
        codes: Tensor,
        scales: Tensor,
        target: Tensor,
    ) -> bool:
        begin, end = span
        taken = end > begin
        if not bool(taken.any()):
            return True
        low, high = int(begin[taken].min()), int(end[taken].max())
        tokens = torch.arange(low, high)
        chosen = (tokens >= begin[:, None]) & (tokens < end[:, None])
        x = torch.where(chosen.to(x.device)[:, None, :, None], compute_dtype(x[:, :, low:high]), 0.0)
        if rotate:
            x = flashq.rotate(x)
        if mean is not None:
            smoothed = (first[:, None] + tokens >= mean_from).to(x.device)[:, None, :, None]
            x = torch.where(smoothed, x - mean[:, :, None].to(x.dtype), x)
        batch, token = chosen.nonzero(as_tuple=True)
        row = target[batch] + token + low
        batch, token, row = (i.to(x.device) for i in (batch, token, row))
        for out, rows in zip((codes, scales), flashq.quantize_tokens(x), strict=True):
            out[batch, :, row] = rows[batch, :, token]
        return True

    def first_block_mean(
        self, codes: Tensor, scales: Tensor, begin: int, end: int, wanted: Tensor, mean: Tensor
    ) -> Tensor:
        # Products of codes and scales with 4 mantissa bits sum exactly in float64, in any order.
        rows = codes[:, :, begin:end].double() * scales[:, :, begin:end, None].double()
        learned = (rows.sum(2) / (end - begin)).float().to(mean.dtype)
        return torch.where(wanted.to(mean.device)[:, None, None], learned, mean)

    def encode_pages(
        self,
        layout: PageLayout,
        k8: Tensor,
        v8: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        search: bool,
        order: ChannelOrder | None = None,
        rotated: bool = False,
    ) -> Tensor:
        if order is not None:
            k8, k_scale = ordered_rows(k8, k_scale, order, rotated)
        return encode_tiles(layout, Tiles(k8, v8, k_scale, v_scale), search)

    def decode_pages(self, layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles = decode_tiles(layout, pages)
        return tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale

    def append(self, cache: KVCache, k: Tensor, v: Tensor, counts: Tensor | None) -> bool:
        return False


PYTORCH: Quantizer = _PyTorch()


def quantizer_for(device: torch.device, dtype: torch.dtype = torch.float32) -> Quantizer:
    """The quantizer for tensors of a device and dtype: that of the first backend that has one; PyTorch's without one,
    and for float64."""
    found = None if dtype == torch.float64 else _dispatch().quantizer_on(device)
    return PYTORCH if found is None else found


@functools.cache
def _dispatch() -> ModuleType:
    """The module with the table of backends.

    The only import of a higher layer in this package. It is resolved by name at the first call, so that a cache has the
    same quantizer regardless of which module of the package was imported first.
    """
    return importlib.import_module("turboattention.dispatch")
