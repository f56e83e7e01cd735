"""Loading models and running them token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from turboattention import TurboConfig
from turboattention.errors import InputError
from turboattention.integrations.transformers import generation, registry
from turboattention.integrations.transformers.generation import Run, Sampler, generate
from turboattention.integrations.transformers.language_model import LanguageModel, load

from .conftest import CONTEXT, TEXT, save_model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_what_a_model_says_of_itself(language: LanguageModel) -> None:
    assert language.context == CONTEXT
    assert language.stop_tokens == frozenset()
    assert language.own_attention == "sdpa"
    assert language.decode(language.encode(TEXT)) == TEXT


def test_end_tokens_are_one_many_or_none(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for ids, expected in ((3, {3}), ([3, 4], {3, 4}), (None, set())):
        monkeypatch.setattr(language.model.generation_config, "eos_token_id", ids)
        assert language.stop_tokens == expected


def test_loading_prints_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(model))
    assert capfd.readouterr() == ("", "")


def test_dtype(model: Path) -> None:
    assert load(str(model), dtype="bfloat16").model.dtype == torch.bfloat16


def test_no_such_folder(offline: None) -> None:
    with pytest.raises(
        InputError, match=r"^model: expected a folder or a name such as org/model, got '/no/such/folder'"
    ):
        load("/no/such/folder")


def test_a_name_that_cannot_be_fetched(offline: None) -> None:
    with pytest.raises(InputError, match=r"^model: nobody/nothing is no folder here, and the hub could not be reached"):
        load("nobody/nothing")


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(
        InputError, match=r"^model: nobody/nothing is neither a folder here nor a public model on the hub$"
    ):
        load("nobody/nothing")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a model's folder with a config\.json, got"):
        load(str(tmp_path))


def test_damaged_weights(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"^model: .*damaged cannot be loaded: .*header"):
        load(str(folder))


def test_missing_weights_are_not_made_up(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "partial")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"^model: .*partial has no weights for model\.layers\.2"):
        load(str(folder))


def test_enabled_is_undone(language: LanguageModel) -> None:
    def fail_inside() -> None:
        with registry.enabled():
            assert "turbo" in AttentionInterface()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert "turbo" not in AttentionInterface()


def test_prefill_in_pieces_is_the_same(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = language.encode(TEXT)
    whole, pieces = Run(language, language.new_cache(None)), Run(language, language.new_cache(None))
    whole.prefill(ids)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 10)
    pieces.prefill(ids)
    torch.testing.assert_close(pieces.logits, whole.logits)


def test_progress_counts_layers(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 4)
    seen: list[tuple[int, int]] = []
    run = Run(language, language.new_cache(None))
    run.prefill([1] * 10, lambda done, total: seen.append((done, total)))
    run.advance(1)
    assert seen == [(n, 6) for n in range(1, 7)]


def test_a_fork_goes_its_own_way(language: LanguageModel) -> None:
    ids = language.encode(TEXT * 3)[:190]
    with registry.enabled():
        run = Run(language, language.new_cache(TurboConfig()))
        run.prefill(ids)
        fork = run.fork()
        for token in range(1, 8):
            run.advance(token)
        again = Run(language, language.new_cache(TurboConfig()))
        again.prefill(ids)
        for token in (9, 10):
            fork.advance(token)
            again.advance(token)
    assert torch.equal(fork.logits, again.logits)
    assert not torch.equal(fork.logits, run.logits)


def test_generate_stops_at_the_end_token(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> Run:
        run = Run(language, language.new_cache(None))
        run.prefill(language.encode(TEXT))
        return run

    free = generate(start(), 6)
    assert (len(free.tokens), free.ended) == (6, False)
    monkeypatch.setattr(language.model.generation_config, "eos_token_id", free.tokens[2])
    stopped = generate(start(), 6)
    assert stopped.ended
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]


def test_tokens_are_told_before_they_are_taken(language: LanguageModel) -> None:
    run = Run(language, language.new_cache(None))
    run.prefill([1, 2, 3])
    lengths: list[int] = []
    generation_ = generate(run, 3, on_token=lambda _: lengths.append(run.cache.get_seq_length()))
    assert lengths == [3, 4, 5]
    assert len(generation_.tokens) == 3


def test_one_token_has_no_speed(language: LanguageModel) -> None:
    run = Run(language, language.new_cache(None))
    run.prefill([1, 2, 3])
    assert generate(run, 1).tokens_per_second is None


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler()(torch.tensor([0.0, 3.0, 1.0])) == 1


def test_sampling_follows_the_odds() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    sampler = Sampler(0.5, 1.0, torch.Generator().manual_seed(1))
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.softmax(logits / 0.5, -1), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    sampler = Sampler(1.0, top_p, torch.Generator().manual_seed(1))
    assert {sampler(logits) for _ in range(200)} == allowed


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = torch.randn(50)
    drawn = [[Sampler(1.0, 0.9, torch.Generator().manual_seed(7))(logits) for _ in range(3)] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_model_with_an_end_token(tmp_path: Path) -> None:
    assert load(str(save_model(tmp_path / "ending", eos=0))).stop_tokens == {0}
