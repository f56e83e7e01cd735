"""Launches of many query rows over packed pages, as data; of few rows they are those of `configs`.

Wide programs, since all rows of one share what restoring a page takes. Found by reading the assembly.
"""

from __future__ import annotations

import functools

from .configs import Architecture, Launch

# By head_dim, up to and including the one named.
_PREFILL = {
    "sm_80": {64: Launch(128, 8, 2), 128: Launch(64, 8, 2), 256: Launch(32, 8, 1)},
    "sm_90": {128: Launch(128, 8, 2), 256: Launch(64, 8, 3)},
    "gfx942": {64: Launch(128, 8, 1), 128: Launch(64, 4, 1), 256: Launch(32, 4, 1)},
    "interpreter": {256: Launch(64, 4, 1)},
}


@functools.cache
def prefill(architecture: Architecture, head_dim: int) -> Launch:
    """Many query rows over pages and open blocks."""
    table = _PREFILL[architecture.name]
    return table[min(size for size in table if size >= head_dim)]
