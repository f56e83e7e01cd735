"""Results of attention: the rotation undone, and the log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LEVELS, LN_2

# Signs of channels c % 64, as in flashq.rotation; two halves.
_SIGNS_LOW = tl.constexpr(0x7F4A7C15)
_SIGNS_HIGH = tl.constexpr(0x1E3779B9)  # bit 31 apart


@triton.jit
def unrotated(x, M: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """x float32 [M, WIDE], of which D channels count, rotated back: Hadamard blocks by butterflies, then signs."""
    BLOCK: tl.constexpr = D & -D
    for stage in tl.static_range(0, 8):
        if (1 << stage) < BLOCK:
            pairs = tl.permute(tl.reshape(x, (M, WIDE >> (stage + 1), 2, 1 << stage)), (0, 1, 3, 2))
            a, b = tl.split(pairs)
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (M, WIDE))
    channel = tl.arange(0, WIDE)
    half = tl.where(channel % 64 < 32, _SIGNS_LOW, _SIGNS_HIGH)
    negative = ((half >> (channel % 32)) & 1) | (channel % 64 == 63).to(tl.int32)
    return x * (tl.where(negative != 0, -1.0, 1.0) * BLOCK**-0.5)[None, :]


@triton.jit
def log_sum_exp(peak, total):
    """-inf where nothing was seen; `total` counts units of 1/127."""
    return tl.where(total > 0.0, peak + tl.log2(tl.maximum(total, 1.0) / LEVELS) * LN_2, float("-inf"))
