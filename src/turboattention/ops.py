"""The two calls of api.py as operators of `torch.ops.turboattention`, for `torch.compile(fullgraph=True)`.

api.py uses them only while Dynamo traces. Their implementations call api.py, including validation, so compiled code
raises the same errors; only gradients are refused while tracing. Their fake implementations return shapes and dtypes.
The graph holds the handle of a cache (kv/handle.py), so a growing cache is not recompiled. `KVCache.append` and
`seq_lens` are operators too; other uses of a cache break the graph. A `TurboConfig` must be created outside compiled
code.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from .config import TurboConfig
from .kv.handle import LIBRARY, cache_of

_SOFTMAX = "Tensor? attn_mask, bool is_causal, float? scale, SymInt? window_size, float? softcap"


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
    config: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from .api import turbo_attention

    result = turbo_attention(
        q,
        k,
        v,
        attn_mask,
        is_causal,
        scale,
        window_size=window_size,
        softcap=softcap,
        return_lse=True,
        config=config_of(config),
        backend=backend,
    )
    return _owned(*result)


def _attention_with_kvcache(
    handle: Tensor,
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    lengths: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window_size: int | None,
    softcap: float | None,
    backend: str,
    v_head_dim: int,
) -> tuple[Tensor, Tensor]:
    from .api import turbo_attention_with_kvcache

    result = turbo_attention_with_kvcache(
        q,
        cache_of(handle),
        k_new,
        v_new,
        lengths=lengths,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        return_lse=True,
        backend=backend,
    )
    return _owned(*result)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_results(q, v.shape[-1])


def _fake_attention_with_kvcache(handle: Tensor, q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_results(q, args[-1])


def _fake_results(q: Tensor, v_head_dim: int) -> tuple[Tensor, Tensor]:
    """out [..., Lq, Dv] and lse [..., Lq], float32 (float64 for float64 q); both contiguous."""
    out = torch.empty(*q.shape[:-1], v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, torch.empty(q.shape[:-1], dtype=lse, device=q.device)


def _owned(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Make results contiguous, as the fake implementations declare them."""
    return out.contiguous(), lse.contiguous()


@functools.lru_cache(maxsize=64)
def config_of(text: str) -> TurboConfig | None:
    """Inverse of `TurboConfig.text`; None for the empty string."""
    if not text:
        return None
    fields = json.loads(text)
    if isinstance(fields["bits"], list):
        fields["bits"] = tuple(fields["bits"])
    return TurboConfig(**fields)


LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {_SOFTMAX}, str config, str backend) -> (Tensor, Tensor)")
LIBRARY.define(
    "attention_with_kvcache(Tensor(a!) handle, Tensor q, Tensor? k_new, Tensor? v_new, Tensor? lengths, "
    f"{_SOFTMAX}, str backend, int v_head_dim) -> (Tensor, Tensor)"
)
LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention_with_kvcache", _attention_with_kvcache, "CompositeExplicitAutograd")
torch.library.register_fake("turboattention::attention", _fake_attention, lib=LIBRARY)
torch.library.register_fake("turboattention::attention_with_kvcache", _fake_attention_with_kvcache, lib=LIBRARY)

attention = torch.ops.turboattention.attention.default
attention_with_kvcache = torch.ops.turboattention.attention_with_kvcache.default
