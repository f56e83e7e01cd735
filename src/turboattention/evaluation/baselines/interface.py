"""What a method must say of itself and be able to do."""

from __future__ import annotations

from typing import Any, Protocol


class CacheMethod(Protocol):
    """A way to keep keys and values, as evaluation sees it.

    A call to the model attends to its own new tokens as the method's prefill does (baselines: at the model's
    precision; TurboAttention: as INT8) and to everything older as stored. Feed a text in short pieces, or token by
    token, to measure what is stored.
    """

    @property
    def name(self) -> str:
        """As typed on the command line: "kivi-4"."""
        ...

    @property
    def title(self) -> str:
        """As a table shows it: "KIVI-4"."""
        ...

    @property
    def source(self) -> str:
        """The paper, and where in it."""
        ...

    @property
    def settings(self) -> str:
        """One line: widths, groups, windows."""
        ...

    @property
    def attention(self) -> str | None:
        """``attn_implementation`` that the model must have; None for its own (sdpa, eager, ...)."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot run here (a package that is not installed), or None."""
        ...

    def make_cache(self, model_config: Any) -> Any:
        """An empty transformers `Cache` for a model with this config.

        Raises:
            BackendError: it cannot run here; the message is that of `unavailable`.
            UnsupportedError: the model's kind of attention.
        """
        ...

    def bits_per_element(self, cache: Any) -> float:
        """Bits stored now over elements held: codes, scales, zeros, low-rank factors, full-precision windows.

        Whatever is stored as a float counts 16 bits, also where the model runs in float32. Of TurboAttention every
        byte allocated counts. Windows grow and are compressed as tokens come, so this moves with the length.
        Infinite while the cache is empty.
        """
        ...
