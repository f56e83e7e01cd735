"""Saved caches: the same after loading, and every file that is not one is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import turboattention as ta
from turboattention.errors import FormatError
from turboattention.kv.channel_order import ChannelOrder
from turboattention.kv.claims import claim_cache
from turboattention.kv.serialization import cache_from_tensors, cache_metadata, cache_tensors, read_file, write_file

from .tools import PLAIN, attend, content, filled, live_pages, tokens

ORDERED = PLAIN.replace(bits=3, reorder_k=True)
ORDER = ChannelOrder(torch.arange(16).flip(0).repeat(2, 1), torch.tensor([True, False]))
CASES = {
    "default": dict(lengths=[200, 64, 0, 131]),
    "3 bits": dict(lengths=[200], config=PLAIN.replace(bits=3)),
    "keys in order": dict(lengths=[200], config=ORDERED),
    "given order": dict(lengths=[150], config=ORDERED, k_order=ORDER),
    "given order, no pages yet": dict(lengths=[5], config=ORDERED, k_order=ORDER),
    "mixed": dict(lengths=[150, 130], config=PLAIN.replace(bits="mixed")),
    "pair of widths": dict(lengths=[150], config=PLAIN.replace(bits=(4, 2))),
    "paper": dict(lengths=[150, 20], config=ta.TurboConfig.paper()),
    "given widths": dict(lengths=[150], head_bits=[[4, 2], [8, 3]]),
    "given widths, no pages yet": dict(lengths=[5], head_bits=[[4, 2], [8, 3]]),
    "given mean": dict(lengths=[150], k_mean=torch.arange(32.0).view(2, 16)),
    "window": dict(lengths=[400, 90], window_size=70),
    "lag, no sinks": dict(lengths=[150, 3], config=PLAIN.replace(flush_lag=20, sink_tokens=0)),
    "no tokens": dict(lengths=[0, 0]),
    "max_tokens, bf16": dict(lengths=[130], max_tokens=500, dtype=torch.bfloat16),
}


def saved(tmp_path: Path, **case) -> tuple[ta.KVCache, Path]:
    cache, *_ = filled(case.pop("lengths"), **case)
    cache.label = "layer 3"
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    return cache, path


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loading_gives_the_same_cache(case, tmp_path):
    cache, path = saved(tmp_path, **case)
    loaded = ta.KVCache.load(path)
    assert content(loaded) == content(cache)
    assert (loaded.label, loaded.max_tokens) == ("layer 3", cache.max_tokens)
    assert (loaded.given_bits is None) is (cache.given_bits is None)
    assert live_pages(loaded) == live_pages(cache)
    for got, want in zip((*loaded.dequantize(), *attend(loaded)), (*cache.dequantize(), *attend(cache)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loaded_cache_goes_on_like_the_saved_one(case, tmp_path):
    cache, path = saved(tmp_path, **case)
    loaded = ta.KVCache.load(str(path))
    for each in (cache, loaded):
        each.append(*tokens(each.batch_size, 2, 130, 16, seed=4))
        each.crop(torch.tensor([100] * each.batch_size) if each.window_size is None else each.seq_lens - 16)
        each.reorder(torch.arange(each.batch_size).flip(0))
    assert content(loaded) == content(cache)


def test_a_cache_that_never_saw_a_token(tmp_path):
    path = tmp_path / "new"
    ta.KVCache(2, 3, 24, head_bits=[4, 2, 2], dtype=torch.float16).save(path)
    loaded = ta.KVCache.load(path)
    assert (loaded.batch_size, loaded.num_kv_heads, loaded.head_dim, loaded.dtype) == (2, 3, 24, torch.float16)
    assert loaded.device is None
    loaded.append(*tokens(2, 3, 130, 24))
    assert loaded.head_bits.tolist() == [[4, 2, 2]] * 2


def test_shared_pages_are_written_once(tmp_path):
    cache, _ = saved(tmp_path, lengths=[200, 130])
    cache.reorder(torch.tensor([0, 0, 1, 0]))
    tensors = cache_tensors(cache, "")
    assert len(tensors["sinks"]) == 2
    assert len(tensors["pages"]) == 2 + 1
    cache.save(tmp_path / "beams")
    loaded = ta.KVCache.load(tmp_path / "beams")
    assert content(loaded) == content(cache)
    assert live_pages(loaded) == live_pages(cache) == 5
    loaded.crop(torch.tensor([0, 200, 130, 200]))
    assert content(loaded)["sequences"][1] == content(cache)["sequences"][1]


def test_several_caches_in_one_file(tmp_path):
    """As a model's layers are stored: prefixes keep them apart, 1 from 11 too."""
    caches = {f"{n}.": filled([70 + n, 3], seed=n)[0] for n in (1, 11)}
    tensors = {name: x for prefix, cache in caches.items() for name, x in cache_tensors(cache, prefix).items()}
    write_file(tmp_path / "two", tensors, {prefix: cache_metadata(cache) for prefix, cache in caches.items()})
    claim = lambda file, metadata: [claim_cache(file, metadata[prefix], prefix) for prefix in caches]  # noqa: E731
    tensors, metadata = read_file(tmp_path / "two", claim)
    for prefix, cache in caches.items():
        assert content(cache_from_tensors(tensors, metadata[prefix], prefix)) == content(cache)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, file_limit):
    small, big = filled([5])[0], filled([3000])[0]
    path = tmp_path / "cache.safetensors"
    small.save(path)
    with file_limit(20_000), pytest.raises(ta.errors.InputError, match=r"path: .* cannot be written: .*File too large"):
        big.save(path)
    assert content(ta.KVCache.load(path)) == content(small)
    assert os.listdir(tmp_path) == [path.name]


# -- files that are not a cache ------------------------------------------------------------------------


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^path: expected a saved cache, got .*nowhere, which does not exist$"):
        ta.KVCache.load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_file(keep, tmp_path):
    _, path = saved(tmp_path, lengths=[200])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)] if isinstance(keep, float) else whole[:keep])
    with pytest.raises(
        FormatError, match=r"^path: expected a saved cache, got .*, (which cannot be read|an empty file)"
    ):
        ta.KVCache.load(path)


@pytest.mark.parametrize(
    "noise, said",
    [
        (b"not a file of tensors at all", "a text file$"),
        ("é一".encode() * 2000, "a text file$"),  # the part that is looked at ends inside a character
        (b"\x00" * 1000, "which cannot be read"),
        (b"\xff" * 1000, "which cannot be read"),
    ],
)
def test_noise(noise, said, tmp_path):
    (tmp_path / "noise").write_bytes(noise)
    with pytest.raises(FormatError, match=rf"^path: expected a saved cache, got .*noise, {said}"):
        ta.KVCache.load(tmp_path / "noise")


def test_a_folder(tmp_path):
    with pytest.raises(FormatError, match=r", a folder$"):
        ta.KVCache.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file(metadata, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model", metadata=metadata)
    with pytest.raises(FormatError, match=r"^path: expected a saved cache with format turboattention-kv, got .* in "):
        ta.KVCache.load(tmp_path / "model")


@pytest.mark.parametrize("key, value", [("version", "5"), ("version", "0"), ("rotation", "7"), ("format", "else")])
def test_another_version(key, value, tmp_path):
    _, path = saved(tmp_path, lengths=[70])
    tensors, metadata = parts(path)
    save_file(tensors, path, metadata=metadata | {key: value})
    with pytest.raises(FormatError, match=rf"^path: expected a saved cache with {key} .*, got '{value}' in "):
        ta.KVCache.load(path)


def test_a_file_of_version_1_is_read(tmp_path):
    """Its configuration knows of no reordered keys."""
    cache, path = saved(tmp_path, lengths=[200])
    tensors, metadata = parts(path)
    content = json.loads(metadata["content"])
    del content["cache"]["config"]["reorder_k"], content["cache"]["version"]
    write_file(path, tensors, content)
    tensors, metadata = parts(path)
    save_file(tensors, path, metadata=metadata | {"version": "1"})
    loaded = ta.KVCache.load(path)
    assert loaded.config == cache.config
    assert all(torch.equal(x, y) for x, y in zip(attend(loaded), attend(cache), strict=True))


AGAIN = (
    "read its text again, .*: turboattention generate --model MODEL --file TEXT --max-new-tokens 0 --save-cache PATH"
)


def as_version_2(path, tensors, content):
    del content["cache"]["version"]
    write_file(path, tensors, content)
    tensors, metadata = parts(path)
    save_file(tensors, path, metadata=metadata | {"version": "2"})


def test_reordered_keys_of_version_2_are_refused(tmp_path):
    """Their INT8 rows were not rotated."""
    _, path = saved(tmp_path, lengths=[200], config=ORDERED)
    tensors, metadata = parts(path)
    as_version_2(path, tensors, json.loads(metadata["content"]))
    with pytest.raises(FormatError, match=rf"^path: expected .* of version 3 where .*, got one of version 2.*{AGAIN}"):
        ta.KVCache.load(path)


def as_version_3(path, mean):
    tensors, metadata = parts(path)
    content = json.loads(metadata["content"])
    content["cache"]["version"] = 3
    write_file(path, tensors | {"k_mean": mean(tensors["k_mean"].float())}, content)
    tensors, metadata = parts(path)
    save_file(tensors, path, metadata=metadata | {"version": "3"})


def test_a_mean_of_version_3_that_bfloat16_rounds_is_refused(tmp_path):
    """The keys in the file lack the float32 mean, so a rounded one must not be added back."""
    _, path = saved(tmp_path, lengths=[200])
    as_version_3(path, lambda mean: mean * (1 + 2**-12))
    with pytest.raises(FormatError, match=rf"^path: expected .* of version 4, .*, got one of version 3.*{AGAIN}"):
        ta.KVCache.load(path)


def test_a_mean_of_version_3_that_bfloat16_holds_is_read(tmp_path):
    cache, path = saved(tmp_path, lengths=[200])
    as_version_3(path, lambda mean: mean)
    loaded = ta.KVCache.load(path)
    assert all(torch.equal(x, y) for x, y in zip(attend(loaded), attend(cache), strict=True))


@pytest.mark.parametrize("bits", [4, 8, "mixed"])
def test_keys_of_version_2_that_reorder_k_did_not_reach_are_read(bits, tmp_path):
    cache, path = saved(tmp_path, lengths=[200], config=PLAIN.replace(bits=bits))
    tensors, metadata = parts(path)
    content = json.loads(metadata["content"])
    content["cache"]["config"]["reorder_k"] = True
    as_version_2(path, tensors, content)
    loaded = ta.KVCache.load(path)
    assert loaded.config == cache.config
    assert all(torch.equal(x, y) for x, y in zip(attend(loaded), attend(cache), strict=True))


@pytest.mark.parametrize("name", ["k_order", "given_order"])
@pytest.mark.parametrize("order", [torch.zeros(2, 16), torch.zeros(2, 16, dtype=torch.uint8), torch.arange(16)])
def test_an_order_that_is_none(order, name, tmp_path):
    _, path = saved(tmp_path, lengths=[200], config=ORDERED, k_order=ORDER)
    tensors, metadata = parts(path)
    write_file(path, tensors | {name: order}, json.loads(metadata["content"]))
    with pytest.raises(FormatError, match=rf"^{name}: expected "):
        ta.KVCache.load(path)


@pytest.mark.parametrize("key", ["version", "content", "digest", "rotation"])
def test_a_header_with_a_part_missing(key, tmp_path):
    _, path = saved(tmp_path, lengths=[70])
    tensors, metadata = parts(path)
    del metadata[key]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FormatError):
        ta.KVCache.load(path)


@pytest.mark.parametrize("field", ["rotate", "smooth_k", "search", "bits", "sink_tokens", "softmax"])
def test_altered_metadata(field, tmp_path):
    """Also a value that reads well, and would make nonsense of the bytes."""
    _, path = saved(tmp_path, lengths=[200])
    tensors, metadata = parts(path)
    body = json.loads(metadata["content"])
    values = {"rotate": False, "smooth_k": False, "search": False, "bits": 3, "sink_tokens": 0, "softmax": "exp"}
    body["cache"]["config"][field] = values[field]
    save_file(tensors, path, metadata=metadata | {"content": json.dumps(body)})
    with pytest.raises(FormatError, match=r"whose content was altered$"):
        ta.KVCache.load(path)


@pytest.mark.parametrize("place", range(1, 12))
def test_one_flipped_bit_anywhere(place, tmp_path):
    """A damaged page would otherwise be read as other keys, without a sign."""
    _, path = saved(tmp_path, lengths=[200])
    content = bytearray(path.read_bytes())
    content[len(content) * place // 12] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError):
        ta.KVCache.load(path)


@pytest.mark.parametrize("body", ["[]", "null", "{", "{}", '{"cache": 3}', '{"layers": []}'])
def test_other_content_under_a_good_header(body, tmp_path):
    from turboattention.kv.serialization import _digest

    _, path = saved(tmp_path, lengths=[70])
    tensors, metadata = parts(path)
    digest = _digest(body, tensors)
    save_file(tensors, path, metadata=metadata | {"content": body, "digest": digest})
    with pytest.raises(FormatError, match=r"^path: "):
        ta.KVCache.load(path)
