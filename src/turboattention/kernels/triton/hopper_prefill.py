"""`prefill` for Hopper: asynchronous matrix products and copies, written in Gluon.

The same results as `prefill` with the exponential "exp" and the static scale of weights, up to the order of sums. A
program is one warpgroup with 64 rows. While the tensor cores multiply the weights of a block by its values, the threads
compute the weights of the next one. Blocks are copied by the TMA, up to `STAGES` of them.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 64
STAGES = 4

_ROUND = gl.constexpr(12582912.0)  # as in rounding.py
_SUM_OF_64 = gl.constexpr(0x30000000)  # as in softmax.py
_LEVELS = gl.constexpr(127.0)
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
_LOW = gl.constexpr(0x7F4A7C15)  # as in rotation.py
_HIGH = gl.constexpr(0x9E3779B9 - (1 << 32))


@gluon.jit
def _fetch(descriptors, block, slot, wanted, buffers, bars, WIDE: gl.constexpr):
    """Start the copy of a block's operands to a slot; its barrier completes with the copy."""
    k_desc, v_desc, scale_desc = descriptors
    k_smem, v_smem, scale_smem = buffers
    bar = bars.index(slot)
    mbarrier.expect(bar, 2 * 64 * WIDE + 4 * 128, pred=wanted)
    tma.async_copy_global_to_shared(k_desc, [block * 64, 0], bar, k_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(v_desc, [block * WIDE, 0], bar, v_smem.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(scale_desc, [block * 128], bar, scale_smem.index(slot), pred=wanted)


@gluon.jit
def _weigh(
    s, k_scale, levels, v_scale, unit, mean, mean_from, block, begin, end, total, peak,
    SCORES: gl.constexpr, MEAN: gl.constexpr, CLEAR: gl.constexpr,
):  # fmt: skip
    """Weights of a block as INT8 in the layout of a first operand, columns as `operands.value_column`; by what to
    rescale the sum before, what to multiply the block's product by, and the running sum and maximum."""
    x = s.to(gl.float32) * k_scale[None, :]
    if not CLEAR:
        key = block * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        x = gl.where(seen, x, float("-inf"))
    block_peak = gl.max(x, 1)
    against = block_peak if CLEAR else gl.where(block_peak == float("-inf"), 0.0, block_peak)
    # The difference first, then its unit: exactly zero at the maximum.
    weight = gl.exp2((x - against[:, None]) * (unit * _LOG2_E)[:, None])
    rounded = gl.fma(weight, _LEVELS, _ROUND)
    block_total = (gl.sum(rounded.to(gl.int32, bitcast=True), 1) + _SUM_OF_64).to(gl.float32)
    shifted = block_peak * unit
    if MEAN:
        shifted += gl.where(block >= mean_from, mean, 0.0)
    new = gl.maximum(peak, shifted)
    safe = new if CLEAR else gl.where(new == float("-inf"), 0.0, new)
    keep = gl.exp2((peak - safe) * _LOG2_E)
    each = gl.exp2((shifted - safe) * _LOG2_E)
    total = total * keep + block_total * each
    p = gl.fma(weight, levels[None, :], _ROUND)
    p = p.to(gl.int32, bitcast=True).to(gl.int8)
    p = gl.permute(gl.reshape(p, (64, 4, 2, 4, 2)), (0, 1, 3, 2, 4))
    return gl.reshape(p, (64, 64)), keep, each * v_scale, total, new


@gluon.jit
def _add(acc, o, keep, each, SUMS: gl.constexpr):
    keep = gl.convert_layout(keep, gl.SliceLayout(1, SUMS))
    each = gl.convert_layout(each, gl.SliceLayout(1, SUMS))
    return gl.fma(o.to(gl.float32), each[:, None], acc * keep[:, None])


@gluon.jit
def _step(
    state, i, last, low, first_block, q_smem, p_smem, descriptors, buffers, bars, v_scale_ptr, unit, mean, mean_from,
    begin, end,
    WIDE: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr, MEAN: gl.constexpr,
    CLEAR: gl.constexpr,
):  # fmt: skip
    """Block i: its weights go to `p_smem`, while those of the block before are multiplied by their values."""
    keep, each, acc, total, peak = state
    k_smem, v_smem, scale_smem = buffers
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    no_scores = gl.zeros((64, 64), gl.int32, layout=SCORES)
    no_sums = gl.zeros((64, WIDE), gl.int32, layout=SUMS)
    slot = i % STAGES
    before = gl.maximum(i - 1, 0) % STAGES
    v_scale = gl.load(v_scale_ptr + low + i)
    mbarrier.wait(bars.index(slot), i // STAGES & 1)
    s = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    o = warpgroup_mma(p_smem, v_smem.index(before).permute((1, 0)), no_sums, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p, next_keep, next_each, total, peak = _weigh(
        s, scale_smem.index(slot).slice(0, 64).load(COLUMN), scale_smem.index(slot).slice(64, 64).load(COLUMN), v_scale,
        unit, mean, mean_from, low + i, begin, end, total, peak, SCORES, MEAN, CLEAR,
    )  # fmt: skip
    o = warpgroup_mma_wait(0, deps=[o])
    p_smem.store(p)
    fence_async_shared()
    gl.thread_barrier()  # all warps have read the slot of the block before
    wanted = i - 1 + STAGES
    _fetch(descriptors, first_block + low + wanted, before, (i > 0) & (wanted <= last), buffers, bars, WIDE)
    acc = _add(acc, o, keep, each, SUMS)
    return next_keep, next_each, acc, total, peak


@gluon.jit
def _butterfly(x, WIDE: gl.constexpr, APART: gl.constexpr, LAYOUT: gl.constexpr):
    """Replace channels that are `APART` from each other by their sum and difference."""
    pairs = gl.permute(gl.reshape(x, (64, WIDE // (2 * APART), 2, APART)), (0, 1, 3, 2))
    a, b = gl.split(pairs)
    x = gl.reshape(gl.permute(gl.join(a + b, a - b), (0, 1, 3, 2)), (64, WIDE))
    return gl.convert_layout(x, LAYOUT)


@gluon.jit(do_not_specialize=["first_head", "first_sequence", "blocks", "window", "mean_from"])
def hopper_prefill(
    q_ptr, unit_ptr, mean_ptr, first_ptr, valid_ptr, lengths_ptr,
    k_desc, v_desc, scale_desc, v_scale_ptr, flag_ptr, out_ptr, lse_ptr,
    first_head, first_sequence, kv_heads, group, queries, blocks, window, mean_from,
    D: gl.constexpr, WIDE: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    MEAN: gl.constexpr, ROTATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `prefill`; the operands are descriptors of their rows. BLOCK: channels that are rotated together."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 16], [512 // WIDE, WIDE // 16], [4, 1], [1, 0])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDE, WIDE // 8], [4, 1], [1, 0])

    own = gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)
    b = first_sequence + gl.program_id(2)
    h = first_head + gl.program_id(1)
    # The last rows see most under a causal mask: they go first.
    tile = (gl.num_programs(0) - 1 - gl.program_id(0)) * 64
    base = (b * kv_heads + h).to(gl.int64) * group * queries

    row = tile + gl.arange(0, 64, layout=gl.SliceLayout(1, LOADED))
    d = gl.arange(0, WIDE, layout=gl.SliceLayout(0, LOADED))
    at = row % group * queries + row // group
    inside = (row < queries * group)[:, None] & (d < D)[None, :]
    q = gl.load(q_ptr + base * D + at.to(gl.int64)[:, None] * D + d[None, :], mask=inside, other=0)
    q_smem = gl.allocate_shared_memory(gl.int8, [64, WIDE], gl.NVMMASharedLayout(WIDE, 8, 2), q)

    row = tile + gl.arange(0, 64, layout=ROW)
    there = row < queries * group
    at = row % group * queries + row // group
    unit = gl.load(unit_ptr + base + at, mask=there, other=1.0)
    mean = gl.zeros_like(unit)
    if MEAN:
        mean = gl.load(mean_ptr + base + at, mask=there, other=0.0)
    position = gl.load(first_ptr + b).to(gl.int32) + row // group
    valid = gl.load(valid_ptr + b).to(gl.int32)
    length = gl.load(lengths_ptr + b).to(gl.int32)
    end = gl.zeros_like(row) + length
    begin = gl.zeros_like(row)
    if CAUSAL:
        end = gl.minimum(end, position + 1)
    if WINDOW:
        begin = gl.maximum(position - window + 1, 0)
        if not CAUSAL:
            end = gl.minimum(end, position + window)
    end = gl.where(row // group < valid, gl.maximum(end, 0), 0)
    some = end > begin
    low = gl.min(gl.where(some, begin, length), 0) // 64
    high = (gl.max(end, 0) + 63) // 64
    # Blocks that all rows see as a whole; rows that see nothing are left out at the end.
    clear = gl.maximum((gl.max(gl.where(some, begin, 0), 0) + 63) // 64, low)
    clear_end = gl.maximum(gl.minimum(gl.min(gl.where(some, end, length), 0) // 64, high), clear)

    k_smem = gl.allocate_shared_memory(gl.int8, [STAGES, 64, WIDE], gl.NVMMASharedLayout(WIDE, 8, 2))
    v_smem = gl.allocate_shared_memory(gl.int8, [STAGES, WIDE, 64], gl.NVMMASharedLayout(64, 8, 2))
    p_smem = gl.allocate_shared_memory(gl.int8, [64, 64], gl.NVMMASharedLayout(64, 8, 2))
    FLAT: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 128], FLAT)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    descriptors = (k_desc, v_desc, scale_desc)
    buffers = (k_smem, v_smem, scale_smem)
    first_block = own * blocks
    v_scale_ptr += first_block
    for i in gl.static_range(STAGES):
        _fetch(descriptors, first_block + low + i, i, low + i < high, buffers, bars, WIDE)

    acc = gl.zeros((64, WIDE), gl.float32, layout=SUMS)
    no_scores = gl.zeros((64, 64), gl.int32, layout=SCORES)
    no_sums = gl.zeros((64, WIDE), gl.int32, layout=SUMS)
    total = gl.zeros((64,), gl.float32, layout=ROW)
    peak = gl.full((64,), float("-inf"), gl.float32, layout=ROW)
    if low < high:
        last = high - low - 1
        p_smem.store(gl.zeros((64, 64), gl.int8, layout=SCORES))
        fence_async_shared()
        gl.thread_barrier()
        keep = gl.full((64,), 1.0, gl.float32, layout=ROW)
        each = gl.zeros((64,), gl.float32, layout=ROW)
        if WINDOW:
            for j in range(0, gl.minimum(clear, high) - low):
                keep, each, acc, total, peak = _step(
                    (keep, each, acc, total, peak), j, last, low, first_block, q_smem, p_smem, descriptors, buffers, bars, v_scale_ptr, unit,
                    mean, mean_from, begin, end, WIDE, STAGES, SCORES, SUMS, MEAN, False,
                )  # fmt: skip
        for k in range(gl.minimum(clear, high) - low, clear_end - low):
            keep, each, acc, total, peak = _step(
                (keep, each, acc, total, peak), k, last, low, first_block, q_smem, p_smem, descriptors, buffers, bars, v_scale_ptr, unit,
                mean, mean_from, begin, end, WIDE, STAGES, SCORES, SUMS, MEAN, True,
            )  # fmt: skip
        for m in range(clear_end - low, last + 1):
            keep, each, acc, total, peak = _step(
                (keep, each, acc, total, peak), m, last, low, first_block, q_smem, p_smem, descriptors, buffers, bars, v_scale_ptr, unit,
                mean, mean_from, begin, end, WIDE, STAGES, SCORES, SUMS, MEAN, False,
            )  # fmt: skip
        o = warpgroup_mma(p_smem, v_smem.index(last % STAGES).permute((1, 0)), no_sums, use_acc=False, is_async=True)
        o = warpgroup_mma_wait(0, deps=[o])
        acc = _add(acc, o, keep, each, SUMS)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))

    total = gl.where(some, total, 0.0)
    share = gl.where(total > 0.0, 1.0 / gl.maximum(total, 1.0), 0.0)
    x = acc * gl.convert_layout(share, gl.SliceLayout(1, SUMS))[:, None]
    if ROTATE:  # channels in registers of a thread first, the others after an exchange
        for i in gl.static_range(8):
            if (i == 0 or i > 2) and (1 << i) < BLOCK:
                x = _butterfly(x, WIDE, 1 << i, SUMS)
    x = gl.convert_layout(x, STORED)
    d = gl.arange(0, WIDE, layout=gl.SliceLayout(0, STORED))
    if ROTATE:
        for i in gl.static_range(1, 3):
            if (1 << i) < BLOCK:
                x = _butterfly(x, WIDE, 1 << i, STORED)
        word = gl.where((d & 32) == 0, _LOW, _HIGH)
        x = x * gl.where(((word >> (d & 31)) & 1) == 0, BLOCK**-0.5, -(BLOCK**-0.5))[None, :]
    result = gl.where(total > 0.0, peak + gl.log2(gl.maximum(total, 1.0) / _LEVELS) * _LN_2, float("-inf"))
    if flag_ptr is not None:
        bad = gl.load(flag_ptr) != 0
        x = gl.where(bad, float("nan"), x)
        result = gl.where(bad, float("nan"), result)
    gl.store(lse_ptr + base + at, result, mask=there)
    row = tile + gl.arange(0, 64, layout=gl.SliceLayout(1, STORED))
    at = row % group * queries + row // group
    inside = (row < queries * group)[:, None] & (d < D)[None, :]
    to = out_ptr + base * D + at.to(gl.int64)[:, None] * D + d[None, :]
    gl.store(to, x.to(out_ptr.dtype.element_ty), mask=inside)


def descriptors(k: Tensor, v: Tensor, scales: Tensor) -> dict[str, Any]:
    """Of operands, as the kernel takes them. scales: K's and V's of each block, float32 [..., 2, 64]."""
    wide = k.shape[-1]
    return {
        "k_desc": TensorDescriptor.from_tensor(k.view(-1, wide), [64, wide], gl.NVMMASharedLayout(wide, 8, 2)),
        "v_desc": TensorDescriptor.from_tensor(v.view(-1, 64), [wide, 64], gl.NVMMASharedLayout(64, 8, 2)),
        "scale_desc": TensorDescriptor.from_tensor(scales.view(-1), [128], gl.NVMMASharedLayout(0, 32, 1)),
    }
