"""A `TurboCache` for MiniMax models, which require their own cache class and store states through its methods."""

from __future__ import annotations

from torch import Tensor
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from .cache import TurboCache


class MiniMaxTurboCache(TurboCache, MiniMaxCache):
    """Created by `TurboCache` for these models. States of lightning attention are in the same layers as those of linear
    attention in other hybrids."""

    def __len__(self) -> int:
        return len(self.layers)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The state [B, H, D, D] of a layer; None before the first token."""
        return self.layers[layer_idx].recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)
