"""Malicious files: rejected before memory is allocated for the sizes that they state."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

import turboattention as ta
from turboattention.errors import FormatError, InputError
from turboattention.kv.serialization import _digest, claim_one, read_file, write_file

from .tools import filled


@pytest.fixture
def forged(tmp_path):
    """A saved cache with some of it replaced, under a digest that fits."""

    def forge(changed=None, **metadata):
        path = tmp_path / "cache"
        filled([200, 90], window_size=100)[0].save(path)
        tensors, about = read_file(path, claim_one)
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
    tensors, about = read_file(tmp_path / "cache", claim_one)
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


# -- claims: nothing is read of a file whose header does not fit ------------------------------------------

HUGE = 2**31
"""Bytes that a sparse file claims and does not have."""


@pytest.fixture
def claiming(tmp_path):
    """A saved cache of 200 and 90 tokens whose header was changed, with as many bytes (a hole) as it then claims."""

    def forge(change):
        path = tmp_path / "cache"
        filled([200, 90])[0].save(path)
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        large = change(header)
        order = sorted((x for x in header if x != "__metadata__"), key=lambda x: header[x]["data_offsets"])
        end = 0
        for name in sorted(order, key=lambda x: x == large):  # the others keep their bytes
            begin, stop = header[name]["data_offsets"]
            header[name]["data_offsets"] = [end, end + stop - begin]
            end += stop - begin
        text = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + body)
            file.truncate(8 + len(text) + end)
        return path

    return forge


def grown(name, shape, dtype, size):
    def change(header):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
        return name

    return change


CLAIMS = {
    "another tensor": (grown("junk", [HUGE], "U8", HUGE), r"^path: .* got 1 others \('junk'\)"),
    "sequences": (grown("lengths", [HUGE // 8], "I64", HUGE), r"^lengths: expected torch.int64 \(0 to 65536\)"),
    "blocks": (grown("table", [2, HUGE // 8], "I32", HUGE), r"^table: expected torch.int32 \(2, 0 to 3\)"),
    "pages": (grown("pages", [HUGE >> 10, 2**10], "U8", HUGE), r"^pages: expected torch.uint8 \(0 to \d, 1 to \d+\)"),
    "bytes of a page": (grown("sinks", [1, HUGE], "U8", HUGE), r"^sinks: expected torch.uint8"),
    "rows": (grown("buffer.k8", [2, 2, HUGE >> 6, 16], "I8", HUGE), r"^buffer.k8: expected torch.int8 \(2, 2, 0 to \d"),
    "channels": (grown("k_mean", [2, 2, HUGE >> 3], "BF16", HUGE), r"^k_mean: expected"),
    "widths": (grown("frozen_bits", [2, HUGE >> 4], "I64", HUGE), r"^frozen_bits: expected torch.int64 \(2, 2\)"),
    "bits of half a byte": (grown("k_order", [2, HUGE], "F4", HUGE), r"^(k_order: expected|path: )"),
}


@pytest.mark.parametrize("change, message", CLAIMS.values(), ids=CLAIMS)
def test_a_sparse_file_is_refused_by_its_header(change, message, claiming):
    with pytest.raises(FormatError, match=message):
        ta.KVCache.load(claiming(change))


def test_many_tensors(claiming):
    def change(header):
        header |= {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}

    with pytest.raises(FormatError, match=r"got 10000 others \('t0'\)"):
        ta.KVCache.load(claiming(change))


def test_a_large_header_is_not_read(claiming):
    def change(header):
        header["__metadata__"]["more"] = "x" * 2**24

    with pytest.raises(FormatError, match=r"its header of 16,\d{3},\d{3} bytes is larger than 16 MiB"):
        ta.KVCache.load(claiming(change))


def test_metadata_that_would_not_be_read_is_not_written(tmp_path):
    with pytest.raises(InputError, match="expected metadata of at most 8 MiB"):
        write_file(tmp_path / "cache", {}, {"notes": "x" * 2**23})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("field, value", [("block_size", 0), ("block_size", 2**40), ("flush_lag", "1"), ("bits", [[]])])
def test_sizes_in_the_configuration(field, value, forged):
    config = filled([200, 90], window_size=100)[0].config
    with pytest.raises(FormatError):
        ta.KVCache.load(forged(config=json.loads(config.text) | {field: value}))


def test_content_that_is_nested_too_deeply(claiming):
    def change(header):
        header["__metadata__"]["content"] = "[" * 100_000

    with pytest.raises(FormatError, match="nested too deeply"):
        ta.KVCache.load(claiming(change))
