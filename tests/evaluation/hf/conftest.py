"""The tiny models of the transformers integration's tests."""

from __future__ import annotations

from tests.integrations.transformers.conftest import distance, forward, one_thread, padded, tiny, tokens, turbo

__all__ = ["distance", "forward", "one_thread", "padded", "tiny", "tokens", "turbo"]
