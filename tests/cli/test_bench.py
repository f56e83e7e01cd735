from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turboattention.benchmarking.gate import WrongResultError
from turboattention.cli import bench_facts
from turboattention.cli.bench_view import time_text

TINY = ("--quick", "--seconds", "0", "--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--backend", "reference")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def document(run, results: Path):
    """Every kind of work once, over tiny shapes; as printed, kept and drawn."""
    out, plot = results / "all.json", results / "all.png"
    if not out.exists():
        ran = run(
            "bench", "all", *TINY, "--lengths", "70,140", "--bits", "3", "--peers", "sdpa,int4",
            "--json", "--out", out, "--plot", plot,
        )  # fmt: skip
        assert ran.json == json.loads(out.read_text())
    return json.loads(out.read_text())


def test_schema(document) -> None:
    assert document["schema"] == 1
    assert set(document) == {"schema", "facts", "rows"}
    facts = document["facts"]
    for name in ("cpu", "threads", "torch", "turboattention", "backend", "commit", "ggml", "peaks", "effort", "time"):
        assert name in facts
    assert facts["backend"] == "reference"
    for row in document["rows"]:
        assert set(row) == {
            *("work", "shape", "bits", "subject", "dtype", "error"),
            *("seconds", "gops", "rivals", "figures", "refused", "limit", "limit_share"),
        }
        assert row["refused"] is None
        # Reading of caches that fit into the processor's own can be faster than memory: no bound from above.
        assert (row["limit"] is not None) == (row["work"] in ("prefill", "chunk", "decode"))
        assert row["limit"] is None or row["limit_share"] > 0
        assert set(row["shape"]) == {"heads", "kv_heads", "head_dim", "queries", "keys", "causal", "batch", "window"}


def test_rows(document) -> None:
    rows = [(row["work"], row["bits"], row["shape"]["keys"], row["shape"]["causal"]) for row in document["rows"]]
    assert [row for row in rows if row[0] == "prefill"] == [
        ("prefill", None, keys, causal) for causal in (True, False) for keys in (70, 140)
    ]
    for work in ("chunk", "decode", "steps", "compress"):
        assert [row[1:3] for row in rows if row[0] == work] == [("3 bits", 70), ("3 bits", 140)]
    memory = [(row["shape"]["keys"], row["shape"]["window"]) for row in document["rows"] if row["work"] == "memory"]
    assert memory == [(70, None), (70, 35), (140, None), (140, 70)]


def test_channels_of_keys_are_reordered_as_in_the_commands_that_run_models(run) -> None:
    call = ("bench", "decode", *TINY, "--lengths", "200", "--bits", "3", "--bits", "mixed", "--peers", "none")
    plain, reordered = run(*call, "--json").json["rows"], run(*call, "--reorder-k", "--json").json["rows"]
    assert [row["bits"] for row in plain] == ["3 bits", "mixed"]
    assert [row["bits"] for row in reordered] == ["3 bits, reordered", "mixed"]
    assert all(0 < row["error"] < 0.05 for row in plain + reordered)


def test_figures(document) -> None:
    decode = [row for row in document["rows"] if row["work"] == "decode"]
    for row in decode:
        assert [rival["peer"] for rival in row["rivals"]] == ["sdpa", "int4"]
        assert 0 < row["error"] < 0.05
        for rival in row["rivals"]:
            assert set(rival["ratio"]) == {"median", "p20", "p80", "count"}
            assert rival["ratio"]["p20"] <= rival["ratio"]["median"] <= rival["ratio"]["p80"]
    figures = {row["work"]: row["figures"] for row in document["rows"]}
    assert "deviation_from_line" in figures["steps"]
    assert {"share", "share_p20", "share_p80", "single_append_share"} <= set(figures["compress"])
    assert {"bytes", "fp16_bytes", "below_fp16", "bits_per_element", "live_bytes"} == set(figures["memory"])


def test_plot(document, results: Path) -> None:
    assert (results / "all.png").read_bytes().startswith(b"\x89PNG")


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    source = str(Path(bench_facts.__file__).parents[2])
    code = "import sys; from turboattention.cli.main import app; sys.argv = ['t', 'bench', '--help']\n"
    code += "try: app()\nexcept SystemExit: print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert "--json" in ran.stdout
    assert ran.stdout.endswith("[]\n")


def test_tables(run) -> None:
    ran = run("bench", *TINY, "--lengths", "70", "--bits", "4", "--mask", "causal", "--peers", "sdpa", columns=80)
    assert (ran.code, ran.stderr) == (0, "")
    assert max(len(line) for line in ran.stdout.splitlines()) <= 80
    for word in (
        "Prefill",
        "Decode",
        "Memory",
        "causal",
        "4 bits",
        "sdpa",
        "faster",
        "below FP16",
        "held/live",
        "w35",
        "[p20 p80]",
        "limit:",
    ):
        assert word in ran.stdout


@pytest.mark.parametrize(("measured", "peak", "said"), [([1.0, 1e9], 1e9, False), ([1e-9, 1e-12], 1e-9, True)])
def test_a_machine_that_is_busy(run, monkeypatch: pytest.MonkeyPatch, measured, peak, said, tmp_path: Path) -> None:
    """The limits are measured before and after; if both were too low, a note is printed."""
    rates = iter(measured)
    monkeypatch.setattr("turboattention.benchmarking.peak.float_peak", lambda: next(rates))
    monkeypatch.setattr("turboattention.benchmarking.peak.read_bandwidth", lambda: 1e9)
    call = ("--lengths", "70", "--bits", "4", "--peers", "none", "--out", tmp_path / "x.json")
    ran = run("bench", "decode", *TINY, *call)
    assert ran.code == 0
    facts = json.loads((tmp_path / "x.json").read_text())["facts"]
    assert facts["peaks"]["float32 GFLOPS"] == peak
    assert ("warning: the machine was busy: its limits were measured too low" in ran.stderr) == said


def test_nothing_to_compare_with(run, tmp_path: Path) -> None:
    ran = run(
        "bench", "decode", *TINY, "--lengths", "70", "--bits", "4", "--peers", "none", "--plot", tmp_path / "x.png"
    )
    assert ran.code == 0
    assert "nothing was compared, so nothing was drawn" in ran.stderr
    assert not (tmp_path / "x.png").exists()


def test_a_wrong_result_is_shown_and_ends_with_1(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, *_: object) -> float:
        raise WrongResultError(f"{name}: off")

    monkeypatch.setattr("turboattention.benchmarking.contenders.check", wrong)
    ran = run("bench", "decode", *TINY, "--lengths", "70", "--bits", "4")
    assert ran.code == 1
    assert "turboattention: off" in ran.stdout
    assert "a wrong result is not timed" in ran.stderr


def test_the_reference_takes_short_contexts_by_itself(run, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr("turboattention.cli.bench._run", lambda plan, *_: plans.append(plan))
    ran = run("bench", "prefill", "--backend", "reference")
    assert "the reference backend is not optimized" in ran.stderr
    assert max(plans[0].lengths["prefill"]) <= 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("everything",), "'everything' is not one of"),
        (("--lengths", "10,x"), "--lengths: expected numbers above 0 such as 1024,4096, got '10,x'"),
        (("--lengths", "0"), "--lengths: expected numbers above 0"),
        (("--head-dim", ""), "--head-dim: expected numbers above 0"),
        (("--bits", "5"), "--bits: expected 8, 4, 3, 2, mixed"),
        (("--heads", "3", "--kv-heads", "2"), "--heads: expected a multiple of --kv-heads (2), got 3"),
        (("--peers", "sdpa,nobody"), "--peers: expected some of sdpa, "),
        (("--backend", "abacus"), "--backend: expected"),
        (("--out", "no/such/folder/x.json"), "--out: no/such/folder/x.json cannot be written: there is no folder"),
        (("--plot", "no/such/folder/x.png"), "--plot: no/such/folder/x.png cannot be written: there is no folder"),
        (("--plot", "x.docx"), "--plot: expected a file ending in one of"),
        (("decode", "--head-dim", "7", "--lengths", "64"), "--head-dim: expected a multiple of 8 up to 512, got 7"),
    ],
)
def test_refusals(run, arguments: tuple[str, ...], message: str) -> None:
    assert message in run("bench", *arguments).error


def test_plot_without_matplotlib(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = run("bench", "--plot", tmp_path / "x.png").error
    assert error == '--plot: needs the package matplotlib: pip install ".[all]" in a clone of the repository'


def test_a_peer_that_is_not_here(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TURBOATTENTION_GGML", str(tmp_path))
    assert (
        "--peers: ggml-f16 cannot run here: llama-cpp-python is not installed"
        in run("bench", "--peers", "ggml-f16").error
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (0.123, "123 ms"), (4.56e-6, "4.56 µs"), (0, "0.00 µs")]
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "src" / "turboattention" / "cli"
    package.mkdir(parents=True)
    monkeypatch.setattr(bench_facts, "__file__", str(package / "bench_facts.py"))
    assert bench_facts.commit() is None
    (tmp_path / "pyproject.toml").write_text("")
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    clean = bench_facts.commit()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "pyproject.toml").write_text("#")
    assert bench_facts.commit() == clean + "+"
