"""Attention over pages that a server manages: a server for tests, and what caches of one sequence each give."""

from __future__ import annotations

import random

import torch

import turboattention as ta
from turboattention.kv.cache import KVCache
from turboattention.paged import BLOCK, PagedBatch, PagedFormat, TailBlocks, paged_attention

from .helpers import normals

CONFIG = ta.TurboConfig.serving(guard="off")
HEADS, QUERY_HEADS = 2, 4
UNIFORM = {bits: ((bits,) * HEADS, (bits,) * HEADS) for bits in (8, 4, 3, 2)}
MIXED = ((4, 2), (2, 8))


class Server:
    """Pages in no order, slots, and what every sequence was given."""

    def __init__(
        self,
        head_bits=UNIFORM[4],
        head_dim=16,
        config=CONFIG,
        ring=BLOCK,
        slots=4,
        seed=0,
        layers=1,
        backend="auto",
        mean=None,
        order=None,
    ):
        self.random = random.Random(seed)
        orders = () if order is None else (order,) * layers
        self.fmt = PagedFormat.of(config, head_dim, [head_bits] * layers, means=(mean,) * layers, orders=orders)
        self.pages = torch.full((64, self.fmt.page_bytes + 64), 0xAB, dtype=torch.uint8)
        self.free = self.random.sample(range(64), 64)
        self.tail_blocks = TailBlocks(layers, slots, HEADS, head_dim, ring=ring)
        self.tail_blocks.codes[0].fill_(77)
        self.backend = backend
        self.blocks: dict[int, list[int]] = {}
        self.slots: dict[int, int] = {}
        self.lengths: dict[int, int] = {}

    def step(self, new: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], **options):
        """`new`: of each sequence q [Hq, T, D], k, v [H, T, D]; the results [Hq, T, D]."""
        for key, (q, _, _) in new.items():
            self.slots.setdefault(key, len(self.slots))
            self.lengths[key] = self.lengths.get(key, 0) + q.shape[1]
            table = self.blocks.setdefault(key, [])
            while len(table) * BLOCK < self.lengths[key]:
                table.append(self.free.pop())
        flat = [torch.cat([parts[i] for parts in new.values()], 1).transpose(0, 1).contiguous() for i in range(3)]
        counts = [parts[0].shape[1] for parts in new.values()]
        widest = max(len(self.blocks[key]) for key in new)
        table = [self.blocks[key] + [63] * (widest - len(self.blocks[key])) for key in new]
        batch = PagedBatch(
            torch.tensor([0, *counts]).cumsum(0),
            torch.tensor([self.lengths[key] for key in new]),
            torch.tensor(table),
            torch.tensor([self.slots[key] for key in new]),
            max(counts),
        )
        out = torch.full_like(flat[0], torch.nan)
        options.setdefault("backend", self.backend)
        self.finite = paged_attention(self.fmt, 0, batch, *flat, out, self.pages, self.tail_blocks, **options)
        return dict(zip(new, (x.transpose(0, 1) for x in out.split(counts)), strict=True))

    def holds(self, key: int, cache: KVCache, blocks: int) -> bool:
        """Whether a sequence's first pages are those of a cache, byte for byte."""
        assert cache.page_table is not None
        if not blocks:
            return True
        assert cache.page_table.pools.compressed is not None
        want = cache.page_table.pools.compressed.gather(cache.page_table.pages[0][:blocks])
        return all(torch.equal(self.page(key, block), want[block]) for block in range(blocks))

    def page(self, key: int, block: int) -> torch.Tensor:
        return self.pages[self.blocks[key][block], : self.fmt.layouts[0].page_bytes]


def tokens(
    seed: int, count: int, head_dim: int = 16, dtype: torch.dtype = torch.float32, query_heads: int = QUERY_HEADS
):
    q, k, v = (
        normals(1, heads, count, head_dim, seed=seed + i)[0] for i, heads in enumerate((query_heads, HEADS, HEADS))
    )
    k[..., 1] += 3.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def expected(sequence, head_bits, config=CONFIG, backend="reference", order=None, **options):
    """The whole sequence through a cache of its own, and the cache. Sinks: a column of the softmax without a value."""
    q, k, v = (x[None] for x in sequence)
    sinks = options.pop("sinks", None)
    sizes = 1, HEADS, q.shape[3]
    cache = KVCache(*sizes, config=config, head_bits=torch.tensor(head_bits), k_order=order)
    if sinks is None:
        return ta.turbo_attention_with_kvcache(q, cache, k, v, backend=backend, **options)[0], cache
    out, lse = ta.turbo_attention_with_kvcache(q, cache, k, v, backend=backend, return_lse=True, **options)
    total = torch.logaddexp(lse[0], sinks[:, None])
    return out[0] * (lse[0] - total).exp()[..., None], cache


def serve(server: Server, sequences: dict, schedule: list[dict[int, int]], **options) -> dict[int, torch.Tensor]:
    done = dict.fromkeys(sequences, 0)
    parts: dict[int, list] = {key: [] for key in sequences}
    for counts in schedule:
        new = {}
        for key, count in counts.items():
            new[key] = tuple(x[:, done[key] : done[key] + count] for x in sequences[key])
            done[key] += count
        for key, out in server.step(new, **options).items():
            parts[key].append(out)
    return {key: torch.cat(outs, 1) for key, outs in parts.items()}


def random_schedule(seed: int, totals: dict[int, int]) -> list[dict[int, int]]:
    """Prefill in pieces beside decoding, in random order, some sequences left out of some steps."""
    chance, left, schedule = random.Random(seed), dict(totals), []
    while any(left.values()):
        picked = [key for key, count in left.items() if count and chance.random() < 0.7]
        chance.shuffle(picked)
        step = {key: min(left[key], chance.choice((1, 1, 2, 30, 64, 65, 130))) for key in picked}
        for key, count in step.items():
            left[key] -= count
        schedule += [step] if step else []
    return schedule


def draft(server: Server, sequence, wrong, prompt: int, drafts: int) -> torch.Tensor:
    """A prompt, then steps of `drafts` tokens, of which the first few are the sequence's and stay."""
    chance, done, count = random.Random(drafts), prompt, sequence[0].shape[1]
    parts = [server.step({0: tuple(x[:, :prompt] for x in sequence)})[0]]
    while done < count:
        accepted = min(chance.randint(1, drafts), count - done)
        right, drafted = (x[:, done : done + accepted] for x in sequence), (x[:, : drafts - accepted] for x in wrong)
        out = server.step({0: tuple(torch.cat(pair, 1) for pair in zip(right, drafted, strict=True))})[0]
        parts.append(out[:, :accepted])
        done += accepted
        server.lengths[0] = done
    return torch.cat(parts, 1)
