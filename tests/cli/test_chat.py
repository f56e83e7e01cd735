"""``turboattention chat`` as typed, and as piped."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from turboattention import TurboConfig
from turboattention.cli import chat as command
from turboattention.cli.interrupt import Interrupt
from turboattention.cli.output import bytes_text
from turboattention.cli.progress import Bars
from turboattention.cli.session import Session
from turboattention.cli.settings import make_setting
from turboattention.errors import InputError
from turboattention.integrations.transformers import generation, language_model, registry
from turboattention.integrations.transformers.language_model import LanguageModel

from .conftest import CONTEXT, TEMPLATE, TEXT, Run, save_model

GREEDY = generation.Sampler()
BARS = Bars(hidden=True)


@pytest.fixture(autouse=True)
def turbo():
    with registry.enabled():
        yield


@pytest.fixture
def session(chat_language: LanguageModel) -> Session:
    return Session(chat_language, make_setting("8"), None)


def turn(session: Session, question: str, limit: int = 6, interrupt: Interrupt | None = None) -> list[int]:
    return session.answer(question, limit, GREEDY, BARS, lambda _: None, interrupt or Interrupt()).tokens


def call(run: Run, model: Path, stdin: str, *arguments: object):
    return run("chat", "--model", model, "--max-new-tokens", 6, *arguments, stdin=stdin)


# -- turns -------------------------------------------------------------------------------------------


def test_a_turn_is_what_the_template_says(session: Session, chat_language: LanguageModel) -> None:
    run = generation.Run(chat_language, chat_language.new_cache(TurboConfig(bits=8)))
    run.prefill(chat_language.encode(f"[user]{TEXT}<end>[assistant]"))
    assert turn(session, TEXT) == generation.generate(run, 6).tokens


def test_a_later_turn_reads_only_what_is_new(session: Session) -> None:
    first = session.answer(TEXT, 6, GREEDY, BARS, lambda _: None, Interrupt())
    second = session.answer("And then?", 6, GREEDY, BARS, lambda _: None, Interrupt())
    assert first.reused_tokens == 0
    assert second.reused_tokens == first.prompt_tokens + 6
    assert session.turns == 2


def test_the_answer_stays_the_tokens_that_were_given(session: Session, chat_language) -> None:
    """Not those that its text would be encoded to, which may be others."""
    said = turn(session, TEXT)
    before = len(chat_language.encode(f"[user]{TEXT}<end>[assistant]"))
    assert session._conversation.ids[before:] == said
    ids = session._conversation.ask("more")
    assert ids[: before + 6] == session._conversation.ids
    assert chat_language.decode(ids[before + 6 :]) == "[user]more[assistant]"  # ends of turns are special tokens


def test_a_template_that_rewrites_the_past_is_followed(tmp_path: Path) -> None:
    """This template keeps the last two messages: the cache is cropped to the tokens that are still valid."""
    template = TEMPLATE.replace("in messages", "in messages[-2:]")
    language = language_model.load(str(save_model(tmp_path / "forgetful", eos=None, template=template)))
    session = Session(language, make_setting("8"), None)
    turn(session, TEXT)
    turn(session, "second")
    ids = session._conversation.ask("third")
    assert language.decode(ids).count("[user]") == 1
    result = session.answer("third", 6, GREEDY, BARS, lambda _: None, Interrupt())
    assert result.reused_tokens < result.prompt_tokens
    assert session._cache is not None
    assert session._cache.get_seq_length() == len(session._conversation.ids)


def test_an_end_token_ends_an_answer_and_is_not_kept_twice(chat_language, session: Session) -> None:
    said = turn(session, TEXT)
    session.clear()
    session._stop = frozenset({said[2]})
    result = session.answer(TEXT, 6, GREEDY, BARS, lambda _: None, Interrupt())
    assert result.ended
    assert result.tokens == said[: said.index(said[2]) + 1]
    assert session._cache is not None
    assert (
        session._cache.get_seq_length()
        == len(session._conversation.ids)
        == result.prompt_tokens + len(result.tokens) - 1
    )


def test_the_end_of_a_turn_in_the_template_ends_an_answer(chat_language) -> None:
    from turboattention.integrations.transformers.chat import stop_tokens

    assert chat_language.stop_tokens == frozenset()
    assert stop_tokens(chat_language) == {chat_language.tokenizer.convert_tokens_to_ids("<end>")}


def test_a_full_context_is_refused_and_nothing_lost(session: Session) -> None:
    turn(session, TEXT)
    before = list(session._conversation.ids)
    with pytest.raises(InputError, match=rf"expected less than the model's context of {CONTEXT} tokens, got"):
        turn(session, TEXT * 12)
    assert session._conversation.ids == before
    assert turn(session, "go on")


def test_an_answer_stops_at_the_context(session: Session) -> None:
    question = TEXT * 4
    result = session.answer(question, 10_000, GREEDY, BARS, lambda _: None, Interrupt())
    assert result.prompt_tokens + len(result.tokens) == CONTEXT


# -- Ctrl-C ------------------------------------------------------------------------------------------


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_an_answer_and_keeps_it(session: Session) -> None:
    whole = turn(session, TEXT, 20)
    session.clear()
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            press()

    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        result = session.answer(TEXT, 20, GREEDY, BARS, write, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert 2 <= len(result.tokens) < 20
    assert result.tokens == whole[: len(result.tokens)]
    assert session.turns == 1
    assert turn(session, "and then?")


def test_ctrl_c_before_the_first_token_undoes_the_turn(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    turn(session, TEXT)
    before = list(session._conversation.ids)
    real = generation.Run.prefill

    def prefill(self: generation.Run, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        press()

    monkeypatch.setattr(generation.Run, "prefill", prefill)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        turn(session, "again", interrupt=interrupt)
    monkeypatch.undo()
    assert session._conversation.ids == before
    assert session._cache is not None
    assert session._cache.get_seq_length() == len(before)
    assert turn(session, "again")


def test_a_second_ctrl_c_does_not_wait() -> None:
    with Interrupt() as interrupt:
        assert not interrupt.enough()
        press()
        assert interrupt.enough()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_the_program_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    chat = command.Chat(session, 6, GREEDY, BARS)
    monkeypatch.setattr(session, "answer", stopped)
    chat._turn("hello")
    assert "stopped: this turn is discarded" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------


def test_piped_output_is_the_answers_alone(run: Run, chat_model: Path, chat_language) -> None:
    session = Session(chat_language, make_setting("4"), None)
    expected = [chat_language.decode(turn(session, line)) for line in ("Who opened?", "Why?")]
    ran = call(run, chat_model, "Who opened?\n\nWhy?\n")
    assert ran.code == 0
    assert ran.stdout == "".join(f"{text}\n" for text in expected)
    assert "\x1b" not in ran.stderr
    assert ran.stderr.startswith("note: turn 1: prompt of ")
    assert "note: turn 2: prompt of " in ran.stderr
    assert "from the cache" in ran.stderr


def test_a_system_prompt_comes_first(run: Run, chat_model: Path, chat_language) -> None:
    session = Session(chat_language, make_setting("4"), "Be brief.")
    assert (
        chat_language.tokenizer.decode(session._conversation.ask("x"))
        == "[system]Be brief.<end>[user]x<end>[assistant]"
    )
    said = chat_language.decode(turn(session, "x"))
    assert call(run, chat_model, "x\n", "--system", "Be brief.").stdout == f"{said}\n"


def test_save_and_load(run: Run, chat_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "talk.cache"
    whole = call(run, chat_model, f"{TEXT}\nand then?\n", "--bits", 3).stdout
    first = call(run, chat_model, f"{TEXT}\n/save {kept}\n", "--bits", 3)
    size = bytes_text(kept.stat().st_size)
    assert re.search(rf"note: 1 turn: cache of \d+ tokens saved to {kept}, {size}\n", first.stderr)
    second = call(run, chat_model, "and then?\n", "--load", kept)
    assert first.stdout + second.stdout == whole
    again = call(run, chat_model, f"/load {kept}\nand then?\n")
    assert again.stdout == second.stdout
    assert f"note: 1 turn from {kept}" in again.stderr


def test_help_and_clear(run: Run, chat_model: Path) -> None:
    ran = call(run, chat_model, "one\n/clear\none\n/help\n/exit\nnever\n")
    first, second = ran.stdout.splitlines()
    assert first == second
    assert "/save PATH" in ran.stderr
    assert "turn 2" not in ran.stderr


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("/nothing\n", "/nothing: expected a command that /help lists, got an unknown one"),
        ("/save\n", "/save: expected a file, as in /save talk.cache, got none"),
        ("/save x\n", "/save: expected a conversation of at least one turn, got none"),
        ("/load none\n", "/load: expected a file, got none: no such file"),
    ],
)
def test_what_is_refused(run: Run, chat_model: Path, lines: str, error: str) -> None:
    assert call(run, chat_model, lines).error == error


def test_a_pipe_goes_on_behind_a_line_that_fails(run: Run, chat_model: Path) -> None:
    """Commands, messages that do not fit, and lines that are no text; the exit code says so."""
    one = call(run, chat_model, "one\n")
    assert one.code == 0
    long = TEXT * 12
    for bad in ("/nothing", "/load none", "/save /no/such/folder/x", long, b"caf\xe9"):
        stdin = b"one\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n/clear\none\n"
        ran = run("chat", "--model", chat_model, "--max-new-tokens", 6, stdin=stdin)
        assert ran.code == 2
        assert ran.stdout == one.stdout * 2
        assert ran.stderr.count("error: ") == 1


@pytest.mark.usefixtures("no_weights")
def test_what_needs_no_weights(run: Run, model: Path, chat_language, chat_model: Path, tmp_path: Path) -> None:
    assert "chat template" in call(run, model, "hello\n").error
    assert call(run, chat_model, "x\n", "--load", tmp_path / "none").error.startswith("--load: expected a file")
    (tmp_path / "notes.txt").write_text("of a year")
    error = call(run, chat_model, "x\n", "--load", tmp_path / "notes.txt").error
    assert error == f"--load: expected a saved cache, got {tmp_path / 'notes.txt'}, a text file"
    filled = generation.Run(chat_language, chat_language.new_cache(TurboConfig()))
    filled.prefill([1, 2, 3])
    filled.cache.save(tmp_path / "prompt.cache", torch.tensor([[1, 2, 3]]))  # type: ignore[union-attr]
    error = call(run, chat_model, "x\n", "--load", tmp_path / "prompt.cache").error
    assert error.startswith("--load: expected a conversation that /save kept")


def test_another_cache_is_no_conversation(run: Run, chat_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "prompt.cache"
    run("generate", "--model", chat_model, "--prompt", TEXT, "--max-new-tokens", 0, "--save-cache", kept)
    assert "/load: expected a conversation that /save kept" in call(run, chat_model, f"/load {kept}\n").error


def test_other_weights_are_refused(run: Run, chat_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "talk.cache"
    call(run, chat_model, f"{TEXT}\n/save {kept}\n")
    other = save_model(tmp_path / "other", seed=1, eos=None, template=TEMPLATE)
    assert call(run, other, "x\n", "--load", kept).error.endswith("got one with other weights")


def test_a_model_without_a_template_is_refused_by_name(run: Run, model: Path) -> None:
    expected = f"--model: expected one with a chat template, got {model}, which has none"
    assert call(run, model, "hello\n").error == expected
    assert run("generate", "--model", model, "--chat", "--prompt", "hello").error == expected


def test_without_a_model_the_error_says_that_one_is_wanted(run: Run) -> None:
    expected = (
        "--model: expected one with a chat template, got the bundled test model, which has none; name a chat model"
    )
    for arguments in (["chat"], ["generate", "--chat", "--prompt", "hello"]):
        assert run(*arguments).error == f"{expected} (--model)"


def test_load_excludes_what_the_file_says(run: Run, chat_model: Path, tmp_path: Path) -> None:
    assert call(run, chat_model, "", "--load", tmp_path / "x", "--bits", 3).error.startswith(
        "--load: expected no --system"
    )


def test_lines_that_are_no_text(run: Run, chat_model: Path) -> None:
    assert run("chat", "--model", chat_model, stdin=b"caf\xe9\n").error == "chat: expected UTF-8 text, got other bytes"


def test_generate_answers_a_message(run: Run, chat_model: Path, chat_language) -> None:
    session = Session(chat_language, make_setting("4"), None)
    said = turn(session, TEXT)
    data = run("generate", "--model", chat_model, "--chat", "--prompt", TEXT, "--max-new-tokens", 6, "--json").json
    assert data["tokens"] == said
    both = run(
        "generate", "--model", chat_model, "--chat", "--prompt", TEXT, "--max-new-tokens", 6, "--json", "--compare"
    ).json
    assert both["settings"][0]["tokens"] == said
    assert torch.tensor(both["own"]["tokens"]).shape == (6,)
