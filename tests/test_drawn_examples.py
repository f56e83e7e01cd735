"""The matrices drawn in public docstrings, compared with the keys that each query really attends to.

All queries are zero, so all visible keys have the same weight, and value j is the j-th unit vector: channel j of an
output is well above zero exactly where key j is attended to.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import turboattention as ta
from turboattention.paged import PagedBatch, PagedFormat, TailBlocks, paged_attention

OFF = ta.TurboConfig(guard="off")
CHANNELS = 8
ROW = re.compile(r"^[01-]( [01-])*(    [01-]( [01-])*)*$")
Matrix = list[list[int | None]]


def drawings(function: Callable[..., Any]) -> dict[str, list[Matrix]]:
    """Of each heading `name=value, ...` the matrices below it, side by side; None where a row is padding."""
    found: dict[str, list[Matrix]] = {}
    heading = ""
    for line in (inspect.getdoc(function) or "").split("Examples:")[1].splitlines():
        line = line.split("#")[0].strip()
        if "=" in line and ROW.match(line) is None:
            heading = line
        elif ROW.match(line):
            parts = line.split("    ")
            matrices = found.setdefault(heading, [[] for _ in parts])
            for matrix, part in zip(matrices, parts, strict=True):
                matrix.append([None if mark == "-" else int(mark) for mark in part.split()])
    return found


def cases(function: Callable[..., Any]) -> list[Any]:
    return [pytest.param(heading, matrices, id=heading) for heading, matrices in drawings(function).items()]


def options_of(heading: str) -> dict[str, Any]:
    return eval(f"dict({heading})", {"__builtins__": {"dict": dict, "True": True}})


def keys_and_values(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of tokens at positions [T]: keys and values [T, 8], the values unit vectors."""
    return torch.ones(len(positions), CHANNELS), torch.eye(CHANNELS)[positions]


def attended(out: Tensor, columns: int) -> Matrix:
    """[rows, 8] -> which keys were attended to; at least 1/8 of a row's weight is on each."""
    return (out > 0.06).int()[:, :columns].tolist()


def make_mask(options: dict[str, Any]) -> None:
    if "attn_mask" in options:
        options["attn_mask"] = torch.tensor(options["attn_mask"], dtype=torch.bool)


def test_there_are_drawings_of_every_kind():
    headings = [*drawings(ta.turbo_attention), *drawings(ta.turbo_attention_with_kvcache), *drawings(paged_attention)]
    assert len(headings) == 12
    for kind in ("is_causal", "attn_mask", "window_size", "lengths", "query_start"):
        assert any(kind in heading for heading in headings), kind


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("heading", "matrices"), cases(ta.turbo_attention))
def test_turbo_attention(heading, matrices, backend):
    options = options_of(heading)
    queries, keys = options.pop("Lq"), options.pop("Lk")
    make_mask(options)
    k, v = keys_and_values(torch.arange(keys))
    q = torch.zeros(1, 1, queries, CHANNELS)
    out = ta.turbo_attention(q, k[None, None], v[None, None], config=OFF, backend=backend, **options)
    assert [attended(out[0, 0], keys)] == matrices


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("heading", "matrices"), cases(ta.turbo_attention_with_kvcache))
def test_turbo_attention_with_kvcache(heading, matrices, backend):
    options = options_of(heading)
    past, tokens = torch.tensor(options.pop("past")), options.pop("T")
    make_mask(options)
    if "lengths" in options:
        options["lengths"] = torch.tensor(options["lengths"])
    cache = ta.KVCache(len(past), 1, CHANNELS, config=OFF)
    k, v = keys_and_values(torch.arange(int(past.max())))
    cache.append(k.expand(len(past), 1, -1, -1), v.expand(len(past), 1, -1, -1), lengths=past)
    new = [keys_and_values(int(length) + torch.arange(tokens)) for length in past]
    k, v = (torch.stack([pair[side] for pair in new])[:, None] for side in (0, 1))
    q = torch.zeros(len(past), 1, tokens, CHANNELS)
    out = ta.turbo_attention_with_kvcache(q, cache, k, v, backend=backend, **options)
    assert [attended(rows[0], len(cache)) for rows in out] == matrices


@pytest.mark.parametrize(("heading", "matrices"), cases(ta.KVCache.append))
def test_append(heading, matrices):
    """Token j of the call has the unit vector j + 1 as value, the others the unit vector 0."""
    options = options_of(heading)
    past, lengths = torch.tensor(options["past"]), torch.tensor(options["lengths"])
    cache = ta.KVCache(len(past), 1, CHANNELS, config=OFF)

    def tokens(values: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x.expand(len(past), 1, -1, -1) for x in keys_and_values(values))

    cache.append(*tokens(torch.zeros(int(past.max()), dtype=torch.int64)), lengths=past)
    cache.append(*tokens(1 + torch.arange(options["T"])), lengths=lengths)
    added = cache.dequantize()[1][:, 0].round()[..., 1:]
    assert [added.sum(-1).int().tolist()] == matrices
    for row, (before, count) in enumerate(zip(past.tolist(), lengths.tolist(), strict=True)):
        assert added[row].argmax(-1)[before : before + count].tolist() == list(range(count))


@pytest.mark.skipif(not ta.backends()["cpu"].usable, reason="pages need the CPU kernels")
@pytest.mark.parametrize(("heading", "matrices"), cases(paged_attention))
def test_paged_attention(heading, matrices):
    options = options_of(heading)
    starts, ends, tokens = (options.pop(name) for name in ("query_start", "seq_lens", "tokens"))
    fmt = PagedFormat.of(ta.TurboConfig.serving(guard="off"), CHANNELS, [((4,), (4,))])
    pages = torch.zeros(len(ends), fmt.page_bytes, dtype=torch.uint8)
    slots = TailBlocks(1, len(ends), 1, CHANNELS)
    counts = [stop - start for start, stop in itertools.pairwise(starts)]

    def step(begins: list[int], counts: list[int], padding: int) -> Tensor:
        positions = torch.cat([begin + torch.arange(n) for begin, n in zip(begins, counts, strict=True)])
        k, v = keys_and_values(torch.nn.functional.pad(positions, (0, padding)))
        out = torch.zeros(len(k), 1, CHANNELS)
        batch = PagedBatch(
            torch.tensor([0, *counts]).cumsum(0),
            torch.tensor([begin + n for begin, n in zip(begins, counts, strict=True)]),
            torch.arange(len(counts))[:, None],
            torch.arange(len(counts)),
        )
        q, k, v = torch.zeros_like(out), k[:, None], v[:, None]
        assert paged_attention(fmt, 0, batch, q, k, v, out, pages, slots, **options)
        return out

    before = [end - count for end, count in zip(ends, counts, strict=True)]
    step([0] * len(ends), before, 0)
    out = step(before, counts, tokens - starts[-1])
    (drawn,) = matrices
    assert len(drawn) == tokens
    for row, (got, want) in enumerate(zip(attended(out[:, 0], len(drawn[0])), drawn, strict=True)):
        assert (want == got) if row < starts[-1] else (want == [None] * len(got)), f"row {row}"
