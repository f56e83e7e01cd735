from __future__ import annotations

import errno
from pathlib import Path

import pytest

from turboattention import bundled
from turboattention.cli.prompt import check_length, read_prompt
from turboattention.errors import InputError


def test_one_of_three_places(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffNée".encode())
    assert read_prompt("text", None, demo=False) == "text"
    assert read_prompt(None, str(file), demo=False) == "Née"
    assert read_prompt(None, None, demo=True) == bundled.text()
    assert read_prompt(None, None, demo=False) is None


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_empty(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=r"^--prompt: expected some text, got none$"):
        read_prompt(text, None, demo=False)
    with pytest.raises(InputError, match=r"^--file: expected some text, got none$"):
        read_prompt(None, str(file), demo=False)


def test_only_one_place() -> None:
    with pytest.raises(InputError, match="expected one of --prompt, --file and --demo, got --prompt and --demo"):
        read_prompt("text", None, demo=True)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--file: .*none\.txt cannot be read: No such file"):
        read_prompt(None, str(tmp_path / "none.txt"), demo=False)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_prompt(None, str(tmp_path), demo=False)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"prompt\.txt cannot be read: Permission denied"):
        read_prompt(None, str(tmp_path / "prompt.txt"), demo=False)


def test_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9 noir")
    with pytest.raises(InputError, match=r"--file: expected UTF-8 text, got other bytes in .* at offset 3"):
        read_prompt(None, str(file), demo=False)


def test_bytes_on_the_command_line_that_are_no_text() -> None:
    with pytest.raises(InputError, match="--prompt: expected UTF-8 text"):
        read_prompt("caf\udce9", None, demo=False)


def test_length() -> None:
    check_length(384, 128, 512)
    check_length(10_000, 128, None)
    check_length(4096, 0, 4096)
    with pytest.raises(
        InputError,
        match=r"^--file: expected at most 3,968 tokens \(the model's context of 4,096 less 128 new ones\), got 4,096$",
    ):
        check_length(4096, 128, 4096, "--file")
    with pytest.raises(InputError, match=r"^--prompt: expected at most 0 tokens"):
        check_length(512, 600, 512)


@pytest.mark.parametrize(("tokens", "new", "most"), [(3969, 128, "127"), (4095, 128, "1"), (1, 5000, "4,095")])
def test_new_tokens_beyond_the_context(tokens: int, new: int, most: str) -> None:
    message = (
        rf"^--max-new-tokens: expected at most {most} \(the model's context of 4,096 less the prompt's {tokens:,} "
    )
    with pytest.raises(InputError, match=message):
        check_length(tokens, new, 4096)


def test_no_tokens() -> None:
    with pytest.raises(InputError, match="at least one token"):
        check_length(0, 1, 512)
