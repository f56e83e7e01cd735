"""The script that measures a whole model, over a tiny one."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from turboattention.config import TurboConfig
from turboattention.integrations.transformers import disable, enable

CONTEXT = 192


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("end_to_end")


@pytest.fixture
def plan(script: ModuleType):
    enable()
    yield script.Plan([CONTEXT], ["4"], steps=2, dtype=torch.float32, backend="reference")
    disable()


def test_both_caches_hold_the_same(script: ModuleType, plan) -> None:
    model = script.build(script.TINY, plan.dtype, CONTEXT + 8)
    own, turbo = script.filled(model, plan, CONTEXT, TurboConfig())
    assert own.get_seq_length() == turbo.get_seq_length() == CONTEXT
    for mine, layer in zip(own.layers, turbo.layers, strict=True):
        k, v = layer.kv.dequantize()
        torch.testing.assert_close((mine.keys, mine.values), (k, v))


def test_a_row(script: ModuleType, plan) -> None:
    model = script.build(script.TINY, plan.dtype, CONTEXT + 8)
    (row,) = script.measure(model, plan)
    assert (row["context"], row["bits"], row["ratio"]["count"]) == (CONTEXT, "4 bits", plan.steps)
    assert row["logit_error"] < 0.1
    assert row["turbo_tokens_per_second"] > 0
    # Two warm-up steps and two timed ones have been appended.
    assert row["fp16_bytes"] == 2 * 2 * 2 * (CONTEXT + 4) * 8 * 64
    assert row["dynamic_cache_bytes"] == 2 * row["fp16_bytes"]


def test_logits_that_are_far_off_are_refused(script: ModuleType, plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "BOUND", 0.0)
    model = script.build(script.TINY, plan.dtype, CONTEXT + 8)
    with pytest.raises(RuntimeError, match=r"4 bits: expected logits within 0\.0 of those over the model's own cache"):
        list(script.measure(model, plan))
