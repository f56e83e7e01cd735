"""Pages that a server manages: a check of prompts in pieces and then steps, which on a GPU are one CUDA graph, and
such a piece to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from plan import Plan
from problem import device, dtype, normals
from timing import on_gpu, relative_error
from torch import Tensor

import turboattention as ta
from turboattention.paged import BLOCK, PagedBatch, PagedFormat, TailBlocks, paged_attention

CONFIG = ta.TurboConfig.serving(guard="off")


def paged(plan: Plan, width: int) -> float:
    """Pages of `width` bits against each sequence through a cache of its own, by the reference, and page by page."""
    prompts, steps = ((1000, 300), 30) if on_gpu() else ((62, 126), 3)
    bits = torch.full((2, plan.kv_heads), width)
    widths = tuple(bits[0].tolist()), tuple(bits[1].tolist())
    fmt = PagedFormat.of(CONFIG, plan.head_dim, [widths])
    sequences = [_tokens(plan, count + steps, seed) for seed, count in enumerate(prompts)]
    wide = max(prompts) // BLOCK + 2
    table = torch.randperm(2 * wide).view(2, wide).to(device(), torch.int32)
    pages = torch.full((2 * wide, fmt.page_bytes), 0xAB, dtype=torch.uint8, device=device())
    opened = TailBlocks(1, 2, plan.kv_heads, plan.head_dim, device())
    tail_slots, results = torch.tensor([1, 0], device=device()), [[], []]

    def attend(rows: list[Tensor], starts: Tensor, lengths: Tensor, most: int) -> Tensor:
        out, batch = torch.empty_like(rows[0]), PagedBatch(starts, lengths, table, tail_slots, most)
        paged_attention(fmt, 0, batch, *rows, out, pages, opened, backend="triton")
        return out

    for begin, end in ((0.0, 0.6), (0.6, 1.0)):
        cuts = [(int(begin * count), int(end * count)) for count in prompts]
        rows = [torch.cat([x[side][a:b] for x, (a, b) in zip(sequences, cuts, strict=True)]) for side in range(3)]
        counts = [b - a for a, b in cuts]
        starts = torch.tensor([0, *counts], device=device()).cumsum(0)
        out = attend(rows, starts, torch.tensor([b for _, b in cuts], device=device()), max(counts))
        for result, part in zip(results, out.split(counts), strict=True):
            result.append(part)
    step = _stepper(attend, [x[:2] for x in _tokens(plan, 2, 9)])
    for turn in range(steps):
        at = [count + turn for count in prompts]
        rows = [torch.stack([x[side][i] for x, i in zip(sequences, at, strict=True)]) for side in range(3)]
        out = step(rows, torch.tensor(at) + 1)
        for result, part in zip(results, out.clone().split(1), strict=True):
            result.append(part)
    assert not int(opened.flag), "a flag was raised"
    worst = 0.0
    for number, (sequence, result) in enumerate(zip(sequences, results, strict=True)):
        q, k, v = (x.transpose(0, 1)[None] for x in sequence)
        cache = ta.KVCache(1, plan.kv_heads, plan.head_dim, config=CONFIG, head_bits=bits)
        want = ta.turbo_attention_with_kvcache(q, cache, k, v, backend="reference")[0].transpose(0, 1)
        worst = max(worst, relative_error(torch.cat(result), want))
        blocks = len(sequence[0]) // BLOCK
        held = cache.page_table
        stored = held.pools.compressed.gather(held.pages[0][:blocks])  # type: ignore[union-attr]
        assert torch.equal(pages[table[number, :blocks].long(), : stored.shape[1]], stored), "pages differ"
    assert worst <= 1e-3 + (3e-3 if dtype() == torch.bfloat16 else 0.0), f"relative error {worst:.1e}"
    return worst


def piece(plan: Plan, width: int, before: int, new: int) -> Callable[[], Tensor]:
    """A call that gives the attention of `new` tokens of a prompt behind `before`, a multiple of 64, over pages of
    `width` bits; the result's memory is that of the next call. Storing tokens again writes the same bytes, so that it
    may be repeated."""
    widths = (width,) * plan.kv_heads
    fmt = PagedFormat.of(CONFIG, plan.head_dim, [(widths, widths)])
    count = -(-(before + new) // BLOCK)
    table = torch.randperm(count)[None].to(device(), torch.int32)
    pages = torch.zeros(count, fmt.page_bytes, dtype=torch.uint8, device=device())
    opened = TailBlocks(1, 1, plan.kv_heads, plan.head_dim, device())

    def attend(rows: list[Tensor], begin: int) -> Callable[[], Tensor]:
        tokens, out = len(rows[0]), torch.empty_like(rows[0])
        given = ([0, tokens], [begin + tokens], [0])
        starts, lengths, tail_slots = (torch.tensor(x, dtype=torch.int32, device=device()) for x in given)
        batch = PagedBatch(starts, lengths, table, tail_slots, tokens)

        def call() -> Tensor:
            paged_attention(fmt, 0, batch, *rows, out, pages, opened, backend="triton")
            return out

        return call

    for begin in range(0, before, 2048):
        attend(_tokens(plan, min(2048, before - begin), begin), begin)()
    return attend(_tokens(plan, new, before), before)


def _stepper(attend: Callable[..., Tensor], like: list[Tensor]) -> Callable[[list[Tensor], Tensor], Tensor]:
    """Steps of one token for two sequences in memory that stays: a captured graph where there is a GPU. Storing a token
    again writes the same bytes, so that the run before the capture, which compiles, may be of the first step."""
    held = [torch.zeros_like(x) for x in like]
    starts, lengths = torch.arange(3, device=device()), torch.ones(2, dtype=torch.int64, device=device())
    made: list[Callable[[], Tensor]] = []

    def step(rows: list[Tensor], after: Tensor) -> Tensor:
        for x, row in zip((*held, lengths), (*rows, after), strict=True):
            x.copy_(row)
        if not made:
            made.append(lambda: attend(held, starts, lengths, 1))
            if on_gpu():
                made[0]()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = made[0]()
                made[0] = lambda: (graph.replay(), out)[1]
        return made[0]()

    return step


def _tokens(plan: Plan, count: int, seed: int) -> list[Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    heads = (plan.heads, plan.kv_heads, plan.kv_heads)
    return [normals(count, n, plan.head_dim, seed=10 * seed + side) for side, n in enumerate(heads)]
