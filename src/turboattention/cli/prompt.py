"""Reads and checks prompts."""

from __future__ import annotations

import sys
from pathlib import Path

from ..bundled import text as bundled_text
from ..errors import InputError
from .descriptors import check_input


def read_prompt(prompt: str | None, file: str | None, demo: bool) -> str | None:
    """The prompt's text; None if none was given.

    Raises:
        InputError: more than one was given, or the file cannot be read or is empty.
    """
    given = _given(prompt, file, demo)
    if len(given) > 1:
        raise InputError(f"{given[1]}: expected one of --prompt, --file and --demo, got {' and '.join(given)}")
    if not given:
        return None
    if prompt is None and not demo:
        return read_file("--file", str(file))
    text = bundled_text() if prompt is None else prompt
    check_text(given[0], text)
    return text


def prompt_source(prompt: str | None, file: str | None, demo: bool, load_cache: Path | None) -> str:
    """The option that the prompt came from, for messages about its length."""
    given = [*_given(prompt, file, demo), *(["--load-cache"] if load_cache else []), "--prompt"]
    return given[0]


def _given(prompt: str | None, file: str | None, demo: bool) -> list[str]:
    options = (("--prompt", prompt), ("--file", file), ("--demo", demo or None))
    return [name for name, value in options if value is not None]


def read_file(option: str, file: str) -> str:
    """The text of a file that an option named; "-" is stdin.

    Raises:
        InputError: it cannot be read, is not UTF-8, or is empty.
    """
    text = _read(option, file)
    check_text(option, text)
    return text


def check_text(option: str, text: str) -> None:
    """Raises InputError for an empty text, or one with surrogates."""
    if not text.strip():
        raise InputError(f"{option}: expected some text, got none")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{option}: expected UTF-8 text, got other bytes")


def _read(option: str, file: str) -> str:
    if file == "-":
        check_input(option)
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{option}: {file} cannot be read: {reason}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: expected UTF-8 text, got other bytes in {file} at offset {error.start}") from error


def check_length(tokens: int, new_tokens: int, context: int | None, option: str = "--prompt") -> None:
    """Raises InputError if the prompt of an `option` does not fit into the context, or leaves no room for the new
    tokens."""
    if not tokens:
        raise InputError(f"{option}: expected at least one token, got none")
    if context is None or tokens + new_tokens <= context:
        return
    if tokens < context:
        raise InputError(
            f"--max-new-tokens: expected at most {context - tokens:,} (the model's context of {context:,} less the "
            f"prompt's {tokens:,} tokens), got {new_tokens:,}"
        )
    room = max(context - new_tokens, 0)
    raise InputError(
        f"{option}: expected at most {room:,} tokens (the model's context of {context:,} less {new_tokens:,} new "
        f"ones), got {tokens:,}"
    )
