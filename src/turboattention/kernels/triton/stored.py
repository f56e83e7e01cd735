"""Softmax weights with `stored_prefill`: queries read their own block as INT8 and earlier blocks from pages.

In its own block, a row's value scales are relative to the largest that it sees, so that its result does not depend on
later tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LEVELS, round_levels, row_codes, weights
from .unpacked_kv import largest_of


@triton.jit
def weigh_stored(
    s, unit, mean, key, v_scale, begin, end, cap, threshold,
    FORM: tl.constexpr, CUT: tl.constexpr, ROW: tl.constexpr, SEEN: tl.constexpr, OWN: tl.constexpr, CAP: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """`softmax.weigh` without masks, for keys `begin <= key < end` of each row (used with SEEN or OWN).

    The fourth result is the scale of the INT8 codes: with ROW or OWN, one per row, from the keys of the block that it
    sees; else one per block."""
    weight, row_sum, row_max = weights(
        s, unit, mean, key, (begin, end), cap, threshold, FORM, CUT, ROW, SEEN, CAP, "", AXIS
    )
    scale = tl.expand_dims(v_scale, 1 - AXIS)
    if ROW:  # What a row does not see has the weight zero.
        codes, unit = row_codes(weight * scale, AXIS)
        largest = unit * LEVELS
    elif OWN:
        keys = tl.expand_dims(key, 1 - AXIS)
        seen = (keys >= tl.expand_dims(begin, AXIS)) & (keys < tl.expand_dims(end, AXIS))
        # Zero the scales of unseen keys: weights may be tiny instead of zero, and scales arbitrarily large.
        scale = tl.where(seen, scale, 0.0)
        largest = tl.max(scale, AXIS)
        largest = tl.where(largest > 0.0, largest, 1.0)
        codes = round_levels(weight, scale * tl.expand_dims(1.0 / largest * LEVELS, AXIS))
    else:
        largest = largest_of(v_scale)
        codes = round_levels(weight, scale / largest * LEVELS)
    return codes, row_sum, row_max, largest
