"""``turboattention ask``: one document, many questions."""

from __future__ import annotations

import io
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from turboattention import TurboConfig, bundled
from turboattention.cli import asking
from turboattention.cli.document import Document, Ready
from turboattention.cli.progress import Bars
from turboattention.cli.stream import write_text
from turboattention.integrations.transformers import generation, registry
from turboattention.integrations.transformers.language_model import LanguageModel

from .conftest import CONTEXT, TEMPLATE, TEXT, Run, save_model

QUESTIONS = ("Who opened the door?", "Where did the old man stand?")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "document.txt"
    path.write_text(f"\n{TEXT * 3}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(chat_language: LanguageModel) -> list[list[int]]:
    """Six greedy tokens a question at 4 bits: the document is read first, then each question over a copy."""
    begin = chat_language.encode(f"[user]{(TEXT * 3).strip()}\n\n")
    found = []
    with registry.enabled():
        whole = generation.Run(chat_language, chat_language.new_cache(TurboConfig()))
        whole.prefill(begin)
        for question in QUESTIONS:
            run = whole.fork()
            run.prefill(chat_language.encode(f"{question}<end>[assistant]"))
            found.append(generation.generate(run, 6).tokens)
    return found


def call(run: Run, model: Path, file: object, *arguments: object, **options):
    asked = [x for question in QUESTIONS for x in ("-q", question)]
    if "stdin" in options:
        asked = []
    return run("ask", "--model", model, "--file", file, "--max-new-tokens", 6, *asked, *arguments, **options)


def test_answers(run: Run, chat_model: Path, chat_language, file: Path, expected) -> None:
    data = call(run, chat_model, file, "--json").json
    assert [answer["tokens"] for answer in data["answers"]] == expected
    assert [answer["question"] for answer in data["answers"]] == list(QUESTIONS)
    assert {answer["reused_tokens"] for answer in data["answers"]} == {data["document_tokens"]}


def test_plain_output(run: Run, chat_model: Path, chat_language, file: Path, expected) -> None:
    ran = call(run, chat_model, file)
    texts = [f"> {q}\n{chat_language.decode(x)}\n" for q, x in zip(QUESTIONS, expected, strict=True)]
    assert ran.stdout == "".join(texts)
    assert ran.stderr.startswith("note: document of ")
    assert ran.stderr.count("from the cache") == 2
    assert "\x1b" not in ran.stderr


def test_a_pipe_without_questions(run: Run, chat_model: Path, file: Path, tmp_path: Path) -> None:
    ran = call(run, chat_model, file, stdin="")
    message = "error: --question: expected at least one, or a question in each line of stdin, got none"
    assert (ran.code, ran.stderr.splitlines()[-1]) == (2, message)
    ran = call(run, chat_model, file, "--save-cache", tmp_path / "document", stdin="")
    assert (tmp_path / "document").exists()
    assert ran.stdout == ""


def test_one_question_gets_the_answer_alone(run: Run, chat_model: Path, chat_language, file: Path, expected) -> None:
    ran = run("ask", "--model", chat_model, "--file", file, "-q", QUESTIONS[0], "--max-new-tokens", 6)
    assert ran.stdout == f"{chat_language.decode(expected[0])}\n"


def test_questions_from_stdin(run: Run, chat_model: Path, file: Path, expected) -> None:
    data = call(run, chat_model, file, "--json", stdin="\n".join(QUESTIONS)).json
    assert [answer["tokens"] for answer in data["answers"]] == expected


@pytest.mark.parametrize("pieces", [0, 2])
def test_ctrl_c_ends_an_answer_and_not_the_program(
    run: Run, chat_model: Path, chat_language, file: Path, expected, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    """Before the first token, or once two pieces of the first answer are written."""
    written, prefill = [], generation.Run.prefill

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def write(text: str) -> None:
        written.append(text)
        write_text(text)
        if len(written) == pieces:
            press()

    def read(self: generation.Run, ids: list[int], *arguments: object) -> None:
        prefill(self, ids, *arguments)  # type: ignore[arg-type]
        read_already.append(len(ids))
        if not pieces and len(read_already) == 2:  # the document comes first
            press()

    read_already: list[int] = []
    monkeypatch.setattr("turboattention.cli.ask.write_text", write)
    monkeypatch.setattr(generation.Run, "prefill", read)
    ran = call(run, chat_model, file, stdin="\n".join(QUESTIONS))
    assert ran.code == 0
    first, second, _ = ran.stdout.split("\n")  # random models also write other separators of lines
    whole = [chat_language.decode(tokens) for tokens in expected]
    assert second == whole[1]
    assert whole[0].startswith(first)
    assert len(first) < len(whole[0])
    assert ("stopped before there was an answer" in ran.stderr) == (pieces == 0)
    assert ("stopped; " in ran.stderr) == (pieces > 0)


def test_ctrl_c_ends_the_program_where_the_questions_are_given(
    run: Run, chat_model: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboattention.cli.ask.write_text", lambda _: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background do not have
    try:
        ran = call(run, chat_model, file)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran.code == 130
    assert QUESTIONS[1] not in ran.stdout


def test_a_kept_document(run: Run, chat_model: Path, file: Path, expected, tmp_path: Path) -> None:
    kept = tmp_path / "document.cache"
    first = call(run, chat_model, file, "--save-cache", kept, "--json").json
    again = call(run, chat_model, file, "--load-cache", kept, "--json").json
    assert [x["tokens"] for x in first["answers"]] == [x["tokens"] for x in again["answers"]] == expected
    assert again["document_seconds"] == 0
    longer = tmp_path / "longer.txt"
    longer.write_text(file.read_text(encoding="utf-8") + " On." * 30, encoding="utf-8")
    ran = call(run, chat_model, longer, "--load-cache", kept)
    found = re.match(r"note: document of (\d+) tokens: (\d+) from .*document.cache, (\d+) read in ", ran.stderr)
    assert found is not None, ran.stderr
    whole, loaded, read = map(int, found.groups())
    assert whole == loaded + read > loaded > 0
    shared = [int(n) for n in re.findall(r"\((\d+) from the cache\)", ran.stderr)]
    assert len(shared) == len(QUESTIONS)
    assert min(shared) >= whole - 1  # what was missing was read once, not for every question
    (tmp_path / "other.txt").write_text("Another text altogether. " * 8, encoding="utf-8")
    refused = call(run, chat_model, tmp_path / "other.txt", "--load-cache", kept).error
    assert refused.startswith("--load-cache: expected a prompt that begins like the cached one")


def test_compare(run: Run, chat_model: Path, chat_language, file: Path, expected) -> None:
    data = call(run, chat_model, file, "--compare", "--json").json
    own, four, three = data["caches"]
    assert [cache["bits"] for cache in data["caches"]] == [None, "4", "3"]
    assert [answer["tokens"] for answer in four["answers"]] == expected
    assert own["kv_bytes_fp16"] == four["kv_bytes_fp16"]
    assert three["kv_bytes"] < four["kv_bytes"] < own["kv_bytes"]
    assert own["file_bytes"] is None
    assert 0 < three["file_bytes"] < four["file_bytes"]
    for answer, wanted in zip(four["answers"], own["answers"], strict=True):
        differ = [x != y for x, y in zip(answer["tokens"], wanted["tokens"], strict=True)]
        assert answer["first_difference"] == (differ.index(True) if True in differ else None)


def test_answers_are_printed_as_they_come(
    run: Run, chat_model: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache by cache: when a cache answers, all answers before this one are out."""
    written, printed, go_on = io.StringIO(), [], asking.go_on
    console = Console(file=written, width=100)
    monkeypatch.setattr("turboattention.cli.ask.results", lambda: console)

    def watch(generation_run: generation.Run, label: str, *rest):
        printed.append(written.getvalue().count(QUESTIONS[0]) + written.getvalue().count(QUESTIONS[1]))
        assert f"\n{label}, document read in " in written.getvalue()
        return go_on(generation_run, label, *rest)

    monkeypatch.setattr(asking, "go_on", watch)
    assert call(run, chat_model, file, "--compare").code == 0
    assert printed == [*range(6)]
    text = written.getvalue()
    places = [text.index(f"\n{label}, document") for label in ("own cache", "4 bits", "3 bits")]
    assert places == sorted(places)
    assert text.index("top-1") > places[-1]


@pytest.mark.parametrize("columns", [60, 110])
def test_compare_shows_each_question(run: Run, chat_model: Path, file: Path, columns: int) -> None:
    """No figure is broken over lines, however narrow the terminal is."""
    ran = call(run, chat_model, file, "--compare", "--bits", "8", columns=columns)
    assert (ran.code, ran.stderr) == (0, "")
    for word in (*QUESTIONS, "own cache", "8 bits", "top-1", "file", "1.00x"):
        assert word in ran.stdout
    assert re.search(r"\d (KiB|bytes)\b", ran.stdout)


def test_every_question_starts_from_the_same_cache(chat_language, file: Path) -> None:
    """The tokens of one question are not in the cache of the next."""
    document = Document(chat_language, file.read_text(encoding="utf-8"))
    with registry.enabled():
        run = generation.Run(chat_language, chat_language.new_cache(TurboConfig()))
        ready = Ready.read(document, run, Bars(hidden=True))
        for _ in range(2):
            asked, shared = ready.ask(document.ids(QUESTIONS[0]))
            assert shared == len(document.prefix)
            asked.prefill(document.ids(QUESTIONS[0])[shared:])
            assert ready.run.cache.get_seq_length() == len(document.prefix)


def test_questions_of_stdin_that_do_not_fit(run: Run, chat_model: Path, file: Path, chat_language, expected) -> None:
    """The next one follows, and the exit code says that one failed."""
    long = TEXT.replace("\n", " ") * 20
    ran = call(run, chat_model, file, stdin=f"{QUESTIONS[0]}\n{long}\n{QUESTIONS[1]}\n")
    assert ran.code == 2
    assert ran.stdout == "".join(f"{chat_language.decode(x)}\n" for x in expected)
    assert ran.stderr.count("error: --file: expected at most") == 1
    refused = call(run, chat_model, file, "--json", stdin=f"{QUESTIONS[0]}\n{long}\n")
    assert refused.error.startswith("--file: expected at most")


@pytest.mark.usefixtures("no_weights")
class TestWhatNeedsNoWeights:
    def test_files(self, run: Run, chat_model: Path, file: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("of a year")
        for options in (["--save-cache", tmp_path / "notes.txt"], ["--load-cache", tmp_path / "notes.txt"]):
            assert call(run, chat_model, file, *options).error.startswith(f"{options[0]}: expected ")
        assert call(run, chat_model, tmp_path / "none").error.startswith("--file: ")
        assert run("ask", "--model", "/no/such", "--file", file, "--load-cache", "x").error.startswith("--load-cache")

    def test_a_cache_of_another_model(self, run: Run, chat_language, file: Path, tmp_path: Path) -> None:
        with registry.enabled():
            filled = generation.Run(chat_language, chat_language.new_cache(TurboConfig()))
            filled.prefill([1, 2, 3])
            filled.cache.save(tmp_path / "kept", torch.tensor([[1, 2, 3]]))  # type: ignore[union-attr]
        other = save_model(tmp_path / "other", num_hidden_layers=3, template=TEMPLATE)
        assert "num_hidden_layers" in call(run, other, file, "--load-cache", tmp_path / "kept").error

    @pytest.mark.parametrize("options", [[], ["--compare"], ["--json"]], ids=str)
    def test_lengths(self, run: Run, chat_model: Path, file: Path, tmp_path: Path, options: list[str]) -> None:
        (tmp_path / "long").write_text(TEXT * 20, encoding="utf-8")
        assert call(run, chat_model, tmp_path / "long", *options).error.startswith("--file: expected at most")
        error = run("ask", "--model", chat_model, "--file", file, "-q", "x", "-q", TEXT * 20, *options).error
        assert error.startswith("--file: expected at most")
        assert run("ask", "--model", chat_model, "--demo", *options).error.startswith("--demo: expected at most")

    def test_a_model_without_a_template(self, run: Run, model: Path, file: Path) -> None:
        error = call(run, model, file).error
        assert error == f"--model: expected one with a chat template, got {model}, which has none"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--bits", "4", "--bits", "3"], "--bits: expected one value without --compare, got 2"),
        (["--compare", "--save-cache", "x"], "--compare: expected no --save-cache or --load-cache with it"),
        (["--load-cache", "x", "--bits", "3"], "--load-cache: expected no --bits"),
        (["--demo"], "--file: expected none with --demo, which has its document, got one"),
        (["-q", " "], "--question: expected some text, got none"),
    ],
)
def test_what_is_refused(run: Run, chat_model: Path, file: Path, arguments: list[str], error: str) -> None:
    assert call(run, chat_model, file, *arguments).error.startswith(error)


def test_no_document(run: Run, chat_model: Path) -> None:
    assert run("ask", "--model", chat_model).error == "--file: expected a document, or --demo, got none"


def test_a_document_on_stdin_wants_questions(run: Run, chat_model: Path) -> None:
    error = run("ask", "--model", chat_model, "--file", "-", stdin=TEXT).error
    assert error == "--question: expected at least one with --file -, which takes stdin, got none"


def test_the_bundled_document_has_questions(run: Run, chat_model: Path) -> None:
    assert len(bundled.questions()) >= 3
    assert all(question.endswith("?") for question in bundled.questions())
    assert 20_000 < len(bundled.document()) < 32_000
    assert f"expected at most {CONTEXT} tokens" in run("ask", "--model", chat_model, "--demo", "--compare").error
