"""LoRA adapters: answers are those of the bundled model with an adapter's weights merged into its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from .answers import MOVED_BY_SHAPE, Answer, answer, assert_same, metric, prompts
from .models import MODEL, save_adapter, save_merged

EIGHT = {"additional_config": {"turboattention": {"bits": 8}}}
"""A product by parts rounds otherwise than a merged one, and codes that lie close fall to the other side, by little."""
LENGTHS = (20, 64, 130, 190, 300)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    return [save_adapter(tmp_path_factory.mktemp("adapters") / str(seed), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def asked(token_ids) -> list[dict[str, list[int]]]:
    return prompts(token_ids, LENGTHS)


@pytest.fixture(scope="module")
def merged(start, adapters, asked, tmp_path_factory) -> list[list[Answer]]:
    """Each prompt alone: without an adapter, with the first, with the second."""
    folder = tmp_path_factory.mktemp("merged")
    models = [MODEL, *(save_merged(folder / adapter.name, adapter) for adapter in adapters)]
    engines = [start(model=str(model), enable_prefix_caching=False, **EIGHT) for model in models]
    return [[answer(llm, [prompt])[0] for prompt in asked] for llm in engines]


def test_two_adapters_in_one_batch(start, adapters, asked, merged) -> None:
    """The same prompts with either adapter at once, among few blocks, none of which may be shared by the two; then
    without an adapter. (vLLM 0.32.0 on CPUs, with its own attention, too, is wrong where both are in one batch.)"""
    from vllm.lora.request import LoRARequest

    llm = start(
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        max_num_batched_tokens=90,
        block_size=64,
        num_gpu_blocks_override=12,
        max_num_seqs=6,
        max_model_len=512,
        **EIGHT,
    )
    for same_prompt in zip(*merged, strict=True):  # adapters matter
        assert len({one.tokens for one in same_prompt}) == len(merged)
    none, first, second = merged
    requests = [LoRARequest(adapter.name, index, str(adapter)) for index, adapter in enumerate(adapters, 1)]
    adapted = [request for request in requests for _ in asked]
    before = metric(llm, "num_preemptions"), metric(llm, "prefix_cache_hits")
    for order in (1, -1):
        got = answer(llm, (asked * 2)[::order], adapters=adapted[::order])
        assert_same(got, [*first, *second][::order], MOVED_BY_SHAPE)
    assert metric(llm, "num_preemptions") > before[0]
    assert metric(llm, "prefix_cache_hits") > before[1]
    assert_same(answer(llm, asked), none, MOVED_BY_SHAPE)
