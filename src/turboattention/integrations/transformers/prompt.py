"""The token ids of a cache, saved in its file, against which a prompt is checked that continues them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InputError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_ids(input_ids: Any, batch: int, length: int) -> Tensor:
    """int64 [batch, length] on the CPU: one id per position of a cache, including padding.

    Raises:
        InputError: `input_ids` have another shape or dtype.
    """
    ids = _integers(input_ids, batch)
    given = ids.shape[1]
    if given != length:
        crop = f"crop({given - length}) the cache, or " if given < length else ""
        raise InputError(
            f"input_ids: expected the {length} tokens that the cache holds, got {given}; {crop}give the ids of what it "
            "took: after generate, output[:, : cache.get_seq_length()]"
        )
    return ids


def check_goes_on(input_ids: Any, known: Tensor, length: int) -> None:
    """Check that a prompt continues the `length` tokens of a cache, whose first ids are `known` [B, L].

    Raises:
        InputError: it does not, or the cache has tokens whose ids are not known.
    """
    if known.shape[1] != length:
        raise InputError(
            f"prompt_ids: expected a cache that knows the ids of all its {length} tokens, got one that knows the first "
            f"{known.shape[1]}: crop({known.shape[1] - length}) removes what it has taken since it was loaded"
        )
    ids = _integers(input_ids, len(known))
    if not torch.equal(ids[:, :length], known[:, : ids.shape[1]]):
        raise InputError(f"input_ids: expected a prompt that begins with the {length} tokens of the cache, got another")
    if ids.shape[1] <= length:
        raise InputError(
            f"input_ids: expected a prompt that goes on behind the {length} tokens of the cache, got {ids.shape[1]}; "
            f"crop({ids.shape[1] - 1 - length}) leaves one of them to process"
        )


def _integers(input_ids: Any, batch: int) -> Tensor:
    if not isinstance(input_ids, Tensor):
        raise InputError(f"input_ids: expected a tensor of integers [{batch}, L], got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in _INTEGERS or input_ids.shape[0] != batch:
        raise InputError(f"input_ids: expected integers [{batch}, L], got {input_ids.dtype} {tuple(input_ids.shape)}")
    return input_ids.to("cpu", torch.int64)
