"""Log messages: heads that lose too much, once; values that are not finite; the memory used."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from turboattention import guard

from .answers import answer, prompts
from .models import save_changed


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Lines of ours, from INFO on."""
    lines: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        lines.append(f"{record.levelname} {record.getMessage()}")
        return True

    logger = logging.getLogger("vllm.turboattention")
    logger.addFilter(note)  # vLLM takes handlers off when it starts
    yield lines
    logger.removeFilter(note)


@pytest.fixture
def spoiled(tmp_path, monkeypatch) -> str:
    """A model whose head 1 in layer 3 has large logits, so that two bits leave the wrong keys on top, and a bound
    between its error, 0.50, and that of all others, up to 0.42."""
    monkeypatch.setattr(guard, "bound_of", lambda bits: torch.full((2,), 0.46))
    return str(save_changed(tmp_path / "m", "model.layers.3.self_attn.k_proj.weight", lambda w: w[64:].mul_(8)))


def test_heads_that_lose_too_much_are_named_once(start, token_ids, logged, spoiled) -> None:
    llm = start(model=spoiled, additional_config={"turboattention": {"bits": 2}})
    answer(llm, prompts(token_ids, [50]), max_tokens=2)
    assert not [line for line in logged if line.startswith("WARNING")]
    answer(llm, prompts(token_ids, [300]), max_tokens=2)
    answer(llm, prompts(token_ids[700:], [300]), max_tokens=2)
    (line,) = [line for line in logged if line.startswith("WARNING")]
    assert "model.layers.3.self_attn.attn: KV head 1 loses too much in the quantized cache (head 1 has" in line
    assert "at K 2 and V 2 bits, bound 0.46); widths kept as configured; calibrate the model" in line


def test_the_check_can_be_left_out(start, token_ids, logged, spoiled) -> None:
    llm = start(model=spoiled, additional_config={"turboattention": {"bits": 2, "guard": False}})
    answer(llm, prompts(token_ids, [300]), max_tokens=2)
    assert not [line for line in logged if line.startswith("WARNING")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_once(start, token_ids, logged, tmp_path, value: float) -> None:
    folder = save_changed(tmp_path / "m", "model.layers.5.self_attn.k_proj.weight", lambda w: w[3].fill_(value))
    llm = start(model=str(folder))
    (got,) = answer(llm, prompts(token_ids, [70]), max_tokens=5)
    assert len(got.tokens) == 5
    (line,) = [line for line in logged if line.startswith("ERROR")]
    assert line.startswith("ERROR model.layers.5.self_attn.attn: NaN or infinity among queries, keys or values")


def test_memory_is_said(start, logged) -> None:
    llm = start(max_num_seqs=3)
    layers = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers
    beside = sum(layer.self_attn.attn.impl.tail_blocks.nbytes for layer in layers) / 2**20
    (line,) = [line for line in logged if line.startswith("INFO TurboAttention")]
    assert line.endswith(
        f"4 bits, 9024 bytes for 64 tokens of a layer; {beside:.1f} MiB in addition for the tail blocks of "
        "3 sequences in 8 layers"
    )
    assert {layer.self_attn.attn.kv_cache.dtype for layer in layers} == {torch.uint8}
