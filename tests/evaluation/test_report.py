"""The page contains the measurements, is self-contained, and a browser renders all of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.report import evaluation, summary
from turboattention.evaluation.report.charts import Point, front, heat_map, lines, pareto
from turboattention.evaluation.report.page import Page
from turboattention.evaluation.suite import document

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def metric(value: float, half: float = 0.0) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def unit(method: str, task: str, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"method": method, "title": METHODS[method].title, "task": task, "metrics": metrics, **more}


def text_unit(method: str, kl: float, bits: float) -> dict[str, Any]:
    names = {"perplexity": 20 + kl, "perplexity_change": kl / 20, "bits_per_byte": 1.5, "kl": kl, "top1": 1 - kl}
    rows = {"position": [100.0, 300.0, 500.0], "kl": [0.0, kl, 2 * kl], "top1": [1.0, 1 - kl, 1 - 2 * kl]}
    metrics = {name: metric(value, kl / 10) for name, value in names.items()}
    return unit(method, "perplexity", metrics, by_position=rows, bits_per_element=bits)


@pytest.fixture
def measured() -> dict[str, Any]:
    """A document with every kind of unit."""
    by_length = [{"length": 512, **metric(1.0)}, {"length": 4000, **metric(0.5, 0.1)}]
    units = [text_unit("fp16", 0.0, 16.0), text_unit("turboquant-3", 0.04, 3.1), text_unit("turbo-4", 0.002, 4.5)]
    units += [
        unit("turbo-4", "recall", {"accuracy": metric(0.75, 0.1)}, by_length=by_length),
        unit(
            "turbo-4", "heads", {"mean_error": metric(0.2), "worst_error": metric(0.4)}, errors=[[0.1, 0.2], [0.1, 0.4]]
        ),
        unit(
            "turbo-4", "gsm8k", {"accuracy": metric(0.0)}, questions=7, fewest_shots=5, warnings=["layer 7: <raised>"]
        ),
        {"method": "turboquant-3", "title": "TurboQuant-MSE 3", "task": "gsm8k", "failed": "no room & no time"},
    ]
    methods = [METHODS[name] for name in ("fp16", "turboquant-3", "turbo-4", "turbo-2")]
    return document({"model": "some <model>", "dtype": "float32"}, methods, units)


def test_table(measured: dict[str, Any]) -> None:
    columns, rows = summary.table(measured, called="name")
    assert columns[:3] == ["method", "bits / element", "perplexity"]
    assert columns[-2:] == ["recall", "gsm8k"]
    assert [row[0] for row in rows] == ["fp16", "turboquant-3", "turbo-4"]
    assert rows[2][1:] == [
        "4.50",
        "20.002\n[20.002, 20.002]",
        "+0.01%\n[-0.01, +0.03]",
        "1.5000\n[1.4998, 1.5002]",
        "0.00200\n[0.00180, 0.00220]",
        "–",  # measured before there was a 1 − TVD
        "99.80%\n[99.78, 99.82]",
        "75.0%\n[65.0, 85.0]",
        "0.0%",
    ]
    assert rows[1][-2:] == ["–", "–"]


def test_page_is_whole_and_self_contained(measured: dict[str, Any]) -> None:
    page = evaluation.html(measured)
    assert page.startswith("<!doctype html>")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "url(" not in page
    for text in ("some &lt;model&gt;", "layer 7: &lt;raised&gt;", "no room &amp; no time", "Recall by context length"):
        assert text in page
    assert page.count("<img ") == 5  # two trades, two by position, one heat map
    balanced(page)


def balanced(page: str) -> None:
    """Every element that is opened is closed."""
    open_elements: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "img", "br"):
                open_elements.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_elements.pop() == tag

    Parser().feed(page)
    assert open_elements == []


def test_a_page_of_little_has_no_empty_sections() -> None:
    page = evaluation.html(document({}, [METHODS["fp16"]], [unit("fp16", "recall", {"accuracy": metric(1.0)})]))
    for title in ("Accuracy against size", "By position", "Where the errors are", "Questions"):
        assert title not in page


def test_the_same_results_give_the_same_page(measured: dict[str, Any]) -> None:
    assert evaluation.html(measured) == evaluation.html(measured)


def test_front_is_what_nothing_beats_in_both() -> None:
    plane = {"a": (4.0, 0.1), "b": (2.0, 0.9), "c": (3.0, 0.95), "d": (4.5, 0.1), "e": (3.5, 0.2), "f": (2.0, 0.8)}
    points = [Point(name, bits, value, value, value) for name, (bits, value) in plane.items()]
    assert [point.name for point in front(points)] == ["f", "e", "a"]


def test_losses_leave_the_own_cache_out(measured: dict[str, Any]) -> None:
    points = evaluation.loss_points(measured, "kl", 1)
    assert [(point.name, point.bits, point.own) for point in points] == [
        ("TurboQuant-MSE 3", 3.1, False),
        ("TurboAttention 4", 4.5, True),
    ]


def test_charts_keep_what_they_were_given() -> None:
    axes = pareto([Point("a", 4.0, 0.1, 0.05, 0.2), Point("b", 3.0, 0.3, -0.1, 0.4)], ylabel="loss").axes[0]
    assert axes.get_yscale() == "linear"  # an interval reaches below 0
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
    drawn = lines({"a": ([1, 2], [0.0, 0.5]), "b": ([1, 2], [0.1, 0.2])}, xlabel="x", ylabel="y", logarithmic=True)
    assert drawn.axes[0].get_yscale() == "log"
    assert [line.get_label() for line in drawn.axes[0].lines] == ["a", "b"]
    image = heat_map([[0.1, 0.2], [0.3, 0.9]], title="t", label="error", highest=0.5).axes[0].images[0]
    assert (image.get_clim(), image.get_array().tolist()) == ((0, 0.5), [[0.1, 0.2], [0.3, 0.9]])


def test_cells_are_escaped() -> None:
    page = Page("<b>", "&")
    page.section("<i>")
    page.table(["<u>"], [["<s>\n<q>"]], strong=[0])
    assert not re.search(r"<(b|i|u|s|q)>", page.html())


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    return found


def test_a_browser_shows_the_page(measured: dict[str, Any], tmp_path: Path) -> None:
    probe = (
        "<script>document.title = JSON.stringify([[...document.images].map(i => i.naturalWidth), "
        "document.querySelectorAll('tr').length, document.documentElement.scrollWidth - innerWidth])</script>"
    )
    page = tmp_path / "report.html"
    # After the load event every picture has its size, or none where it could not be drawn.
    script = f"<script>addEventListener('load', () => {{{probe[8:-9]}}})</script>"
    page.write_text(evaluation.html(measured).replace("</body>", script + "</body>"), encoding="utf-8")
    shot = tmp_path / "report.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=1200,900", "--enable-logging=stderr"]
    seen = subprocess.run(
        [browser(), *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<title>\[\[([\d,]+)\],(\d+),(-?\d+)\]</title>", seen.stdout)
    assert found, seen.stdout[:500] + seen.stderr[-500:]
    widths = [int(width) for width in found.group(1).split(",")]
    assert len(widths) == 5
    assert min(widths) > 100
    assert int(found.group(2)) > 10
    assert int(found.group(3)) <= 0, "the page is wider than its window"
    assert "CONSOLE" not in seen.stderr
    subprocess.run(
        [browser(), *options, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True
    )
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 20_000
