"""The page that benchmarks/architectures generates from its results. `make architectures` runs the sweep."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.architectures.{name}")


def test_page_is_what_the_results_say(module: Any) -> None:
    page = module("page")
    assert page.PAGE.read_text(encoding="utf-8") == page.of_results()


def test_readme_has_the_counts(module: Any) -> None:
    architectures = json.loads(module("page").RESULTS.read_text(encoding="utf-8"))["architectures"]
    counted = [module("verdict").Verdict.of(x).counted.verdict for x in architectures]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"in \[(\d+) of (\d+) architectures\].*? (\d+) others are rejected .*? (\d+) could not be", readme)
    assert said is not None
    right, refused, unbuilt = (counted.count(x) for x in ("right", "refused", "not built"))
    assert tuple(map(int, said.groups())) == (right, len(counted), refused, unbuilt)


def test_what_refusals_advise_works(module: Any) -> None:
    """Where they say to leave the cache out, "turbo" is right over the model's own; else eager attention runs."""
    architectures = json.loads(module("page").RESULTS.read_text(encoding="utf-8"))["architectures"]
    refused = [x["found"] | {"built": x["built"]} for x in architectures if "past_key_values out" in json.dumps(x)]
    advised = {
        "DynamicCache": "leave past_key_values out to attend",
        "built": 'load it with attn_implementation="eager"',
    }
    for where, advice in advised.items():
        found = [x[where]["verdict"] for x in refused if advice in x["TurboCache"]["note"]]
        assert found
        assert set(found) == {"right"}


def test_what_an_architecture_is_counted_as(module: Any) -> None:
    verdict = module("verdict")
    finding, kinds = verdict.Finding, ("TurboCache", "DynamicCache", "StaticCache", "INT8", "default sizes")
    right = {kind: finding("right", error=1e-7) for kind in kinds}
    verdicts = [
        verdict.Verdict("works", finding("right"), right),
        verdict.Verdict(
            "in part", finding("right", "no padding"), {**right, "StaticCache": finding("as eager", "too")}
        ),
        verdict.Verdict("refused as it runs", finding("right"), {**right, "TurboCache": finding("refused", "a mask")}),
        verdict.Verdict(
            "refused unbuilt", finding("not built", "no such size"), {"TurboCache": finding("refused", "it")}
        ),
        verdict.Verdict("unbuilt", finding("not built", "no such library")),
    ]
    assert [x.counted.verdict for x in verdicts] == ["right", "right", "refused", "refused", "not built"]
    assert [verdict.Verdict.of(json.loads(json.dumps(x.brief()))) for x in verdicts] == verdicts
    text = module("page").page(verdicts, "5", 1.0)
    assert "Of 5 architectures and variants, 2 work with a `TurboCache`, 2 are rejected" in text
    assert "| a mask | refused as it runs |\n| it | refused unbuilt |\n" in text
    assert "| no such library | unbuilt |\n" in text
    assert "| no padding | in part |\n" in text
    assert "Of 3 architectures whose eager attention runs over its own cache, 2 give" in " ".join(text.split())


@pytest.fixture
def sweep(module: Any) -> Any:
    """A sweep of two architectures, one that works and one that is refused."""
    verdict = module("verdict")

    def sweep(works: str = "right", error: float = 3e-7, int8: float = 0.05, says: str = "no cache") -> list[Any]:
        finding = verdict.Finding
        found = {"TurboCache": finding(works, "", error), "INT8": finding("right", "", int8)}
        refused = {"TurboCache": finding("refused", says)}
        return [
            verdict.Verdict("llama", finding("right"), found),
            verdict.Verdict("mamba", finding("not built", "too large"), refused),
        ]

    return sweep


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"works": "wrong"}, "llama, TurboCache: wrong, stored as right"),
        ({"works": "refused"}, "llama, TurboCache: refused, stored as right"),
        ({"error": 2e-6}, "llama, TurboCache: error 2.0e-06, at most 1.0e-06 expected (stored as 3.0e-07)"),
        ({"int8": 0.11}, "llama, INT8: error 1.1e-01, at most 1.0e-01 expected (stored as 5.0e-02)"),
        ({"says": "no keys"}, "mamba, TurboCache: says 'no keys', stored as 'no cache'"),
    ],
)
def test_differences_from_the_stored_sweep(module: Any, sweep: Any, changes: dict[str, Any], line: str) -> None:
    differences = module("compare").differences
    assert differences(sweep(**changes), sweep()) == [line]
    assert differences(sweep(error=9e-7, int8=0.09), sweep()) == []


def test_architectures_that_came_or_went(module: Any, sweep: Any) -> None:
    differences = module("compare").differences
    assert differences(sweep(), sweep()[:1]) == ["mamba: not in the stored results"]
    assert differences(sweep()[:1], sweep()) == ["mamba: missing, stored as refused"]
    assert differences(sweep()[:1], sweep(), whole=False) == []
    (llama, mamba), (stored, _) = sweep(), sweep()
    del llama.found["INT8"]
    assert differences([llama, mamba], [stored, mamba]) == ["llama, INT8: not compared, stored as right"]


def test_a_check_fails_where_a_result_differs(module: Any, sweep: Any, monkeypatch: Any, capsys: Any) -> None:
    """And writes nothing."""
    program = module("__main__")
    before = module("page").RESULTS.read_bytes()
    by_name = {verdict.name: verdict for verdict in sweep()}
    monkeypatch.setattr(program, "apart", lambda name, timeout: by_name[name])
    monkeypatch.setattr(program.tiny, "names", lambda: list(by_name))
    monkeypatch.setattr("sys.argv", ["architectures", "--check"])
    for stored, status, said in (
        (sweep(), 0, "2 architectures are as in architectures.json"),
        (sweep("wrong"), 1, "st"),
    ):
        monkeypatch.setattr(program.page, "stored", lambda stored=stored: stored)
        assert program.main() == status
        assert said in capsys.readouterr().out.splitlines()[-1]
    assert module("page").RESULTS.read_bytes() == before


def test_nightly_checks_the_architectures() -> None:
    (nightly,) = re.findall(r"^nightly:(.*?)##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert "architectures-check" in nightly.split()
