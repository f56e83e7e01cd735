"""Widths per KV head: given by the user, or chosen when the first block is compressed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import WIDTHS, TurboConfig
from ..errors import ConfigError
from ..flashq import assign_head_bits, head_priority

GivenBits = Tensor | Sequence[int] | Sequence[Sequence[int]]


def parse_head_bits(head_bits: GivenBits | None, heads: int) -> Tensor | None:
    """int64 [2, Hkv] (K, V) from widths [Hkv], for both, or [2, Hkv]. Raises ConfigError."""
    if head_bits is None:
        return None
    try:
        bits = torch.as_tensor(head_bits).cpu()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"head_bits: expected integers, got {head_bits!r}") from error
    if bits.is_floating_point() or bits.dtype == torch.bool:
        raise ConfigError(f"head_bits: expected integers, got {bits.dtype}")
    bits = bits.to(torch.int64)
    if bits.shape == (heads,):
        bits = bits.expand(2, heads)
    if bits.shape != (2, heads):
        raise ConfigError(f"head_bits: expected shape ({heads},) or (2, {heads}), got {tuple(bits.shape)}")
    if not all(int(b) in WIDTHS for b in bits.flatten()):
        raise ConfigError(f"head_bits: expected widths of {', '.join(map(str, WIDTHS))}, got {bits.tolist()}")
    return bits.clone(memory_format=torch.contiguous_format)


def uniform_head_bits(config: TurboConfig, heads: int) -> Tensor | None:
    """int64 [2, Hkv] from `config.bits`; None for ``"mixed"``, which depends on the tokens."""
    if config.bits == "mixed":
        return None
    k_bits, v_bits = config.kv_bits
    return torch.tensor([[k_bits] * heads, [v_bits] * heads])


def mixed_head_bits(config: TurboConfig, k: Tensor, v: Tensor) -> Tensor:
    """int64 [2, Hkv] for bits="mixed", from the priorities of the heads of K and of V.

    k, v: the first compressed blocks [N, Hkv, B, D], without smoothing and rotation.
    """
    return torch.stack([assign_head_bits(head_priority(x), config.low_bit_fraction).cpu() for x in (k, v)])
