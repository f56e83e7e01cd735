"""The pages that benchmarks/serving generates from its measurements. The engines need vLLM: `make vllm-bench`."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FACTS = {"gpu": None, "cpu": "some", "threads": 1, "vllm": "0", "torch": "2", "turboattention": "0"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module as it runs: those beside it are top-level."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "serving"))
    for file in (ROOT / "benchmarks" / "serving").glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for file in (ROOT / "benchmarks" / "serving").glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_answers_are_held_to_solo_answers(script: Any) -> None:
    solo = {"same": [1, 2, 3], "near": [1, 2, 3], "far": [1, 2, 3], "short": [1, 2, 3], "cut": [1, 2, 3], "none": [1]}
    got = {"same": [1, 2, 3], "near": [1, 9, 9], "far": [1, 2, 9], "short": [1, 2], "cut": [1, 2], "none": []}
    gaps = {name: [1.0, 0.01, 0.2] for name in solo}
    found = script("comparing").compare(got, solo, gaps, ["cut"], bound=0.05)
    assert found.equal == 2
    assert (found.close, found.widest) == (1, 0.01)
    assert found.wrong == ("far", "short", "none")


def test_memory_that_grows_after_the_warm_up(script: Any) -> None:
    memory_of = script("comparing").memory_of
    flat = [100, 500, 1000, 1000, 1000, 1000, 1000, 1000]
    assert memory_of(flat).growth == 0
    assert memory_of([*flat[:-2], 1100, 1100]).growth == pytest.approx(0.1)
    with pytest.raises(ValueError, match="expected 8 or more, got 7"):
        memory_of(flat[1:])


def test_soak_requests(script: Any) -> None:
    requests_of = script("soak_requests").requests_of
    ids = [random.Random(0).randrange(2048) for _ in range(4000)]
    requests = requests_of(2000, ids)
    assert requests == requests_of(2000, ids)
    assert all(10 <= len(r.prompt) <= 600 and 1 <= r.output <= 64 for r in requests)
    assert 200 < sum(r.abort_after is not None for r in requests) < 400
    shared = {r.prompt[:64] for r in requests if r.shared and len(r.prompt) >= 64}
    assert len(shared) <= 6
    assert {len(r.prompt) % 64 for r in requests} == set(range(64))


def test_workload(script: Any) -> None:
    module = script("workload")
    load = module.Workload(50, (5, 9), (2, 3), 4.0, 100)
    requests = module.requests_of(load)
    assert requests == module.requests_of(load)
    assert {len(r.prompt) for r in requests} == {5, 6, 7, 8, 9}
    assert all(10 <= token < 100 for r in requests for token in r.prompt)
    arrivals = [r.arrival for r in requests]
    assert arrivals == sorted(arrivals)
    assert 6 < arrivals[-1] < 25
    together = module.requests_of(module.Workload(5, (5, 9), (2, 3), None, 100))
    assert {r.arrival for r in together} == {0.0}


@pytest.mark.parametrize("name, variable", [("stock", ""), ("turbo-4", "4"), ("turbo-mixed", "folder")])
def test_contenders_are_told_by_the_environment(script: Any, name: str, variable: str) -> None:
    module = script("contenders")
    assert module.BY_NAME[name].environment(Path("folder")) == {"TURBOATTENTION_VLLM": variable}


def test_mixed_needs_a_calibration(script: Any) -> None:
    with pytest.raises(ValueError, match="expected a folder for turbo-mixed, got none"):
        script("contenders").MIXED.environment()


def test_models(script: Any, tmp_path: Path) -> None:
    """The side pool has INT8 codes and float32 scales of 64 tokens, K and V, for every sequence and a spare one."""
    from turboattention.calibration import Calibration

    model = script("models").llama(tmp_path / "model", attention_only=True)
    assert (model.layers, model.kv_heads, model.head_dim) == (2, 8, 128)
    assert model.side_pool(4) == 2 * 2 * 8 * (5 * 64 * (128 + 4) + 6 * 16 * 128 * 2)
    bits = Calibration.load(model.mixed(tmp_path / "mixed")).head_bits
    assert [x.tolist() for x in bits] == [[[2] * 4 + [4] * 4] * 2] * 2


def row(contender: str, seconds: float, rate: float | None = None) -> dict[str, Any]:
    spread = {"mean": 0.01, "p50": 0.02, "p95": 0.03}
    figures = {"seconds": seconds, "output_tokens_per_second": 100 / seconds, "tokens_a_step": 2.0}
    return {
        "contender": contender,
        "title": contender,
        "budget": 24 << 20,
        "tokens": 4096,
        "rate": rate,
        "num_preemptions": 3,
        "first_token": spread,
        "per_token": spread,
        **figures,
    }


def test_throughput_section(script: Any) -> None:
    rows = [row("stock", 4.0), row("turbo-4", 2.0), row("stock", 6.0), row("turbo-4", 2.0)]
    rows += [row("stock", 5.0, 1.0), row("turbo-4", 5.0, 1.0), row("stock", 5.0, 7.0)]
    plan = {"requests": 2, "prompt": [5, 9], "output": [2, 3], "sequences": 4}
    document = {"facts": FACTS, "model": "some", "plan": plan, "rounds": 2, "rows": rows}
    text = script("throughput_section").throughput(document, "picture").splitlines()
    assert "| 24 MiB, all at once | stock | 4,096 | 21 | 1.00 | 2.0 | 3 | 0.02, 0.03 | 10.0, 20.0, 30.0 |" in text
    assert "| 24 MiB, all at once | turbo-4 | 4,096 | 50 | 2.50 | 2.0 | 3 | 0.02, 0.03 | 10.0, 20.0, 30.0 |" in text
    assert "| 24 MiB, 1 per second | stock | 4,096 | 20 | 1.00 | 2.0 | 3 | 0.02, 0.03 | 10.0, 20.0, 30.0 |" in text
    assert not [line for line in text if "7 per second" in line]  # interrupted before turbo-4 ran


def test_throughput_section_of_a_real_model(script: Any) -> None:
    """With the quality of each cache, where it was measured."""
    plan = {"requests": 2, "prompt": [5, 9], "output": [2, 3], "sequences": 4}
    quality = {"passages": 2, "context": 2048, "step": 64}
    quality |= {"contenders": {"turbo-4": {"kl": 0.00437, "top1": 0.958, "perplexity": 0.0021}}}
    rows = [row("stock", 4.0), row("turbo-4", 2.0)]
    document = {"facts": FACTS, "model": "some", "plan": plan, "rounds": 1, "rows": rows, "quality": quality}
    text = script("throughput_section").throughput(document, "picture").splitlines()
    assert next(line for line in text if "| turbo-4 |" in line).endswith("| 0.0044 | 95.8% | +0.2% |")
    assert next(line for line in text if "| stock |" in line).endswith("| – | – | – |")


@pytest.mark.parametrize("fp8", [[], [row("stock-fp8", 3.0)]], ids=["without", "with"])
def test_throughput_section_tells_of_missing_fp8(script: Any, fp8: list[dict[str, Any]]) -> None:
    plan = {"requests": 2, "prompt": [5, 9], "output": [2, 3], "sequences": 4}
    rows = [row("stock", 4.0), *fp8, row("turbo-4", 2.0)]
    document = {"facts": FACTS, "model": "some", "plan": plan, "rounds": 1, "rows": rows}
    text = script("throughput_section").throughput(document, "picture")
    assert ("vLLM, fp8* was not measured in this table" in text) == (not fp8)


def test_capacity_section_tells_of_a_missed_floor(script: Any) -> None:
    common = {"model": "m", "blocks": 1, "block_size": 128, "tokens_per_gib": 9, "with_side_pool": 8}
    common |= {"side_pool_bytes": 1 << 20, "times_with_side_pool": 3.0, "title": "t"}
    rows = [common | {"contender": "turbo-4", "times": times} for times in (3.6, 3.59)]
    text = script("sections").capacity({"facts": FACTS, "budget": 1 << 30, "sequences": 1, "rows": rows}, "picture")
    assert "3.60 (floor 3.6) |" in text
    assert "3.59 (floor 3.6, missed) |" in text


def soaked(**changes: Any) -> dict[str, Any]:
    counted = {"requests": 90, "shared_prefixes": 30, "taken_back": 9, "blocks": 8, "block_size": 64, "bits": "4"}
    counted |= {"num_preemptions": 7, "prefix_cache_hits": 640, "generated": 1234, "bound": 0.05}
    answers = {"equal": 89, "close": 1, "widest": 0.02, "wrong": []}
    memory = {"early": 1 << 20, "late": 1 << 20, "growth": 0.0}
    return {"facts": FACTS, "answers": answers, "memory": memory, "problems": [], **counted, **changes}


def test_soak_section(script: Any) -> None:
    soak = script("sections").soak
    plain, drafting = soak(soaked(), ""), soak(soaked(drafts=12, draft_tokens=1000, accepted_tokens=300), "")
    assert "draft" not in plain
    assert "API server" not in plain
    assert drafting.startswith("## Correctness under load, with drafts\n")
    assert "| preemptions | 7 |\n| drafts accepted, rejected | 300, 700 |" in drafting
    assert "greedy, up to 12 n-gram drafts per step:" in drafting
    half = {"equal": 20, "close": 0}
    served = soak(soaked(server={"requests": 20, "first": half, "second": half, "lost": 19}), "")
    assert "| answers equal to a single run's, before the kill and after the restart | 20, 20 |" in served
    assert "Then the API server is killed" in served


def test_page_is_what_the_results_say(script: Any) -> None:
    page = script("page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.with_section(text, page.section(page.RESULTS))


def test_page_without_markers(script: Any) -> None:
    with pytest.raises(ValueError, match="got a page without them"):
        script("page").with_section("text", "section")
