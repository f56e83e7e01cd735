"""Loads the steps, zeros and scales of a head one page ahead of their use in decode.

Otherwise the kernel would wait for memory five times per page, each time behind a barrier that loads cannot cross.
Values are converted where they are used, since converting them here would wait for the loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import first_half, key_channels


@triton.jit
def key_metadata(page, offsets, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Steps and zeros of packed keys, uint8 [WIDE / 2] for the channels of each of the two products
    (`products.key_channels`), and the arguments of `scales_of`."""
    channel = key_channels(WIDE, D)
    SECOND: tl.constexpr = first_half(D)
    steps = page + offsets[1] + channel
    zeros = page + offsets[2] + channel
    exponents, scale = _scales(page, offsets, BY_TOKEN)
    if BITS == 8:
        held = (exponents, exponents, exponents, exponents, exponents, scale)
    else:
        inside = None if D == WIDE else channel < D
        behind = None if D == WIDE else channel + SECOND < D
        held = (
            tl.load(steps, mask=inside), tl.load(zeros, mask=inside),
            tl.load(steps + SECOND, mask=behind), tl.load(zeros + SECOND, mask=behind), exponents, scale,
        )  # fmt: skip
    return held


@triton.jit
def value_metadata(page, offsets, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Steps and zeros of packed values, uint8 [WIDE], and the arguments of `scales_of`."""
    d = tl.arange(0, WIDE)
    exponents, scale = _scales(page, offsets, BY_TOKEN)
    if BITS == 8:
        held = (exponents, exponents, exponents, scale)
    else:
        inside = None if D == WIDE else d < D
        step = tl.load(page + offsets[1] + d, mask=inside)
        held = (step, tl.load(page + offsets[2] + d, mask=inside), exponents, scale)
    return held


@triton.jit
def _scales(page, offsets, BY_TOKEN: tl.constexpr):
    t = tl.arange(0, 64)
    exponents = tl.zeros((64,), tl.uint8)
    if BY_TOKEN:
        exponents = tl.load(page + offsets[3] + t)
    return exponents, tl.load((page + offsets[4]).to(tl.pointer_type(tl.int32)))


@triton.jit
def scales_of(exponents, scale):
    """Token scales of the page, float32 [64]; the same as `unpacked_kv.token_scales`."""
    return (scale - (exponents.to(tl.int32) << 19)).to(tl.float32, bitcast=True)
