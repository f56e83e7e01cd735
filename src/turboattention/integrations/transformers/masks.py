"""The mask function of "turbo", and what the attention function reads from a mask.

transformers builds one mask per forward and kind of layer and hands it to every layer. "turbo" builds
- bool [B, Lk] for causal and sliding-window masks: which key positions are tokens (not padding), and
- bool [B, 1, Lq, Lk] for every other pattern (chunked, packed, prefix, bidirectional, static caches).
Both carry their `MaskPlan`, which is therefore computed once per forward pass instead of once per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from ...errors import InputError, ShapeError
from .guarded_mask import GuardedMask, check_declared

_PLAN = "_turbo_plan"


@dataclass(frozen=True)
class MaskPlan:
    """The meaning of one mask.

    mask: bool [B, Lk], True for tokens, among which attention is causal (bottom-right aligned, limited to
        `window` if set); or bool or additive [B or 1, 1 or H, Lq, Lk].
    window: tokens visible to a query, including its own, as passed to the mask function; None: all.
    from_function: whether `turbo_mask` made it, so that a `window` of None means that there is no window.
    """

    mask: Tensor
    window: int | None = None
    from_function: bool = False

    @property
    def is_causal(self) -> bool:
        return self.mask.dim() == 2

    @property
    def width(self) -> int:
        """Number of key positions in the mask, including past tokens and padding."""
        return self.mask.shape[-1]

    @cached_property
    def visible(self) -> Tensor | None:
        """bool [B, Lk] on the CPU: positions that are visible to some query; None if all are."""
        shown = self.mask if self.is_causal else shown_by(self.mask).any(2).any(1)
        return None if bool(shown.all()) else shown.cpu()

    @cached_property
    def matrix(self) -> Tensor | None:
        """The mask [B or 1, 1 or H, Lq, Lk] as `turbo_attention` takes it; None if it hides nothing."""
        if self.is_causal:
            return None
        shown = shown_by(self.mask)
        if self.mask.dtype == torch.bool:
            return None if bool(shown.all()) else shown
        return torch.where(shown, self.mask, float("-inf"))


def shown_by(mask: Tensor) -> Tensor:
    """bool: where a boolean mask is True, or an additive mask is above the values used for "hidden"."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def read_mask(mask: Tensor | None) -> MaskPlan | None:
    """The plan of the mask that a layer gets: one made by `turbo_mask`, or one passed by the user."""
    if mask is None:
        return None
    plan = getattr(mask, _PLAN, None)
    if plan is not None:
        return plan
    if isinstance(mask, GuardedMask):  # a part of one
        mask = mask.as_subclass(Tensor)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"attention_mask: expected a tensor [B, Lk] or [B, 1, Lq, Lk], got {got}")
    if mask.dim() == 2 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        mask = mask.to(torch.bool)
    return MaskPlan(mask)


def turbo_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """transformers' mask interface (see `transformers.masking_utils.sdpa_mask` for the arguments).

    With `allow_is_causal_skip=False` the full matrix is returned.
    """
    causal, window = _causal_window(mask_function)
    config = kwargs.get("config")
    check_declared(config)
    if isinstance(attention_mask, GuardedMask):  # made by `generate`, for a model that creates masks from it again
        attention_mask = attention_mask.as_subclass(Tensor)
    # The length of a static cache is not known while tracing.
    known = not (torch.compiler.is_dynamo_compiling() and isinstance(q_offset, Tensor))
    ends_together = known and kv_offset + kv_length == int(q_offset) + q_length
    # Graphs take plain tensors only, and `generate` compiles the steps over static caches (spare keys, or a tensor).
    guarded = ends_together and not torch.compiler.is_dynamo_compiling() and not isinstance(q_offset, Tensor)
    if causal and ends_together and allow_is_causal_skip and not _cut_by_model(config):
        tokens = _tokens(attention_mask, batch_size, kv_length, kv_offset, device)
        return _with_plan(tokens, window, config, guarded)
    if mask_function is bidirectional_mask_function:
        tokens = _tokens(attention_mask, batch_size, kv_length, kv_offset, device)
        return _with_plan(tokens[:, None, None, :].expand(-1, 1, q_length, -1), None, config, guarded)
    matrix = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        device=device,
        **kwargs,
    )
    assert matrix is not None
    return _with_plan(matrix, None, config, guarded)


def _cut_by_model(config: Any) -> bool:
    """Gemma 4 with shared keys selects rows of its masks, which therefore need a row dimension."""
    kind = str(getattr(config, "model_type", ""))
    return kind.startswith("gemma4") and bool(getattr(config, "num_kv_shared_layers", None))


def _with_plan(mask: Tensor, window: int | None, config: Any, guarded: bool) -> Tensor:
    plan = MaskPlan(mask, window, from_function=True)
    if guarded:
        mask = GuardedMask.of(mask, str(getattr(config, "model_type", "unknown")))
    setattr(mask, _PLAN, plan)
    return mask


def _tokens(
    attention_mask: Tensor | None, batch: int, kv_length: int, kv_offset: int, device: torch.device | str
) -> Tensor:
    """bool [B, kv_length]: which of the positions from `kv_offset` on are tokens."""
    if attention_mask is None:
        return torch.ones(batch, kv_length, dtype=torch.bool, device=device)
    if attention_mask.shape[-1] < kv_offset + kv_length:
        raise InputError(
            f"attention_mask: expected one column for each of the {kv_offset + kv_length} past and new positions, "
            f"got {attention_mask.shape[-1]}"
        )
    tokens = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    # A view would be shared with the caller, who may change it before the next forward.
    return tokens.expand(batch, -1).clone()


def _causal_window(mask_function: Callable) -> tuple[bool, int | None]:
    """Whether a mask function is only causal, and its sliding window.

    transformers composes a sliding window as a closure over (overlay, causal), which is recognized by the code objects
    of its parts. Unrecognized functions are evaluated as a matrix, which is always correct.
    """
    if mask_function is causal_mask_function:
        return True, None
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot inspect closures
        return False, None
    parts = _closure(mask_function, "mask_functions")
    if getattr(mask_function, "__code__", None) is not _AND_CODE or not isinstance(parts, tuple) or len(parts) != 2:
        return False, None
    overlay, base = parts
    window = _closure(overlay, "sliding_window")
    if getattr(overlay, "__code__", None) is _WINDOW_CODE and base is causal_mask_function and isinstance(window, int):
        return True, window
    return False, None


def _closure(function: Callable, name: str) -> Any:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None or name not in code.co_freevars:
        return None
    return cells[code.co_freevars.index(name)].cell_contents


_AND_CODE = and_masks(causal_mask_function).__code__
_WINDOW_CODE = sliding_window_overlay(1).__code__
