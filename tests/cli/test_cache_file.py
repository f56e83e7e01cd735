"""Saved caches: reuse, and rejected files and options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MistralConfig

from turboattention import TurboConfig
from turboattention.cli import cache_file
from turboattention.errors import FormatError, InputError
from turboattention.files import write_text
from turboattention.integrations.transformers import TurboCache, generation, language_model, registry
from turboattention.integrations.transformers.language_model import LanguageModel

from .conftest import TEXT, save_model


@pytest.fixture(autouse=True)
def turbo():
    with registry.enabled():
        yield


@pytest.fixture(scope="module")
def ids(language: LanguageModel) -> list[int]:
    return language.encode(TEXT * 3)[:200]


@pytest.fixture(scope="module")
def saved(language: LanguageModel, ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "prompt.cache"
    with registry.enabled():
        run = generation.Run(language, language.new_cache(TurboConfig(bits=8)))
        run.prefill(ids)
        assert isinstance(run.cache, TurboCache)
        cache_file.save(run.cache, ids, path)
    return path


def logits(language: LanguageModel, path: Path, ids: list[int]) -> tuple[torch.Tensor, int]:
    """Of the token after `ids`, from a kept cache, and how many tokens it spared."""
    cache, cached = cache_file.load(language, path)
    kept = cache_file.reuse(cache, cached, ids)
    assert cache.get_seq_length() == kept
    run = generation.Run(language, cache)
    run.prefill(ids[kept:])
    assert cache.get_seq_length() == len(ids)
    return run.logits, kept


def test_loads_what_was_saved(language: LanguageModel, saved: Path, ids: list[int]) -> None:
    cache, cached = cache_file.load(language, saved)
    assert cached == ids
    assert cache.layers[0].kv is not None
    assert cache.layers[0].kv.config == TurboConfig(bits=8)


def test_a_longer_prompt_processes_the_rest_alone(language: LanguageModel, saved: Path, ids: list[int]) -> None:
    more = [*ids, 5, 6, 7]
    run = generation.Run(language, language.new_cache(TurboConfig(bits=8)))
    run.prefill(ids)
    run.prefill([5, 6, 7])
    got, kept = logits(language, saved, more)
    assert kept == len(ids)
    assert torch.equal(got, run.logits)


@pytest.mark.parametrize("length", [200, 199, 150, 101])
def test_the_same_or_a_shorter_prompt_leaves_one_token_to_do(
    language: LanguageModel, saved: Path, ids: list[int], length: int
) -> None:
    got, kept = logits(language, saved, ids[:length])
    assert kept == length - 1
    run = generation.Run(language, language.new_cache(None))
    run.prefill(ids[:length])
    assert torch.nn.functional.cosine_similarity(got, run.logits, dim=0) > 0.99


def test_another_ending_is_cropped(language: LanguageModel, saved: Path, ids: list[int]) -> None:
    _, kept = logits(language, saved, [*ids[:180], ids[180] + 1, 7])
    assert kept == 180


def test_another_text_is_refused(language: LanguageModel, saved: Path, ids: list[int]) -> None:
    cache, cached = cache_file.load(language, saved)
    with pytest.raises(
        InputError, match=r"begins like the cached one \(200 tokens\), got one that shares 3 of its tokens"
    ):
        cache_file.reuse(cache, cached, [*ids[:3], ids[3] + 1, *ids[4:]])


def test_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = language_model.load(str(save_model(tmp_path / "other", num_hidden_layers=3)))
    with pytest.raises(InputError, match=r"^--load-cache: expected a TurboCache made .*num_hidden_layers"):
        cache_file.load(other, saved)


@pytest.mark.parametrize("content", [b"", b"no cache at all", b"\x10" + bytes(100)])
def test_a_foreign_file_is_refused(language: LanguageModel, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"^--load-cache: expected a saved cache"):
        cache_file.load(language, path)


def test_a_damaged_file_is_refused(language: LanguageModel, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(FormatError):
        cache_file.load(language, path)


def test_a_cache_without_its_tokens_is_refused(language: LanguageModel, ids: list[int], tmp_path: Path) -> None:
    run = generation.Run(language, language.new_cache(TurboConfig()))
    run.prefill(ids)
    assert isinstance(run.cache, TurboCache)
    run.cache.save(tmp_path / "anonymous")
    with pytest.raises(InputError, match=r"^--load-cache: expected one prompt and its tokens"):
        cache_file.load(language, tmp_path / "anonymous")


def test_no_file(language: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: no such file$"):
        cache_file.load(language, tmp_path / "none")
    with pytest.raises(InputError, match=r": a folder$"):
        cache_file.load(language, tmp_path)


def test_targets_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_file.check_target(tmp_path / "new")
    with pytest.raises(InputError, match="got the folder"):
        cache_file.check_target(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        cache_file.check_target(tmp_path / "none" / "new")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="no permission"):
        cache_file.check_target(tmp_path / "new")


@pytest.mark.parametrize("content", [b"", b"notes of a year", b"\x10" + bytes(100)])
def test_other_files_are_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^--save-cache: expected a new file or a saved cache to replace"):
        cache_file.check_target(path)
    assert path.read_bytes() == content


def test_pipes_are_neither_waited_for_nor_replaced(language: LanguageModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"--save-cache: expected a new file .*pipe, which is neither"):
        cache_file.check_target(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"--load-cache: expected a file, got .*pipe: not a regular file"):
        cache_file.load(language, tmp_path / "pipe")


def test_nor_are_other_tensors(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="which is neither"):
        cache_file.check_target(tmp_path / "model.safetensors")


def test_a_saved_cache_is_replaced(saved: Path) -> None:
    cache_file.check_target(saved)


def test_a_full_disk_is_an_input_error(tmp_path: Path, file_limit) -> None:
    class Full:
        def save(self, path: Path, **_: object) -> None:
            write_text(path, "x" * 10_000)

    message = "--save-cache: .* cannot be written: File too large"
    with file_limit(5_000), pytest.raises(InputError, match=message):
        cache_file.save(Full(), [1], tmp_path / "x")  # type: ignore[arg-type]


def test_a_sliding_window_does_not_go_back_far() -> None:
    """A prompt that shares most of the cached one, but needs tokens that its windows released: the error advises."""
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=64,
        vocab_size=99,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="turbo")
    cache, ids = TurboCache(config), list(range(90)) * 4
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), past_key_values=cache)
    with pytest.raises(InputError, match=r"^--load-cache: .* \(360 tokens\), .* shares 250 .*; run it without --load"):
        cache_file.reuse(cache, ids, [*ids[:250], 98, 98])
    assert cache.get_seq_length() == len(ids)
