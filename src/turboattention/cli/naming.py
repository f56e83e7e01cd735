"""Errors of the library name its arguments; in commands, they are rewritten to name the command's options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import TurboError


@contextmanager
def named(**options: str) -> Iterator[None]:
    """Inside the `with` block, errors about these arguments of the library name `options` instead. Options with the
    same name as the argument need no entry (`for_command`)."""
    try:
        yield
    except TurboError as error:
        argument, _, rest = str(error).partition(": ")
        if argument not in options:
            raise
        raise type(error)(f"{options[argument]}: {rest}") from error


_CALLED = {"model_config": "model"}
"""Arguments that have other names as options in every command."""


def for_command(message: str, command: Any) -> str:
    """A message of the library about an argument, rewritten for the option of that name if `command` has one."""
    argument, colon, rest = message.partition(": ")
    option = f"--{_CALLED.get(argument, argument).replace('_', '-')}"
    known = {text for parameter in getattr(command, "params", ()) for text in parameter.opts}
    return f"{option}: {rest}" if colon and option in known else message
