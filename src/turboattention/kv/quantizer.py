"""Who quantizes: the operations that staging and the page store need, and who carries them out.

PyTorch by default. Layers above may install a provider of faster ones (`install`), which give the
same results to the last bit; this package knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .. import flashq
from ..flashq.symmetric import compute_dtype
from .channel_order import reorder
from .layout import PageLayout
from .pages import Tiles
from .pages import decode_pages as decode_tiles
from .pages import encode_pages as encode_tiles

if TYPE_CHECKING:
    from .growth import Growing


class Quantizer(Protocol):
    """Stage 1 of tokens and the page codec, on tensors of one device."""

    def quantize_tokens(
        self,
        x: Tensor,
        span: tuple[Tensor, Tensor],
        first: Tensor,
        mean: Tensor | None,
        mean_from: int,
        rotate: bool,
        order: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        target: Tensor,
    ) -> bool:
        """Rotate or reorder, smooth and quantize tokens `span[0][b] .. span[1][b]` of each sequence of x [B, H, T, D].

        order: int64 [H, D], the channel that each place takes, or None. Token t stands at position `first[b] + t`;
        from `mean_from` on, mean [B, H, D] is subtracted (in the order of places).
        Its row goes to row `target[b] + t` of codes int8 [B, H, W, D] and scales [B, H, W]. What
        else x holds is never read. All of span, first and target are int64 [B] (CPU).

        Returns whether all values read were finite and in range, where it looks; else True.
        """
        ...

    def first_block_mean(
        self, codes: Tensor, scales: Tensor, begin: int, end: int, wanted: Tensor, mean: Tensor
    ) -> Tensor:
        """[B, H, D]: `mean`, but for the sequences `wanted` (bool [B], CPU) the mean of their rows `begin`
        to `end` (exclusive) of codes [B, H, W, D] under scales [B, H, W], rounded once to float32."""
        ...

    def encode_pages(
        self, layout: PageLayout, k8: Tensor, v8: Tensor, k_scale: Tensor, v_scale: Tensor, search: bool
    ) -> Tensor:
        """Full blocks, as in `pages.Tiles` [N, H, B, D] -> uint8 [N, page_bytes]."""
        ...

    def decode_pages(self, layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 [N, page_bytes] -> k8, v8, k_scale, v_scale."""
        ...

    def append(self, cache: Growing, k: Tensor, v: Tensor, counts: Tensor | None) -> bool:
        """Append k, v [B, H, T, D], whose shapes were checked, at once; of each sequence the first
        `counts[b]` tokens (int64 [B], CPU), where given. False, and nothing done, where it does not do
        that: values that are not finite, blocks that need a decision, many tokens."""
        ...


class _PyTorch:
    """Any device, also float64."""

    def quantize_tokens(
        self,
        x: Tensor,
        span: tuple[Tensor, Tensor],
        first: Tensor,
        mean: Tensor | None,
        mean_from: int,
        rotate: bool,
        order: Tensor | None,
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
        if order is not None:
            x = reorder(x, order, 1)
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
        # Codes times scales of 4 mantissa bits sum exactly in float64: the order does not matter.
        rows = codes[:, :, begin:end].double() * scales[:, :, begin:end, None].double()
        learned = (rows.sum(2) / (end - begin)).float().to(mean.dtype)
        return torch.where(wanted.to(mean.device)[:, None, None], learned, mean)

    def encode_pages(
        self, layout: PageLayout, k8: Tensor, v8: Tensor, k_scale: Tensor, v_scale: Tensor, search: bool
    ) -> Tensor:
        return encode_tiles(layout, Tiles(k8, v8, k_scale, v_scale), search)

    def decode_pages(self, layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tiles = decode_tiles(layout, pages)
        return tiles.k8, tiles.v8, tiles.k_scale, tiles.v_scale

    def append(self, cache: Growing, k: Tensor, v: Tensor, counts: Tensor | None) -> bool:
        return False


PYTORCH: Quantizer = _PyTorch()

Provider = Callable[[torch.device], "Quantizer | None"]
_providers: list[Provider] = []


def install(provider: Provider) -> Callable[[], None]:
    """Ask `provider` for a quantizer before PyTorch is taken, the latest first; None from it means
    that it has none for that device. Returns a function that undoes this."""
    _providers.append(provider)
    return lambda: _providers.remove(provider)


def quantizer_for(device: torch.device, dtype: torch.dtype = torch.float32) -> Quantizer:
    """The fastest quantizer for tensors of a device and dtype. float64 is always PyTorch's."""
    if dtype != torch.float64:
        for provider in reversed(_providers):
            found = provider(device)
            if found is not None:
                return found
    return PYTORCH
