"""Quantization error of the presets on synthetic tensors: the tables of docs/numerics.md."""

from __future__ import annotations

import torch
from torch import Tensor

from ..api import turbo_attention_with_kvcache
from ..config import TurboConfig
from ..kv.cache import KVCache
from ..kv.stage1 import MEAN_SKIPS
from ..reference.exact import exact_attention
from .synthetic import long_context_sink, synthetic_qkv

LAST_ROWS = 64

PRESETS: dict[str, TurboConfig] = {
    "tiles (paper)": TurboConfig.paper(),
    "+ K smoothing": TurboConfig.paper(smooth_k=True),
    "+ rotation": TurboConfig.paper(smooth_k=True, rotate=True),
    "+ token scales, no sink block": TurboConfig(search=False, sink_tokens=0, guard="off"),
    "+ sink block": TurboConfig(search=False, guard="off"),
    "+ search (default)": TurboConfig(guard="off"),
    "+ K of 4, 3 and 2 bits in order": TurboConfig(reorder_k=True, guard="off"),
}
"""Rows of the table, from the paper's preset to the default and beyond."""

EARLY: dict[str, tuple[int, bool]] = {
    "all rows": (1024, False),
    "first 128 rows": (128, False),
    "all rows, first block smoothed": (1024, True),
    "first 128 rows, first block smoothed": (128, True),
}
"""Rows of the table of the first rows: the arguments of `early_error`."""

_RUNNING = TurboConfig(bits=8, row_max="running", softmax="sas", sas_threshold=-6.0, guard="off")

LONG_CONTEXT: dict[str, TurboConfig] = {
    "running max, tile-wide s_P": _RUNNING.replace(p_scale="tile"),
    "running max, static 1/127": _RUNNING.replace(p_scale="static"),
    "block-local max (default)": TurboConfig(bits=8, guard="off"),
}
"""Columns of the long-context table; stage 2 is off, so that only the softmax differs."""


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`, in float64."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def preset_error(kind: str, bits: int, config: TurboConfig) -> tuple[float, float]:
    """Relative error of the attention output over the last 64 rows (causal, 1,024 tokens, D = 128).

    Returns (storage, whole): exact attention over the stored values, and the whole integer path.
    """
    wanted, *got = _outputs(kind, config.replace(bits=bits), slice(-LAST_ROWS, None), False)
    stored, whole = (relative_error(x, wanted) for x in got)
    return stored, whole


def early_error(kind: str, rows: int, known_mean: bool) -> tuple[float, float]:
    """As `preset_error`, for the default at 8 bits, over the first `rows` rows.

    known_mean: as if the mean of the first block were known before its keys are quantized, so that they are smoothed.
    """
    wanted, *got = _outputs(kind, TurboConfig(bits=8, guard="off"), slice(None), known_mean)
    stored, whole = (relative_error(x[:, :, :rows], wanted[:, :, :rows]) for x in got)
    return stored, whole


def _outputs(kind: str, config: TurboConfig, rows: slice, known_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of exact attention, of exact attention over the stored values, and of the whole integer path."""
    q, k, v = (torch.from_numpy(x) for x in synthetic_qkv(kind))
    q = q[:, :, rows]
    mean = k[0, :, MEAN_SKIPS : config.block_size].mean(1).float() if known_mean else None
    cache = KVCache(1, k.shape[1], k.shape[3], config=config, k_mean=mean)
    cache.append(k.float(), v.float())
    wanted, _ = exact_attention(q, k, v, is_causal=True)
    stored, _ = exact_attention(q, *cache.dequantize(), is_causal=True)
    return wanted, stored, turbo_attention_with_kvcache(q.float(), cache, backend="reference")


def long_context_error(tokens: int, gap: float, config: TurboConfig) -> float:
    """Relative error of one decode query whose first key gets a large part of the attention."""
    q, k, v = (torch.from_numpy(x) for x in long_context_sink(tokens, gap))
    wanted, _ = exact_attention(q, k, v)
    cache = KVCache(1, 1, k.shape[3], config=config)
    cache.append(k.float(), v.float())
    return relative_error(turbo_attention_with_kvcache(q.float(), cache, backend="reference"), wanted)
