"""A model's decode step at fixed addresses: tried, captured as a CUDA graph, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import TurboCache
from .graphed import Given
from .static_cache import StaticCache


class StaticStep:
    """A model's decode step at fixed addresses."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], cache: TurboCache):
        self._forward, self._cache, self._layers = forward, cache, cache.layers
        self._static = StaticCache.of(cache)
        batch, device = cache.batch_size, model.device
        room = max(layer.kv.max_tokens - int(layer.kv.lengths.min()) for layer in cache.layers)
        stored = cache.get_seq_length()
        with torch.inference_mode(False):  # they outlive whatever mode this step runs in
            self._tokens, self._positions = (torch.zeros(batch, 1, dtype=torch.int64, device=device) for _ in range(2))
            self._shown = torch.ones(batch, stored + room + 1, dtype=torch.bool, device=device)
            self._heard = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        valid = cache.layers[0].valid
        self._padded = valid is not None
        if valid is not None:
            self._shown[:, :stored] = valid.to(device)
        self._device = device
        self._out: Any = None
        self._flag: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def current(self) -> bool:
        """Whether the cache has not changed since the last step, and has room for another."""
        graphs = self._static.graphs
        return len(graphs) == len(self._layers) and all(graph.current and not graph.full for graph in graphs)

    def agrees(self, step: Given) -> bool:
        """Whether mask and positions agree with the cache. Waits for the device, once."""
        stored = self._cache.get_seq_length()
        said = []
        if step.mask is not None:
            said.append((step.mask.bool() == self._shown[:, : stored + 1]).all())
        if step.positions is not None and not self._padded:
            said.append((step.positions >= stored).all())
        return not said or bool(torch.stack(said).all())

    def make(self, step: Given, capture: bool) -> None:
        """Try the step on copies, which compiles what it needs, and capture it. The cache does not change."""
        self._take(step)
        if not capture:
            self._work()
            self._try(False)
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Libraries initialize in the first and second call on a stream, which must not be captured.
                for _ in range(2):
                    self._work()
            torch.cuda.current_stream().wait_stream(stream)
            self._try(False)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as the reader of a streamer, may use the device.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._work()
            self._graph = graph

    def run(self, step: Given) -> Any:
        """The step: the model's output, logits [B, 1, V] of its own. Raises NonFiniteError for an earlier step; the
        cache is then as it was before this one."""
        self._ready()
        self._take(step)
        try:
            if self._graph is None:
                self._work()
            else:
                self._graph.replay()
            assert self._flag is not None
            self._heard.copy_(self._flag, non_blocking=True)
            out = type(self._out)(logits=self._out.logits.clone(), past_key_values=self._cache)
            self._count()  # while the device works
        except BaseException:
            self.close()  # its progress is unknown: the next call starts from the host's counts
            raise
        return out

    def close(self) -> None:
        """Release the pages that were not filled. The cache can be used further without the graph."""
        self._graph = self._out = self._flag = None
        for graph in self._static.graphs:
            graph.send()
            graph.close()

    def _try(self, trying: bool) -> None:
        for layer in self._static.layers:
            layer.trying = trying

    def _work(self) -> None:
        """The device's work of a step; the same for every step."""
        self._out = self._forward(
            input_ids=self._tokens,
            position_ids=self._positions,
            past_key_values=self._static,
            use_cache=True,
            return_dict=True,
        )
        self._flag = torch.stack([graph.flag for graph in self._static.graphs]).amax(0)

    def _take(self, step: Given) -> None:
        self._tokens.copy_(step.tokens)
        if step.positions is None:
            self._positions.fill_(self._cache.get_seq_length())
        else:
            self._positions.copy_(step.positions)

    def _ready(self) -> None:
        if int(self._heard):
            self._heard.zero_()
            for graph in self._static.graphs:
                graph.send()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        for graph in self._static.graphs:
            graph.ready()

    def _count(self) -> None:
        for layer, graph in zip(self._layers, self._static.graphs, strict=True):
            assert layer.kv is not None
            layer.take_step()
            graph.count()
