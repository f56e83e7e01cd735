"""`TurboConfig`: every choice that changes a number, in one frozen value."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

WIDTHS = (2, 3, 4, 8)

Bits = int | tuple[int, int] | Literal["mixed"]

_CHOICES = {
    "softmax": ("auto", "sas", "sas2", "exp"),
    "row_max": ("block", "running"),
    "p_scale": ("row", "static", "tile"),
    "rescale": ("exact", "sas"),
    "guard": ("adapt", "warn", "off"),
}


@dataclass(frozen=True)
class TurboConfig:
    """What is computed. `TurboConfig()` is what users should have; `TurboConfig.paper()` is the paper.

    Every field changes results, none changes speed alone. Raises `ConfigError` for a value out of
    range.
    """

    bits: Bits = 4
    """Width of stored codes: 8, 4, 3 or 2; ``(k_bits, v_bits)``; or ``"mixed"``: per layer the
    `low_bit_fraction` of KV heads with the lowest priority take 2 bits, the others 4. A `TurboCache`
    with a calibration takes that one's widths for ``"mixed"`` instead."""

    block_size: int = 64
    """Tokens per tile and per compressed block, B. A multiple of 16 from 16 to 256."""

    softmax: Literal["auto", "sas", "sas2", "exp"] = "auto"
    """Exponential of the attention weights: the paper's SAS (table and cubic), its base-2 form
    (exponent bits and cubic), or exact. ``"auto"``: what is fastest where the tensors are, which is ``"exp"`` on GPUs,
    with their unit for exponentials, and ``"sas"`` elsewhere."""

    sas_threshold: float = -9.0
    """Weights whose logit lies further than this below the maximum are zero, with SAS. Negative; the paper's is -6."""

    row_max: Literal["block", "running"] = "block"
    """Maximum that weights are taken against: of the current block only, or of all blocks so far."""

    p_scale: Literal["row", "static", "tile"] = "row"
    """INT8 scale of the weights: ``"row"``, for each row and block, its largest product of a weight and V's token scale
    / 127; ``"static"`` 1/127; ``"tile"`` the tile's largest weight / 119. Row sums the normalizer from weights rounded
    256 times as finely as their codes, static from the quantized weights, tile from weights as they are. Static is
    faster, by 2 % of a decode step and a tenth of a prefill on an H100, and errs more."""

    rescale: Literal["exact", "sas"] = "exact"
    """Exponential used when partial results are rescaled to a new maximum."""

    smooth_k: bool = True
    """Subtract a per-channel mean of K (of the sequence's first block) from every later key."""

    rotate: bool = True
    """Rotate V by a signed block Hadamard matrix before quantizing, and K and Q where `reorder_k` leaves them."""

    reorder_k: bool = False
    """Where K has 3 or 2 bits, store it unrotated, its channels in the order of their attention energy, the upper half
    with wider codes than the lower: 3 bits become 4 and 2, 2 bits become 3 and 1 (kv/layout.py). The order is fixed at
    the first compressed block, from its keys and from the queries until then. From 4 bits on, and under ``"mixed"``,
    K is rotated: unrotated keys lose more in stage 1 than they gain in stage 2. Halves the KL divergence of real models
    at 2 bits (docs/numerics.md). The order is that of the cache's first sequences, for all of them: off by default,
    since a sequence's bytes then depend on its batch."""

    token_scales: bool = True
    """Stage-1 scales per token (row), not per tile; 8 bits each where stored."""

    sink_tokens: int = 64
    """The first tokens of each sequence that stay INT8: 0 or a multiple of `block_size` (the default
    is rounded up to one)."""

    search: bool = True
    """Below 4 bits, search each channel's range for the least squared error instead of min-max."""

    low_bit_fraction: float = 0.5
    """Share of KV heads that take 2 bits under ``bits="mixed"``."""

    stored_prefill: bool = False
    """Read complete earlier blocks in stored form even where the call's own INT8 tiles are at
    hand, so that results do not depend on how a prompt was cut into calls."""

    guard: Literal["adapt", "warn", "off"] = "adapt"
    """At a cache's first compressed block, compare with exact attention: give heads beyond the
    bound more bits and warn, only warn, or do nothing."""

    flush_lag: int = 0
    """Tokens by which compression lags behind a full buffer, so that rejected speculative tokens
    can be cropped without reaching compressed blocks."""

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("smooth_k", "rotate", "reorder_k", "token_scales", "search", "stored_prefill"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        size = self.block_size
        if not _is_int(size) or size % 16 or not 16 <= size <= 256:
            raise ConfigError(f"block_size: expected a multiple of 16 from 16 to 256, got {size!r}")
        if self.sink_tokens == 64 and _is_int(self.sink_tokens):
            object.__setattr__(self, "sink_tokens", -(-64 // size) * size)
        if not _is_int(self.sink_tokens) or self.sink_tokens < 0 or self.sink_tokens % size:
            raise ConfigError(f"sink_tokens: expected 0 or a multiple of block_size ({size}), got {self.sink_tokens!r}")
        if not _is_int(self.flush_lag) or self.flush_lag < 0:
            raise ConfigError(f"flush_lag: expected an integer of at least 0, got {self.flush_lag!r}")
        if self.flush_lag and self.stored_prefill:
            raise ConfigError(f"flush_lag: expected 0 with stored_prefill, got {self.flush_lag!r}")
        if not _is_number(self.sas_threshold) or not -80 <= self.sas_threshold < 0:
            raise ConfigError(f"sas_threshold: expected a number from -80 to below 0, got {self.sas_threshold!r}")
        if not _is_number(self.low_bit_fraction) or not 0 <= self.low_bit_fraction <= 1:
            raise ConfigError(f"low_bit_fraction: expected a number from 0 to 1, got {self.low_bit_fraction!r}")
        # Now, because a compiled graph, which needs it, reads attributes and computes nothing from them.
        object.__setattr__(self, "_text", json.dumps(vars(self)))

    @classmethod
    def paper(cls, **overrides: Any) -> TurboConfig:
        """TurboAttention as published (arXiv 2412.08585): the row to compare with.

        Tile-wide scales for Q, K, V and the weights, running maximum, SAS everywhere, min-max
        stage 2, one universal buffer scale; no smoothing, rotation, sink block, search or guard. Only
        the backend "reference" computes it.
        """
        published: dict[str, Any] = {
            "softmax": "sas",
            "row_max": "running",
            "sas_threshold": -6.0,
            "p_scale": "tile",
            "rescale": "sas",
            "smooth_k": False,
            "rotate": False,
            "token_scales": False,
            "sink_tokens": 0,
            "search": False,
            "guard": "off",
        }
        return cls(**(published | overrides))

    @classmethod
    def serving(cls, **overrides: Any) -> TurboConfig:
        """What paged serving computes (`turboattention.paged`): pages are of one size, and a page's bytes depend on
        its tokens alone, never on how a prompt was cut into calls.

        Complete blocks are read as stored, none stays INT8, keys are rotated and not smoothed (set `smooth_k` where
        means are calibrated), and the guard only warns.
        """
        fixed: dict[str, Any] = {
            "stored_prefill": True,
            "sink_tokens": 0,
            "smooth_k": False,
            "guard": "warn",
        }
        return cls(**(fixed | overrides))

    def replace(self, **changes: Any) -> TurboConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def softmax_on(self, device: torch.device) -> str:
        """The form that `softmax` names for tensors on a device: "sas", "sas2" or "exp"."""
        if self.softmax != "auto":
            return self.softmax
        return "exp" if device.type == "cuda" else "sas"

    @property
    def text(self) -> str:
        """The fields as JSON."""
        return self._text  # type: ignore[attr-defined]

    @property
    def reorders_k(self) -> bool:
        """Whether K's channels are reordered."""
        return self.reorder_k and self.token_scales and self.kv_bits[0] in (2, 3)

    @property
    def rotates_k(self) -> bool:
        """Whether K and Q are rotated; V is where `rotate` says so."""
        return self.rotate and not self.reorders_k

    @property
    def kv_bits(self) -> tuple[int, int]:
        """(K, V) widths of a head that is not assigned 2 bits: 4 under ``"mixed"``."""
        if self.bits == "mixed":
            return (4, 4)
        return self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_bits(bits: object) -> None:
    pair = bits if isinstance(bits, tuple) and len(bits) == 2 else (bits, bits)
    if bits != "mixed" and not all(_is_int(b) and b in WIDTHS for b in pair):
        raise ConfigError(f'bits: expected 8, 4, 3, 2, a pair of these for (K, V), or "mixed", got {bits!r}')
