"""Decoding step by step, compressing, and memory."""

from __future__ import annotations

import pytest

from turboattention.benchmarking.problem import Shape, fill, make_problem
from turboattention.benchmarking.steps import linearity, measure_steps
from turboattention.benchmarking.storing import Growing, measure_compression, measure_memory
from turboattention.benchmarking.timing import Effort
from turboattention.config import TurboConfig

SMALL = TurboConfig(block_size=16, sink_tokens=16)


@pytest.mark.parametrize("tokens", [64, 70])
def test_steps_pass_a_flush_in_every_block(tokens: int) -> None:
    found = measure_steps(Shape(2, 1, 16, 1, tokens), SMALL, "reference", blocks=2)
    assert found.seconds.count == 32 - 2
    assert found.worst >= found.flush > 0


def test_linearity() -> None:
    figures = linearity([1000, 2000, 4000], [0.002, 0.003, 0.005])
    assert figures["seconds_per_token"] == pytest.approx(1e-6)
    assert figures["seconds_at_zero"] == pytest.approx(1e-3)
    assert figures["deviation_from_line"] == pytest.approx(0, abs=1e-9)


def test_compression() -> None:
    found = measure_compression(Shape(2, 1, 16, 1, 70), SMALL, "reference", Effort(0.0, 0.0, least=2))
    assert found.share.count == 2
    assert found.share.p20 <= found.share.median <= found.share.p80
    assert min(found.block.median, found.decode.median, found.single) > 0


def test_a_growing_cache_starts_again() -> None:
    problem = make_problem(Shape(2, 1, 16, 1, 32))
    growing = Growing(fill(problem.k, problem.v, SMALL), limit=64)
    lengths = []
    for _ in range(4):
        growing.cache().append(problem.k[:, :, :16], problem.v[:, :, :16])
        lengths.append(len(growing.cache()) if len(growing._now) < 64 else 64)
    assert lengths == [48, 64, 48, 64]


def test_memory_counts_what_the_cache_counts() -> None:
    shape = Shape(2, 2, 64, 1, 1024)
    problem = make_problem(shape)
    cache = fill(problem.k, problem.v, TurboConfig())
    figures = measure_memory(shape, TurboConfig())
    assert figures["bytes"] == cache.nbytes
    assert figures["fp16_bytes"] == 2 * problem.k.numel() * 2
    assert figures["below_fp16"] == pytest.approx(16 / figures["bits_per_element"])
    assert figures["bits_per_element"] == cache.bits_per_element


def test_memory_of_a_window_is_that_of_the_tokens_in_it() -> None:
    """At most one block more than a cache of only these tokens, for any length of the context."""
    config = TurboConfig(sink_tokens=0)
    for keys in (1024, 2100, 4000):
        figures = measure_memory(Shape(1, 1, 64, 1, keys, window=512), config)
        live = measure_memory(Shape(1, 1, 64, 1, 512), config)
        assert figures["live_bytes"] == live["bytes"]
        assert figures["fp16_bytes"] == live["fp16_bytes"]
        assert live["bytes"] <= figures["bytes"] <= live["bytes"] * 9 / 8 + 63 * 2 * (64 + 2)
