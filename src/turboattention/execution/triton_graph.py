"""A decode step as a CUDA graph: everything it needs stands at fixed places, and the host only counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..kv.cache import KVCache
from .triton_steps import BLOCK, Call, look, steps_of


class DecodeGraph:
    """Decode steps of one token over a cache, captured once and replayed.

        graph = DecodeGraph(cache, num_heads=32)
        out, lse = graph.step(q, k, v)

    Within a capture of the caller's own (a whole model's step) call `attend`, and `advance` before every
    replay. In between, `cache` may be read and saved; after anything else that changes it, make a new graph.

    Args:
        cache: on a CUDA device, past its first block and its sinks, with `max_tokens`: pages for so many
            tokens of every sequence are taken here and given back by `close`.
        num_heads: of the queries.
        scale, window_size, softcap: as in `turbo_attention_with_kvcache`.
        capture: without, `step` runs the same work eagerly on the same memory.

    Raises:
        InputError: a cache that is not as above. UnsupportedError: one whose configuration takes no steps.
    """

    def __init__(
        self,
        cache: KVCache,
        num_heads: int,
        *,
        scale: float | None = None,
        window_size: int | None = None,
        softcap: float | None = None,
        capture: bool = True,
    ):
        if cache.max_tokens is None or int(cache.lengths.max()) >= cache.max_tokens or not cache.settled:
            raise InputError(
                "cache: expected max_tokens beyond its lengths and every sequence past its first block and sinks, "
                f"got max_tokens={cache.max_tokens} and lengths {cache.lengths.tolist()}"
            )
        steps = steps_of(cache)
        if steps is None or cache.dtype is None or cache.device is None:
            raise UnsupportedError("cache: expected a configuration whose steps are one call, got another")
        self._cache, self._steps = cache, steps
        steps.reserve([cache.max_tokens // BLOCK - int(count) for count in cache.page_counts])
        window = cache.window_size if window_size is None else window_size
        self._call = Call(cache.head_dim**-0.5 if scale is None else scale, True, window, softcap)
        heads = (num_heads, cache.num_kv_heads, cache.num_kv_heads)
        self._inputs = tuple(
            torch.zeros(cache.batch_size, h, 1, cache.head_dim, dtype=cache.dtype, device=cache.device) for h in heads
        )
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._graph = self._capture() if capture else None

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, Hq, 1, D], k, v [B, Hkv, 1, D] -> out like q and lse float32 [B, Hq, 1], valid until the next step.

        Raises InputError where the cache is full or was changed by something else; NonFiniteError for values of
        an earlier step.
        """
        self.advance()
        for held, new in zip(self._inputs, (q, k, v), strict=True):
            held.copy_(new)
        if self._graph is None:
            self._outputs = self.attend(*self._inputs)
        else:
            self._graph.replay()
        assert self._outputs is not None
        return self._outputs

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The device's work of a step, and none of the host's."""
        return self._steps.run(q, k, v, self._call, fills=True)

    def advance(self) -> None:
        """Count a step on the host, ahead of the device. Raises as `step` does."""
        look(self._cache)
        if self._cache.kept is not self._steps:
            raise InputError("cache: expected it as the graph left it, got one changed by another call")
        assert self._cache.max_tokens is not None
        if int(self._cache.lengths.max()) >= self._cache.max_tokens:
            raise InputError(f"cache: expected room in its max_tokens={self._cache.max_tokens}, got it full")
        filled = self._steps.filled_by(1)
        assert filled is not None
        pages = self._steps.fresh(self._cache, filled)
        self._steps.count(self._cache, 1, filled, pages)

    def close(self) -> None:
        """Give back pages that were not filled. The graph is then of no use."""
        self._steps.release()
        if self._cache.kept is self._steps:
            self._cache.kept = None

    def _capture(self) -> torch.cuda.CUDAGraph:
        # Kernels are compiled before the capture, by a step on copies.
        stream = torch.cuda.Stream(self._cache.device)
        stream.wait_stream(torch.cuda.current_stream(self._cache.device))
        with torch.cuda.stream(stream):
            q, k, v = self._inputs
            self._steps.copied().run(q, k, v, self._call, fills=True)
        torch.cuda.current_stream(self._cache.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self.attend(*self._inputs)
        return graph
