"""The ablation on real models: its rows, and its table."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

import turboattention as ta

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "benchmarks" / "ablation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_part_is_all_that_its_rows_differ_in(ablation):
    rows = {row.name: row for row in ablation.rows(3)}

    def differing(a, b):
        own = {name for name in ("exact", "unordered") if getattr(rows[a], name) != getattr(rows[b], name)}
        configs = rows[a].config, rows[b].config
        return own | {one.name for one in fields(ta.TurboConfig) if len({getattr(c, one.name) for c in configs}) > 1}

    for name, part in ablation.PARTS.items():
        assert differing("none", f"only {name}") == set(part)
        assert differing("all", f"all but {name}") == set(part)
    default = ta.TurboConfig(bits=3, softmax="sas", reorder_k=True, guard="off")
    assert rows["all"].config == default


def test_channels_in_the_model_s_order_have_two_widths(ablation):
    (row,) = [row for row in ablation.rows(4) if row.unordered]
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    orders = [layer._k_order for layer in row.make_cache(config).layers]
    assert len(orders) == 3
    assert all(order.permutation.tolist() == 2 * [list(range(16))] and bool(order.halved.all()) for order in orders)


def test_the_page_has_the_table_of_the_results(ablation):
    result = json.loads(ablation.RESULTS.read_text(encoding="utf-8"))
    _, section, _ = ablation.PAGE.read_text(encoding="utf-8").split(ablation.MARK)
    assert section.strip() == ablation.table(result).strip()


def test_the_parts_together_beat_none_and_each_alone(ablation):
    """On every model and at every width."""
    result = json.loads(ablation.RESULTS.read_text(encoding="utf-8"))
    assert "smollm2" in result
    for widths in result.values():
        for rows in widths.values():
            alone = [row["kl"]["value"] for name, row in rows.items() if name == "none" or name.startswith("only ")]
            assert rows["all"]["kl"]["value"] < min(alone)
