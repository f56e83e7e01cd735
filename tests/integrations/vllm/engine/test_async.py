"""The engine that servers use: requests come and go while others run."""

from __future__ import annotations

import asyncio
from typing import Any

from .answers import MOVED_BY_SHAPE, Answer, answer, assert_same, greedy, prompts
from .models import MODEL

LENGTHS = (130, 20, 64, 300, 100, 190)
LEFT = (0, 3)


def test_clients_that_leave(start, token_ids, monkeypatch) -> None:
    asked = prompts(token_ids, LENGTHS)
    idle = start()
    wanted = [answer(idle, [prompt])[0] for prompt in asked]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    got = asyncio.run(_serve(asked))
    stayed = [index for index in range(len(asked)) if index not in LEFT]
    assert_same([got[index] for index in stayed], [wanted[index] for index in stayed], MOVED_BY_SHAPE)


async def _serve(asked: list[dict[str, list[int]]]) -> dict[int, Answer]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(MODEL),
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=32 << 20,
            max_model_len=512,
            block_size=64,
            num_gpu_blocks_override=11,
            max_num_batched_tokens=60,
            max_num_seqs=4,
        )
    )
    answers: dict[int, Answer] = {}

    async def client(index: int) -> None:
        outputs: list[Any] = []
        async for output in engine.generate(asked[index], greedy(40), f"client-{index}"):
            outputs.append(output)
            if index in LEFT and len(outputs) == 5:
                return  # leaving the loop aborts the request
        answers[index] = Answer.of(outputs[-1])

    try:
        await asyncio.gather(*(client(index) for index in range(len(asked))))
    finally:
        engine.shutdown()
    return answers
