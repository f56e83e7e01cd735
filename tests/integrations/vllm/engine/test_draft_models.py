"""Drafts by a model: answers are each prompt's alone, without drafts. The draft model's layers have a cache of their
own, in the tail slots of the same requests; it decides how many drafts are accepted, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .answers import MOVED_BY_SHAPE, Answer, answer, assert_same, prompts
from .models import MODEL, save_changed, save_eagle_head, save_mimo
from .watching import FOLDER, NAME, seen, watch

LENGTHS = (20, 60, 63, 64, 126, 190, 250)
RANDOM = {"draft_load_config": {"load_format": "dummy"}}


@pytest.fixture(scope="module")
def asked(token_ids) -> list[dict[str, list[int]]]:
    return prompts(token_ids, LENGTHS)


@pytest.fixture(scope="module")
def solo(start, asked) -> list[Answer]:
    idle = start(enable_prefix_caching=False)
    return [answer(idle, [prompt], max_tokens=70)[0] for prompt in asked]


@pytest.fixture
def drafting(start, monkeypatch) -> Iterator[Any]:
    """Start an engine in a process of its own, as where vLLM has drafted once it can start no other engine. It has few
    blocks, and takes prompts in pieces that end inside them."""
    started: list[Any] = []

    def drafting(draft: dict[str, Any], **options: Any) -> Any:
        monkeypatch.syspath_prepend(FOLDER)
        busy = dict(num_gpu_blocks_override=12, max_num_batched_tokens=90, max_num_seqs=5, max_model_len=384)
        llm = start(
            processes=True, speculative_config=draft, worker_extension_cls=NAME, block_size=64, **(busy | options)
        )
        watch(llm)
        started.append(llm)
        return llm

    yield drafting
    for llm in started:
        llm.llm_engine.engine_core.shutdown()


def test_a_model_that_drafts_for_itself(drafting, asked, solo) -> None:
    """Its drafts are its answers: hardly one is rejected, unless the draft model reads another request's cache."""
    llm = drafting({"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 4})
    assert_same(answer(llm, asked, max_tokens=70), solo, MOVED_BY_SHAPE)
    counted = seen(llm)
    assert counted["preempted"] > 0
    assert counted["accepted"] > 0.95 * (counted["accepted"] + counted["rejected"]) > 300


def test_a_model_that_is_often_wrong(drafting, asked, solo, tmp_path) -> None:
    other = save_changed(tmp_path / "other", "model.layers.6.mlp.down_proj.weight", lambda w: w.zero_())
    llm = drafting({"method": "draft_model", "model": str(other), "num_speculative_tokens": 12})
    for order in (1, -1):
        assert_same(answer(llm, asked[::order], max_tokens=70), solo[::order], MOVED_BY_SHAPE)
    counted = seen(llm)
    missing = [name for name in ("preempted", "accepted", "rejected", "reopened", "shared") if not counted[name]]
    assert not missing, f"none of {missing} in {counted}"


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_random_heads(drafting, asked, solo, tmp_path, method: str) -> None:
    """Nearly every draft is rejected."""
    target, head = MODEL, {"method": method, "num_speculative_tokens": 3, **RANDOM}
    if method == "mtp":
        target = save_mimo(tmp_path / "mimo")
    else:
        head["model"] = str(save_eagle_head(Path(tmp_path, "head")))
    llm = drafting(head, model=str(target))
    assert_same(answer(llm, asked, max_tokens=70), solo, MOVED_BY_SHAPE)
    counted = seen(llm)
    missing = [name for name in ("preempted", "rejected", "reopened") if not counted[name]]
    assert not missing, f"none of {missing} in {counted}"
