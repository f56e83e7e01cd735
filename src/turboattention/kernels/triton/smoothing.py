"""The mean of K over a sequence's first block, which smoothing subtracts from later keys.

The launcher has the same arguments and bit-identical results as that of the same name in `kernels.cpu.quantize`. Index
tensors may be on the CPU or on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import TOKEN_SCALES, check_tiles, indices
from .configs import EXACT
from .rows import rounded_mean


@triton.jit(do_not_specialize=["begin", "end", "heads", "width"])
def _mean_kernel(
    codes, scales, wanted, mean, begin, end, heads, width, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + tile // heads) != 0:
        channel = tl.arange(0, WIDTH)
        # Products of codes and scales with 4 mantissa bits sum exactly in float64, in any order.
        total = tl.zeros((WIDTH,), tl.float64)
        for at in range(begin, end, ROWS):
            row = at + tl.arange(0, ROWS)
            there = row < end
            row = tile * width + row
            scale = tl.load(scales + row, mask=there, other=0.0).to(tl.float64)
            code = tl.load(codes + row[:, None] * D + channel, mask=there[:, None] & (channel < D)[None, :], other=0)
            total += tl.sum(code.to(tl.float64) * scale[:, None], 0)
        count = (end - begin).to(tl.float64) + tl.zeros((WIDTH,), tl.float64)
        tl.store(mean + tile * D + channel, rounded_mean(total, count), mask=channel < D)


def first_block_mean(codes: Tensor, scales: Tensor, begin: int, end: int, wanted: Tensor, mean: Tensor) -> Tensor:
    """For sequences in `wanted` (bool [B]), the mean of rows `begin` to `end` (exclusive); else `mean`.

    codes: int8 [B, H, W, D]; scales: float32 or bfloat16 [B, H, W]. Returns bfloat16 [B, H, D]. Raises DtypeError."""
    mean = mean.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
    batch, heads, width, head_dim = codes.shape
    check_tiles(codes, scales, TOKEN_SCALES)
    if batch * heads:
        _mean_kernel[(batch * heads,)](
            codes, scales, indices(wanted, codes), mean, begin, end, heads, width,
            D=head_dim, ROWS=8, WIDTH=triton.next_power_of_2(head_dim), **EXACT,
        )  # fmt: skip
    return mean
