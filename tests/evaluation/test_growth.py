"""Errors over text that the model writes itself."""

from __future__ import annotations

from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.growth_task import PROMPT, SEED, GrowthTask, write

from .subject import ScriptedSubject, no_progress, parts_in_memory
from .test_text_metrics import LETTERS, alphabet


def test_the_text_begins_with_the_prompt_and_goes_on_as_the_model_does() -> None:
    subject = ScriptedSubject({"": alphabet}, confidence=50.0)
    task = GrowthTask("abcdefgh" * 50, "letters", 200, 1, 64)
    task.run(subject, [METHODS["turbo-4"]], parts_in_memory("turbo-4"), no_progress)
    _, own, turbo = subject.sessions
    assert own.text == turbo.text
    assert own.text.startswith("\x01" + ("abcdefgh" * 50)[:PROMPT] + "ijklmnop")
    assert len(own.text) == 200 - 1  # the last token is predicted, and not fed


def test_errors_late_in_the_text_are_told_from_early_ones() -> None:
    def forgets(text: str) -> str:
        return alphabet(text) if len(text) < 500 else "?"

    subject = ScriptedSubject({"": alphabet, "turbo-2": forgets}, confidence=9.0)
    task, methods = GrowthTask(LETTERS, "letters", 800, 2, 64), [METHODS[name] for name in ("fp16", "turbo-2")]
    own, turbo = task.run(subject, methods, parts_in_memory("fp16", "turbo-2"), no_progress)
    assert next(iter(turbo["metrics"])) == "kl"
    assert own["metrics"]["kl_last"]["value"] == 0.0 == turbo["metrics"]["kl_first"]["value"]
    assert turbo["metrics"]["kl_last"]["value"] > 1


def test_the_same_seed_writes_the_same_and_never_ends_early() -> None:
    subject = ScriptedSubject({"": lambda text: "\0"}, confidence=3.0)  # the likeliest is the end of the text
    first, again, other = (write(subject, [97], 150, SEED + more) for more in (0, 0, 1))
    assert len(first) == 150
    assert 0 not in first
    assert first == again != other
