"""Replaces a `TurboCache` while a model's decode step is captured as a CUDA graph: its layers attend through
`DecodeGraph`, which does not read from the device, and the caller that replays the step counts the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedError
from ...impl.triton.graph import DecodeGraph
from .cache import TurboCache
from .call import LayerCall
from .layer import TurboLayer
from .masks import MaskPlan


class StaticLayer(TurboLayer):
    """The cache layer `layer` for steps of one token; its graph is created when the model first attends."""

    def __init__(self, layer: TurboLayer):
        vars(self).update(vars(layer))
        self.graph: DecodeGraph | None = None
        self.trying = True
        self._fixed: tuple[Any, ...] = ()

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        plan: MaskPlan | None,
        is_causal: bool,
        call: LayerCall,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [B, Hq, 1, D] over stored tokens and the pending one; on copies while `trying`.

        Raises:
            UnsupportedError: attention that a graph does not support, such as layers that share another's keys.
        """
        pending, self._pending = self._pending, None
        if pending is None or query.shape[2] != 1:
            raise UnsupportedError(
                f"model: layer {self.index} attends to keys of another layer, which a graph does not support"
            )
        if plan is not None and not plan.is_causal:
            raise UnsupportedError(
                f"model: layer {self.index} has a mask of another kind; graphs support causal and sliding-window "
                "attention"
            )
        fixed = query.shape[1], call.scale, call.window if is_causal else None, call.softcap
        if self.graph is None:
            assert self.kv is not None
            heads, scale, window, softcap = self._fixed = fixed
            self.graph = DecodeGraph(self.kv, heads, scale=scale, window_size=window, softcap=softcap, capture=False)
        if fixed != self._fixed:
            raise UnsupportedError(f"model: expected one call of attention in layer {self.index}, got several")
        step = self.graph.try_out if self.trying else self.graph.attend
        out, lse = step(query, *pending)
        return call.with_sinks(out if call.sinks is None else (out, lse))


class StaticCache(TurboCache):
    """The layers of a `TurboCache` as `StaticLayer`s."""

    layers: Sequence[StaticLayer]  # type: ignore[assignment]

    @classmethod
    def of(cls, cache: TurboCache) -> StaticCache:
        return cls.from_layers([StaticLayer(layer) for layer in cache.layers])  # type: ignore[return-value]

    @property
    def graphs(self) -> list[DecodeGraph]:
        """The graphs created so far."""
        return [layer.graph for layer in self.layers if layer.graph is not None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not available: a graph would keep the current number.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "model: expected one that knows a token's position by its position_ids, got one that asks for the cache's "
            "length, which a graph cannot update"
        )

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Sizes for masks, of which attention here only reads the kind."""
        return self.layers[layer_idx].get_seq_length()
