"""The INT8 decode buffer: the tokens of each sequence that no full block holds yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modes import in_own_modes
from .pages import Tiles


class Int8Buffer:
    """`capacity` INT8 tokens a sequence, left-aligned, with a scale per token.

    codes int8 [B, H, capacity, D], scales [B, H, capacity]: bfloat16 where scales are on the
    4-mantissa-bit grid of token scales (exact), else float32. Rows past a sequence's length are zero.
    """

    def __init__(self, batch: int, heads: int, capacity: int, head_dim: int, token_scales: bool, device: torch.device):
        self.capacity = capacity
        scale_dtype = torch.bfloat16 if token_scales else torch.float32
        self.k8, self.v8 = (
            torch.zeros(batch, heads, capacity, head_dim, dtype=torch.int8, device=device) for _ in range(2)
        )
        self.k_scale, self.v_scale = (
            torch.zeros(batch, heads, capacity, dtype=scale_dtype, device=device) for _ in range(2)
        )

    TENSORS = ("k8", "v8", "k_scale", "v_scale")

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).untyped_storage().nbytes() for name in self.TENSORS)

    def memory(self, rows: int) -> tuple[Tensor, ...]:
        """The tensors with `rows` rows a head, contiguous, at least `capacity`: some kernels want room for
        the token that fills a block. Moved only where there are more or fewer; the rows behind are zero."""
        whole = []
        for name in self.TENSORS:
            held = getattr(self, name)
            stride, size = held.stride(1), (*held.shape[:2], rows, *held.shape[3:])
            if stride != rows * (held.shape[3] if held.dim() == 4 else 1):
                moved = held.new_zeros(size)
                moved[:, :, : self.capacity] = held
                setattr(self, name, moved[:, :, : self.capacity])
                whole.append(moved)
            else:
                whole.append(held.as_strided(size, (size[1] * stride, stride, *held.stride()[2:])))
        return tuple(whole)

    def tiles(self) -> Tiles:
        """What is buffered, scales as float32."""
        return Tiles(self.k8, self.v8, self.k_scale.float(), self.v_scale.float())

    def take(self, tiles: Tiles, first: Tensor, lengths: Tensor) -> None:
        """Hold rows `first .. first + lengths` (int64 [B] each) of every sequence of `tiles`."""
        rows = first[:, None] + torch.arange(self.capacity, device=first.device)
        valid = torch.arange(self.capacity, device=first.device) < lengths[:, None]
        rows = torch.where(valid, rows, 0).to(self.k8.device)[:, None, :]
        valid = valid.to(self.k8.device)[:, None, :]
        for name in self.TENSORS:
            source, target = getattr(tiles, name), getattr(self, name)
            index = rows[..., None].expand_as(target) if source.dim() == 4 else rows.expand_as(target)
            mask = valid[..., None] if source.dim() == 4 else valid
            target.copy_(torch.where(mask, source.gather(2, index), 0))

    @in_own_modes
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies made under `inference_mode` can be changed outside of it, too."""
        self.__dict__.update(state)
        for name in self.TENSORS:
            if (held := getattr(self, name)).is_inference():
                setattr(self, name, held.clone())

    def select(self, index: Tensor) -> Int8Buffer:
        """A copy of the sequences `index` int64 [B']."""
        copy = object.__new__(Int8Buffer)
        copy.capacity = self.capacity
        for name in self.TENSORS:
            setattr(copy, name, getattr(self, name).index_select(0, index.to(self.k8.device)))
        return copy
