"""Widths of codes as data: everything that kernels derive from a width is derived here.

A code has a lower plane of 8, 4, 2 or 1 bits and may have a plane of its highest bit (`flashq.packing.PLANES`). K of a
head may have two widths (`kv.layout.K_HALVES`). Kernels number a head's K by its width or, if it has two, by
`TWO_WIDTHS` plus their mean; V by its width. A new width of such planes in PLANES or K_HALVES needs no change here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...flashq.packing import PLANES
from ...kv.layout import K_HALVES, WIDEST

_PLANES = tl.constexpr(PLANES)
_HALVES = tl.constexpr(K_HALVES)
"""As constexpr, the tables are part of the key under which Triton keeps a compiled kernel."""

TWO_WIDTHS = WIDEST
"""Offset added to the mean of two widths."""

K_NUMBERS = tl.constexpr(TWO_WIDTHS + max(K_HALVES) + 1)
V_NUMBERS = tl.constexpr(WIDEST + 1)
"""Numbers of K and of V are smaller than these."""


@triton.constexpr_function
def lower_plane(bits):
    """Bits of a code in its lower plane; all, or all but the highest."""
    lower, *upper = _PLANES.value[bits]
    assert upper in ([], [1]), "PLANES: expected at most one upper plane, of 1 bit"
    return lower


@triton.constexpr_function
def wider(number):
    """The width of the first half of a head's channels of K."""
    return _HALVES.value[number - TWO_WIDTHS][0] if number > TWO_WIDTHS else number


@triton.constexpr_function
def narrower(number):
    """The width of the second half."""
    return _HALVES.value[number - TWO_WIDTHS][1] if number > TWO_WIDTHS else number


@triton.constexpr_function
def own_numbers(numbers, side):
    """The numbers in a bit mask that a side can have: only K (side 0) has two widths."""
    return numbers if side == 0 else numbers & ((2 << WIDEST) - 1)


@triton.constexpr_function
def has_two_widths(numbers):
    """Whether some number of a bit mask is one of two widths."""
    return numbers >> (TWO_WIDTHS + 1) != 0


@triton.constexpr_function
def pair_of(k_number, v_number):
    """The bit of a pair of K's and V's numbers in a mask (`page_offsets.pairs_mask`)."""
    return 1 << (WIDEST + 1) * k_number + v_number
