"""What is logged: heads that lose too much, once, and values that are not finite."""

from __future__ import annotations

import logging

import pytest
import torch

from .answers import answer, prompts


def test_heads_that_lose_too_much_are_named_once(start, token_ids, caplog) -> None:
    llm = start(additional_config={"turboattention": {"bits": 2}})
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    keys = runner.model.model.layers[3].self_attn.qkv_proj.weight.data
    keys[4 * 64 : 5 * 64] *= 8  # keys of head 0: of large logits, few bits leave the wrong ones on top
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "vllm.turboattention"):
            answer(llm, prompts(token_ids, [50]), max_tokens=2)
            assert not caplog.records
            answer(llm, prompts(token_ids, [300]), max_tokens=2)
            (record,) = caplog.records
            answer(llm, prompts(token_ids[700:], [300]), max_tokens=2)
            assert len(caplog.records) == 1
    finally:
        logger.removeHandler(caplog.handler)
    assert "model.layers.3.self_attn.attn: KV heads 0 lose too much in the quantized cache (head 0" in record.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_once_a_layer(start, token_ids, caplog, value: float) -> None:
    llm = start()
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.model.model.layers[5].self_attn.qkv_proj.weight.data[4 * 64] = value
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.ERROR, "vllm.turboattention"):
            (got,) = answer(llm, prompts(token_ids, [70]), max_tokens=5)
    finally:
        logger.removeHandler(caplog.handler)
    assert len(got.tokens) == 5
    (record,) = caplog.records
    assert record.message.startswith("model.layers.5.self_attn.attn: NaN or infinity among queries, keys or values")


def test_memory_is_said(start, caplog) -> None:
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "vllm.turboattention"):
            llm = start(max_num_seqs=3)
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = [record.message for record in caplog.records if record.message.startswith("TurboAttention")]
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    pools = [layer.self_attn.attn.impl.open_blocks for layer in runner.model.model.layers]
    said = sum(pool.nbytes for pool in pools) / 2**20
    assert line == (
        f"TurboAttention: 4 bits, 9024 bytes for 64 tokens of a layer; {said:.1f} MiB beside them for the open blocks of "
        "3 sequences in 8 layers"
    )
    pages = {layer.self_attn.attn.kv_cache.dtype for layer in runner.model.model.layers}
    assert pages == {torch.uint8}
