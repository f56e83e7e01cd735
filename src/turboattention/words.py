"""Singular and plural forms in messages."""

from __future__ import annotations

from collections.abc import Sequence


def number_of(count: int, noun: str) -> str:
    """1 -> "1 token", 2000 -> "2,000 tokens"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(noun: str, numbers: Sequence[int]) -> str:
    """[1] -> "head 1", [1, 3] -> "heads 1, 3"."""
    return f"{noun if len(numbers) == 1 else f'{noun}s'} {', '.join(map(str, numbers))}"
