"""Memory of large tensors goes back to the system when they are freed."""

from __future__ import annotations

import ctypes
import sys

LARGE = 4 * 2**20
"""Bytes; the logits of a piece are larger, in models whose memory matters."""
_M_MMAP_THRESHOLD = -3


def release_large_blocks() -> None:
    """Have the C library map blocks from `LARGE` on by themselves, for the rest of the process.

    glibc takes blocks of up to 32 MiB from its heap once some of that size were freed. What is kept of each piece of a
    text (a few numbers, a grown cache) then lies between the freed logits, which the next piece's no longer fit: the
    heap grows by a piece's logits for every piece. Nothing happens with other C libraries.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, LARGE)
