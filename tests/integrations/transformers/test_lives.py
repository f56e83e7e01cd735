"""Threads and processes at once, over generate, crop, reorder, clone, copy, save and load of a `TurboCache`: each gets
what it would alone, and only whole files are ever loaded."""

from __future__ import annotations

import copy
import functools
import hashlib
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from turboattention import TurboConfig
from turboattention.integrations.transformers import TurboCache, enable
from turboattention.integrations.transformers.serialization import read_notes, save_cache
from turboattention.kv.serialization import cache_tensors

Step = tuple[str, int]
KINDS = ["forward", "forward", "generate", "crop", "reorder", "clone", "copy", "deepcopy", "save", "load"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 16)), min_size=1, max_size=7)
CONFIG = TurboConfig(block_size=16, sink_tokens=16, guard="off")


@functools.cache
def model() -> Any:
    """Random, with two sliding layers of three."""
    enable()
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation="turbo",
    )
    return Gemma3ForCausalLM(config).eval()


def ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(seed))


def born(length: int) -> TurboCache:
    cache = TurboCache(model().config, CONFIG)
    with torch.no_grad():
        model()(ids(length, 0), past_key_values=cache)
    return cache


def state(cache: TurboCache) -> str:
    """A digest of its content."""
    digest = hashlib.sha256()
    for layer in cache.attention_layers:
        for name, x in sorted(cache_tensors(layer.kv, "").items()):
            digest.update(name.encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def live(cache: TurboCache, steps: list[Step], path: Path, copies: Path) -> str:
    """The state at the end. A file's notes are the state that was saved, and another's file may be there by now."""
    for number, (kind, count) in enumerate(steps):
        if kind == "forward" and count:
            with torch.no_grad():
                model()(ids(count, number), past_key_values=cache)
        elif kind == "generate":
            # Ids that the cache has never seen: it does not know those of `forward`.
            prompt = torch.cat([ids(cache.get_seq_length(), 0), ids(1 + count, number)], 1)
            cache.check_prompts = False
            model().generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
        elif kind == "crop":
            cache.crop(max(1, cache.get_seq_length() - count))
        elif kind == "reorder":
            cache.reorder_cache(torch.tensor([count % 2, 1]))
        elif kind in ("clone", "copy", "deepcopy"):
            old = cache
            cache = cache.clone() if kind == "clone" else getattr(copy, kind)(cache)
            with torch.no_grad():
                model()(ids(1 + count, 99), past_key_values=old)  # which must not show in the copy
        elif kind == "save":
            save_cache(cache, path, notes=state(cache))
        elif kind == "load" and path.exists():
            TurboCache.load(path, model().config)  # whole, whoever replaces the file meanwhile
            shutil.copyfile(path, copies)
            loaded, noted = TurboCache.load(copies, model().config), read_notes(copies)
            assert state(loaded) == noted, "a damaged file was loaded"
            cache = loaded
    return state(cache)


@settings(max_examples=6)
@given(length=st.sampled_from([1, 16, 70]), lives=st.lists(STEPS, min_size=3, max_size=3))
def test_threads_over_clones_of_one_cache(length, lives):
    """They share pages; each ends in the same state as without the others."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(4 * len(lives))]
        count = len(lives)
        alone = [live(born(length), *given) for given in zip(lives, paths, paths[count:], strict=False)]
        cache = born(length)
        before, clones = state(cache), [cache.clone() for _ in lives]
        with ThreadPoolExecutor(count) as threads:
            assert list(threads.map(live, clones, lives, paths[2 * count :], paths[3 * count :])) == alone
        assert state(cache) == before


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def in_process(length: int, steps: list[Step], path: str, copies: str) -> str:
    torch.set_num_threads(1)
    return live(born(length), steps, Path(path), Path(copies))


@settings(max_examples=4)
@given(length=st.sampled_from([16, 70]), lives=st.tuples(STEPS, STEPS))
def test_processes_that_share_a_file(processes, length, lives):
    """Each loads files saved by the other, at any time, and finds them complete."""
    with tempfile.TemporaryDirectory() as folder:
        path, copies = f"{folder}/cache", [f"{folder}/copy{i}" for i in range(2)]
        around = [[("save", 0), *steps, ("load", 0), ("forward", 3), ("save", 0), ("load", 0)] for steps in lives]
        running = [processes.submit(in_process, length, steps, path, copies[i]) for i, steps in enumerate(around)]
        assert all(len(one.result(timeout=120)) == 64 for one in running)
        assert sorted(file.name for file in Path(folder).iterdir()) == ["cache", "copy0", "copy1"]
