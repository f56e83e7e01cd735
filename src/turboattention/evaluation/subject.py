"""What the measures need of a model: texts as tokens, and logits through a method's cache.

Everything goes the decode path: a text is fed in short pieces, each attends to what the cache has stored of the
pieces before. A perplexity taken in one prefill never reads a quantized cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from .baselines import CacheMethod

PIECE = 16
"""Tokens fed at once where their values are known. A piece sees its own tokens unquantized: on average half of it."""

attending: ContextVar[str | None] = ContextVar("attending", default=None)
"""The name of the method whose cache is being attended to, while several go through the model together."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps to do."""


class Session(Protocol):
    """One text on its way through a model over one cache."""

    def read(self, ids: Sequence[int]) -> None:
        """Take tokens as a prompt: in large pieces, without their logits."""
        ...

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Take tokens through the cache, a piece at a time: logits float32 [len(ids), V] of the token after each."""
        ...

    def fork(self) -> Session:
        """An independent session in the same state."""
        ...

    @property
    def bits_per_element(self) -> float:
        """What the method's cache takes now, everything counted."""
        ...


class Subject(Protocol):
    """A causal language model under test."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> int | None:
        """Tokens it was made for; None where it does not say."""
        ...

    @property
    def vocabulary(self) -> int:
        """V: logits of one token."""
        ...

    @property
    def begin(self) -> list[int]:
        """Tokens that every text begins with: BOS where the model's tokenizer puts one, or none."""
        ...

    @property
    def stop_tokens(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def open(self, method: CacheMethod) -> Session:
        """An empty session over this method's cache."""
        ...

    def feed_together(self, sessions: Sequence[Session], ids: Sequence[Sequence[int]], *, last: bool = False) -> Tensor:
        """One piece of tokens through the cache of each session: logits float32 [sessions, L, V], or with `last` those
        after the last token alone, [sessions, 1, V].

        The same as feeding them one by one, but in one forward: weights are read once for all.

        Args:
            ids: equally many for each session.
        """
        ...

    def head_errors(self, method: CacheMethod, ids: Sequence[int], skip: int) -> list[list[float]]:
        """Relative error of attention's output by layer and query head, over positions from `skip` on.

        Every layer is given the input that it has with the model's own cache, so that an error is its own.
        """
        ...
