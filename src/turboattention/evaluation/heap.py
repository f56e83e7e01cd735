"""Returns the memory of large tensors to the system when they are freed."""

from __future__ import annotations

import ctypes
import sys

LARGE = 4 * 2**20
"""Bytes. The logits of a piece are larger in models with large vocabularies."""
_M_MMAP_THRESHOLD = -3


def release_large_blocks() -> None:
    """Make glibc allocate blocks of at least `LARGE` bytes with mmap, for the rest of the process.

    By default glibc allocates blocks of up to 32 MiB from its heap once blocks of that size have been freed. The small
    results kept from each piece of a text then fragment the heap between freed logits, and the heap grows by the
    logits of one piece for every piece. No effect with other C libraries.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, LARGE)
