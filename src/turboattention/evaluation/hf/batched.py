"""Sequences over different kinds of caches in one forward pass: linear layers run on the batch, attention row by row.

Each row has its own cache with one sequence, of any length. The model gets the rows as a batch, and a cache that
passes the keys and values of each row to the cache of the row; attention then runs per row, with the attention
function of that cache. Rows are not padded and do not interact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from ...errors import UnsupportedError
from ...integrations.transformers.language_model import LanguageModel
from ...integrations.transformers.registry import NAME as TURBO
from ..subject import attending

NAME = "turbo_together"
_HANDLE = "_turbo_rows"
_SDPA = "sdpa"


class Row(NamedTuple):
    """A sequence: the name of its method, its cache, and the attention implementation for this cache."""

    name: str
    cache: Any
    attention: str


class TogetherCache(Cache):
    """The cache that the model gets; distributes keys and values to the caches of the rows."""

    def __init__(self, rows: Sequence[Row]):
        super().__init__(layers=[DynamicLayer()])  # the model asks it for the kind of mask; no mask is made
        self._rows = rows

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        held = [
            row.cache.update(key_states[at : at + 1], value_states[at : at + 1], layer_idx, *args, **kwargs)
            for at, row in enumerate(self._rows)
        ]
        setattr(key_states, _HANDLE, (self._rows, held))
        return key_states, value_states


def can_go_together(own_attention: str) -> bool:
    """Whether a model's own attention function can run on a single row, with a mask made here."""
    return own_attention == _SDPA


def forward_together(language: LanguageModel, rows: Sequence[Row], ids: Sequence[Sequence[int]], last: bool) -> Tensor:
    """Logits [rows, L, V], or [rows, 1, V] of the `last` token, as the model gives them.

    Raises:
        UnsupportedError: the model's layers share keys, or do not go through transformers' attention interface.
    """
    model = language.model
    tokens = torch.tensor([list(row) for row in ids], device=model.device)
    begin = torch.tensor([[row.cache.get_seq_length()] for row in rows], device=model.device)
    positions = begin + torch.arange(tokens.shape[1], device=model.device)
    options: dict[str, Any] = {"logits_to_keep": 1} if last else {}
    with _registered():
        language.use(NAME)
        cache = TogetherCache(rows)
        return model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, **options).logits


def attend_together(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, Hq, L, D] queries -> [B, L, Hq, D], each row over its own cache."""
    found: Any = getattr(key, _HANDLE, None)
    if found is None or attention_mask is not None:
        raise UnsupportedError("together: expected a model whose layers attend causally, each over keys of its own")
    positions = options.pop("position_ids", None)
    outputs = []
    for at, (row, (keys, values)) in enumerate(zip(*found, strict=True)):
        if positions is not None:
            options["position_ids"] = positions[at : at + 1]
        mask = None
        if row.attention != TURBO:  # "turbo" needs no mask
            mask = causal_mask(query.shape[2], keys.shape[2], options.get("sliding_window"), query.device)
        said = attending.set(row.name)
        outputs.append(
            AttentionInterface()[row.attention](module, query[at : at + 1], keys, values, mask, **options)[0]
        )
        attending.reset(said)
    return torch.cat(outputs), None


@functools.lru_cache(maxsize=64)
def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [1, 1, queries, keys], True where the key is visible; the last query is at the last key. None if all are
    visible. With 2 queries and 4 keys:

        1 1 1 0
        1 1 1 1
    """
    last = torch.arange(keys - queries, keys, device=device)[:, None]
    at = torch.arange(keys, device=device)
    seen = at <= last
    if window is not None:
        seen &= at > last - window
    return None if bool(seen.all()) else seen[None, None]


@contextmanager
def _registered() -> Iterator[None]:
    """Register the name for attention but not for masks, so that transformers makes no mask."""
    AttentionInterface.register(NAME, attend_together)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(NAME, None)
