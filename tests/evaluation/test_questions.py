"""Published formats, and how answers are read. The lines here are made up in those formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from turboattention.errors import InputError
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.question_task import QuestionTask
from turboattention.evaluation.questions import aqua, as_conversation, bbh, gsm8k, load
from turboattention.evaluation.questions.question import plain_number
from turboattention.evaluation.records import Records

from .subject import ScriptedSubject, no_progress, parts_in_memory, run_alone

PROMPTS = """Some notice about the data.
-----
Say whether it holds.

Q: Is 1 < 2?
A: Let's think step by step.
One is less. So the answer is (A).

Q: Is 2 < 1?
A: Let's think step by step.
It is not. So the answer is (B)."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    def lines(name: str, rows: list[dict]) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    sums = [
        {"question": f"What is {n} + {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(600, 607)
    ]
    options = ["A)1", "B)2", "C)3", "D)4", "E)5"]
    algebra = [{"question": "x = 1?", "options": options, "rationale": "It is one.", "correct": "A"}] * 7
    lines("gsm8k/train.jsonl", sums)
    lines("gsm8k/test.jsonl", sums[:3])
    lines("aqua/dev.json", algebra)
    lines("aqua/test.json", algebra[:2])
    examples = {"canary": "", "examples": [{"input": "Is 3 < 4?\nOptions:\n(A) Yes\n(B) No", "target": "(A)"}]}
    lines("bbh/bbh/small.json", [examples])
    (tmp_path / "bbh/cot-prompts").mkdir()
    (tmp_path / "bbh/cot-prompts/small.txt").write_text(PROMPTS, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 * 2 = 10\n#### 1,010", "1010"),
        ("#### $18.00\n\n#### 4", "18"),
        ("She has 3 dogs, so 7 in all.", "7"),
        ("#### -5", "-5"),
        ("no number", None),
        ("", None),
    ],
)
def test_gsm8k_answers(text: str, answer: str | None) -> None:
    assert gsm8k.extract(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("1,234.50", "1234.5"), ("$7.", "7"), ("-0.0", "0"), ("-0.5", "-0.5"), ("007", "7"), ("1.2.3", None), ("", None)],
)
def test_numbers_have_one_form(text: str, answer: str | None) -> None:
    assert plain_number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So x = 2.\nThe answer is B.", "B"),
        ("Correct answer - (C)", "C"),
        ("Answer: D", "D"),
        ("the ANSWER is E", "E"),
        ("It is (A) or rather (B).", "B"),
        ("An apple a day", None),
        ("The answer is Because.", None),
    ],
)
def test_aqua_answers(text: str, answer: str | None) -> None:
    assert aqua.extract(text) == answer


@pytest.mark.parametrize(
    ("text", "options", "answer"),
    [
        ("So the answer is (B).", True, "(B)"),
        ("So the answer is B.", True, "(B)"),
        ("It must be (C)", True, "(C)"),
        ("So the answer is valid.", False, "valid"),
        ("So the answer is ] } ].\n", False, "] } ]"),
        ("The answer is No. Or, the answer is Yes.", False, "No. Or, the answer is Yes"),
        ("I do not know", False, None),
        ("", True, None),
    ],
)
def test_bbh_answers(text: str, options: bool, answer: str | None) -> None:
    assert bbh.extract(text, options=options) == answer


def test_gsm8k_files(data: Path) -> None:
    (questions,) = load("gsm8k", data)
    assert [q.target for q in questions.questions] == ["1200", "1202", "1204"]
    assert questions.questions[0].prompt == "Question: What is 600 + 600?\nAnswer:"
    assert len(questions.examples) == gsm8k.SHOTS
    second = questions.context(2).removeprefix(questions.context(1))
    assert second == "Question: What is 601 + 601?\nAnswer: 601+601=<<601+601=1202>>1202\n#### 1202\n\n"


def test_aqua_files(data: Path) -> None:
    (questions,) = load("aqua", data)
    prompt = "Question: x = 1?\nOptions: A)1 B)2 C)3 D)4 E)5\nAnswer:"
    assert (questions.questions[0].prompt, questions.questions[0].target) == (prompt, "A")
    assert questions.context(1) == prompt + " It is one.\nThe answer is A.\n\n"


def test_bbh_files(data: Path) -> None:
    (questions,) = load("bbh", data)
    assert questions.name == "bbh/small"
    assert questions.head == "Say whether it holds.\n\n"
    assert [questions.extract(example.solution) for example in questions.examples] == ["(A)", "(B)"]
    assert questions.questions[0].prompt.endswith("(B) No\nA: Let's think step by step.\n")
    assert questions.context(1).endswith("So the answer is (A).\n\n")


def test_an_example_may_be_solved_on_the_line_of_its_cue() -> None:
    _, (example,) = bbh.split_prompt("Q: Is it?\nA: Let's think step by step. It is. So the answer is yes.")
    assert (example.prompt, example.solution) == (
        "Q: Is it?\nA: Let's think step by step.",
        " It is. So the answer is yes.\n\n",
    )


def template(messages: Sequence[dict[str, str]], answer: bool) -> str:
    """Like Qwen2.5's: a system message of its own where none is given."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Help."}, *messages]
    text = "".join(f"<{message['role']}>{message['content']}</>" for message in messages)
    return text + "<assistant>" * answer


def test_a_conversation_has_the_examples_as_turns(data: Path) -> None:
    (plain,) = load("gsm8k", data)
    chat = as_conversation(plain, template)
    assert chat.context(0) == "<system>Help.</>"
    assert chat.context(1) == (
        "<system>Help.</><user>Question: What is 600 + 600?\nAnswer:</>"
        "<assistant>600+600=<<600+600=1200>>1200\n#### 1200</>"
    )
    assert chat.context(5).count("<user>") == 5
    assert chat.questions[1].prompt == "<user>Question: What is 601 + 601?\nAnswer:</><assistant>"
    assert [q.target for q in chat.questions] == [q.target for q in plain.questions]
    assert QuestionTask(chat, None).settings["chat"] is True
    assert "chat" not in QuestionTask(plain, None).settings


def test_instructions_are_the_system_message(data: Path) -> None:
    chat = as_conversation(load("bbh", data)[0], template)
    assert chat.context(0) == "<system>Say whether it holds.</>"
    assert chat.context(1).endswith("<assistant>One is less. So the answer is (A).</>")


def test_a_conversation_without_examples(data: Path) -> None:
    chat = as_conversation(replace(load("gsm8k", data)[0], examples=()), template)
    assert chat.context(0) == ""
    assert chat.questions[0].prompt.startswith("<system>Help.</><user>Question")


def test_a_template_that_changes_earlier_turns_is_refused(data: Path) -> None:
    def forgets(messages: Sequence[dict[str, str]], answer: bool) -> str:
        return template(messages[-1:], answer)

    with pytest.raises(InputError, match="expected a chat template that renders earlier turns the same"):
        as_conversation(load("gsm8k", data)[0], forgets)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("gsm8k", "gsm8k/test.jsonl", None, "cannot be read: No such file"),
        ("gsm8k", "gsm8k/test.jsonl", "", "got an empty file"),
        ("gsm8k", "gsm8k/test.jsonl", "{", "expected JSON lines in .* line 1"),
        ("aqua", "aqua/test.json", '{"question": ""}', "expected the fields question, options, rationale, correct"),
        ("aqua", "aqua/dev.json", "[]", "got list"),
        ("bbh/small", "bbh/bbh/small.json", "[]", "expected an object with examples"),
        ("bbh/small", "bbh/bbh/small.json", '{"examples": []}', "expected questions in .*, got none"),
        ("bbh/small", "bbh/cot-prompts/small.txt", None, "cannot be read"),
        ("bbh/other", "bbh/bbh/small.json", "{}", "expected bbh/TASK with one of small; got 'other'"),
    ],
)
def test_other_files_are_refused(data: Path, name: str, file: str, content: str | None, message: str) -> None:
    (data / file).unlink()
    if content is not None:
        (data / file).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load(name, data)


def writes(script: str):
    """A model that writes `script` after every "Answer:" at the end of the last question, then stops."""

    def follow(text: str) -> str:
        begun = text.rpartition("Answer:")[2]
        return script[len(begun)] if script.startswith(begun) and len(begun) < len(script) else "\0"

    return follow


def ask(data: Path, script: str, context: int = 100_000) -> tuple[dict, ScriptedSubject]:
    subject = ScriptedSubject({"": writes(script)}, context)
    return run_alone(QuestionTask(load("gsm8k", data)[0], None), subject, METHODS["turbo-4"]), subject


def test_right_and_wrong_answers(data: Path) -> None:
    result, _ = ask(data, " 1202 it is.\n#### 1202")
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert result["metrics"]["answered"]["value"] == 1.0
    assert [row["answer"] for row in result["shown"]] == ["1202"] * 3
    assert (result["questions"], result["fewest_shots"], result["bits_per_element"]) == (3, 5, 4.25)


def test_what_comes_after_the_next_question_does_not_count(data: Path) -> None:
    result, subject = ask(data, " none\n\nQuestion: #### 1202")
    assert result["metrics"]["answered"]["value"] == 0.0
    assert not any(session.text.endswith("1202") for session in subject.sessions[1:])


def test_examples_are_read_and_the_question_is_fed(data: Path) -> None:
    _, subject = ask(data, " 1")
    (reading, examples), (feeding, question), *generated = subject.sessions[1].calls
    assert (reading, feeding) == (True, False)
    assert examples.count("####") == 5
    assert question == "Question: What is 600 + 600?\nAnswer:"
    assert [text for _, text in generated] == [" ", "1"]


def test_fewer_examples_where_the_context_is_small(data: Path) -> None:
    result, subject = ask(data, " 1", context=256 + 200)
    assert 0 < result["fewest_shots"] < 5
    assert all(len(session.text) <= 456 for session in subject.sessions)


def test_a_question_that_never_fits_is_refused(data: Path) -> None:
    with pytest.raises(InputError, match="gsm8k: expected questions that fit the model's context"):
        ask(data, "", context=270)


class Watched(ScriptedSubject):
    """Counts the rows that go through the model together, and can be stopped after some steps."""

    steps = 10**9

    def feed_together(self, sessions, ids, *, last=False):
        if not self.steps:
            raise KeyboardInterrupt
        self.steps -= 1
        self.rows = [*getattr(self, "rows", []), (len(sessions), len(ids[0]))]
        return super().feed_together(sessions, ids, last=last)


def test_methods_and_questions_are_answered_side_by_side(data: Path) -> None:
    subject = Watched({"turbo-4": writes(" 1202"), "": writes(" so #### 1200")})
    task, methods = QuestionTask(load("gsm8k", data)[0], None), [METHODS["turbo-4"], METHODS["kivi-4"]]
    results = task.run(subject, methods, parts_in_memory("turbo-4", "kivi-4"), no_progress)
    assert [result["solved"] for result in results] == [[0, 1, 0], [1, 0, 0]]
    assert results == [run_alone(task, subject, method) for method in methods]
    examples = [session for session in subject.sessions if len(session.calls) == 1]
    assert len(examples) == 2 + 2  # once for each method, however many questions
    # Three questions, read by both methods at once; all six go on together until the shorter ones end.
    assert [rows for rows, length in subject.rows if length > 1][:3] == [2, 2, 2]
    assert [rows for rows, length in subject.rows if length == 1][:9] == [6] * 5 + [3] * 4


def test_an_ended_run_goes_on_after_the_last_answer(data: Path, tmp_path: Path) -> None:
    task, methods = QuestionTask(load("gsm8k", data)[0], None), [METHODS["turbo-4"], METHODS["kivi-4"]]
    settings = {method.name: {} for method in methods}
    whole = Watched({"turbo-4": writes(" 1202"), "": writes(" so #### 1200")})
    wanted = task.run(whole, methods, parts_in_memory(*settings), no_progress)
    stopped = Watched({"turbo-4": writes(" 1202"), "": writes(" so #### 1200")})
    stopped.steps = 3 + 6  # the shorter answers are there
    with pytest.raises(KeyboardInterrupt):
        task.run(stopped, methods, Records(tmp_path).parts("gsm8k", settings), no_progress)
    again = Watched({"": writes(" so #### 1200")})  # turbo-4 would answer otherwise now
    assert task.run(again, methods, Records(tmp_path).parts("gsm8k", settings), no_progress) == wanted
    assert {rows for rows, _ in again.rows} == {1, 3}
