"""The code and the figures of README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import turboattention as ta
from turboattention.evaluation.errors_by_preset import relative_error
from turboattention.evaluation.synthetic import synthetic_qkv
from turboattention.guard import BOUNDS
from turboattention.reference.exact import exact_attention

from .helpers import normals

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LENGTHS = (128, 512, 1024, 4096, 8192)
WIDTHS = {"8": 8, "4": 4, "3": 3, '"mixed"': "mixed", "2": 2}


def table() -> dict[int | str, tuple[list[float], float]]:
    """By bits: how many times smaller than FP16 by length, and the error."""
    rows = {}
    for name, *cells in re.findall(
        r"^\| `(.+?)`[^|]*\|" + r" ([\d.]+)x \|" * 5 + r" ([\d.]+) \|", README, re.MULTILINE
    ):
        *ratios, error = map(float, cells)
        rows[WIDTHS[name]] = ratios, error
    return rows


TABLE = table()


def stored(bits: int | str, tokens: int, head_dim: int = 64, heads: int = 2) -> ta.KVCache:
    cache = ta.KVCache(1, heads, head_dim, config=ta.TurboConfig(bits=bits, guard="off"))
    x = normals(1, heads, tokens, head_dim)
    cache.append(x, x)
    return cache


def times_smaller(cache: ta.KVCache) -> float:
    return 16 / cache.bits_per_element


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    """Block after block, as someone who follows the page would."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict = {}
    try:
        for block in blocks:
            exec(block, names)
    finally:
        ta.integrations.transformers.disable()
    assert capsys.readouterr().out.startswith("501 ")
    assert "The old castle stood on a hill, and" in names["tokenizer"].decode(names["output"][0])
    assert names["cache"].get_seq_length() == names["output"].shape[1] - 1


def test_every_width_is_in_the_table():
    assert list(TABLE) == list(WIDTHS.values())


@pytest.mark.parametrize("bits", TABLE, ids=str)
def test_sizes(bits):
    for tokens, ratio in zip(LENGTHS, TABLE[bits][0], strict=True):
        measured = times_smaller(stored(bits, tokens))
        assert measured == pytest.approx(ratio, abs=0.0501), tokens
        assert 1.005 < times_smaller(stored(bits, tokens, 128, 8)) / measured < 1.03


def test_where_a_cache_is_larger():
    for bits in TABLE:
        larger = [tokens for tokens in range(1, 200) if times_smaller(stored(bits, tokens)) < 1]
        assert larger == [*range(1, 9), 17]


@pytest.mark.parametrize("bits", TABLE, ids=str)
def test_errors(bits):
    """Several KV heads, so that half of them can have 2 bits."""
    q, k, v = (torch.from_numpy(x) for x in synthetic_qkv("gauss", kv_heads=4 if bits == "mixed" else 1))
    q = q[:, :, -64:]
    cache = ta.KVCache(1, k.shape[1], 128, config=ta.TurboConfig(bits=bits, guard="off"))
    cache.append(k.float(), v.float())
    wanted, got = (exact_attention(q, *kv, is_causal=True)[0] for kv in ((k, v), cache.dequantize()))
    assert relative_error(got, wanted) == pytest.approx(TABLE[bits][1], rel=0.05)


def test_the_bounds_of_the_guard():
    said = re.search(r"beyond ([\d.]+) at 8 bits, ([\d.]+) at 4, ([\d.]+) at 3 or ([\d.]+) at 2 ", README)
    assert said is not None
    assert dict(zip((8, 4, 3, 2), map(float, said.groups()), strict=True)) == BOUNDS
