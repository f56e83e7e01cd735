"""Closed stdin, stdout and stderr, as `<&-` and `>&-` make them: real processes, every command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = "README.md"

COMMANDS = {
    "root": "",
    "generate": f"generate --file {TEXT} --max-new-tokens 1",
    "chat": "chat",
    "ask": "ask --demo -q Who? --max-new-tokens 1",
    "eval": f"eval --text {TEXT} --tasks perplexity",
    "calibrate": "calibrate --out calibration",
    "inspect": "inspect",
    "bench": "bench --quick",
    "doctor": "doctor",
    "doctor --json": "doctor --json",
}
READERS = {
    "generate": ("generate --file - --max-new-tokens 1", "--file"),
    "chat": ("chat", "chat"),
    "ask lines": (f"ask --file {TEXT} --max-new-tokens 1", "stdin"),
    "ask --file -": ("ask --file - -q Who?", "--file"),
    "eval": ("eval --text -", "--text"),
    "calibrate": ("calibrate --text - --out calibration", "--text"),
    "inspect": ("inspect --file -", "--file"),
}


def run(arguments: str, redirections: str, folder: Path) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of the command line in a shell of its own."""
    (folder / TEXT).write_text("Once upon a time there was a lamp. " * 20)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = f"{shlex.quote(sys.executable)} -m turboattention {arguments} {redirections}"
    ran = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=environment, cwd=folder, timeout=300, check=False
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_without_stdout_every_command_says_so_at_once(arguments, tmp_path):
    code, out, err = run(arguments, ">&-", tmp_path)
    assert (code, out) == (2, "")
    assert err == "error: stdout: expected an open stream for results, got a closed one (>/dev/null discards them)\n"
    assert os.listdir(tmp_path) == [TEXT]


@pytest.mark.parametrize("arguments, option", READERS.values(), ids=READERS)
def test_without_stdin_commands_that_read_it_say_so(arguments, option, tmp_path):
    code, out, err = run(arguments, "<&-", tmp_path)
    assert (code, out) == (2, "")
    *notes, last = err.splitlines()
    assert last == f"error: {option}: expected text on stdin, got a closed stream"
    assert not any("Traceback" in line for line in notes)


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_without_what_is_not_needed_commands_work(closed, tmp_path):
    code, out, err = run(f"generate --file {TEXT} --max-new-tokens 2 --save-cache kept", closed, tmp_path)
    assert code == 0, err
    assert out
    # No file took the number of a closed one, and what libraries print.
    assert sorted(os.listdir(tmp_path)) == [TEXT, "kept"]
    code, out, err = run(f"generate --file {TEXT} --load-cache kept --max-new-tokens 2", closed, tmp_path)
    assert code == 0, err


def test_a_stderr_that_takes_nothing_costs_only_the_messages(tmp_path):
    code, out, _ = run(f"generate --file {TEXT} --max-new-tokens 2", "2>/dev/full", tmp_path)
    assert (code, bool(out)) == (0, True)
    assert run("generate --prompt ''", "2>/dev/full", tmp_path)[0] == 2


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&- 2>&-"])
def test_without_anything_the_exit_code_speaks(closed, tmp_path):
    assert run("doctor", closed, tmp_path) == (2, "", "")


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_help_that_nobody_reads_is_no_error(asked, tmp_path):
    assert run(asked, ">&-", tmp_path) == (0, "", "")
