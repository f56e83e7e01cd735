"""The list of methods: names, descriptions, and the error for an unknown name."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from turboattention.errors import BackendError, ConfigError, InputError
from turboattention.evaluation.baselines import METHODS, parse_methods
from turboattention.evaluation.baselines.kinds import HubMethod, TurboMethod

from ...calibration.samples import calibration


def test_names_in_the_order_given_each_once() -> None:
    assert [m.name for m in parse_methods(" turbo-4, KIVI-4,,fp16,kivi-4 ")] == ["turbo-4", "kivi-4", "fp16"]


def test_all_are_those_that_can_run_here() -> None:
    names = [m.name for m in parse_methods("all")]
    assert names == [name for name, method in METHODS.items() if method.unavailable() is None]
    assert {"fp16", "int4", "kivi-2", "gear-l-4", "turboquant-3", "saw-int4", "kvarn-k4v2", "turbo-paper-4"} <= {*names}
    assert ("hf-quanto-4" in names) == _installed("optimum.quanto")


@pytest.mark.parametrize("text, got", [("kivi-3", "'kivi-3'"), ("fp16,all", "'all'"), ("", "''"), (" , ", "' , '")])
def test_refuses_other_names(text: str, got: str) -> None:
    with pytest.raises(
        InputError, match=f"methods: expected names from fp16, int8, .*, turbo-calibrated, or all; got {got}"
    ):
        parse_methods(text)


@pytest.mark.parametrize("name", METHODS)
def test_each_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert all([method.title, method.source, method.settings])
    assert method.attention == ("turbo" if name.startswith("turbo-") else None)


def test_titles_are_unique() -> None:
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_a_missing_backend_is_named() -> None:
    method = METHODS["hf-quanto-4"]
    assert isinstance(method, HubMethod)
    for module in ("no_such_package", "no_such_package.quanto"):
        absent = replace(method, module=module)
        assert absent.unavailable() == f"not available: it needs {module}, which is not installed"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_a_missing_backend_makes_no_cache() -> None:
    pytest.importorskip("transformers")
    absent = replace(METHODS["hf-quanto-4"], module="no_such_package")  # type: ignore[type-var]
    with pytest.raises(BackendError, match="methods: hf-quanto-4 is not available: it needs no_such_package"):
        absent.make_cache(None)


def test_calibrated_methods_follow_the_calibration() -> None:
    made = calibration(0.01, 0.02, 0.4, 0.01, budget=3)
    own, other = parse_methods("turbo-calibrated,turbo-calibrated-2.5", made)
    assert isinstance(own, TurboMethod)
    assert isinstance(other, TurboMethod)
    assert (own.name, own.title) == ("turbo-calibrated", "TurboAttention 3, calibrated")
    assert own.calibration is made
    assert other.title == "TurboAttention 2.5, calibrated"
    assert other.calibration is not None
    assert other.calibration.average_bits < made.average_bits
    assert own.settings != other.settings
    assert parse_methods("all", made)[-1] == own


@pytest.mark.parametrize("name", ["turbo-calibrated", "turbo-calibrated-3"])
def test_calibrated_methods_need_one(name: str) -> None:
    with pytest.raises(InputError, match=f"methods: {name} needs a calibration .turboattention calibrate., got none"):
        parse_methods(name)


def test_averages_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_methods("turbo-calibrated-9", calibration())


def test_the_page_has_every_baseline() -> None:
    page = (Path(__file__).parents[3] / "docs" / "baselines.md").read_text(encoding="utf-8")
    for name in METHODS:
        stem, _, last = name.rpartition("-")
        if name != "fp16" and not name.startswith("turbo-"):
            assert f"`{name}`" in page or (f"`{stem}-" in page and f"`-{last}`" in page)
