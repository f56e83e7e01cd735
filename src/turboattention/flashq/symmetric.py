"""Stage 1: symmetric quantization of floats to INT8, per tile or per token.

Codes are within +-119 instead of +-127, so that values rounded to a step by stage 2 still fit in INT8.

A token's scale is rounded up to 4 mantissa bits, so that its ratio to a power of two above it fits exactly in 8 bits
(`kv.layout`) and compressing a block does not round it again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DtypeError, ShapeError

CODE_MAX = 119

# Smaller scales are raised to this, so that rows of tiny values quantize to zero and the division does not overflow.
SMALLEST_SCALE = 2.0**-100

_MANTISSA_STEP = 1 << 19  # float32 has 23 mantissa bits; 4 are kept


def quantize_int8(x: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize each tile of `block_size` rows of a head with one scale.

    Args:
        x: [B, H, L, D] float (16-bit floats are taken as float32).
        block_size: rows per tile; the last tile may be shorter.

    Returns:
        codes int8 [B, H, L, D] within +-119, and scales [B, H, ceil(L / block_size)], float32
        (float64 for float64 input): `s = max|X| / 119` and `codes = round_half_even(X / s)`. An
        all-zero tile has scale 1.

    Raises:
        ShapeError: x does not have four dimensions, or block_size is below 1. DtypeError: x is not floating-point.

    Source: TurboAttention (arXiv 2412.08585), FlashQ stage 1.
    """
    if x.dim() != 4:
        raise ShapeError(f"x: expected [batch, heads, tokens, head_dim], got shape {tuple(x.shape)}")
    if block_size < 1:
        raise ShapeError(f"block_size: expected at least 1, got {block_size}")
    x = compute_dtype(x)
    peaks = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scales = F.pad(peaks, (0, -x.shape[2] % block_size)).unflatten(-1, (-1, block_size)).amax(-1)
    scales = _safe(scales / CODE_MAX)
    rows = scales.repeat_interleave(block_size, -1)[..., : x.shape[2], None]
    return (x / rows).round_().to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor, block_size: int = 64) -> Tensor:
    """Inverse of `quantize_int8`: codes int8 [B, H, L, D], scales [B, H, ceil(L / block_size)] -> [B, H, L, D] in the
    dtype of `scales`."""
    rows = scales.repeat_interleave(block_size, -1)[..., : codes.shape[2], None]
    return codes.to(scales.dtype) * rows


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of x [..., D] with one scale.

    Returns codes int8 [..., D] within +-119 and scales [...], float32 (float64 for float64 input): `max|row| / 119`
    rounded up to 4 mantissa bits, hence exact in bfloat16. An all-zero row has scale 1. Raises DtypeError if x is not
    floating-point.
    """
    x = compute_dtype(x)
    scales = _safe(round_up_to_grid(x.abs().amax(-1) / CODE_MAX))
    return (x / scales[..., None]).round_().to(torch.int8), scales


def round_up_to_grid(scales: Tensor) -> Tensor:
    """Round non-negative scales up to 4 mantissa bits."""
    single = scales.to(torch.float32)
    # Conversion from float64 may round down; take the next float32 then, so that codes stay within range.
    single = torch.where(
        single.to(scales.dtype) < scales, torch.nextafter(single, single.new_tensor(torch.inf)), single
    )
    bits = single.view(torch.int32)
    bits = (bits + (_MANTISSA_STEP - 1)) & -_MANTISSA_STEP
    return bits.view(torch.float32).to(scales.dtype)


def compute_dtype(x: Tensor) -> Tensor:
    """Convert floats other than float64 to float32. Raises DtypeError for other dtypes."""
    if not x.is_floating_point():
        raise DtypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _safe(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales.clamp(min=SMALLEST_SCALE))
