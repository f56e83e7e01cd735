"""The interface of a KV cache method."""

from __future__ import annotations

from typing import Any, Protocol


class CacheMethod(Protocol):
    """A KV cache quantization method under evaluation.

    A call of the model attends to its own new tokens like the method's prefill (baselines: at the model's precision;
    TurboAttention: as INT8), and to all older tokens in their stored form. Feed a text in short pieces, or token by
    token, to measure the stored form.
    """

    @property
    def name(self) -> str:
        """The name on the command line, such as "kivi-4"."""
        ...

    @property
    def title(self) -> str:
        """The name in tables, such as "KIVI-4"."""
        ...

    @property
    def source(self) -> str:
        """The paper, with section or algorithm."""
        ...

    @property
    def settings(self) -> str:
        """One line: widths, groups, windows."""
        ...

    @property
    def numerics(self) -> int:
        """The version of the method's numerics, raised with every change of its results; 0 if they never change."""
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
        """Stored bits per element: codes, scales, zeros, low-rank factors and full-precision windows.

        Stored floats count as 16 bits, also if the model runs in float32. For TurboAttention, all allocated bytes are
        counted. The value changes with the length, as windows grow and are compressed. Infinite while the cache is
        empty.
        """
        ...
