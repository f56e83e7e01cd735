"""What is measured: shapes of real models on a GPU, tiny ones where there is none."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    """A decoder's shapes; random weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int


@dataclass(frozen=True)
class Plan:
    """prefill: (batch, tokens); decode: (batch, tokens); bits of decode; throughput's context lengths; `sweep_`: shapes
    that launches are tried on, `sweep_pages` as (tokens before, new tokens)."""

    heads: int
    kv_heads: int
    head_dim: int
    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int], ...]
    bits: tuple[int | str, ...]
    graph: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    sweep_decode: tuple[tuple[int, int], ...]
    sweep_prefill: tuple[tuple[int, int], ...]
    sweep_pages: tuple[tuple[int, int], ...]
    model: Model
    memory_limit: float = field(default=float("inf"))


LLAMA_3_8B = Model(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, inner=14336)

REAL = Plan(
    heads=32,
    kv_heads=8,
    head_dim=128,
    prefill=((2, 8192), (1, 16384)),
    decode=((16, 8192), (64, 8192), (1, 131072)),
    bits=(4, 3, "mixed", 2),
    graph=((1, 8192), (16, 8192), (64, 8192)),
    contexts=(8192, 32768),
    sweep_decode=((16, 8192), (64, 8192)),
    sweep_prefill=((1, 16384),),
    sweep_pages=((0, 8192), (14336, 2048)),
    model=LLAMA_3_8B,
    memory_limit=72e9,
)

TINY = Plan(
    heads=2,
    kv_heads=1,
    head_dim=64,
    prefill=((1, 70),),
    decode=((1, 192),),
    bits=(4,),
    graph=((1, 190),),
    contexts=(130,),
    sweep_decode=((1, 192),),
    sweep_prefill=((1, 70),),
    sweep_pages=((64, 70),),
    model=Model(layers=1, hidden=128, heads=2, kv_heads=1, head_dim=64, inner=128),
    memory_limit=7e5,
)
