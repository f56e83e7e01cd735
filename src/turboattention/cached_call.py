"""The new tokens of a call over a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError, ShapeError
from .validation import check_lengths


def new_tokens(q: Tensor, k_new: Tensor | None, lengths: Tensor | None) -> Tensor:
    """int64 [B]: tokens each sequence takes. Raises InputError, ShapeError, DtypeError."""
    if k_new is None:
        if lengths is not None:
            raise InputError("lengths: expected None without k_new and v_new, got a tensor")
        return torch.zeros(len(q), dtype=torch.int64)
    if lengths is not None and (k_new.dim() != 4 or q.shape[2] != k_new.shape[2]):
        raise ShapeError(f"q: expected as many rows as k_new has tokens, with lengths, got {q.shape[2]} rows")
    return check_lengths(lengths, len(q), k_new.shape[2])
