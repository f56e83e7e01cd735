"""The entry point: help, version, and how failures look."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import turboattention

SOURCE = Path(__file__).parents[2] / "src"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "80", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


def without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line where a package is not installed."""
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['turboattention', *{list(arguments)!r}]\n"
        "from turboattention.cli.main import app; app()"
    )
    return python("-c", code)


def test_version(run) -> None:
    assert run("--version").stdout == f"turboattention {turboattention.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 0
    assert "generate" in ran.stdout
    assert "doctor" in ran.stdout


@pytest.mark.parametrize("command", ["bench", "generate", "doctor"])
def test_each_command_has_help_and_json(run, command: str) -> None:
    assert "--json" in run(command, "--help").stdout


def test_runs_as_a_module() -> None:
    ran = python("-m", "turboattention", "--version")
    assert (ran.returncode, ran.stdout) == (0, f"turboattention {turboattention.__version__}\n")


def test_help_imports_neither_torch_nor_transformers() -> None:
    ran = python("-X", "importtime", "-m", "turboattention", "generate", "--help")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines()}
    assert ran.returncode == 0
    assert "typer" in imported
    assert imported & {"torch", "transformers", "numpy"} == set()


def test_unknown_command(run) -> None:
    assert "No such command 'nothing'" in run("nothing").error


def test_unknown_option(run) -> None:
    assert "--bit" in run("generate", "--bit", "4").error


def test_option_without_its_value(run) -> None:
    assert "--prompt" in run("generate", "--prompt").error


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_packages_of_the_command_line(package: str) -> None:
    ran = without(package, "--help")
    assert ran.returncode == 1
    hint = 'pip install ".[all]" in a clone of the repository'
    assert ran.stderr == f"error: the command line needs the package {package}: {hint}\n"


def test_without_transformers() -> None:
    ran = without("transformers", "generate", "--prompt", "x", "--model", ".")
    assert (ran.returncode, ran.stdout) == (1, "")
    hint = 'pip install ".[all]" in a clone of the repository'
    assert ran.stderr == f"error: this command needs the package transformers: {hint}\n"


def test_a_module_of_this_package_that_is_missing_is_not_explained_away() -> None:
    ran = without("turboattention.cli.doctor", "--help")
    assert "ModuleNotFoundError" in ran.stderr


def test_unexpected_errors_are_one_line_too(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("of all things")

    monkeypatch.setattr("turboattention.cli.doctor.examine", fail)
    ran = run("doctor")
    assert ran.code == 1
    assert ran.stderr == "error: KeyError: 'of all things' (TURBOATTENTION_DEBUG=1 shows where)\n"


def test_debug_shows_the_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = python("-m", "turboattention", "generate", "--prompt", " ", TURBOATTENTION_DEBUG="1")
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr
    assert "InputError" in ran.stderr


def test_usage_errors_stay_one_line_under_debug() -> None:
    ran = python("-m", "turboattention", "nothing", TURBOATTENTION_DEBUG="1")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)


def test_an_interrupt_ends_quietly(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("turboattention.cli.doctor.examine", interrupt)
    ran = run("doctor")
    assert (ran.code, ran.stderr) == (130, "")


def test_a_terminal_that_lacks_characters_gets_replacements() -> None:
    ran = python("-m", "turboattention", "doctor", PYTHONIOENCODING="ascii")
    assert ran.returncode == 0
    assert "reference" in ran.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        env = {**os.environ, "PYTHONPATH": str(SOURCE)}
        command = [sys.executable, "-m", "turboattention", "--version"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, check=False)
    assert (ran.returncode, ran.stderr) == (2, "error: stdout: cannot be written: no space left on the device\n")
