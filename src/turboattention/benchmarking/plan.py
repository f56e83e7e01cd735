"""The rows of a benchmark, measured one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from ..config import TurboConfig
from .compare import measure
from .contenders import turbo
from .peers import PEERS, peers_for
from .problem import Problem, Shape, make_problem
from .records import Row
from .statistics import Spread
from .steps import linearity, measure_steps
from .storing import measure_compression, measure_memory
from .timing import Effort

WORKS = ("prefill", "chunk", "decode", "steps", "compress", "memory")

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """The measurements of a benchmark.

    works: some of WORKS. backend: a backend's name, not "auto". settings: (label, configuration) of the caches.
    lengths, head_dims: for all works; by default those of the tables.
    """

    works: Sequence[str]
    backend: str
    settings: Sequence[tuple[str, TurboConfig]]
    heads: int = 8
    kv_heads: int = 2
    lengths: dict[str, Sequence[int]] = field(default_factory=dict)
    head_dims: dict[str, Sequence[int]] = field(default_factory=dict)
    masks: Sequence[bool] = (True, False)
    peers: Sequence[str] = tuple(PEERS)
    dtype: torch.dtype = torch.float32
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    step_blocks: int = 4

    @property
    def subject(self) -> str:
        return f"turboattention {self.backend}"


CHUNK_QUERIES = 256

WINDOW = 512
"""Window of the caches whose memory is measured; half of the context if that is shorter."""

LENGTHS = {
    "prefill": (1024, 2048, 4096, 8192),
    "chunk": (2048, 8192),
    "decode": (4096, 8192, 32768),
    "steps": (4096, 8192, 16384, 32768),
    "compress": (4096,),
    "memory": (8192,),
}
QUICK_LENGTHS = {
    "prefill": (512,),
    "chunk": (1024,),
    "decode": (2048,),
    "steps": (1024, 2048),
    "compress": (1024,),
    "memory": (8192,),
}
HEAD_DIMS = {"prefill": (64, 128)}


def run(plan: Plan, say: Notify = lambda _: None) -> Iterator[Row]:
    """Yield each row when it has been measured."""
    makers = {
        "prefill": _prefill,
        "chunk": _chunk,
        "decode": _decode,
        "steps": _steps,
        "compress": _compress,
        "memory": _memory,
    }
    for work in plan.works:
        for head_dim in plan.head_dims.get(work, HEAD_DIMS.get(work, (128,))):
            lengths = plan.lengths.get(work) or LENGTHS[work]
            yield from makers[work](plan, head_dim, lengths, lambda text, work=work: say(f"{work}: {text}"))


def _row(plan: Plan, work: str, shape: Shape, bits: str | None, **values: object) -> Row:
    dtype = str(plan.dtype).removeprefix("torch.")
    return Row(work, asdict(shape), bits, plan.subject, dtype, **values)  # type: ignore[arg-type]


def _prefill(plan: Plan, head_dim: int, lengths: Sequence[int], say: Notify) -> Iterator[Row]:
    config = TurboConfig()
    for causal in plan.masks:
        for length in lengths:
            shape = Shape(plan.heads, plan.kv_heads, head_dim, length, length, causal)
            problem = make_problem(shape, plan.dtype, plan.seed)
            yield _measured(plan, "prefill", None, problem, config, say)


def _chunk(plan: Plan, head_dim: int, lengths: Sequence[int], say: Notify) -> Iterator[Row]:
    return _over_cache(plan, "chunk", CHUNK_QUERIES, head_dim, lengths, say)


def _decode(plan: Plan, head_dim: int, lengths: Sequence[int], say: Notify) -> Iterator[Row]:
    return _over_cache(plan, "decode", 1, head_dim, lengths, say)


def _over_cache(
    plan: Plan, work: str, queries: int, head_dim: int, lengths: Sequence[int], say: Notify
) -> Iterator[Row]:
    """Attention of this many queries over a cache, without a causal mask."""
    for length in lengths:
        shape = Shape(plan.heads, plan.kv_heads, head_dim, queries, length)
        problem = make_problem(shape, plan.dtype, plan.seed)
        for label, config in plan.settings:
            say(f"{label}, {length:,} tokens: filling the cache")
            filled = problem.with_cache(config)
            row = _measured(plan, work, label, filled, config, say)
            assert filled.cache is not None
            yield replace(row, figures=row.figures | {"cache_bytes": filled.cache.nbytes})


def _measured(plan: Plan, work: str, bits: str | None, problem: Problem, config: TurboConfig, say: Notify) -> Row:
    shape = problem.shape
    what = f"{bits or ('causal' if shape.causal else 'full')}, {shape.keys:,} tokens"
    row = _row(plan, work, shape, bits)
    subject = turbo(problem, plan.backend, config)
    peers = peers_for(list(plan.peers), problem, config)
    return measure(row, subject, problem, peers, plan.backend, plan.effort, lambda name: say(f"{what}: {name}"))


def _steps(plan: Plan, head_dim: int, lengths: Sequence[int], say: Notify) -> Iterator[Row]:
    for label, config in plan.settings:
        medians: list[float] = []
        for length in lengths:
            say(f"{label}, {length:,} tokens")
            shape = Shape(plan.heads, plan.kv_heads, head_dim, 1, length)
            found = measure_steps(shape, config, plan.backend, plan.step_blocks)
            medians.append(found.seconds.median)
            figures = {"flush_over_median": found.flush, "worst_over_median": found.worst}
            last = length == lengths[-1] and len(set(lengths)) > 1
            figures |= linearity(list(lengths), medians) if last else {}
            yield _row(plan, "steps", shape, label, seconds=found.seconds, figures=figures)


def _compress(plan: Plan, head_dim: int, lengths: Sequence[int], say: Notify) -> Iterator[Row]:
    for label, config in plan.settings:
        for length in lengths:
            say(f"{label}, {length:,} tokens")
            shape = Shape(plan.heads, plan.kv_heads, head_dim, 1, length)
            found = measure_compression(shape, config, plan.backend, plan.effort)
            figures = _spread_figures("share", found.share) | {
                "decode_seconds": found.decode.median,
                "single_append_seconds": found.single,
                "single_append_share": found.single / found.decode.median,
            }
            yield _row(plan, "compress", shape, label, seconds=found.block, figures=figures)


def _spread_figures(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_p20": spread.p20, f"{name}_p80": spread.p80}


def _memory(plan: Plan, head_dim: int, lengths: Sequence[int], say: Notify) -> Iterator[Row]:
    for label, config in plan.settings:
        for length in lengths:
            say(f"{label}, {length:,} tokens")
            for window in (None, min(WINDOW, -(-length // 2))):
                shape = Shape(plan.heads, plan.kv_heads, head_dim, 1, length, window=window)
                yield _row(plan, "memory", shape, label, figures=measure_memory(shape, config))
