from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboattention.cli.stream import TokenText, printable

from .conftest import make_tokenizer

TOKENIZER = make_tokenizer()


def decode(ids: object) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    pieces: list[str] = []
    stream = TokenText(decode, pieces.append)
    for token in TOKENIZER(text)["input_ids"]:
        stream.add(token)
    stream.finish()
    assert "".join(pieces) == decode(TOKENIZER(text)["input_ids"])


def test_no_half_characters() -> None:
    pieces: list[str] = []
    stream = TokenText(decode, pieces.append)
    for token in TOKENIZER("日本")["input_ids"]:
        stream.add(token)
    assert pieces == ["日", "本"]


def test_a_character_cut_off_at_the_end_is_shown_as_such() -> None:
    pieces: list[str] = []
    stream = TokenText(decode, pieces.append)
    for token in TOKENIZER("a日")["input_ids"][:-1]:
        stream.add(token)
    stream.finish()
    assert pieces == ["a", "�"]


@pytest.mark.parametrize(("text", "shown"), [("a\x1b[31mb", "a[31mb"), ("a\n\tb", "a\n\tb"), ("\x07\x9bx\r", "x")])
def test_nothing_steers_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
