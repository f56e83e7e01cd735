"""Checks and conversions of the arguments of stage 1, and the rows per program."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...errors import DtypeError
from ...uploads import upload
from .configs import EXACT

TOKEN_SCALES = (torch.float32, torch.bfloat16)
"""Both hold a token's scale, of 4 mantissa bits, exactly."""


def float_rows(x: Tensor) -> Tensor:
    """Float rows of any strides with contiguous channels; copied if the channels are not contiguous."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DtypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    return x if x.stride(-1) == 1 else x.contiguous()


def means(mean: Tensor | None) -> Tensor | None:
    """`mean` with contiguous rows. Raises DtypeError unless it is bfloat16 or None."""
    if mean is not None and mean.dtype != torch.bfloat16:
        raise DtypeError(f"mean: expected bfloat16, got {mean.dtype}")
    return None if mean is None else mean.contiguous()


def indices(x: Tensor, beside: Tensor) -> Tensor:
    """As contiguous int64 on the other tensor's device; copies from the CPU are asynchronous."""
    x = x.to(torch.int64).contiguous()
    return x if x.device == beside.device else upload(x, beside.device)


def check_tiles(codes: Tensor, scales: Tensor, scale_dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Check codes [B, H, W, D] and scales [B, H, W]."""
    if codes.dtype != torch.int8 or scales.dtype not in scale_dtypes:
        raise DtypeError(f"codes, scales: expected int8 and {scale_dtypes}, got {codes.dtype} and {scales.dtype}")
    if not codes.is_contiguous() or not scales.is_contiguous():
        raise DtypeError("codes, scales: expected contiguous tensors, got others")


def row_shape(rows: int, head_dim: int) -> dict[str, int]:
    """How many rows a program takes: up to 32 values a thread, or 16 where few rows must keep all
    processors busy (decode)."""
    width = triton.next_power_of_2(head_dim)
    values, warps = (min(32 * width, 4096), 4) if rows > 4096 else (512, 1)
    return {"ROWS": max(values // width, 1), "WIDTH": width, "num_warps": warps, **EXACT}


def pair_shape(rows: int, head_dim: int, v_head_dim: int) -> dict[str, int]:
    """`row_shape` of programs that take rows of keys or of values."""
    shape = row_shape(rows, max(head_dim, v_head_dim))
    widths = {"WIDTH": triton.next_power_of_2(head_dim), "V_WIDTH": triton.next_power_of_2(v_head_dim)}
    return {**shape, **widths, "D": head_dim, "DV": v_head_dim}
