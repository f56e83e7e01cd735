"""What a page has of a head beside codes: steps, zeros and scales, loaded a block ahead of their products.

A step of decode would otherwise wait for memory five times a page, each time behind a barrier that loads do not pass.
Values stay as they lie until they are used: whatever converted them at once would wait for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import first_half, key_channels


@triton.jit
def key_metadata(page, place, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Steps and zeros uint8 [WIDE / 2] of the channels of either product (`products.key_channels`) of packed keys; and
    the scales as `scales_of` takes them."""
    channel = key_channels(WIDE, D)
    SECOND: tl.constexpr = first_half(D)
    steps = page + place[1] + channel
    zeros = page + place[2] + channel
    exponents, scale = _scales(page, place, BY_TOKEN)
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
def value_metadata(page, place, WIDE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Steps and zeros uint8 [WIDE] of packed values, and the scales as `scales_of` takes them."""
    d = tl.arange(0, WIDE)
    exponents, scale = _scales(page, place, BY_TOKEN)
    if BITS == 8:
        held = (exponents, exponents, exponents, scale)
    else:
        inside = None if D == WIDE else d < D
        step = tl.load(page + place[1] + d, mask=inside)
        held = (step, tl.load(page + place[2] + d, mask=inside), exponents, scale)
    return held


@triton.jit
def _scales(page, place, BY_TOKEN: tl.constexpr):
    t = tl.arange(0, 64)
    exponents = tl.zeros((64,), tl.uint8)
    if BY_TOKEN:
        exponents = tl.load(page + place[3] + t)
    return exponents, tl.load((page + place[4]).to(tl.pointer_type(tl.int32)))


@triton.jit
def scales_of(exponents, scale):
    """Scales of the page's tokens, float32 [64]; as `operands.token_scales`."""
    return (scale - (exponents.to(tl.int32) << 19)).to(tl.float32, bitcast=True)
