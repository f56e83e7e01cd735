"""Keys in a calibrated order of channels: against transformers, and bytes of shared prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turboattention import Calibration, TurboConfig

from .answers import MOVED_BY_LIBRARY, answer, assert_same, metric, prompts
from .models import MODEL, load, transformers_answer

LENGTHS = (5, 64, 130, 333)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, token_ids) -> Path:
    from turboattention.integrations.transformers import calibrate

    made = tmp_path_factory.mktemp("calibration")
    calibrate(load(MODEL), token_ids[2000:2512], length=512).save(made)
    return made


def settings(folder: Path, bits: int = 3) -> dict:
    return {"turboattention": {"calibration": str(folder), "bits": bits, "reorder_k": True}}


@pytest.mark.parametrize("bits", [4, 3])
def test_same_tokens_as_transformers(start, folder, token_ids, bits: int) -> None:
    asked, calibration = prompts(token_ids, LENGTHS), Calibration.load(folder)
    config, model = TurboConfig.serving(bits=bits, reorder_k=True), load(MODEL)
    wanted = [transformers_answer(model, prompt, config, calibration=calibration) for prompt in asked]
    llm = start(additional_config=settings(folder, bits), max_num_batched_tokens=100, block_size=64)
    assert any(layer.impl.format.layouts[0].k_halves for layer in attention(llm))
    for _ in range(2):  # then with shared prefixes
        assert_same(answer(llm, asked), wanted, MOVED_BY_LIBRARY[bits])


def test_a_shared_prefix_has_the_same_bytes_in_any_server(start, folder, token_ids) -> None:
    """Whose first blocks are others, in which an order would be found that differs; and a second request shares it."""
    shared, pages = list(token_ids[500:628]), []
    for first in (token_ids[:200], token_ids[900:1100]):
        llm = start(additional_config=settings(folder), block_size=64)
        answer(llm, [{"prompt_token_ids": list(first)}], 4)
        answer(llm, [{"prompt_token_ids": shared + list(token_ids[700:730])}], 4)
        before = metric(llm, "prefix_cache_hits")
        answer(llm, [{"prompt_token_ids": shared + list(token_ids[800:830])}], 4)
        assert metric(llm, "prefix_cache_hits") - before == len(shared)
        pages.append([held(layer) for layer in attention(llm)])
    for one, other in zip(*pages, strict=True):
        assert len(one & other) == len(shared) // 64


def attention(llm: Any) -> list[Any]:
    layers = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.layers
    return [layer.self_attn.attn for layer in layers]


def held(layer: Any) -> set[bytes]:
    """The pages that were written."""
    pages = layer.kv_cache.flatten(1)
    return {bytes(page.numpy()) for page in pages[(pages != 0).any(1)]}
