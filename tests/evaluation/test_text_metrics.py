from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from turboattention.errors import InputError
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.records import Records
from turboattention.evaluation.text_metrics import TextTask, compare, cut

from .subject import VOCABULARY, ScriptedSubject, no_progress, parts_in_memory, run_alone

TURBO = METHODS["turbo-4"]


def alphabet(text: str) -> str:
    """What comes next: the following letter, "a" after "z"."""
    return chr((ord(text[-1]) - 96) % 26 + 97) if text[-1].isalpha() else "a"


def measure(subject: ScriptedSubject, text: str, method=TURBO, context: int = 1000, limit: int = 2) -> dict:
    return run_alone(TextTask(text, "letters", context, limit), subject, method)


LETTERS = "abcdefghijklmnopqrstuvwxyz" * 100


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    metrics = measure(ScriptedSubject({"": alphabet}, confidence=0.0), LETTERS)["metrics"]
    assert metrics["perplexity"]["value"] == pytest.approx(VOCABULARY)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(math.log2(VOCABULARY))  # one byte a token


def test_bytes_are_those_of_utf8() -> None:
    subject = ScriptedSubject({"": lambda text: "a"}, confidence=0.0)
    subject.decode = lambda ids: "é" * len(ids)
    metrics = measure(subject, LETTERS)["metrics"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(math.log2(VOCABULARY) / 2)


def test_the_same_predictions_lose_nothing() -> None:
    result = measure(ScriptedSubject({"": alphabet}), LETTERS, context=26 * 40)  # both passages begin with "a"
    metrics = result["metrics"]
    for name, value in (("kl", 0.0), ("perplexity_change", 0.0), ("overlap", 1.0), ("top1", 1.0)):
        assert metrics[name] == {"value": value, "low": value, "high": value}
    right = 5.0 - math.log(math.exp(5.0) + VOCABULARY - 1)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(-right), rel=1e-5)
    assert result["tokens"] == 2080
    assert result["bits_per_element"] == 4.25


def test_errors_late_in_the_context_show_there_alone() -> None:
    def forgets(text: str) -> str:
        return alphabet(text) if len(text) < 500 else "?"

    result = measure(ScriptedSubject({"": alphabet, "turbo-4": forgets}), LETTERS, limit=1)
    rows = result["by_position"]
    for position, kl, top1 in zip(rows["position"], rows["kl"], rows["top1"], strict=True):
        if abs(position - 500) > 40:
            assert (kl > 1, top1) == ((True, 0.0) if position > 500 else (False, 1.0))
    assert result["metrics"]["top1"]["value"] == pytest.approx(0.5, abs=0.01)
    assert result["metrics"]["perplexity_change"]["value"] > 1


def test_every_token_goes_through_the_cache_in_pieces() -> None:
    subject = ScriptedSubject({"": alphabet})
    run_alone(TextTask(LETTERS, "letters", 200, 1, 64), subject, TURBO)
    own, turbo = subject.sessions
    assert own.calls == turbo.calls
    assert [(reading, len(text)) for reading, text in own.calls] == [(False, 64)] * 3 + [(False, 8)]


def test_the_own_cache_is_run_once_for_all_methods() -> None:
    subject, task = ScriptedSubject({"": alphabet, "turbo-2": lambda text: "?"}), TextTask(LETTERS, "letters", 1000, 2)
    names = ("fp16", "turbo-4", "turbo-2")
    results = task.run(subject, [METHODS[name] for name in names], parts_in_memory(*names), no_progress)
    assert len(subject.sessions) == 2 * 3
    assert [result["metrics"]["top1"]["value"] for result in results] == [1.0, 1.0, 0.0]
    assert results == [run_alone(task, subject, METHODS[name]) for name in names]


def test_as_many_methods_go_together_as_the_logits_of_a_piece_allow() -> None:
    subject, task = ScriptedSubject({"": alphabet}), TextTask(LETTERS, "letters", 1000, 2, 64)
    assert task.together(subject) == 12
    subject.vocabulary = 262_144  # 64 MiB for each row of 64
    assert task.together(subject) == 7
    subject.vocabulary = 10**9
    assert task.together(subject) == 1


def test_an_ended_run_goes_on_after_the_last_passage(tmp_path: Path) -> None:
    class Stops(ScriptedSubject):
        def decode(self, ids):
            if len(self.sessions) > 2:
                raise KeyboardInterrupt
            return super().decode(ids)

    task, wanted = TextTask(LETTERS, "letters", 300, 3), ScriptedSubject({"": alphabet})
    parts = Records(tmp_path).parts(task.name, {"turbo-4": {}})
    with pytest.raises(KeyboardInterrupt):
        task.run(Stops({"": alphabet}), [TURBO], parts, no_progress)
    again = ScriptedSubject({"": alphabet})
    got = task.run(again, [TURBO], Records(tmp_path).parts(task.name, {"turbo-4": {}}), no_progress)
    assert got == [run_alone(task, wanted, TURBO)]
    assert len(again.sessions) == 2 * 2


def test_compare_by_hand() -> None:
    own = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]]).log()
    got = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.6, 0.3]]).log()
    figures = compare(own, got, torch.tensor([0, 2]))
    assert figures["tvd"] == pytest.approx([0.25, 0], abs=1e-6)
    assert figures["kl"] == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0], abs=1e-6)
    assert figures["nll"] == pytest.approx([math.log(4), -math.log(0.3)])
    assert figures["own_nll"] == pytest.approx([math.log(2), -math.log(0.3)])
    assert figures["same"].tolist() == [0, 1]


def test_passages_are_apart_and_spread() -> None:
    ids = list(range(1050))
    assert [(p[0], len(p)) for p in cut(ids, 100, 3)] == [(0, 100), (300, 100), (600, 100)]
    assert [len(p) for p in cut(ids, 100, 99)] == [100] * 10
    assert [len(p) for p in cut(ids, 5000, 3)] == [1050]


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="text: expected at least two tokens, got 1"):
        measure(ScriptedSubject({"": alphabet}), "a")
