"""Each row names the processor limit that it comes closest to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from turboattention.benchmarking.limits import FLOAT, INTEGER, MEMORY, beyond_products, bytes_read, named, nearest
from turboattention.benchmarking.records import Row
from turboattention.benchmarking.statistics import Spread

SHAPE = {"heads": 8, "kv_heads": 2, "head_dim": 128, "queries": 1, "keys": 1000, "causal": False, "batch": 1}
ROW = Row("decode", SHAPE, "4 bits", "t", "float32", 0.0, Spread(1e-3, 1e-3, 1e-3, 3), 50.0, figures={})
FACTS = {"isa": "fast", "peaks": {"float32 GFLOPS": 100.0, "fast INT8 GOPS": 200.0, "read GB/s": 10.0}}
QUERIES = 8 * 128 * 4


def test_bytes() -> None:
    assert bytes_read(ROW) == QUERIES + 2 * 2 * 128 * 1000 * 4
    assert bytes_read(replace(ROW, dtype="bfloat16")) == bytes_read(ROW) / 2
    assert bytes_read(replace(ROW, figures={"cache_bytes": 1000})) == QUERIES + 1000


def test_the_larger_share_is_the_limit() -> None:
    near = nearest(replace(ROW, figures={"cache_bytes": 4_000_000 - QUERIES}), FACTS)
    assert near is not None
    assert (near.name, near.share) == (MEMORY, pytest.approx(0.4))
    near = nearest(replace(ROW, figures={"cache_bytes": 1_000_000}), FACTS)
    assert near is not None
    assert (near.name, near.share) == (INTEGER, pytest.approx(0.25))


def test_a_backend_without_an_instruction_set_multiplies_floats() -> None:
    near = nearest(replace(ROW, figures={"cache_bytes": 1_000_000}), FACTS | {"isa": None})
    assert near is not None
    assert (near.name, near.share) == (FLOAT, pytest.approx(0.5))


def test_a_share_beyond_the_products_is_noticed() -> None:
    """More than memory gives is possible, from the processor's caches."""
    assert beyond_products([ROW, replace(ROW, limit=INTEGER, limit_share=1.01)])
    assert beyond_products([replace(ROW, limit=FLOAT, limit_share=1.01)])
    assert not beyond_products([ROW, replace(ROW, limit=INTEGER, limit_share=1.0)])
    assert not beyond_products([replace(ROW, limit=MEMORY, limit_share=2.0)])


def test_what_was_not_measured_has_no_limit() -> None:
    assert nearest(replace(ROW, seconds=None), FACTS) is None
    assert nearest(replace(ROW, gops=None), FACTS) is None
    assert nearest(ROW, {}) is None
    assert named(ROW, {}) is ROW
    row = named(replace(ROW, figures={"cache_bytes": 0}), FACTS)
    assert (row.limit, row.limit_share) == (INTEGER, 0.25)
