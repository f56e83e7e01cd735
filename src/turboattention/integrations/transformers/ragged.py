"""Rows of unequal length: packs valid tokens to one side, and scatters results back to their positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def pack_index(valid: Tensor, side: Literal["left", "right"] = "left") -> tuple[Tensor, Tensor]:
    """The positions of valid tokens per row: bool [B, T] -> index int64 [B, T'], counts int64 [B].

    T' is the largest count. Entries beyond the count of a row are positions that are not valid.
    """
    counts = valid.sum(-1)
    width = int(counts.max()) if len(counts) else 0
    if side == "left":
        return torch.argsort(~valid, dim=-1, stable=True)[:, :width], counts
    return torch.argsort(valid, dim=-1, stable=True)[:, valid.shape[1] - width :], counts


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, D] at positions index [B, T'] -> [B, H, T', D]."""
    index = index.to(x.device)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def put_back(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """The inverse of `take`: x [B, H, T', D] -> [B, H, T, D], zeros where `valid` [B, T] is False."""
    out = x.new_zeros(x.shape[0], x.shape[1], valid.shape[1], x.shape[3])
    index = index.to(x.device)[:, None, :, None]
    out.scatter_(2, index.expand_as(x), x)
    return torch.where(valid.to(x.device)[:, None, :, None], out, 0.0)


def take_columns(mask: Tensor, valid: Tensor, hidden: bool | float) -> Tensor:
    """mask [B or 1, H, T, L]: the columns selected by `valid` [B, L], packed to the left and padded with `hidden`."""
    index, counts = pack_index(valid)
    index, width = index.to(mask.device), index.shape[1]
    mask = mask.expand(len(valid), -1, -1, -1)
    packed = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    beyond = (torch.arange(width) >= counts[:, None]).to(mask.device)
    return packed.masked_fill(beyond[:, None, None, :], hidden)


def take_rows(mask: Tensor, index: Tensor) -> Tensor:
    """mask [B or 1, H, T, L] at query rows index [B, T']; a single row applies to all."""
    if mask.shape[2] == 1:
        return mask
    return take(mask.expand(len(index), -1, -1, -1), index)


def alike(valid: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Groups of equal rows of bool [B, L]: (rows int64 [n], their columns int64 [m])."""
    patterns, group = valid.unique(dim=0, return_inverse=True)
    return [((group == i).nonzero()[:, 0], pattern.nonzero()[:, 0]) for i, pattern in enumerate(patterns)]
