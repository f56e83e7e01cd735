"""Concurrent threads and processes with save, load, clone, copy, crop and append do not affect each other."""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .lives import born, in_process, live
from .tools import live_pages, pool_bytes

KINDS = ["append", "append", "crop", "clone", "copy", "deepcopy", "save", "load"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 16) | st.just(90)), min_size=1, max_size=8).map(
    lambda steps: [(kind, number if kind == "append" else number % 17) for kind, number in steps]
)
BIRTHS = st.tuples(st.sampled_from([1, 64, 130, 700]), st.sampled_from([None, 70]), st.sampled_from([None, 900]))


@settings(max_examples=8)
@given(birth=BIRTHS, lives=st.lists(STEPS, min_size=3, max_size=3))
def test_threads_over_clones_of_one_cache(birth, lives):
    """They share pages; each ends in the same state as without the others."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(2 * len(lives))]
        alone = [live(born(*birth), steps, path) for steps, path in zip(lives, paths, strict=False)]
        cache = born(*birth)
        pages, size = live_pages(cache), pool_bytes(cache)
        clones = [cache.clone() for _ in lives]
        with ThreadPoolExecutor(len(lives)) as threads:
            together = list(threads.map(live, clones, lives, paths[len(lives) :]))
        assert together == alone
        del clones
        gc.collect()
        assert live_pages(cache) == pages
        assert pool_bytes(cache) >= size if birth[2] else pool_bytes(cache) == size


@settings(max_examples=6)
@given(length=st.sampled_from([64, 700]), lives=st.tuples(STEPS, STEPS))
def test_threads_that_save_to_one_path(length, lives):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        path = Path(folder) / "cache"
        births = [born(length, None, None) for _ in lives]
        list(threads.map(live, births, [[*steps, ("save", 0), ("load", 0)] for steps in lives], [path] * 2, [True] * 2))
        assert [file.name for file in Path(folder).iterdir()] == ["cache"]


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@settings(max_examples=8)
@given(length=st.sampled_from([64, 700]), window=st.sampled_from([None, 70]), lives=st.tuples(STEPS, STEPS))
def test_processes_that_share_a_file(processes, length, window, lives):
    """Each loads files saved by the other, at any time, and finds them complete."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "cache")
        around = [[("save", 0), *steps, ("load", 0), ("append", 3), ("save", 0), ("load", 0)] for steps in lives]
        running = [processes.submit(in_process, length, window, steps, path) for steps in around]
        assert all(len(one.result(timeout=120)) == 64 for one in running)
        assert [file.name for file in Path(folder).iterdir()] == ["cache"]
