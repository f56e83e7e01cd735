"""lm-evaluation-harness over a cache: a task file of our own, so that nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import save_model
from turboattention.errors import InputError
from turboattention.evaluation.baselines import METHODS
from turboattention.integrations.transformers import language_model, registry

pytest.importorskip("lm_eval", reason="needs lm-eval")
pytestmark = pytest.mark.filterwarnings("ignore")

from turboattention.evaluation.hf import harness  # noqa: E402

QUESTIONS = [
    {"question": f"The old man said {n}", "answer": "yes", "choices": ["yes", "no"], "gold": 0} for n in range(5)
]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    with registry.enabled():
        yield language_model.load(str(save_model(tmp_path_factory.mktemp("models") / "tiny")), "cpu", "float32")


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks over one file: one whose answers are written, one whose answers are chosen."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    common |= {"doc_to_text": "{{question}}:", "num_fewshot": 0, "metadata": {"version": 1}}
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match"}],
    }
    written |= {"generation_kwargs": {"until": ["\\n"], "max_gen_toks": 6, "do_sample": False}}
    chosen = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}
    chosen |= {"metric_list": [{"metric": "acc"}]}
    for name, kind in (("our_written", written), ("our_chosen", chosen)):
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | kind), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "metric"), [("our_written", "exact_match"), ("our_chosen", "acc")])
def test_a_task_runs_over_a_cache(language: Any, include: Path, name: str, metric: str) -> None:
    result = harness.run(language, METHODS["turbo-4"], name, limit=3, include=include)
    assert result["questions"] == 3
    assert 0 <= result["metrics"][metric]["value"] <= 1
    assert result["metrics"][metric]["high"] > result["metrics"][metric]["low"]
    assert 0 < result["bits_per_element"] < float("inf")


def test_choices_are_those_of_the_model_without_a_cache(language: Any, include: Path, monkeypatch: Any) -> None:
    """Reading in pieces over the own cache changes no log-likelihood: the harness's own class is the witness."""
    from lm_eval.models.huggingface import HFLM

    over_cache = harness._model_class()(language, METHODS["fp16"], lambda done, total: None)
    plain = HFLM(pretrained=language.model, tokenizer=language.tokenizer, batch_size=1, device="cpu")
    tokens = torch.tensor([language.encode("The door opened, and an old man stood in the light of the lamp.")])
    torch.testing.assert_close(over_cache._model_call(tokens), plain._model_call(tokens), rtol=1e-4, atol=1e-4)
    assert len(over_cache.bits) == 1


def test_long_prompts_are_read_through_the_cache(language: Any) -> None:
    seen: list[int] = []
    handle = language.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    model = harness._model_class()(language, METHODS["turbo-2"], lambda done, total: None)
    prompt = torch.tensor([language.encode("The door opened, and an old man stood. " * 20)[:200]])
    try:
        out = model._model_generate(prompt, max_length=205, stop=["\\n"], attention_mask=torch.ones_like(prompt))
    finally:
        handle.remove()
    assert seen[:2] == [200 - harness.ASKED, harness.ASKED]
    assert set(seen[2:]) <= {1}
    assert out.shape[1] <= 205


def test_progress_is_told(language: Any, include: Path) -> None:
    told: list[tuple[int, int]] = []
    harness.run(
        language,
        METHODS["fp16"],
        "our_written",
        limit=3,
        include=include,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 3), (1, 3), (2, 3)]


def test_unknown_tasks_are_refused(include: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_manager_of", lambda name, folder: harness._manager(folder))
    with pytest.raises(InputError, match="with a task of lm-evaluation-harness, got 'our_witten'"):
        harness.check("our_witten", include)
    harness.check("our_written", include)


def test_local_data_stand_in_for_the_hubs(tmp_path: Path) -> None:
    class Entry:
        yaml_path = tmp_path / "task.yaml"

    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "bbh" / "bbh").mkdir(parents=True)
    (tmp_path / "bbh" / "bbh" / "navigate.json").touch()
    sums = harness._with_local_data(Entry, "gsm8k_cot", tmp_path)
    assert sums["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "gsm8k" / "test.jsonl")
    logic = harness._with_local_data(Entry, "bbh_cot_fewshot_navigate", tmp_path)
    assert logic["dataset_kwargs"]["field"] == "examples"
    assert logic["include"] == str(Entry.yaml_path)
    for name in ("bbh_cot_fewshot_snarks", "arc_easy"):
        assert harness._with_local_data(Entry, name, tmp_path) is None
    assert harness._with_local_data(Entry, "gsm8k", None) is None
