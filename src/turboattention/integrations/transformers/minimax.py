"""A `TurboCache` that MiniMax's models take: they ask for their own class of caches, and keep states by its methods."""

from __future__ import annotations

from torch import Tensor
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from .cache import TurboCache


class MiniMaxTurboCache(TurboCache, MiniMaxCache):
    """What `TurboCache` makes for these models. The states of lightning attention are in the layers of linear attention
    that other hybrids have, and all else is as there."""

    def __len__(self) -> int:
        return len(self.layers)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The state [B, H, D, D] of a layer; None before the first token."""
        return self.layers[layer_idx].recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)
