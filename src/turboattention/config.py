"""`TurboConfig`: all options that affect results, in one frozen dataclass."""

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
    "softmax": ("auto", "sas", "sas2", "sas16", "exp"),
    "row_max": ("block", "running"),
    "p_scale": ("row", "static", "tile"),
    "rescale": ("exact", "sas"),
    "guard": ("adapt", "warn", "off"),
}


@dataclass(frozen=True)
class TurboConfig:
    """Options of quantization and softmax. `TurboConfig()` is the recommended configuration, `TurboConfig.paper()` the
    paper's (arXiv 2412.08585); docs/numerics.md measures the differences.

    Every field affects results; none affects only speed. Raises `ConfigError` for values out of range.
    """

    bits: Bits = 4
    """Bits per stored code: 8, 4, 3 or 2; ``(k_bits, v_bits)``; or ``"mixed"``: in each layer, the
    `low_bit_fraction` of KV heads with the lowest priority use 2 bits and the others 4, as in the paper. A `TurboCache`
    with a calibration uses the calibrated widths for ``"mixed"``; without one, 3 bits, best with `reorder_k`, have the
    same size and a lower error."""

    block_size: int = 64
    """Tokens per tile and per compressed block, B. A multiple of 16 from 16 to 256."""

    softmax: Literal["auto", "sas", "sas2", "sas16", "exp"] = "auto"
    """Exponential of the attention weights: the paper's SAS (table and cubic), its base-2 form (exponent bits and
    cubic), the base-2 form computed from integer products in 16-bit integers, or exact. ``"auto"`` is the fastest for
    the device of the tensors: ``"exp"`` on GPUs, which have hardware for exponentials; elsewhere ``"sas16"``, or
    ``"sas"`` with `stored_prefill`, whose results must not depend on a block's later tokens."""

    sas_threshold: float = -9.0
    """With ``"sas"`` and ``"sas2"``, weights are zero if their logit minus the maximum is below this. Negative; -6 in
    the paper. With ``"sas16"``, weights below 2^-15 are zero."""

    row_max: Literal["block", "running"] = "block"
    """The maximum that is subtracted from logits: of the current block only, or of all blocks so far."""

    p_scale: Literal["row", "static", "tile"] = "row"
    """INT8 scale of the weights. ``"row"``: for each row and block, the largest product of a weight and V's token
    scale, / 127. ``"static"``: 1/127. ``"tile"``: the largest weight of the tile / 119. The normalizer is the sum of
    weights rounded to 1/256 of a code (row), of quantized weights (static) or of unquantized weights (tile). Static is
    faster, by 2 % in decode and about a tenth in prefill on an H100, and less accurate."""

    rescale: Literal["exact", "sas"] = "exact"
    """Exponential used when partial results are rescaled to a new maximum."""

    smooth_k: bool = True
    """Subtract a per-channel mean of K, computed over the sequence's first block, from every later key."""

    rotate: bool = True
    """Rotate Q, K and V by a signed block Hadamard matrix before quantizing."""

    reorder_k: bool = False
    """Compress K of 4, 3 and 2 bits without rotation, with channels sorted by decreasing `E[q^2] var(k)` and wider
    codes for the first half than for the second: 4 bits become 5 and 3, 3 bits 4 and 2, 2 bits 3 and 1 (kv/layout.py).
    Heads whose channels differ little, and all INT8 rows, are stored as without this option. The order is fixed at
    the first compressed block, from its keys and all queries up to it (docs/numerics.md), or given by a calibration.
    All sequences of a cache share it, so without a calibration the stored bytes of a sequence depend on its batch; the
    option is therefore off by default."""

    token_scales: bool = True
    """Use one stage-1 scale per token (row) instead of one per tile; a page stores 8 bits of each."""

    sink_tokens: int = 64
    """How many tokens at the start of each sequence stay INT8: 0 or a multiple of `block_size` (the default is rounded
    up to a multiple)."""

    exact_rows: int = 16
    """How many queries at the start of each sequence are computed in floating point, if their call contains the
    sequence from its first token and has `is_causal`. They see so few keys that INT8's errors do not average out, and
    in models whose first tokens are attention sinks, later layers amplify them (docs/numerics.md). 0 for none. A cache
    with `stored_prefill`, whose results must not depend on how a prompt is split into calls, has none; a server's
    pages do (`TailBlocks`)."""

    search: bool = True
    """Below 8 bits, search each channel's range for the least squared error instead of min-max."""

    low_bit_fraction: float = 0.5
    """The fraction of KV heads that use 2 bits with ``bits="mixed"``."""

    stored_prefill: bool = False
    """Read earlier complete blocks in their stored form even if their INT8 tiles are available in the same call, so
    that results do not depend on how a prompt is split into calls."""

    guard: Literal["adapt", "warn", "off"] = "adapt"
    """When a cache compresses its first block, compare with exact attention and, for heads whose error exceeds the
    bound: use more bits and warn (adapt), only warn (warn); or skip the comparison (off)."""

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
        if not _is_int(self.exact_rows) or self.exact_rows < 0:
            raise ConfigError(f"exact_rows: expected an integer of at least 0, got {self.exact_rows!r}")
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
        # Computed now, because a compiled graph needs the value and can only read attributes.
        object.__setattr__(self, "_text", json.dumps(vars(self)))

    @classmethod
    def paper(cls, **overrides: Any) -> TurboConfig:
        """TurboAttention as published (arXiv 2412.08585), as a baseline for comparisons.

        Tile-wide scales for Q, K, V and the weights, running maximum, SAS everywhere, min-max
        stage 2, one universal buffer scale; no smoothing, rotation, sink block, exact rows, search or guard.
        On GPUs, only the backend "reference" computes it.
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
            "exact_rows": 0,
            "search": False,
            "guard": "off",
        }
        return cls(**(published | overrides))

    @classmethod
    def serving(cls, **overrides: Any) -> TurboConfig:
        """The configuration for paged serving (`turboattention.paged`), where all pages have the same size and the
        bytes of a page depend only on its tokens, not on how a prompt was split into calls.

        Complete blocks are read as stored and none stays INT8; keys are rotated but not smoothed (set `smooth_k` with
        calibrated means); the guard only warns.
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
        """`softmax` with "auto" resolved for tensors on a device: "sas", "sas2", "sas16" or "exp"."""
        if self.softmax != "auto":
            return self.softmax
        if device.type == "cuda":
            return "exp"
        return "sas" if self.stored_prefill else "sas16"

    @property
    def text(self) -> str:
        """The fields as JSON."""
        return self._text  # type: ignore[attr-defined]

    @property
    def reorders_k(self) -> bool:
        """Whether K's channels are reordered in compressed pages."""
        return self.reorder_k and self.token_scales and self.kv_bits[0] < 8

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
