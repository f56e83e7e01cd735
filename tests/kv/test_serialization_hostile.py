"""Files made to harm: refused, before memory is taken for what they claim."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import turboattention as ta
from turboattention.errors import FormatError
from turboattention.kv.serialization import _digest, read_file, write_file

from .tools import filled


@pytest.fixture
def forged(tmp_path):
    """A saved cache with some of it replaced, under a digest that fits."""

    def forge(changed=None, **metadata):
        path = tmp_path / "cache"
        filled([200, 90], window_size=100)[0].save(path)
        tensors, about = read_file(path)
        tensors = tensors | (changed(tensors) if changed else {})
        content = json.dumps({"cache": about["cache"] | metadata})
        header = {"format": "turboattention-kv", "version": "1", "rotation": "1"} | {"content": content}
        save_file(tensors, path, metadata=header | {"digest": _digest(content, tensors)})
        return path

    return forge


def test_a_forged_file_without_changes_loads(forged):
    assert len(ta.KVCache.load(forged())) == 200


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", ["buffer.k_scale", "buffer.v_scale", "k_mean"])
def test_numbers_that_are_not_finite(forged, name, bad):
    with pytest.raises(FormatError, match=name):
        ta.KVCache.load(forged(lambda tensors: {name: torch.full_like(tensors[name], bad)}))


def test_scales_of_pages_that_are_not_finite(forged):
    with pytest.raises(FormatError, match="pages"):
        ta.KVCache.load(forged(lambda tensors: {"pages": torch.full_like(tensors["pages"], 255)}))


@pytest.mark.parametrize("side", ["k_scales", "v_scales"])
@pytest.mark.parametrize("scale", [1e-38, -1.0, float("nan"), float("inf"), 2e30])
def test_scales_of_pages_that_tokens_would_take_out_of_range(forged, side, scale):
    """A token's scale is the head's less some of its bits: below the smallest, bits of NaN and infinity."""
    layout = filled([200])[0].page_table.pools.compressed.layout
    at = getattr(layout, side)

    def change(tensors):
        pages = tensors["pages"].clone()
        pages[0, at : at + 4] = torch.tensor([scale]).view(torch.uint8)
        pages[:, layout.k_token_scales : layout.k_scales] = 255
        return {"pages": pages}

    with pytest.raises(FormatError, match=r"^pages: expected (numbers below 1e\+30|scales of at least 0)"):
        ta.KVCache.load(forged(change))


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_table_with_a_gap(forged, column):
    """The pages behind it would take the places of others, also of the first ones, which another pool holds."""

    def change(tensors):
        before, after = tensors["table"].split([column, tensors["table"].shape[1] - column], 1)
        return {"table": torch.cat([before, after.new_full((2, 1), -2), after], 1)}

    with pytest.raises(FormatError, match=r"^table: expected "):
        ta.KVCache.load(forged(change))


def test_no_memory_is_taken_for_an_empty_cache_of_many_heads(tmp_path):
    ta.KVCache(1, 1, 16).save(tmp_path / "cache")
    tensors, about = read_file(tmp_path / "cache")
    write_file(tmp_path / "cache", tensors, {"cache": about["cache"] | {"num_kv_heads": 2**40}})
    with pytest.raises(FormatError, match="num_kv_heads: expected at most 65536, got 1099511627776"):
        ta.KVCache.load(tmp_path / "cache")


@pytest.mark.parametrize("size", [{"num_kv_heads": 2**40}, {"head_dim": 2**40}, {"num_kv_heads": 3}], ids=str)
def test_sizes_that_no_tensor_has(forged, size):
    with pytest.raises(FormatError):
        ta.KVCache.load(forged(**size))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="cannot be read"):
        ta.KVCache.load(tmp_path / "pipe")
