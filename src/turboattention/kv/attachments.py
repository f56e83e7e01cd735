"""Objects attached to a cache: the state of a backend, a deferred error, and tokens at full precision."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class BackendState(Protocol):
    """State that a backend keeps for one cache between steps. The cache drops it when something else changes its
    pages, tail buffer or sequences, and never copies it."""

    @property
    def addresses(self) -> Tensor:
        """The `PageTable.addresses` from which it was created; with other addresses, the state is out of date."""
        ...


class DeferredError(Protocol):
    """A flag for values that were not finite, in calls of a backend that does not wait for its device."""

    def look(self, label: str | None) -> None:
        """Raise NonFiniteError, once, if the flag has arrived. label: the cache's label, for the message."""
        ...

    def copied(self) -> DeferredError:
        """A flag for a copy of the cache, which reports the error independently."""
        ...


class ExactPast(NamedTuple):
    """The tokens that a cache holds, at full precision, for the guard.

    k, v: [B, Hkv, len(cache), D]. q: [B, Hq, n, D], the last queries before this call, at `positions` (int64 [B, n]),
    where those not marked in `valid` (bool [B, n]) are padding.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    positions: Tensor
    valid: Tensor
