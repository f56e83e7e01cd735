"""The guard: compares attention over a cache's first compressed blocks with exact attention, head by head.

Low-bit storage can make the output of single heads useless without any visible error. When a cache compresses its
first block, sampled queries attend to its tokens twice: at full precision, and to their quantized form. A head whose
relative error is beyond the bound of its width is promoted to the next wider one, with one `GuardWarning` (`guarded`).
If 8 bits are not enough for a head, and the caller still has the tokens at full precision (`KVCache.exact_past`),
`BeyondInt8Error` is raised. If widths cannot change, as in vLLM's pages, there is only the warning
(`fixed_widths_message`). Bounds and procedure: numerics.md, The guard.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch
from torch import Tensor

from .config import TurboConfig
from .errors import GuardWarning
from .guard_sample import QUERIES, TOKENS, Sample, causal_attention, relative_errors
from .kv.cache import KVCache
from .kv.channel_order import ChannelOrder
from .kv.compression import Compression
from .kv.stage1 import Stage
from .params import AttentionParams
from .softmax import logit_scale
from .words import listed

BOUNDS = {8: 0.05, 4: 0.3, 3: 0.6, 2: 0.7}
"""Bits -> largest relative error (Frobenius norm) of a head's output. Well above the error of normally distributed
data, and below 1, which is the error of an output of zeros."""

EARLY_BOUND = 3 * BOUNDS[8]
"""Bound of the INT8 error before the first compressed block, where the estimate from few tokens is noisy; half of the
planned width's bound if that is larger. An exact layer takes 16 bits or more, which a small error does not justify."""

_PACKAGE = f"{os.path.dirname(__file__)}{os.sep}"

_WIDER = {2: 3, 3: 4, 4: 8, 8: 8}


class BeyondInt8Error(Exception):
    """Heads of a cache with `exact_past` stay beyond their bound at 8 bits; the text names them. The cache is
    unchanged."""


def guarded(
    cache: KVCache,
    staged: Stage,
    compression: Compression,
    q: Tensor,
    positions: Tensor,
    valid: Tensor,
    new: tuple[Tensor, Tensor],
    params: AttentionParams,
) -> Compression:
    """`compression` (`compression_of(cache, staged)`) at widths for which every head is within its bound; unchanged if
    it decides no widths, or the guard is off.

    Widths given by the user are never changed, only warned about.

    Args:
        q: [B, Hq, Lq, D], at `positions` (int64 [B, Lq]); rows not marked in `valid` (bool [B, Lq]) are padding.
        new: the call's k and v, each [B, Hkv, T, D].
        params: of the call; its mask is not applied.

    Raises:
        BeyondInt8Error: the cache has `exact_past`, widths may change, and 8 bits are not enough.
    """
    planned = compression.head_bits
    if cache.config.guard == "off" or not compression.decides or planned is None:
        return compression
    sample = Sample(cache, staged, compression, q, positions, valid, new, params)
    first = errors = sample.errors(planned)
    bits, beyond = planned, _beyond(errors, planned)
    failing = beyond.clone()
    if cache.config.guard == "adapt" and cache.given_bits is None:
        if cache.exact_past is not None:
            _check_int8(cache.first_head, sample, first, failing, planned)
        while bool(beyond.any()) and bool((bits[:, beyond] < 8).any()):
            bits = widen(bits, beyond)
            errors = sample.errors(bits)
            beyond = _beyond(errors, bits)
    if bool(failing.any()):
        message = _message(cache.first_head, failing, beyond, first, planned, bits)
        advice = _advice(sample, planned, failing)
        warnings.warn(f"{cache.label or 'cache'}: {message}; {advice}", GuardWarning, stacklevel=stacklevel_outside())
    return compression.at(bits)


def fixed_widths_message(
    config: TurboConfig,
    head_bits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_mean: Tensor | None = None,
    k_order: ChannelOrder | None = None,
    first_head: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    window_size: int | None = None,
) -> str | None:
    """The warning for storage whose widths cannot change; None if every head is within its bound.

    Also None if a value is not finite, which the caller reports on its own.

    Args:
        head_bits: int64 [2, Hkv], the widths of K and V.
        q, k, v: [T, Hq, D], [T, Hkv, D] twice: one sequence from its first token, at least a block long.
        k_mean, k_order: calibrated means of K, float [Hkv, D], and order of its channels.
        first_head: index in the model of the first KV head here.
        scale, softcap, window_size: as in `turbo_attention`.
    """
    tokens = min(len(k) // config.block_size * config.block_size, TOKENS)
    q, k, v = (x[:tokens].transpose(0, 1)[None].float() for x in (q, k, v))
    if not all(bool(x.isfinite().all()) for x in (q, k, v)):
        return None
    heads, head_dim = k.shape[1], k.shape[3]
    config = config.replace(guard="off")
    cache = KVCache(1, heads, head_dim, config=config, head_bits=head_bits, k_mean=k_mean, k_order=k_order)
    cache.append(k, v)
    q = q[:, :, -QUERIES:]
    positions = torch.arange(tokens - q.shape[2], tokens)[None]
    params = AttentionParams(True, logit_scale(scale, head_dim), window_size, softcap, None)
    exact, stored = (
        causal_attention(q, positions, *kv, torch.tensor([tokens]), params) for kv in ((k, v), cache.dequantize())
    )
    errors = relative_errors(stored, exact, heads)
    beyond = _beyond(errors, head_bits)
    if not bool(beyond.any()):
        return None
    message = _message(first_head, beyond, beyond, errors, head_bits, head_bits)
    return f"{message}; calibrate the model, or serve it with more bits"


def bound_of(bits: Tensor) -> Tensor:
    """Bound per head for widths int64 [2, Hkv]: that of the narrower of K and V."""
    return torch.tensor([BOUNDS[int(b)] for b in bits.amin(0)], dtype=torch.float64)


def stacklevel_outside() -> int:
    """The `stacklevel` with which the caller of this function warns about the first frame outside the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


def _beyond(errors: Tensor, bits: Tensor) -> Tensor:
    return ~(errors <= bound_of(bits))


def widen(bits: Tensor, heads: Tensor) -> Tensor:
    """`bits` (int64 [2, Hkv]) with the next width for the narrower of K and V, or both if equal, of `heads` (bool)."""
    wider = torch.tensor([[_WIDER[int(b)] for b in row] for row in bits])
    return torch.where(heads & (bits == bits.amin(0)), wider, bits)


def lose_too_much(heads: list[int]) -> str:
    """[1] -> "KV head 1 loses too much", [1, 3] -> "KV heads 1, 3 lose too much"."""
    return f"{listed('KV head', heads)} {'loses' if len(heads) == 1 else 'lose'} too much"


def _message(first_head: int, failing: Tensor, beyond: Tensor, errors: Tensor, planned: Tensor, bits: Tensor) -> str:
    """Names the heads that are `failing` at the `planned` widths, and those still `beyond` their bound at `bits`."""
    heads = failing.nonzero().flatten().tolist()
    worst = max(heads, key=lambda head: float(errors[head]))
    what = f"{lose_too_much([first_head + head for head in heads])} in the quantized cache"
    how = (
        f"head {first_head + worst} has relative error {float(errors[worst]):.2f} at K {int(planned[0, worst])} "
        f"and V {int(planned[1, worst])} bits, bound {float(bound_of(planned)[worst]):.2f}"
    )
    if torch.equal(bits, planned):
        return f"{what} ({how}); widths kept as configured"
    widths = ", ".join(f"{first_head + head}: {int(bits[0, head])}/{int(bits[1, head])}" for head in heads)
    rest = beyond.nonzero().flatten().tolist()
    remain = "remains beyond its" if len(rest) == 1 else "remain beyond their"
    still = f"; {listed('head', [first_head + head for head in rest])} {remain} bound" if rest else ""
    return f"{what} ({how}); raised to K/V bits {widths}{still}"


def _check_int8(first_head: int, sample: Sample, errors: Tensor, failing: Tensor, planned: Tensor) -> None:
    """Raises `BeyondInt8Error` if heads are `failing` at the planned widths, with these `errors`, and 8 bits are not
    enough, or if the INT8 error is beyond `EARLY_BOUND` and half of the planned width's bound."""
    bound = (bound_of(planned) / 2).clamp(min=EARLY_BOUND)
    if not bool((failing | ~(errors <= bound)).any()):  # they include INT8's own
        return
    errors = sample.errors(torch.full((2, len(failing)), 8))
    hopeless = ~(errors <= bound) | (failing & ~(errors <= BOUNDS[8]))
    if bool(hopeless.any()):
        raise BeyondInt8Error(_int8_message(first_head, errors, hopeless, BOUNDS[8]))


def early_int8_message(got: Tensor, exact: Tensor, kv_heads: int, first_head: int, bits: int) -> str | None:
    """Names the KV heads whose INT8 attention is beyond the bound for planned widths of `bits` (see `EARLY_BOUND`);
    None if there is none.

    got, exact: outputs [B, Hq, Lq, D] over the same tokens, before any block is compressed.
    """
    bound = max(EARLY_BOUND, BOUNDS[bits] / 2)
    errors = relative_errors(got, exact, kv_heads)
    beyond = ~(errors <= bound)
    return _int8_message(first_head, errors, beyond, bound) if bool(beyond.any()) else None


def _int8_message(first_head: int, errors: Tensor, heads: Tensor, bound: float) -> str:
    named = heads.nonzero().flatten().tolist()
    worst = max(named, key=lambda head: float(errors[head]))
    heads_text = listed("KV head", [first_head + head for head in named])
    return (
        f"INT8 loses too much in {heads_text} (head {first_head + worst} has relative error "
        f"{float(errors[worst]):.2f} at 8 bits, bound {bound:.2f})"
    )


def _advice(sample: Sample, planned: Tensor, failing: Tensor) -> str:
    """Advice for the user: the fewest 8-bit sides that bring every failing head within its bound."""
    k, v = (int(bits[failing].min()) for bits in planned)
    for wide in (([8], [v]), ([k], [8]), ([8], [8])):
        bits = torch.where(failing, torch.tensor(wide), planned)
        if not torch.equal(bits, planned) and not bool(_beyond(sample.errors(bits), bits).any()):
            (k,), (v,) = wide
            return f"pass bits=({k}, {v}) (--bits {k},{v}), or calibrate the model"
    return "8 bits are not enough: keep the layer in the model's own dtype (exact_layers of a TurboCache)"
