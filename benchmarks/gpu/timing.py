"""Times of GPU work: medians of triton.testing.do_bench in turns, graphs, and what the machine can do at best."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from problem import dtype
from torch import Tensor

from turboattention.benchmarking.records import Row
from turboattention.benchmarking.statistics import Spread, paired_ratio, spread

Work = Callable[[], object]

ROUNDS = 5
WRONG = 0.1
"""Relative error from which on nothing is timed."""

MILLISECONDS = 60
"""Of samples for a contender in a round."""


def on_gpu() -> bool:
    return torch.cuda.is_available()


def rotated(works: Sequence[Work]) -> Work:
    """Calls that take turns, so that what one reads has left the cache when its turn comes again."""
    turns = itertools.cycle(works)
    return lambda: next(turns)()


def copies_past_cache(nbytes: int) -> int:
    """How many sets of inputs of so many bytes are together larger than twice the L2 cache."""
    if not on_gpu():
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(16, -(-2 * cache // max(1, nbytes))))


def in_turns(works: dict[str, Work]) -> tuple[dict[str, tuple[Spread, Spread]], dict[str, str]]:
    """For each contender: seconds, and its time over the first one's, paired by round; and what was wrong with those
    that failed, which the others outlive. The first one may not fail."""
    rounds: dict[str, list[float]] = {name: [] for name in works}
    first = next(iter(works))
    failed: dict[str, str] = {}
    for _ in range(ROUNDS if on_gpu() else 1):
        for name, work in works.items():
            if name in failed:
                continue
            try:
                rounds[name].append(once(work))
            except Exception as problem:
                if name == first:
                    raise
                failed[name] = said(problem)
    timed = {name: values for name, values in rounds.items() if name not in failed}
    return {name: (spread(values), paired_ratio(values, rounds[first])) for name, values in timed.items()}, failed


def said(problem: Exception) -> str:
    """A failure in one line."""
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:300]}"


def attempted(row: Callable[[], Row], work: str, shape: dict, bits: str | None = None) -> Row:
    """The row, or one that says why there is none: what comes after it is measured all the same."""
    try:
        return row()
    except Exception as problem:
        return Row(work, shape, bits, "turboattention triton", str(dtype()), refused=said(problem))


def wrong(work: str, shape: dict, bits: str | None, error: float) -> Row:
    """What stands for a row whose result was not what it should be."""
    return Row(work, shape, bits, "turboattention triton", str(dtype()), error, refused=f"WRONG, error {error:.3g}")


def once(work: Work, milliseconds: int = MILLISECONDS) -> float:
    """Seconds of a call: the median of many, the L2 cache emptied before each."""
    if not on_gpu():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    from triton.testing import do_bench

    return do_bench(work, warmup=10, rep=milliseconds, quantiles=[0.5]) / 1e3


def graphed(work: Work, before: Work = lambda: None) -> Work:
    """The same work as a CUDA graph, without the time of launching; as it is where there is no GPU. `before`
    is called in front of each run that is not a replay."""
    if not on_gpu():
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            before()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def each_call(work: Work, count: int) -> list[float]:
    """Seconds of every one of `count` calls in a row."""
    if not on_gpu():
        return [once(work) for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def peaks() -> dict[str, float]:
    """Measured, not claimed: bytes a second of a copy, operations a second of matrix products."""
    if not on_gpu():
        return {}
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    found = {"GB/s": 2 * x.numel() / once(functools.partial(y.copy_, x)) / 1e9}
    n = 8192
    a, b = (torch.randint(-100, 100, (n, n), dtype=torch.int8, device="cuda") for _ in range(2))
    found |= {"INT8 TOPS": _tops(n, lambda: torch._int_mm(a, b.t()))}
    f, g = a.to(torch.bfloat16), b.to(torch.bfloat16)
    return found | {"bfloat16 TFLOPS": _tops(n, lambda: f @ g.t())}


def _tops(n: int, work: Work) -> float:
    try:
        return 2 * n**3 / once(work) / 1e12
    except RuntimeError:
        return float("nan")


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())
