"""The same prompts through transformers' `generate()` with a `TurboCache`, at the same serving configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from turboattention import TurboConfig

from .answers import MOVED_BY_LIBRARY, answer, assert_same, prompts
from .models import MODEL, load, save_gemma, save_window, transformers_answer

LENGTHS = (17, 63, 64, 130, 200, 333)
"""More than the queries in floating point: a cache has them only for the tokens of a prompt, a server for all."""


@pytest.fixture(autouse=True)
def first_queries_alike(monkeypatch) -> None:
    """Caches with `stored_prefill` compute no queries in floating point, but servers do, whose slots keep what that
    takes. These prompts are single calls, for which caches can, too."""
    monkeypatch.setattr("turboattention.exact_rows.rows_of", lambda config: config.exact_rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": MODEL,
        "mistral": save_window(folder / "mistral"),
        "gemma2": save_gemma(folder / "gemma2"),
        "wide": save_gemma(folder / "wide", head_dim=512),
    }


@pytest.mark.parametrize(
    "name, bits",
    [
        *(("llama", bits) for bits in (8, 4, 3, 2)),
        *((name, 4) for name in ("mistral", "gemma2", "wide")),
    ],
)
def test_same_tokens(start, models, token_ids, name: str, bits: int) -> None:
    asked = prompts(token_ids, LENGTHS)
    config = TurboConfig.serving(bits=bits)
    model = load(models[name])
    wanted = [transformers_answer(model, prompt, config) for prompt in asked]
    # Pieces of prompts and decoding in one step, prefixes shared.
    settings = {"turboattention": {"bits": bits}}
    llm = start(model=str(models[name]), additional_config=settings, max_num_batched_tokens=100, block_size=64)
    assert_same(answer(llm, asked), wanted, MOVED_BY_LIBRARY[bits])
    assert_same(answer(llm, asked), wanted, MOVED_BY_LIBRARY[bits])


def test_calibrated(start, token_ids, tmp_path) -> None:
    from turboattention.integrations.transformers import calibrate

    model = load(MODEL)
    calibration = calibrate(model, token_ids[2000:2512], budget=3.0, means=True, length=512)
    assert len({tuple(bits.flatten().tolist()) for bits in calibration.head_bits}) > 1
    calibration.save(tmp_path)
    asked = prompts(token_ids, LENGTHS)
    config = TurboConfig.serving(bits="mixed", smooth_k=True)
    wanted = [transformers_answer(model, prompt, config, calibration=calibration) for prompt in asked]
    llm = start(additional_config={"turboattention": {"calibration": str(tmp_path)}}, max_num_batched_tokens=100)
    assert_same(answer(llm, asked), wanted, MOVED_BY_LIBRARY[3])
