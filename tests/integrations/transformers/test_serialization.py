"""`TurboCache.save` and `load`: a long prompt for next time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from turboattention import KVCache, TurboConfig
from turboattention.errors import FormatError, InputError
from turboattention.integrations.transformers import TurboCache, serialization

SMALL = TurboConfig(bits=(4, 3), block_size=16, sink_tokens=16, guard="off")


@pytest.fixture(params=["llama", "gemma3", "gemma3n"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def batch(tokens, padded):
    return padded([tokens(1, 60), tokens(1, 37, seed=1)])


@pytest.fixture
def saved(tiny, forward, tokens, tmp_path):
    """A file of 40 tokens of the Llama shape."""
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL)
    forward(model, "turbo", tokens(1, 40), [40], cache)
    cache.save(tmp_path / "prompt.safetensors", input_ids=tokens(1, 40))
    return tmp_path / "prompt.safetensors"


def test_a_loaded_cache_continues_identically(model, batch, forward, tmp_path):
    ids, mask = batch
    cache = TurboCache(model.config, SMALL, max_tokens=128)
    forward(model, "turbo", ids, [50], cache, mask)
    cache.save(tmp_path / "cache")
    loaded = TurboCache.load(tmp_path / "cache", model.config)
    assert (loaded.get_seq_length(), loaded.seq_lens.tolist()) == (50, [50, 27])
    assert [layer.window for layer in loaded.layers] == [layer.window for layer in cache.layers]
    assert loaded.fp16_nbytes == cache.fp16_nbytes
    expected = forward(model, "turbo", ids, [9, 1], cache, mask)
    assert torch.equal(forward(model, "turbo", ids, [9, 1], loaded, mask), expected)


def test_generate_goes_on_from_a_file(tiny, tokens, saved):
    model = tiny("llama")
    model.set_attn_implementation("turbo")
    ids = torch.cat([tokens(1, 40), tokens(1, 5, seed=1)], 1)
    results = []
    for _ in range(2):
        cache = TurboCache.load(saved, model.config)
        assert cache.check_prompt(ids) == 40
        settings = {"past_key_values": cache, "max_new_tokens": 5, "do_sample": False}
        results.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
        assert cache.get_seq_length() == 49
    assert torch.equal(*results)


@pytest.mark.parametrize("rows", [(40,), (40, 23)], ids=["one row", "left-padded"])
def test_a_cache_kept_after_generate_goes_on(rows, tiny, tokens, padded, tmp_path):
    """As if it had never been in a file."""
    model = tiny("llama")
    model.set_attn_implementation("turbo")
    ids, mask = padded([tokens(1, n, seed=n) for n in rows])
    settings = {"max_new_tokens": 8, "do_sample": False}
    cache = TurboCache(model.config, SMALL)
    output = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    with pytest.raises(InputError, match="expected the 47 tokens that the cache holds, got 40"):
        cache.save(tmp_path / "cache", input_ids=ids)
    cache.save(tmp_path / "cache", input_ids=output[:, : cache.get_seq_length()])
    loaded = TurboCache.load(tmp_path / "cache", model.config)
    for other in (ids, output[:, :-1], torch.cat([ids, tokens(len(rows), 20)], 1)):
        with pytest.raises(InputError, match=r"^input_ids: expected a prompt that"):
            loaded.check_prompt(other)
    longer = torch.cat([output, tokens(len(rows), 5, seed=2)], 1)
    assert loaded.check_prompt(longer) == 47
    mask = torch.cat([mask, torch.ones(len(rows), 13, dtype=mask.dtype)], 1)
    expected = model.generate(longer, attention_mask=mask, past_key_values=cache, **settings)
    result = model.generate(longer, attention_mask=mask, past_key_values=loaded, **settings)
    assert torch.equal(result, expected)
    assert loaded.get_seq_length() == 53 + 7


def test_a_reset_cache_keeps_its_settings(tiny, forward, tokens, tmp_path):
    model = tiny("llama")
    cache = TurboCache(model.config, SMALL, head_bits=[[8, 4]] * 3)
    forward(model, "turbo", tokens(1, 40), [40], cache)
    cache.save(tmp_path / "cache")
    loaded = TurboCache.load(tmp_path / "cache")
    loaded.reset()
    forward(model, "turbo", tokens(1, 40), [40], loaded)
    assert loaded.layers[0].kv.config == SMALL
    assert loaded.layers[0].kv.head_bits.tolist() == [[8, 4], [8, 4]]


class TestPrompts:
    def test_another_prompt(self, tokens, saved):
        cache = TurboCache.load(saved)
        assert torch.equal(cache.prompt_ids, tokens(1, 40))
        with pytest.raises(InputError, match="begins with the 40 tokens"):
            cache.check_prompt(tokens(1, 60, seed=1))
        with pytest.raises(InputError, match="begins with the 40 tokens"):
            cache.check_prompt(tokens(1, 30, seed=1))

    @pytest.mark.parametrize("length, crop", [(40, -1), (39, -2), (1, -40)])
    def test_a_prompt_must_go_on(self, length, crop, tokens, saved):
        cache, ids = TurboCache.load(saved), tokens(1, 40)[:, :length]
        with pytest.raises(InputError, match=rf"continues the 40 tokens of the cache, got {length}; crop\({crop}\)"):
            cache.check_prompt(ids)
        cache.crop(crop)
        assert cache.check_prompt(ids) == length - 1

    @pytest.mark.parametrize("ids", ["abc", [[1, 2]], torch.ones(1, 50), torch.ones(50, dtype=torch.int64), None])
    def test_a_prompt_that_is_none(self, ids, saved):
        with pytest.raises(InputError, match=r"^input_ids: expected (a tensor of )?integers \[1, L\], got "):
            TurboCache.load(saved).check_prompt(ids)

    def test_a_cropped_cache_needs_less_of_it(self, tokens, saved):
        cache = TurboCache.load(saved)
        cache.crop(-10)
        ids = torch.cat([tokens(1, 40)[:, :30], tokens(1, 4, seed=1)], 1)
        assert cache.check_prompt(ids) == 30

    def test_tokens_taken_since_loading_are_not_known(self, tiny, forward, tokens, saved):
        """Nor are those that came where others were cropped."""
        model, cache, ids = tiny("llama"), TurboCache.load(saved), tokens(1, 50)
        forward(model, "turbo", ids, [5], cache)
        with pytest.raises(InputError, match=r"ids of all its 45 tokens, got one that knows the first 40: crop\(-5\)"):
            cache.check_prompt(ids)
        cache.crop(-15)
        forward(model, "turbo", ids, [5], cache)
        with pytest.raises(InputError, match=r"ids of all its 35 tokens, got one that knows the first 30: crop\(-5\)"):
            cache.check_prompt(ids)
        cache.reset()
        with pytest.raises(InputError, match="saved without"):
            cache.check_prompt(ids)

    def test_they_follow_the_rows(self, tiny, forward, tokens, tmp_path):
        model, ids = tiny("llama"), tokens(2, 40)
        cache = TurboCache(model.config, SMALL)
        forward(model, "turbo", ids, [40], cache)
        cache.save(tmp_path / "cache", input_ids=ids)
        for change, rows in (
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        ):
            loaded = TurboCache.load(tmp_path / "cache")
            change(loaded)
            more = torch.cat([ids[rows], tokens(len(rows), 1)], 1)
            assert loaded.check_prompt(more) == 40
            if rows[0] == 1:
                with pytest.raises(InputError, match="begins with"):
                    loaded.check_prompt(torch.cat([ids[[0] * len(rows)], more[:, -1:]], 1))

    def test_saved_without_one(self, saved, tmp_path):
        cache = TurboCache.load(saved)
        cache.prompt_ids = None
        cache.save(tmp_path / "other")
        with pytest.raises(InputError, match="saved without"):
            TurboCache.load(tmp_path / "other").check_prompt(torch.ones(1, 50, dtype=torch.int64))

    @pytest.mark.parametrize("length", [0, 39, 41])
    def test_of_another_length(self, length, saved, tokens, tmp_path):
        message = rf"expected the 40 tokens that the cache holds, got {length}; "
        message += r"crop\(-" if length < 40 else "pass the ids of what it took: after generate, output"
        with pytest.raises(InputError, match=message):
            TurboCache.load(saved).save(tmp_path / "other", input_ids=tokens(1, length))
        assert not (tmp_path / "other").exists()

    @pytest.mark.parametrize("ids", ["abc", [[1] * 40], torch.ones(1, 40), torch.ones(1, 40, dtype=torch.bool)])
    def test_that_are_no_ids(self, ids, saved, tmp_path):
        with pytest.raises(InputError, match=r"^input_ids: expected (a tensor of )?integers \[1, L\], got "):
            TurboCache.load(saved).save(tmp_path / "other", input_ids=ids)

    def test_of_another_batch(self, saved, tmp_path):
        with pytest.raises(InputError, match=r"input_ids: expected integers \[1, L\]"):
            TurboCache.load(saved).save(tmp_path / "other", input_ids=torch.ones(2, 40, dtype=torch.int64))


class TestOtherModels:
    def test_named_at_once(self, tiny, saved):
        with pytest.raises(InputError, match="TurboCache made for this model"):
            TurboCache.load(saved, tiny("qwen3").config)

    def test_or_at_the_first_forward(self, tiny, saved, forward, tokens):
        model = tiny("llama", num_attention_heads=8)
        with pytest.raises(InputError, match=r"num_attention_heads=8.*num_attention_heads=4"):
            forward(model, "turbo", tokens(1, 45), [5], TurboCache.load(saved))


class TestBadFiles:
    def test_truncated(self, saved, tmp_path):
        content = saved.read_bytes()
        for size in (0, 7, 100, len(content) // 2, len(content) - 1):
            (tmp_path / "short").write_bytes(content[:size])
            with pytest.raises(FormatError, match="path"):
                TurboCache.load(tmp_path / "short")

    def test_not_safetensors(self, tmp_path):
        (tmp_path / "text").write_text("nothing of the kind " * 100)
        with pytest.raises(FormatError, match="path"):
            TurboCache.load(tmp_path / "text")

    def test_foreign(self, tmp_path):
        save_file({"x": torch.ones(3)}, tmp_path / "foreign", metadata={"format": "pt"})
        with pytest.raises(FormatError, match="path"):
            TurboCache.load(tmp_path / "foreign")

    def test_a_single_kv_cache(self, tmp_path):
        cache = KVCache(1, 2, 8)
        cache.append(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
        cache.save(tmp_path / "single")
        with pytest.raises(FormatError, match=r"written by TurboCache\.save"):
            TurboCache.load(tmp_path / "single")

    def test_the_other_way_round(self, saved):
        with pytest.raises(FormatError):
            KVCache.load(saved)

    @pytest.mark.parametrize("missing", ["layer0.lengths", "layer2.table", "layer1.buffer.k8"])
    def test_missing_tensors(self, missing, saved, tmp_path):
        with safe_open(saved, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        del tensors[missing]
        save_file(tensors, tmp_path / "missing", metadata=metadata)
        with pytest.raises(FormatError):
            TurboCache.load(tmp_path / "missing")

    def test_altered_metadata(self, saved, tmp_path):
        with safe_open(saved, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        content = json.loads(metadata["content"])
        content["turbo_cache"]["length"] = 39
        save_file(tensors, tmp_path / "altered", metadata=metadata | {"content": json.dumps(content)})
        with pytest.raises(FormatError, match="lengths: expected 0 to 39 tokens"):
            TurboCache.load(tmp_path / "altered")

    def test_ids_of_fewer_tokens_than_it_holds(self, tiny, forward, tokens, tmp_path, monkeypatch):
        cache = TurboCache(tiny("llama").config, SMALL)
        forward(tiny("llama"), "turbo", tokens(1, 20), [20], cache)
        monkeypatch.setattr(serialization, "checked_ids", lambda ids, *_: ids)
        cache.save(tmp_path / "short", input_ids=tokens(1, 19))
        with pytest.raises(FormatError, match=r"prompt_ids: expected torch.int64 \(1, 20\), got torch.int64 \(1, 19\)"):
            TurboCache.load(tmp_path / "short")

    def test_absent(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            TurboCache.load(tmp_path / "absent")

    def test_a_folder(self, tmp_path):
        with pytest.raises(FormatError, match=rf"^path: expected a file .*, got the folder {tmp_path}$"):
            TurboCache.load(tmp_path)


def test_an_empty_cache_is_not_saved(tiny, tmp_path):
    with pytest.raises(InputError, match="empty"):
        TurboCache(tiny("llama").config).save(tmp_path / "empty")
    assert not list(tmp_path.iterdir())
