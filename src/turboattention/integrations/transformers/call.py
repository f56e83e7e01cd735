"""One attention call of a model, translated to this package's functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...api import turbo_attention, turbo_attention_with_kvcache
from ...config import TurboConfig
from ...kv.cache import KVCache
from ...softmax import sink_share


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one dtype: if their dtypes differ under autocast, all are cast to autocast's dtype, as in SDPA."""
    device = tensors[0].device.type
    if all(x.dtype == tensors[0].dtype for x in tensors) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


@dataclass(frozen=True)
class LayerCall:
    """The options of one attention call.

    scale: factor of the logits. softcap: cap of the logits. window: tokens visible to a query, including its own.
    sinks: learned sink logits [Hq], an extra column of the softmax without a value.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    config: TurboConfig | None = None
    backend: str = "auto"

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """[B, Hq, Lq, D] over full-precision keys; causal is bottom-right aligned."""
        config = self.config
        if config is not None and config.guard == "warn":  # dense_guard.py warns, and names the layer
            config = config.replace(guard="off")
        result = turbo_attention(
            query, key, value, mask, is_causal, self.scale, config=config, **self._shared(is_causal)
        )
        return self.with_sinks(result)

    def cached(
        self,
        query: Tensor,
        cache: KVCache,
        new: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """[B, Hq, Lq, D] over the packed cache, to which the `new` keys and values are appended."""
        key, value = new if new is not None else (None, None)
        result = turbo_attention_with_kvcache(
            query,
            cache,
            key,
            value,
            lengths=lengths,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scale,
            **self._shared(is_causal),
        )
        return self.with_sinks(result)

    def _shared(self, is_causal: bool) -> dict[str, Any]:
        return {
            "window_size": self.window if is_causal else None,
            "softcap": self.softcap,
            "return_lse": self.sinks is not None,
            "backend": self.backend,
        }

    def with_sinks(self, result: Any) -> Tensor:
        """The output of a call with the options of `_shared`, with the learned sinks applied."""
        if self.sinks is None:
            return result
        out, lse = result
        return (out * sink_share(lse.float(), self.sinks)).to(out.dtype)
