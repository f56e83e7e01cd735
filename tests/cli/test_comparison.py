"""Comparisons: their figures against independent ways to get them."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from turboattention.cli.comparison import Comparison, compare, first_difference, same_tokens
from turboattention.cli.output import guard_warnings
from turboattention.cli.progress import Bars
from turboattention.cli.settings import make_setting
from turboattention.errors import GuardWarning
from turboattention.integrations.transformers import TurboCache, generation, registry
from turboattention.integrations.transformers.language_model import LanguageModel

from .conftest import TEXT

LIMIT = 24
BITS = ("8", "4", "2", "mixed")

tokens = st.lists(st.integers(0, 3), max_size=6)


@pytest.fixture(scope="module")
def ids(language: LanguageModel) -> list[int]:
    return language.encode(TEXT * 3)[:250]


@pytest.fixture(scope="module")
def comparison(language: LanguageModel, ids: list[int]) -> Comparison:
    with registry.enabled():
        settings = [make_setting(bits) for bits in BITS]
        return compare(language, ids, settings, LIMIT, Bars(hidden=True))


def test_own_run_is_what_transformers_generates(
    comparison: Comparison, language: LanguageModel, ids: list[int]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(language.name, dtype=torch.float32)
    out = model.generate(torch.tensor([ids]), max_new_tokens=LIMIT, do_sample=False, pad_token_id=0)
    assert comparison.own.tokens == out[0, len(ids) :].tolist()


def test_quantized_runs_are_what_transformers_generates(
    comparison: Comparison, language: LanguageModel, ids: list[int]
) -> None:
    with registry.enabled():
        language.use("turbo")
        for row in comparison.rows:
            cache = TurboCache(language.model.config, row.setting.config)
            out = language.model.generate(
                torch.tensor([ids]), past_key_values=cache, max_new_tokens=LIMIT, do_sample=False, pad_token_id=0
            )
            assert row.outcome.tokens == out[0, len(ids) :].tolist()


def test_top1_is_the_share_ranked_first_on_the_own_text(
    comparison: Comparison, language: LanguageModel, ids: list[int]
) -> None:
    own = comparison.own.tokens
    with registry.enabled():
        for row in comparison.rows:
            run = generation.Run(language, TurboCache(language.model.config, row.setting.config))
            run.prefill(ids)
            hits = int(run.logits.argmax()) == own[0]
            for before, token in itertools.pairwise(own):
                run.advance(before)
                hits += int(run.logits.argmax()) == token
            assert row.agreement.top1 == hits / len(own)
            # As many tokens as the row's own run, which must not count what was measured beside it.
            assert row.outcome.kv_bytes == run.kv_bytes


def test_some_setting_goes_its_own_way(comparison: Comparison) -> None:
    """Otherwise the tests above would compare only equal texts."""
    assert any(row.agreement.first_difference is not None for row in comparison.rows)


def test_differences(comparison: Comparison) -> None:
    for row in comparison.rows:
        first = row.agreement.first_difference
        assert first == first_difference(comparison.own.tokens, row.outcome.tokens)
        assert row.agreement.same_tokens == same_tokens(comparison.own.tokens, row.outcome.tokens)
        shared = row.agreement.same_text_chars
        assert comparison.own.text[:shared] == row.outcome.text[:shared]


def test_bytes(comparison: Comparison, language: LanguageModel, ids: list[int]) -> None:
    cached = len(ids) + LIMIT - 1
    layers, heads, head_dim = 2, 2, 16
    fp16 = 2 * 2 * cached * layers * heads * head_dim
    assert comparison.own.kv_bytes_fp16 == fp16
    assert comparison.own.kv_bytes == 2 * fp16
    for row in comparison.rows:
        assert row.outcome.kv_bytes_fp16 == fp16
        assert row.outcome.ratio == pytest.approx(fp16 / row.outcome.kv_bytes)
        assert row.outcome.bits_per_element == pytest.approx(16 * row.outcome.kv_bytes / fp16)


def test_fewer_bits_take_fewer_bytes(comparison: Comparison) -> None:
    size = {row.setting.bits: row.outcome.kv_bytes for row in comparison.rows}
    assert size["2"] < size["4"] < size["8"] < comparison.own.kv_bytes


def test_speeds_are_measured(comparison: Comparison) -> None:
    for outcome in (comparison.own, *(row.outcome for row in comparison.rows)):
        assert outcome.prefill_seconds > 0
        assert outcome.decode_tokens_per_second is not None
        assert outcome.decode_tokens_per_second > 0


def test_what_the_guard_says_is_kept_once(
    language: LanguageModel, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = generation.Run.prefill

    def warn(self: generation.Run, *arguments: object) -> None:
        prefill(self, *arguments)
        for _ in range(2):
            warnings.warn("layer 0, head 1: 8 bits", GuardWarning, stacklevel=1)

    monkeypatch.setattr(generation.Run, "prefill", warn)
    with registry.enabled(), guard_warnings(show=False):
        compared = compare(language, ids[:20], [make_setting("4")], 2, Bars(hidden=True))
    assert compared.rows[0].warnings == ["layer 0, head 1: 8 bits"]


@given(tokens, tokens)
def test_first_difference_splits_what_is_shared(a: list[int], b: list[int]) -> None:
    first = first_difference(a, b)
    if first is None:
        assert a == b
    else:
        assert a[:first] == b[:first]
        assert a[first : first + 1] != b[first : first + 1]


@given(tokens, tokens)
def test_same_tokens_is_a_share(a: list[int], b: list[int]) -> None:
    assert 0 <= same_tokens(a, b) <= 1
    assert (same_tokens(a, b) == 1) == (a == b)
    assert same_tokens(a, b) == same_tokens(b, a)


def test_same_tokens_counts_the_longer_one() -> None:
    assert same_tokens([1, 2, 3, 4], [1, 2]) == 0.5
