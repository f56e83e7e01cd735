"""Tokens a second of a decoder's shapes with random weights, as many sequences as one memory
limit holds, with the quantized cache and with one of 16-bit floats."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import contenders
import torch
from plan import Model, Plan
from problem import device, dtype, filled_cache, normals, repeated
from timing import Work, attempted, each_call, graphed, on_gpu, once
from torch import Tensor
from torch.nn import functional

import turboattention as ta
from turboattention.benchmarking.records import Row
from turboattention.benchmarking.statistics import spread
from turboattention.impl.triton.graph import DecodeGraph

_STEPS = 64  # every sequence fills a block once
_ROOM = 128  # tokens of every sequence beyond its context
_SHARES = (0.97, 0.87)  # of the memory for caches; the second where the allocator's fragments leave too little


def rows(plan: Plan, peaks: dict[str, float]) -> Iterator[Row]:
    with torch.inference_mode(), _limited(_limit(plan)):
        layers = [_Layer(plan.model) for _ in range(plan.model.layers)]
        weights = sum(layer.nbytes for layer in layers)
        for context in plan.contexts:
            budget = _limit(plan) - weights - plan.memory_limit / 16  # activations
            for bits in (None, 4, 2):
                for share in _SHARES:
                    row = functools.partial(_measured, plan, layers, context, bits, share * budget)
                    row = attempted(row, "throughput", _shape(plan, context, bits, share * budget), _text(bits))
                    if "out of memory" not in (row.refused or ""):
                        break
                yield row


def _measured(plan: Plan, layers: list[_Layer], context: int, bits: int | None, budget: float) -> Row:
    model, shape = plan.model, _shape(plan, context, bits, budget)
    batch = shape["batch"]
    name = "16-bit cache" if bits is None else "turboattention triton"
    x = normals(batch, model.hidden, seed=7)
    _forget()
    try:
        caches = _floats(model, batch, context) if bits is None else _quantized(model, batch, context, bits)
        replay = graphed(functools.partial(_decode, layers, caches.attends, x), caches.advance)

        def step() -> None:
            caches.advance()
            replay()

        seconds = spread(each_call(step, _STEPS if on_gpu() else 2))
    except torch.cuda.OutOfMemoryError as error:
        return Row("throughput", shape, _text(bits), name, str(dtype()), refused=str(error).splitlines()[0])
    figures = {"tokens/s": batch / seconds.median, "cache bytes": float(caches.nbytes)} | _peak()
    return Row("throughput", shape, _text(bits), name, str(dtype()), None, seconds, figures=figures)


def _shape(plan: Plan, context: int, bits: int | None, budget: float) -> dict:
    """As many sequences as the budget holds."""
    batch = max(1, int(budget / plan.model.layers / _bytes_a_sequence(plan.model, context, bits)))
    return {"batch": batch, "keys": context, "layers": plan.model.layers, "memory_limit": _limit(plan)}


@contextlib.contextmanager
def _limited(limit: float) -> Iterator[None]:
    """PyTorch takes no more memory than this of the GPU: what does not fit raises OutOfMemoryError."""
    if not on_gpu():
        yield
        return
    _forget()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _forget() -> None:
    """Memory of earlier rows goes back, or it would count."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> dict[str, float]:
    """What the limit is held to: memory taken of the GPU, weights included."""
    return {"peak bytes": float(torch.cuda.max_memory_reserved())} if on_gpu() else {}


class _Caches(NamedTuple):
    """A way to attend for every layer, what the host does before a step, and bytes."""

    attends: list[Callable]
    advance: Work
    nbytes: int


def _floats(model: Model, batch: int, context: int) -> _Caches:
    """Static tensors, the new token always written behind the context; the quickest way to attend is taken."""
    size = 2, batch, model.kv_heads, context + 1, model.head_dim
    held = [normals(*size, seed=layer) for layer in range(model.layers)]
    q = normals(batch, model.heads, 1, model.head_dim, seed=5)
    ways = contenders.decode()
    times = {name: _time_or_never(functools.partial(way, q, *held[0])) for name, way in ways.items()}
    best = ways[min(times, key=lambda name: times[name])]

    def attend(cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache[0, :, :, -1:], cache[1, :, :, -1:] = k, v
        return best(q, cache[0], cache[1])

    attends = [functools.partial(attend, cache) for cache in held]
    return _Caches(attends, lambda: None, sum(x.nbytes for x in held))


def _quantized(model: Model, batch: int, context: int, bits: int) -> _Caches:
    config = ta.TurboConfig(bits=bits, guard="off")
    one = filled_cache(1, model.kv_heads, model.head_dim, context, config, max_tokens=context + _ROOM)
    held = [repeated(one, batch) for _ in range(model.layers)]
    graphs = [DecodeGraph(cache, model.heads, capture=False) for cache in held]

    def attend(graph: DecodeGraph, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return graph.attend(q, k, v)[0]

    def advance() -> None:
        for graph in graphs:
            graph.advance()

    attends = [functools.partial(attend, graph) for graph in graphs]
    return _Caches(attends, advance, sum(cache.nbytes for cache in held))


def _time_or_never(work: Work) -> float:
    try:
        return once(work)
    except Exception:  # a backend that does not take these shapes
        return float("inf")


def _decode(layers: list[_Layer], attends: list[Callable], x: Tensor) -> Tensor:
    for layer, attend in zip(layers, attends, strict=True):
        x = layer(x, attend)
    return x


class _Layer:
    """Attention and MLP of a Llama decoder: x [B, hidden] -> the same."""

    def __init__(self, model: Model):
        self.model = model
        kv = model.kv_heads * model.head_dim
        q = model.heads * model.head_dim
        shapes = ((q + 2 * kv, model.hidden), (model.hidden, q), (2 * model.inner, model.hidden))
        shapes += ((model.hidden, model.inner),)
        scale = model.hidden**-0.5
        self.qkv, self.out, self.up, self.down = (
            torch.randn(shape, dtype=dtype(), device=device()) * scale for shape in shapes
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.qkv, self.out, self.up, self.down))

    def __call__(self, x: Tensor, attend: Callable) -> Tensor:
        m, batch = self.model, len(x)
        normed = functional.rms_norm(x, (m.hidden,))
        heads = functional.linear(normed, self.qkv).view(batch, -1, 1, m.head_dim)
        q, k, v = heads.split([m.heads, m.kv_heads, m.kv_heads], 1)
        x = x + functional.linear(attend(q, k, v).reshape(batch, -1), self.out)
        gate, up = functional.linear(functional.rms_norm(x, (m.hidden,)), self.up).chunk(2, -1)
        return x + functional.linear(functional.silu(gate) * up, self.down)


def _bytes_a_sequence(model: Model, context: int, bits: int | None) -> float:
    """Of one layer."""
    floats = 2 * model.kv_heads * model.head_dim * (context + 1) * 2
    if bits is None:
        return floats
    config = ta.TurboConfig(bits=bits, guard="off")
    sample = filled_cache(1, model.kv_heads, model.head_dim, 192, config)
    assert sample.page_table is not None
    compressed = sample.page_table.pools.of(sinks=False)
    fixed = sample.nbytes - compressed.nbytes
    return fixed + -(-(context + _ROOM) // 64) * _placed(compressed.layout.page_bytes)


_SEGMENT, _UNIT = 2 << 20, 512


def _placed(size: int) -> float:
    """Bytes that PyTorch takes of a GPU for an allocation: of less than a MiB, as many as fit 2 MiB share these."""
    size = -(-size // _UNIT) * _UNIT
    return size if size > _SEGMENT // 2 else _SEGMENT / (_SEGMENT // size)


def _limit(plan: Plan) -> float:
    if not on_gpu():
        return plan.memory_limit
    return min(plan.memory_limit, 0.9 * torch.cuda.get_device_properties(0).total_memory)


def _text(bits: int | None) -> str | None:
    return None if bits is None else str(bits)
