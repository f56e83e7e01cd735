"""How a comparison reads at different widths, with and without colour."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from turboattention.cli.comparison import Agreement, Comparison, Outcome, Row
from turboattention.cli.comparison_view import as_json, show
from turboattention.cli.settings import make_setting

FACTS = {"model": "tiny", "dtype": "float32", "device": "cpu", "threads": 2, "backend": "reference"}
OWN = Outcome("own cache", " the door was locked, and I", [1, 2, 3, 4], False, 1.5, 40.0, 32 << 20, 16 << 20)


def row(bits: str, text: str, shared: int, first: int | None, warnings: list[str] | None = None) -> Row:
    setting = make_setting(bits)
    outcome = replace(OWN, label=setting.label, text=text, kv_bytes=4 << 20)
    return Row(setting, outcome, Agreement(first, 0.5, shared, 0.75), warnings or [])


SAME = row("8", OWN.text, len(OWN.text), None)
OTHER = row("4", " the door was open, as it", 14, 2, ["layer 1, head 0: 8 bits"])


def render(rows: list[Row], width: int, prompt: str = "Once upon a time") -> str:
    file = io.StringIO()
    show(Comparison(1234, OWN, rows), prompt, FACTS, Console(file=file, width=width, highlight=False))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_every_figure_is_shown_whole(width: int) -> None:
    shown = " ".join(render([SAME, OTHER], width).split())
    assert "…" not in shown.replace("ending …", "")
    for figure in ("1.00x", "4.00x", "16.00", "4.00", "1.50", "40.0", "never", "at 3", "50.0%", "75.0%"):
        assert figure in shown


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(len(line) for line in render([SAME, OTHER, SAME], width).splitlines()) <= width


def test_wide_terminals_take_all_texts_in_one_table() -> None:
    assert render([SAME, OTHER], 140).count("own cache  ") == 2
    assert render([SAME, OTHER], 80).count("own cache  ") == 3


def test_the_difference_is_marked_without_colour() -> None:
    shown = render([OTHER], 100)
    assert "the door was ▶locked, and I" in shown
    assert "the door was ▶open, as it" in shown


def test_the_mark_is_explained() -> None:
    assert "▶ marks the first difference from the own cache's text." in " ".join(render([SAME, OTHER], 80).split())


def test_equal_texts_have_no_mark() -> None:
    shown = render([SAME], 100)
    assert "▶" not in shown
    assert shown.count("the door was locked, and I") == 2


def test_the_end_of_a_text_is_shown() -> None:
    ended = replace(SAME, outcome=replace(SAME.outcome, ended=True))
    assert "and I [end]" in render([ended], 100)


def test_the_prompt_is_one_line_with_its_end() -> None:
    line = next(x for x in render([SAME], 80, "word\n" * 100 + "at the end").splitlines() if x.startswith("Prompt"))
    assert line.startswith("Prompt: 1,234 tokens, ending … ")
    assert line.endswith("at the end")


def test_what_ran_and_what_the_guard_said() -> None:
    shown = " ".join(render([OTHER], 80).split())
    assert "Model tiny in float32 on cpu (CPU threads: 2), quantized attention on the reference backend." in shown
    assert "4 bits: layer 1, head 0: 8 bits" in shown


def test_model_output_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in render([row("4", " the\x1b[2J door", 4, 1)], 80)


def test_brackets_are_text() -> None:
    assert "[bold]x[/bold]" in render([row("4", " the [bold]x[/bold]", 4, 1)], 80).replace("▶", "")


def test_json() -> None:
    data = as_json(Comparison(1234, OWN, [OTHER]))
    assert data["prompt_tokens"] == 1234
    assert data["own"] == {
        "text": OWN.text,
        "tokens": [1, 2, 3, 4],
        "new_tokens": 4,
        "ended": False,
        "prefill_seconds": 1.5,
        "decode_tokens_per_second": 40.0,
        "kv_bytes": 32 << 20,
        "kv_bytes_fp16": 16 << 20,
        "ratio": 0.5,
        "bits_per_element": 32.0,
    }
    setting = data["settings"][0]
    assert setting["config"]["bits"] == 4
    assert (setting["bits"], setting["label"]) == ("4", "4 bits")
    assert (setting["ratio"], setting["bits_per_element"]) == (4.0, 4.0)
    assert (setting["first_difference"], setting["same_tokens"], setting["top1_agreement"]) == (2, 0.5, 0.75)
    assert setting["warnings"] == ["layer 1, head 0: 8 bits"]
