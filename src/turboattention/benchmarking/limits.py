"""The processor limit that a row comes closest to, and the fraction of it that the row reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .records import Row

MEMORY, INTEGER, FLOAT = "memory bandwidth", "integer products", "FP32 products"


@dataclass(frozen=True)
class Limit:
    """name: MEMORY, INTEGER or FLOAT. share: the rate of the row over the measured rate of the processor; data that
    stays in the processor's caches can exceed the bandwidth of memory."""

    name: str
    share: float


def nearest(row: Row, facts: Mapping[str, Any]) -> Limit | None:
    """The limit whose share is the largest; None for a row without a rate, or a processor that was not measured.

    Both products count as integer products on the instruction set that ran; a backend without one multiplies floats.
    Memory traffic is counted as one read of the cache, or of a prefill's tensors, in the dtype of the row.
    """
    peaks, isa = facts.get("peaks", {}), facts.get("isa")
    if row.seconds is None or row.gops is None:
        return None
    integer = peaks.get(f"{isa} INT8 GOPS")
    name, peak = (INTEGER, integer) if integer else (FLOAT, peaks.get("float32 GFLOPS"))
    found = [Limit(name, row.gops / peak)] if peak else []
    if memory := peaks.get("read GB/s"):
        found.append(Limit(MEMORY, bytes_read(row) / row.seconds.median / 1e9 / memory))
    return max(found, key=lambda limit: limit.share, default=None)


def named(row: Row, facts: Mapping[str, Any]) -> Row:
    """The row with its limit."""
    limit = nearest(row, facts)
    return row if limit is None else replace(row, limit=limit.name, limit_share=limit.share)


def beyond_products(rows: Sequence[Row]) -> bool:
    """Whether a row exceeds the measured peak rate; other load must then have slowed the peak measurement."""
    return any(row.limit in (INTEGER, FLOAT) and (row.limit_share or 0) > 1 for row in rows)


def bytes_read(row: Row) -> float:
    """Bytes that an attention call has to read at least."""
    shape, size = row.shape, 4 if row.dtype == "float32" else 2
    tokens = shape["batch"] * shape["head_dim"]
    queries = tokens * shape["heads"] * shape["queries"] * size
    stored = 2 * tokens * shape["kv_heads"] * shape["keys"] * size
    return queries + row.figures.get("cache_bytes", stored)
