from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import TEXT

FIGURES = ("perplexity", "perplexity_change", "bits_per_byte", "kl", "top1")
SMALL = ("--methods", "fp16,turbo-4", "--tasks", "perplexity,heads", "--limit", "1", "--context", "200")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT * 10, encoding="utf-8")
    return path


def test_files_and_json(run, model: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    document = run("eval", "--model", model, "--text", book, *SMALL, "--out", out, "--json").json
    assert document["facts"]["model"] == str(model)
    assert [(unit["method"], unit["task"]) for unit in document["units"]] == [
        ("fp16", "perplexity"),
        ("turbo-4", "perplexity"),
        ("fp16", "heads"),
        ("turbo-4", "heads"),
    ]
    own, turbo = (unit["metrics"] for unit in document["units"][:2])
    assert own["kl"]["value"] == 0.0 < turbo["kl"]["value"]
    assert all(set(turbo[name]) == {"value", "low", "high"} for name in FIGURES)
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == document
    assert "KV cache methods compared" in (out / "report.html").read_text(encoding="utf-8")
    assert len(list((out / "units").iterdir())) == 4


def test_a_second_run_is_only_a_table(run, model: Path, book: Path, tmp_path: Path) -> None:
    call = ("eval", "--model", model, "--text", book, *SMALL, "--out", tmp_path / "results")
    first = run(*call, columns=80)
    second = run(*call, columns=80)
    assert first.stdout == second.stdout
    assert "results reused: 4 of 4" in second.stderr
    assert "were reused" not in first.stderr
    assert max(len(line) for line in second.stdout.splitlines()) <= 80
    for word in ("turbo-4", "fp16", "16.00", "KL,", "top-1"):
        assert word in second.stdout
    book.write_text(TEXT * 11, encoding="utf-8")
    assert "were reused" not in run(*call).stderr


def test_pieces_of_another_size(run, model: Path, book: Path) -> None:
    call = ("eval", "--model", model, "--text", book, "--methods", "turbo-4", "--tasks", "perplexity,growth")
    units = run(*call, "--limit", "1", "--context", "200", "--piece", "64", "--json").json["units"]
    assert [unit["task"] for unit in units] == ["perplexity", "growth"]
    assert [unit["settings"]["task"]["piece"] for unit in units] == [64, 64]
    assert [unit["tokens"] for unit in units] == [199, 199]


def test_a_text_in_front_of_every_text(run, model: Path, book: Path) -> None:
    call = ("eval", "--model", model, "--text", book, "--methods", "fp16", "--tasks", "perplexity", "--context", "100")
    plain, behind = (run(*call, "--limit", "1", *more, "--json").json for more in ((), ("--begin", "a door")))
    assert "begin" not in plain["facts"]
    assert behind["facts"]["begin"] == "a door"
    assert behind["units"][0]["tokens"] > plain["units"][0]["tokens"]


def test_generated_tasks(run, model: Path) -> None:
    call = ("--methods", "turbo-2", "--tasks", "recall,arithmetic", "--limit", "2", "--lengths", "200")
    units = run("eval", "--model", model, *call, "--json").json["units"]
    assert [unit["task"] for unit in units] == ["recall", "arithmetic"]
    assert [row["asked"] for unit in units for row in unit["by_length"]] == [2, 2]


def test_an_ended_run_leaves_what_it_has(run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboattention.evaluation.head_task import HeadTask

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HeadTask, "run", ended)
        assert run("eval", "--model", model, *SMALL, "--out", tmp_path).code != 0
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["units"]) == 2
    assert (tmp_path / "report.html").exists()
    assert "results reused: 2 of 4" in run("eval", "--model", model, *SMALL, "--out", tmp_path).stderr


def test_a_calibrated_method(run, model: Path, book: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibrated"
    assert run("calibrate", "--model", model, "--text", book, "--out", folder, "--bits", "3").code == 0
    call = (
        "--methods",
        "turbo-3,turbo-calibrated",
        "--tasks",
        "perplexity",
        "--context",
        "300",
        "--limit",
        "1",
        "--text",
        book,
    )
    document = run("eval", "--model", model, *call, "--calibration", folder, "--json").json
    assert [unit["method"] for unit in document["units"]] == ["turbo-3", "turbo-calibrated"]
    assert document["units"][0]["metrics"]["kl"] != document["units"][1]["metrics"]["kl"]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    (tmp_path / "gsm8k").mkdir()
    line = json.dumps({"question": "2 + 2?", "answer": "Four.\n#### 4"}) + "\n"
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(line, encoding="utf-8")
    return tmp_path


def test_questions_from_files(run, model: Path, sums: Path) -> None:
    call = ("--methods", "turbo-4", "--tasks", "gsm8k", "--data", sums)
    (unit,) = run("eval", "--model", model, *call, "--json").json["units"]
    assert unit["metrics"]["accuracy"]["value"] in (0.0, 1.0)
    assert unit["shown"][0]["target"] == "4"


def test_questions_in_a_conversation(run, chat_model: Path, sums: Path) -> None:
    call = ("--methods", "turbo-4", "--tasks", "gsm8k", "--data", sums, "--chat")
    (unit,) = run("eval", "--model", chat_model, *call, "--json").json["units"]
    assert (unit["settings"]["task"]["chat"], unit["fewest_shots"]) == (True, 1)


@pytest.mark.usefixtures("no_weights")
def test_a_conversation_needs_a_template(run, model: Path, sums: Path) -> None:
    call = ("--methods", "turbo-4", "--tasks", "gsm8k", "--data", sums, "--chat")
    error = run("eval", "--model", model, *call).error
    assert error == f"--model: expected one with a chat template, got {model}, which has none"


def test_what_cannot_be_measured_is_told_at_the_end(run, model: Path) -> None:
    call = ("--methods", "fp16", "--tasks", "recall,perplexity", "--limit", "1", "--context", "100", "--lengths", "5")
    ran = run("eval", "--model", model, *call)
    assert ran.code == 1
    assert (
        "recall, FP16 (own cache): --lengths: expected contexts that hold 1 question of recall, got 5 tokens"
        in ran.stderr
    )
    assert "perplexity" in ran.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "fp17"), "^--methods: expected names from fp16, .*; got 'fp17'"),
        (("--tasks", "poetry"), "^--tasks: expected some of perplexity, .*; got 'poetry'"),
        (("--tasks", ","), "^--tasks: expected at least one, got none"),
        (("--tasks", "gsm8k"), "--data: expected the folder with the files of gsm8k, got none"),
        (("--tasks", "aqua", "--data", "nowhere"), "^--data: nowhere/aqua/dev.json cannot be read: No such file"),
        (("--text", "nowhere.txt"), "--text: nowhere.txt cannot be read: No such file"),
        (("--lengths", "1k"), "--lengths: expected numbers above 0 such as 1024,4096, got '1k'"),
        (("--include", "nowhere"), "--include: expected a folder with task files, got nowhere"),
        (("--chat", "--tasks", "recall"), "--chat: expected gsm8k, aqua or bbh among --tasks, got recall"),
        (("--limit", "0"), "Invalid value for '--limit'"),
        (("--model", "nowhere/"), "^--model: expected a folder or a name"),
    ],
)
def test_wrong_calls(run, options: tuple[str, ...], message: str) -> None:
    import re

    assert re.search(message, run("eval", *options).error)


def test_a_method_that_is_not_installed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboattention.evaluation.baselines import kinds

    monkeypatch.setattr(kinds.HubMethod, "unavailable", lambda self: "needs the package quanto")
    message = run("eval", "--methods", "hf-quanto-4").error
    assert message == "--methods: hf-quanto-4 cannot run here: needs the package quanto"


def test_the_harness_is_named_where_it_is_missing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboattention.evaluation.hf import harness

    def missing(_: object) -> None:
        raise ModuleNotFoundError("no", name="lm_eval")

    monkeypatch.setattr(harness, "_manager", missing)
    message = run("eval", "--tasks", "lm-eval/gsm8k").error
    assert message.startswith("--tasks: lm-eval/gsm8k needs lm-evaluation-harness")
