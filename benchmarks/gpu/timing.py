"""Times of GPU work: medians of triton.testing.do_bench in turns, graphs, and what the machine can do at best."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turboattention.benchmarking.statistics import Spread, paired_ratio, spread

Work = Callable[[], object]

ROUNDS = 5
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


def in_turns(works: dict[str, Work]) -> dict[str, tuple[Spread, Spread]]:
    """For each contender: seconds, and its time over the first one's, paired by round."""
    rounds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS if on_gpu() else 1):
        for name, work in works.items():
            rounds[name].append(once(work))
    first = next(iter(rounds.values()))
    return {name: (spread(values), paired_ratio(values, first)) for name, values in rounds.items()}


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
