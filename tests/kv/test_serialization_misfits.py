"""Tensors that do not fit their metadata, as another program might write them, are refused."""

from __future__ import annotations

import json

import pytest
import torch

import turboattention as ta
from turboattention.errors import FormatError
from turboattention.kv.serialization import cache_from_tensors, cache_metadata, cache_tensors

from .tools import filled


def broken(change, **case) -> None:
    cache, *_ = filled(**({"lengths": [200, 131]} | case))
    tensors, metadata = cache_tensors(cache, ""), cache_metadata(cache)
    metadata = json.loads(json.dumps(metadata))
    change(tensors, metadata)
    with pytest.raises(FormatError):
        cache_from_tensors(tensors, metadata, "")


def set_config(name, value):
    def change(_, metadata):
        metadata["config"][name] = value

    return change


def set_field(name, value):
    def change(_, metadata):
        metadata[name] = value

    return change


def set_tensor(name, make):
    def change(tensors, _):
        tensors[name] = make(tensors[name])

    return change


def drop(name):
    def change(tensors, metadata):
        del (tensors if name in tensors else metadata)[name]

    return change


MISFITS = {
    "heads": set_field("num_kv_heads", 3),
    "head_dim": set_field("head_dim", 24),
    "head_dim as text": set_field("head_dim", "16"),
    "dtype": set_field("dtype", "nn"),
    "unknown dtype": set_field("dtype", "float7"),
    "window": set_field("window_size", -1),
    "block size": set_config("block_size", 32),
    "bits": set_config("bits", 7),
    "token scales": set_config("token_scales", False),
    "smoothing": set_config("smooth_k", False),
    "sinks": set_config("sink_tokens", 0),
    "more sinks": set_config("sink_tokens", 128),
    "unknown setting": set_config("colour", "red"),
    "no config": drop("config"),
    "no lengths": drop("lengths"),
    "no buffer": drop("buffer.k8"),
    "no mean": drop("k_mean"),
    "no pages": drop("pages"),
    "no sinks": drop("sinks"),
    "no widths": drop("frozen_bits"),
    "lengths too long": set_tensor("lengths", lambda x: x + 64),
    "lengths too short": set_tensor("lengths", lambda x: x - 64),
    "lengths as float": set_tensor("lengths", lambda x: x.double()),
    "fewer sequences": set_tensor("lengths", lambda x: x[:1]),
    "page numbers": set_tensor("table", lambda x: x + 1),
    "a page unused": set_tensor("table", lambda x: x.clamp(max=0)),
    "table of one row": set_tensor("table", lambda x: x[:1]),
    "short pages": set_tensor("pages", lambda x: x[:, :-16].contiguous()),
    "fewer pages": set_tensor("pages", lambda x: x[:-1]),
    "pages of another dtype": set_tensor("pages", lambda x: x.to(torch.int8)),
    "widths of one head": set_tensor("frozen_bits", lambda x: x[:, :1]),
    "other widths": set_tensor("frozen_bits", lambda x: x - 1),
    "buffer shape": set_tensor("buffer.v8", lambda x: x[:, :, :-1].contiguous()),
    "scale dtype": set_tensor("buffer.k_scale", lambda x: x.float()),
    "mean shape": set_tensor("k_mean", lambda x: x[:, :1]),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_misfits_are_refused(change):
    broken(change)


def test_what_is_not_broken_loads():
    """The frame of the test above: without a change there is no error."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        broken(lambda *_: None)


def test_lengths_without_pages_are_refused():
    cache = ta.KVCache(2, 2, 16)
    with pytest.raises(FormatError, match=r"^lengths: expected zeros without pages, got \[3, 0\]$"):
        cache_from_tensors({"lengths": torch.tensor([3, 0])}, cache_metadata(cache), "")
