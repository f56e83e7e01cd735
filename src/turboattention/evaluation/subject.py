"""The interface of a model under evaluation: texts as tokens, and logits through a method's cache.

Everything uses the decode path: a text is fed in short pieces, and each piece attends to the stored form of the pieces
before it. A perplexity computed in a single prefill never reads a quantized cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from .baselines import CacheMethod

PIECE = 16
"""Tokens per forward pass of a known text. Each token attends to half of its piece on average without quantization."""

attending: ContextVar[str | None] = ContextVar("attending", default=None)
"""The method whose cache is being attended to, while several methods share a forward pass."""

Progress = Callable[[int, int], None]
"""Called with the number of finished steps and of all steps."""


class Session(Protocol):
    """One text in progress, with its cache."""

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens as a prompt, in large pieces and without logits."""
        ...

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Read tokens in pieces of `PIECE`: logits float32 [len(ids), V] of the token after each."""
        ...

    def fork(self) -> Session:
        """An independent session in the same state."""
        ...

    @property
    def bits_per_element(self) -> float:
        """The current size of the method's cache, including everything it stores."""
        ...


class Subject(Protocol):
    """A causal language model under test."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> int | None:
        """The model's maximum number of tokens; None if unknown."""
        ...

    @property
    def vocabulary(self) -> int:
        """V, the size of the vocabulary."""
        ...

    @property
    def begin(self) -> list[int]:
        """The tokens at the start of every text: BOS if the model's tokenizer adds one, or none."""
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
        """Feed one piece of tokens to each session: logits float32 [sessions, L, V], or with `last` only those after
        the last token, [sessions, 1, V].

        The results equal those of separate calls, but the weights are read only once.

        Args:
            ids: tokens per session, the same number for each.
        """
        ...

    def head_errors(self, method: CacheMethod, ids: Sequence[int], skip: int) -> list[list[float]]:
        """Relative error of the attention output by layer and query head, over positions from `skip` on.

        Every layer gets the input that it has with the model's own cache, so that errors do not propagate.
        """
        ...
