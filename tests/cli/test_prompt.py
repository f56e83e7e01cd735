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
    with pytest.raises(
        InputError, match=r"at most 3,968 tokens \(the model's context of 4,096 less 128 new ones\), got 3,969"
    ):
        check_length(3969, 128, 4096)
    with pytest.raises(InputError, match="at most 0 tokens"):
        check_length(1, 600, 512)
    with pytest.raises(InputError, match="at least one token"):
        check_length(0, 1, 512)
