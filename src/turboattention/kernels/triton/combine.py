"""Combines the splits of split-KV decode: one program per row of a query head."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotation import rotate_back
from .softmax import LOG2_E, log_sum_exp


@triton.jit
def _merged(acc_ptr, row_max_ptr, row_sum_ptr, at, splits, WIDE: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr):
    """A row's output [1, WIDE], row max and row sum from its splits, which are R apart, starting at `at`."""
    s = tl.arange(0, SPLITS)
    row_maxima = tl.load(row_max_ptr + at + s * R, mask=s < splits, other=float("-inf"))
    row_sums = tl.load(row_sum_ptr + at + s * R, mask=s < splits, other=0.0)
    row_max = tl.max(row_maxima, 0)
    safe = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(row_sums * tl.exp2((row_maxima - safe) * LOG2_E), 0)
    d = tl.arange(0, WIDE)
    TOGETHER: tl.constexpr = 8 if SPLITS > 8 else SPLITS
    out = tl.zeros((TOGETHER, WIDE), tl.float32)
    for begin in tl.range(0, splits, TOGETHER):
        some = begin + tl.arange(0, TOGETHER)
        share = tl.load(row_max_ptr + at + some * R, mask=some < splits, other=float("-inf"))
        share = tl.exp2((share - safe) * LOG2_E)
        # The memory of a split without visible keys is uninitialized.
        part = tl.load(acc_ptr + (at + some * R)[:, None] * WIDE + d[None, :], mask=(share > 0.0)[:, None], other=0.0)
        out = tl.fma(part, share[:, None], out)
    result = tl.sum(out, 0)[None, :] * tl.where(row_sum > 0.0, 1.0 / tl.maximum(row_sum, 1e-30), 0.0)
    return result, row_max, row_sum


@triton.jit(do_not_specialize=["splits", "tiles", "most"])
def combine(
    acc_ptr, row_max_ptr, row_sum_ptr, out_ptr, lse_ptr, starts, splits, tiles, group, queries, most,
    out_stride_t, out_stride_h,
    D: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Grid (rows, KV heads, sequences). acc, row_max, row_sum: as written by `decode` or `paged_decode`. SPLITS: a
    power of two, at least `splits`.

    Of a cache (starts is None): out [B, Hkv g, Lq, D], contiguous; lse float32 [B, Hkv g, Lq], natural log. Of a
    server: out [T, Hkv g, D], for sequences of at most `most` rows.
    """
    row, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base = (b * tl.num_programs(1) + h).to(tl.int64)
    there = True
    if starts is not None:
        start = tl.load(starts + b).to(tl.int64)
        rows = (tl.load(starts + b + 1).to(tl.int64) - start) * group
        there = (rows <= most) & (row < rows)
    if there:
        at = (base * tiles + row // R) * splits * R + row % R
        result, row_max, row_sum = _merged(acc_ptr, row_max_ptr, row_sum_ptr, at, splits, WIDE, R, SPLITS)
        if ROTATE:
            result = rotate_back(result, 1, WIDE, D & -D, False)
        if starts is not None:
            to = (start + row // group) * out_stride_t + (h * group + row % group).to(tl.int64) * out_stride_h
        else:
            of_row = (base * group + row % group) * queries + row // group
            tl.store(lse_ptr + of_row, log_sum_exp(row_max, row_sum))
            to = of_row * D
        d = tl.arange(0, WIDE)[None, :]
        tl.store(out_ptr + to + d, result.to(out_ptr.dtype.element_ty), mask=d < D)
