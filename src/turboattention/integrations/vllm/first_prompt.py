"""The guard where widths are fixed (numerics.md, The guard): a layer's first prompt, stored and exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from ...guard import bound_of
from ...kv.cache import KVCache
from ...paged import BLOCK, PagedFormat
from ...reference.exact import exact_attention

_TOKENS = 512  # looked at
_QUERIES = 32  # the last ones


class FirstPrompt:
    """Judges one layer, `layer_format` its format alone. `first_head`: number of its first KV head in the model."""

    def __init__(self, layer_format: PagedFormat, first_head: int = 0):
        self.first_head = first_head
        self.config = layer_format.config.replace(guard="off")
        self.bits = torch.tensor(layer_format.head_bits[0])
        self.mean = layer_format.means[0] if layer_format.means else None

    def complaint(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, window: int | None
    ) -> str | None:
        """None, or which heads lose too much; None, too, where values are not finite, which is another complaint.

        q [T, Hq, D], k, v [T, Hkv, D]: a sequence from its start, of at least a block.
        """
        tokens = min(len(k) // BLOCK * BLOCK, _TOKENS)
        q, k, v = (x[:tokens].transpose(0, 1)[None].float() for x in (q, k, v))
        if not all(bool(x.isfinite().all()) for x in (q, k, v)):
            return None
        cache = KVCache(1, k.shape[1], k.shape[3], config=self.config, head_bits=self.bits, k_mean=self.mean)
        cache.append(k, v)
        q = q[:, :, -_QUERIES:]
        wanted, got = (
            exact_attention(q, *pair, is_causal=True, scale=scale, softcap=softcap, window_size=window)[0]
            for pair in ((k, v), cache.dequantize())
        )
        lost, whole = ((x[0].unflatten(0, (k.shape[1], -1)) ** 2).sum((1, 2, 3)).cpu() for x in (got - wanted, wanted))
        return self._message((lost / whole.clamp(min=1e-300)).sqrt())

    def _message(self, errors: Tensor) -> str | None:
        bounds = bound_of(self.bits)
        beyond = (~(errors <= bounds)).nonzero().flatten().tolist()
        if not beyond:
            return None
        worst = max(beyond, key=lambda head: float(errors[head]))
        k_bits, v_bits = self.bits[:, worst].tolist()
        return (
            f"KV heads {', '.join(str(self.first_head + head) for head in beyond)} lose too much in the quantized "
            f"cache (head {self.first_head + worst} has relative error {float(errors[worst]):.2f} at K {k_bits} and V "
            f"{v_bits} bits, bound {float(bounds[worst]):.2f}); widths are kept: calibrate the model, or serve it with "
            "more bits"
        )
