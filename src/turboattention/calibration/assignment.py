"""Chooses the width of each head under a budget of average bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..config import WIDTHS
from ..errors import ConfigError, InputError, ShapeError
from ..guard import BOUNDS, bound_of, widen

Strategy = Literal["error", "even", "priority"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def assign_bits(scores: Sequence[Tensor], budget: float, strategy: Strategy = "error") -> list[Tensor]:
    """Widths for K and V of every head.

    Args:
        scores: per layer. For "error" and "even" the cost of each width, float [2, Hkv, len(WIDTHS)]
            (`LayerStatistics.costs`, or any other additive measure); for "priority" the paper's head priority, float
            [2, Hkv].
        budget: upper bound of the average width, from 2 to 8, over K and V of all heads; steps, zeros and scales are
            not included.
        strategy: "error": starts at 2 bits everywhere, and adds bits where they reduce the cost most per bit, in any
            layer. "even": the same within each layer, with an equal budget for every layer, for servers, whose pages
            have one size. "priority": the paper's method (section 3.2), within each layer and separately for K and V:
            heads of low priority get 2 bits and the others 4 (4 and 8 for budgets above 4).

    Returns:
        int64 [2, Hkv] per layer.

    Raises:
        ConfigError, ShapeError, InputError: arguments out of range.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not WIDTHS[0] <= budget <= WIDTHS[-1]:
        raise ConfigError(f"budget: expected an average width from {WIDTHS[0]} to {WIDTHS[-1]} bits, got {budget!r}")
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    trailing = () if strategy == "priority" else (len(WIDTHS),)
    for layer, score in enumerate(scores):
        if score.shape != (2, *score.shape[1:2], *trailing):
            wanted = "[2, Hkv" + "".join(f", {n}" for n in trailing) + "]"
            raise ShapeError(f"scores: expected {wanted} for {strategy!r}, got {list(score.shape)} in layer {layer}")
        if not bool(score.isfinite().all()):
            raise InputError(f"scores: expected finite values, got NaN or infinity in layer {layer}")
    if strategy == "priority":
        return _by_priority(scores, budget)
    if strategy == "even":
        return [_by_error([score], budget)[0] for score in scores]
    return _by_error(scores, budget)


def keep_bounds(bits: Sequence[Tensor], errors: Sequence[Tensor]) -> list[Tensor]:
    """`bits` with heads promoted to the next width while their error is beyond the guard's bound of their width.

    Args:
        bits: int64 [2, Hkv] per layer; errors: float [2, Hkv, len(WIDTHS)] likewise, relative.
    """
    kept = []
    for widths, error in zip(bits, errors, strict=True):
        while bool((beyond := _beyond(widths, error)).any()):
            widths = widen(widths, beyond)
        kept.append(widths)
    return kept


def beyond_int8(errors: Sequence[Tensor]) -> tuple[int, ...]:
    """Indices of the layers with a head that is beyond its bound with K and V at 8 bits; `errors` as above."""
    widest = [torch.full(error.shape[:2], max(WIDTHS), dtype=torch.int64) for error in errors]
    lost = [chosen_error(bits, error) for bits, error in zip(widest, errors, strict=True)]
    return tuple(index for index, error in enumerate(lost) if bool((~(error <= BOUNDS[max(WIDTHS)])).any()))


def chosen(bits: Tensor, figures: Tensor) -> Tensor:
    """float64 [2, Hkv]: of `figures` [2, Hkv, len(WIDTHS)] those at `bits`, int64 [2, Hkv]."""
    index = torch.tensor([[WIDTHS.index(int(b)) for b in row] for row in bits]).reshape(bits.shape)
    return figures.double().gather(-1, index[..., None]).squeeze(-1)


def chosen_error(bits: Tensor, errors: Tensor) -> Tensor:
    """float64 [Hkv]: relative error with K and V stored at `bits`, int64 [2, Hkv]; their errors are independent."""
    return chosen(bits, errors).square().sum(0).sqrt()


def _beyond(bits: Tensor, errors: Tensor) -> Tensor:
    """bool [Hkv]: heads beyond their bound that are not at the largest width yet."""
    return ~(chosen_error(bits, errors) <= bound_of(bits)) & (bits.amin(0) < max(BOUNDS))


def _by_priority(scores: Sequence[Tensor], budget: float) -> list[Tensor]:
    low, high = (2, 4) if budget <= 4 else (4, 8)
    share, owed, widths = (budget - low) / (high - low), 1e-9, []
    for score in scores:
        bits = torch.full(score.shape, low, dtype=torch.int64)
        for row, priority in zip(bits, score, strict=True):
            # The part of a row's share that is not a whole head is carried over to the next row.
            owed += share * len(priority)
            row[torch.argsort(priority, stable=True)[len(priority) - int(owed) :]] = high
            owed -= int(owed)
        widths.append(bits)
    return widths


def _by_error(scores: Sequence[Tensor], budget: float) -> list[Tensor]:
    """Greedy choice of the promotion, by one width or several, with the largest saving per bit within the budget."""
    flat = torch.cat([score.reshape(-1, len(WIDTHS)).double().cpu() for score in scores])
    widths = torch.tensor(WIDTHS, dtype=torch.float64)
    at = torch.zeros(len(flat), dtype=torch.int64)
    left = math.floor((budget - WIDTHS[0]) * len(flat) + 1e-9)
    price = widths - widths[at][:, None]
    while left > 0:
        gain = (flat.gather(1, at[:, None]) - flat) / price
        gain[(price <= 0) | (price > left)] = -torch.inf
        best = int(gain.argmax())
        entry, width = divmod(best, len(WIDTHS))
        if gain[entry, width] == -torch.inf:
            break
        left -= int(price[entry, width])
        at[entry] = width
        price[entry] = widths - widths[width]
    bits = torch.tensor(WIDTHS)[at]
    return [part.reshape(2, -1) for part in bits.split([score.shape[0] * score.shape[1] for score in scores])]
