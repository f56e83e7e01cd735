"""Two tensor-parallel ranks, each with half the heads, in processes of their own."""

from __future__ import annotations

from .answers import MOVED_BY_SHAPE, answer, assert_same, prompts

LENGTHS = (5, 64, 100, 190, 300)


def test_two_ranks(start, token_ids) -> None:
    asked = prompts(token_ids, LENGTHS)
    whole = start(processes=True, block_size=64)
    blocks = whole.llm_engine.vllm_config.cache_config.num_gpu_blocks
    wanted = answer(whole, asked)
    halves = start(processes=True, tensor_parallel_size=2, max_num_batched_tokens=90, block_size=64)
    assert_same(answer(halves, asked), wanted, MOVED_BY_SHAPE)
    # The same bytes per rank hold twice the blocks, but for the padding of pages.
    assert halves.llm_engine.vllm_config.cache_config.num_gpu_blocks > 1.9 * blocks
