"""Rejected drafts are removed, also from blocks that they filled."""

from __future__ import annotations

from typing import Any

import pytest

from .answers import MOVED_BY_SHAPE, answer, assert_same, metric, prompts

LENGTHS = (20, 64, 100, 126, 190, 250)


@pytest.fixture(scope="module")
def plain(start) -> Any:
    return start()


@pytest.mark.parametrize("drafts", [3, 12])
def test_ngram(start, plain, token_ids, drafts: int) -> None:
    # Twice the same piece, so that there is something to copy.
    asked = [
        {"prompt_token_ids": (p["prompt_token_ids"] * 2)[: len(p["prompt_token_ids"]) + 30]}
        for p in prompts(token_ids, LENGTHS)
    ]
    wanted = [answer(plain, [prompt], max_tokens=80)[0] for prompt in asked]
    # In a process of its own: where vLLM has drafted once, it can start no other engine.
    ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
    llm = start(processes=True, speculative_config=ngram, block_size=64, max_num_batched_tokens=120)
    assert_same(answer(llm, asked, max_tokens=80), wanted, MOVED_BY_SHAPE)
    tried, kept = (metric(llm, f"spec_decode_num_{what}_tokens") for what in ("draft", "accepted"))
    assert 100 < kept < tried - 100
