"""What others attach to a cache: the state of a backend, an error that is reported late, tokens at full precision."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class BackendState(Protocol):
    """What a backend keeps from step to step over one cache. The cache drops it when something else changes its pages,
    tail buffer or sequences, and never copies it."""

    @property
    def addresses(self) -> Tensor:
        """The `PageTable.addresses` that it was made from; if the table has others by now, it is out of date."""
        ...


class DeferredError(Protocol):
    """Values that were not finite, in a call of a backend that does not wait for its device."""

    def look(self, label: str | None) -> None:
        """Raise NonFiniteError, once, if such values are known by now. label: of the cache, for the message."""
        ...

    def copied(self) -> DeferredError:
        """For a copy of the cache, which reports the error independently."""
        ...


class ExactPast(NamedTuple):
    """The tokens that a cache holds, at full precision, for the guard.

    k, v: [B, Hkv, len(cache), D]. q: [B, Hq, n, D], the last queries before this call, at `positions` (int64 [B, n]),
    of which those marked in `valid` (bool [B, n]) are real.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    positions: Tensor
    valid: Tensor
