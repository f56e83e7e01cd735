"""What steps keep is made and changed outside of `torch.inference_mode`, in every order of the modes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import turboattention as ta
from turboattention.errors import NonFiniteError
from turboattention.impl.triton import steps as triton_steps
from turboattention.impl.triton.graph import DecodeGraph
from turboattention.kernels.triton import decode_rows, page_offsets
from turboattention.kv.layout import PageLayout
from turboattention.paged import TailBlocks

from ...helpers import qkv
from ...kv.tools import append_by_stages, content, filled
from .tools import assert_close

NO_SINKS = ta.TurboConfig(guard="off", sink_tokens=0)
MODES = (torch.no_grad, torch.inference_mode)


def in_every_order(count: int) -> Any:
    """A test whose argument `modes` is so many of the two."""
    orders = list(itertools.product(MODES, repeat=count))
    return pytest.mark.parametrize("modes", orders, ids=["-".join(x.__name__ for x in modes) for modes in orders])


def new(turn: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(2, 4, 2, 1, 1, 16, seed=200 + turn)


def tensors(x: Any, seen: set[int]) -> Iterator[Tensor]:
    """All that are reachable from an object of this package."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from tensors(value, seen)
    elif isinstance(x, list | tuple):
        for value in x:
            yield from tensors(value, seen)
    elif type(x).__module__.startswith("turboattention"):
        yield from tensors(getattr(x, "__dict__", {}), seen)


def kept(*owners: Any) -> list[Tensor]:
    return list(tensors(owners, set()))


@in_every_order(3)
def test_a_graph_over_a_flush(modes):
    """Captured, stepped over the end of a block and continued by plain calls, each in a mode of its own."""
    make, step, after = modes
    with after():
        cache, *_ = filled([126, 190], config=NO_SINKS, max_tokens=256)
        want = cache.clone()
    with make():
        graph = DecodeGraph(cache, 4, capture=False)
        graph.try_out(*new(9))
    for turn in range(2):
        q, k, v = new(turn)
        with step():
            got = tuple(x.clone() for x in graph.step(q, k, v))
        with after():
            assert_close(got, ta.turbo_attention_with_kvcache(q, want, k, v, return_lse=True, backend="reference"))
        # Of the graph, what a step gave is the caller's.
        assert not [x for x in kept(cache, graph._steps, graph._inputs) if x.is_inference()]
    with after():
        graph.close()
        q, k, v = new(3)
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
        ta.turbo_attention_with_kvcache(q, want, k, v, backend="reference")
        cache.crop(100)
        want.crop(100)
        assert content(cache) == content(want)


@in_every_order(2)
def test_plain_steps(modes):
    """A first block that fills, so that its mean is taken on the device, and a page in a table that was made before."""
    cache, *_ = filled([62, 62], config=NO_SINKS)
    want = cache.clone()
    for turn, mode in enumerate((*modes, *modes)):
        q, k, v = new(turn)
        mask = torch.zeros(1, 1, 1, 63 + turn)
        mask[..., :5] = -torch.inf
        with mode():
            ta.turbo_attention_with_kvcache(q, cache, k, v, attn_mask=mask, backend="triton")
        append_by_stages(want, k, v)
        assert content(cache) == content(want)
        assert not [x for x in kept(cache) if x.is_inference()]


@in_every_order(2)
def test_steps_that_a_benchmark_takes_by_itself(modes):
    """`steps_of` keeps what it makes with the cache, whoever asks."""
    cache, *_ = filled([126, 190], config=NO_SINKS)
    first, then = modes
    with first():
        assert triton_steps.steps_of(cache) is not None
    with then():
        for turn in range(3):
            ta.turbo_attention_with_kvcache(*_split(cache, turn), backend="triton")
    assert not [x for x in kept(cache) if x.is_inference()]


def _split(cache: ta.KVCache, turn: int) -> tuple[Any, ...]:
    q, k, v = new(turn)
    return q, cache, k, v


@in_every_order(2)
@pytest.mark.parametrize("graph", [False, True])
def test_what_was_not_finite_is_told_in_any_mode(graph, modes):
    make, told = modes
    q, k, v = new(0)
    k[0, 0, 0, 0] = torch.nan
    with make():
        cache, *_ = filled([130, 191], config=NO_SINKS, max_tokens=256)
        held = DecodeGraph(cache, 4, capture=False) if graph else None
    with make():
        if held is not None:
            held.step(q, k, v)
        else:
            ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
    with told(), pytest.raises(NonFiniteError):
        cache.look()
    cache.look()


@in_every_order(2)
def test_tail_blocks_of_a_server(modes):
    make, told = modes
    with make():
        blocks = TailBlocks(1, 2, 2, 16)
    with torch.inference_mode():
        blocks.flag.fill_(1)
    with told():
        assert blocks.poll_nonfinite()
    assert not blocks.poll_nonfinite()
    assert not [x for x in kept(blocks) if x.is_inference()]


def test_tables_for_ever():
    layout, cpu = PageLayout(16, 64, (4, 2), (3, 3), token_scales=True), torch.device("cpu")
    with torch.inference_mode():
        held = (
            page_offsets.all_page_offsets(layout, cpu),
            page_offsets.head_page_offsets(layout, (1,), cpu),
            decode_rows._blank(5, cpu),
        )
    assert not [x for x in held if x.is_inference()]
