"""The tail buffer: the INT8 tokens of each sequence that are not compressed into pages yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modes import in_own_modes
from ..uploads import upload
from .pages import Tiles

_STEP = 16
_SPARE = 256


class TailBuffer:
    """Up to `capacity` INT8 tokens per sequence, left-aligned, with a scale per token.

    Codes are int8 [B, H, rows, D or Dv], scales [B, H, rows]: bfloat16 with token scales, which have 4 mantissa bits
    and are exact in it, else float32. `rows_for` chooses the number of rows; those past a sequence's tokens are zero.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        token_scales: bool,
        device: torch.device,
        v_head_dim: int = 0,
    ):
        self.capacity = capacity
        scale_dtype, rows = torch.bfloat16 if token_scales else torch.float32, min(_STEP, capacity)
        self.k8, self.v8 = (
            torch.zeros(batch, heads, rows, width, dtype=torch.int8, device=device)
            for width in (head_dim, v_head_dim or head_dim)
        )
        self.k_scale, self.v_scale = (
            torch.zeros(batch, heads, rows, dtype=scale_dtype, device=device) for _ in range(2)
        )

    TENSORS = ("k8", "v8", "k_scale", "v_scale")

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).untyped_storage().nbytes() for name in self.TENSORS)

    @property
    def rows(self) -> int:
        """Allocated rows per sequence."""
        return self.k8.shape[2]

    def rows_for(self, tokens: int, held: int) -> int:
        """Rows to allocate for at most `tokens` buffered tokens per sequence.

        A multiple of 16. Since each change of the number moves the buffer, the multiple grows with `held`, the tokens
        that the longest sequence can attend to, as long as it is small in comparison.
        """
        step = max(_STEP, held // _SPARE // _STEP * _STEP)
        return min(max(1, -(-tokens // step)) * step, self.capacity)

    @in_own_modes
    def memory(self, rows: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Codes int8 [B, H, rows, D or Dv] and scales [B, H, rows] of K and V, contiguous; the first `capacity` rows
        are the buffer.

        `rows` may exceed `capacity`, since some kernels need a row for the token that fills a block. Tensors are moved
        only if the number of rows changes; new rows are zero.
        """
        whole = []
        for name in self.TENSORS:
            held = getattr(self, name)
            stride, size = held.stride(1), (*held.shape[:2], rows, *held.shape[3:])
            if stride != rows * (held.shape[3] if held.dim() == 4 else 1):
                moved, kept = held.new_empty(size), min(rows, held.shape[2])
                moved[:, :, :kept] = held[:, :, :kept]
                moved[:, :, kept:] = 0
                setattr(self, name, moved[:, :, : self.capacity])
                whole.append(moved)
            else:
                whole.append(held.as_strided(size, (size[1] * stride, stride, *held.stride()[2:])))
        k8, v8, k_scale, v_scale = whole
        return (k8, v8), (k_scale, v_scale)

    def tiles(self) -> Tiles:
        """The buffered rows, with scales as float32."""
        return Tiles(self.k8, self.v8, self.k_scale.float(), self.v_scale.float())

    def take(self, tiles: Tiles, first: Tensor, lengths: Tensor, held: int) -> None:
        """Replace the contents by rows `first` to `first + lengths` (int64 [B], end exclusive) of `tiles`; `held` as in
        `rows_for`."""
        count = self.rows_for(int(lengths.max()) if len(lengths) else 0, held)
        rows = first[:, None] + torch.arange(count, device=first.device)
        valid = torch.arange(count, device=first.device) < lengths[:, None]
        rows = upload(torch.where(valid, rows, 0), self.k8.device)[:, None, :]
        valid = upload(valid, self.k8.device)[:, None, :]
        for name in self.TENSORS:
            source, mine = getattr(tiles, name), getattr(self, name)
            shape = (*mine.shape[:2], count, *mine.shape[3:])
            index = rows[..., None].expand(shape) if source.dim() == 4 else rows.expand(shape)
            mask = valid[..., None] if source.dim() == 4 else valid
            setattr(self, name, torch.where(mask, source.gather(2, index), 0).to(mine.dtype))

    @in_own_modes
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tensors copied under `inference_mode` are cloned, so that they can be modified outside it."""
        self.__dict__.update(state)
        for name in self.TENSORS:
            if (held := getattr(self, name)).is_inference():
                setattr(self, name, held.clone())

    def select(self, index: Tensor) -> TailBuffer:
        """A copy of the sequences `index` int64 [B']."""
        copy = object.__new__(TailBuffer)
        copy.capacity = self.capacity
        for name in self.TENSORS:
            setattr(copy, name, getattr(self, name).index_select(0, index.to(self.k8.device)))
        return copy
