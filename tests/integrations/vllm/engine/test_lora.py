"""LoRA adapters: answers are those of the bundled model with the adapter's weights merged into its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .answers import MOVED_BY_SHAPE, Answer, answer, assert_same, metric, prompts
from .models import MODEL, save_adapter, save_merged

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
    engines = [start(model=str(model), enable_prefix_caching=False) for model in models]
    return [[answer(llm, [prompt])[0] for prompt in asked] for llm in engines]


def test_adapters_in_one_batch(start, adapters, asked, merged) -> None:
    """The same prompts without and with adapters at once, among few blocks, none of which may be shared by two of
    them."""
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
    )
    requests = [LoRARequest(adapter.name, index, str(adapter)) for index, adapter in enumerate(adapters, 1)]
    everything: list[Any] = [None] * len(asked)
    for request in requests:
        everything += [request] * len(asked)
    wanted = [one for answers in merged for one in answers]
    assert len({one.tokens for one in wanted}) == len(wanted)  # adapters matter
    before = metric(llm, "num_preemptions"), metric(llm, "prefix_cache_hits")
    for order in (1, -1):
        got = answer(llm, (asked * 3)[::order], adapters=everything[::order])
        assert_same(got, wanted[::order], MOVED_BY_SHAPE)
    assert metric(llm, "num_preemptions") > before[0]
    assert metric(llm, "prefix_cache_hits") > before[1]
