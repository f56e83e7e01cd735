"""Figures in the documentation are those of the files in benchmarks/results."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from turboattention.benchmarking.records import Rival, Row, as_document, rows_of
from turboattention.benchmarking.statistics import Spread

ROOT = Path(__file__).parents[2]
FACTS = {
    "cpu": "Some CPU",
    "threads": 2,
    "backend": "cpu",
    "turboattention": "1.2.3",
    "torch": "2.13.0",
    "ggml": "0.9",
    "commit": "0123456789abcdef",
    "peaks": {"float32 GFLOPS": 150.0},
}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as it runs: the modules beside it are top-level."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("report", "tables", "targets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("report")


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_a_page_says_what_the_files_say(report: ModuleType, page: str) -> None:
    found = report.current((ROOT / page).read_text(encoding="utf-8"))
    assert found in (None, report.section(page, report.load(report.RESULTS))), "run: python benchmarks/report.py"


def spread(value: float) -> Spread:
    return Spread(value, value * 0.9, value * 1.1, 5)


def row(work: str, bits: str | None, keys: int, *, ratio: float = 0.0, peer: str = "sdpa", **figures: float) -> Row:
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "queries": keys, "keys": keys, "causal": work == "prefill"}
    rivals = [Rival(peer, peer, error=0.0, seconds=spread(1.0), gops=90.0, ratio=spread(ratio))] if ratio else []
    return Row(work, shape | {"batch": 1}, bits, "t", "float32", 0.01, spread(1e-3), 100.0, rivals, figures)


ROWS = [
    row("prefill", None, 1024, ratio=1.7),
    row("prefill", None, 2048, ratio=1.5),
    row("decode", "4 bits", 8192, ratio=12.0),
    row("decode", "3 bits", 8192, ratio=0.9, peer="int4"),
    row("steps", "4 bits", 4096, flush_over_median=1.5, worst_over_median=1.6),
    row("compress", "4 bits", 4096, share=0.02, share_p20=0.01, share_p80=0.03, decode_seconds=1e-3,
        single_append_seconds=1e-4, single_append_share=0.1),
    row("memory", "4 bits", 8192, below_fp16=3.7, bits_per_element=4.3, bytes=1.0, fp16_bytes=1.0),
]  # fmt: skip
MODEL = {
    "context": 4096,
    "bits": "4 bits",
    "ratio": asdict(spread(1.25)),
    "sdpa_tokens_per_second": 4.0,
    "turbo_tokens_per_second": 5.0,
    "fp16_bytes": 36,
    "turbo_cache_bytes": 10,
}
REAL = {
    "model": "small",
    "context": 1024,
    "caches": [
        {
            "cache": "4 bits",
            "kl": 0.0123,
            "cache_bytes": 2**20,
            "peak_bytes": 3 * 2**20,
            "attention_share": 0.25,
            "prompt_seconds": asdict(spread(2.0)),
            "prompt_ratio": asdict(spread(1.5)),
            "token_seconds": asdict(spread(0.1)),
            "token_ratio": asdict(spread(2.5)),
        }
    ],
    "llama.cpp": [{"cache": "q8_0", "prompt_seconds": 3.0, "token_seconds": 0.2}],
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project with one results file."""
    document = json.loads(json.dumps(as_document(ROWS, FACTS))) | {"end_to_end": [MODEL], "real_models": [REAL]}
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "cpu" / "box.json").write_text(json.dumps(document))
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        (tmp_path / name).write_text("before\n<!-- performance:begin -->\nold\n<!-- performance:end -->\nafter\n")
    return tmp_path


def test_rows_survive_a_file() -> None:
    document = json.loads(json.dumps(as_document(ROWS, FACTS)))
    assert rows_of(document) == ROWS
    with pytest.raises(ValueError, match="schema: expected 1, got 2"):
        rows_of(document | {"schema": 2})


def test_sections(report: ModuleType, tree: Path) -> None:
    results = report.load(tree / "results")
    for name in report.PAGES:
        assert not report.update(tree, name, results, check=True)
        assert "old" in (tree / name).read_text()
        assert not report.update(tree, name, results, check=False)
        assert report.update(tree, name, results, check=True)
        text = (tree / name).read_text()
        assert text.startswith("before\n<!-- performance:begin -->\n")
        assert text.endswith("\n<!-- performance:end -->\nafter\n")
        assert "**Some CPU**, 2 threads, backend `cpu`" in text
        assert "| causal, 1,024 | 128 | 1.00 ms | 100 | FP32 products 67% | 1.70 (1.53 to 1.87) |" in text
        assert "| 4 bits, 8,192 | 128 | 1.00 ms | 100 | FP32 products 67% | 12.00 (10.80 to 13.20) |" in text
        assert "| 4 bits | 8,192 | 3.70x | 4.30 |" in text
        assert "| 4,096 | 4 bits | 4.00 | 5.00 | 1.25x (1.12 to 1.38) | 3.60x |" in text
        speeds = "2.00 | 1.50 (1.35 to 1.65) | 10.0 | 2.50 (2.25 to 2.75)"
        assert f"| small, 1,024 | 4 bits | {speeds} | 25% | 1.0 | 3.0 | 0.0123 |" in text
        assert "| small, 1,024 | llama.cpp q8_0 | 3.00 | – | 5.0 | – | – | – | – | – |" in text
    assert "commit 0123456789ab, float32 GFLOPS 150" in " ".join((tree / "docs/performance.md").read_text().split())
    assert "(../benchmarks/results/cpu/box.json)" in (tree / "docs/performance.md").read_text()


def test_the_processor_measured_last_comes_first(report: ModuleType, tree: Path) -> None:
    folder = tree / "results" / "cpu"
    newest = json.loads((folder / "box.json").read_text())
    newest["facts"] |= {"cpu": "New CPU", "time": "2031"}
    (folder / "new").mkdir()
    for name, share in (("a", 1.0), ("b", 2.0)):
        newest["rows"][2]["rivals"][0]["ratio"]["median"] = share
        (folder / "new" / f"{name}.json").write_text(json.dumps(newest))
    results = report.load(tree / "results")
    assert [(result.processor, result.place.name) for result in results] == [
        ("new", "a.json"), ("new", "b.json"), ("box", "box.json"),
    ]  # fmt: skip
    text = report.section("README.md", results)
    order = [text.index(part) for part in ("New CPU", "Other processors:", "Some CPU")]
    assert order == sorted(order)
    assert "(RESULTS" not in text
    assert "(../benchmarks/results/cpu/new/b.json)" in report.section("docs/performance.md", results)


def test_peers_that_store_are_said_to(report: ModuleType, tree: Path) -> None:
    path = tree / "results" / "cpu" / "box.json"
    document = json.loads(path.read_text())
    assert "Storing:" not in report.full(report.load(tree / "results"))
    for row in document["rows"][2:4]:
        row["figures"] = {"cache_bytes": 1}
    document["rows"][2]["rivals"][0] |= {"peer": "ort-int8"}
    path.write_text(json.dumps(document))
    text = report.full(report.load(tree / "results"))
    assert "× ONNX Runtime INT8, storing" in text
    assert "*Storing*: each call of such an implementation also stores one token" in text


def test_targets_say_where_the_floor_is_missed(report: ModuleType, tree: Path) -> None:
    lines = report.full(report.load(tree / "results")).splitlines()
    measured = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[-1].removesuffix(" |") for line in lines[2:15]
    }
    values = list(measured.values())
    assert values[0] == "1.50 to 1.70x; at the floor in 1 of 2 shapes (below the floor)"
    assert values[1:4] == ["–", "–", "12.00x at 8,192"]
    assert values[4:7] == ["–", "0.90x (below the floor)", "–"]
    assert values[7:10] == ["2.00 %", "1.50x at a flush, at most 0% from a line", "3.70x"]


def test_a_page_without_markers_is_left_alone(report: ModuleType, tree: Path) -> None:
    (tree / "README.md").write_text("plain\n")
    assert report.update(tree, "README.md", [], check=False)
    assert (tree / "README.md").read_text() == "plain\n"


def test_without_results_nothing_is_claimed(report: ModuleType) -> None:
    assert "Nothing has been measured yet." in report.section("README.md", [])
    assert all(line.endswith("| – |") for line in report.full([]).splitlines()[2:])


def test_plots(report: ModuleType, tree: Path) -> None:
    (path,) = report.draw(report.load(tree / "results"), tree / "docs")
    assert path.name == "performance-box.png"
    assert path.read_bytes().startswith(b"\x89PNG")
