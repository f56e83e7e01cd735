"""`enable` and `disable`: add the name "turbo" to transformers' two registries, and remove it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ... import dispatch
from ...config import TurboConfig
from ...validation import check_config
from .attention import turbo_attention_forward
from .followed import check_release, follow, unfollow
from .masks import turbo_mask

NAME = "turbo"

_ABSENT = object()
# The entries under the name before `enable`, per registry; empty while disabled.
_replaced: dict[type, Any] = {}


def enable(config: TurboConfig | None = None, backend: str = "auto") -> None:
    """Register ``attn_implementation="turbo"``. Calling it again replaces `config` and `backend`.

    Args:
        config: for calls without a `TurboCache` (which has its own); `TurboConfig()` by default.
        backend: for calls without a `TurboCache`, as in `turbo_attention`.

    Raises:
        ConfigError, InputError, BackendError: as a call with these arguments. BackendError: this release of
            transformers was not tested and uses another name for the cache argument. Nothing is registered then.
    """
    check_release()
    check_config(config)
    dispatch.choose(backend)
    forward = partial(turbo_attention_forward, config=config, backend=backend)
    for registry, function in ((AttentionInterface, forward), (AttentionMaskInterface, turbo_mask)):
        _replaced.setdefault(registry, registry._global_mapping.get(NAME, _ABSENT))
        registry.register(NAME, function)
    follow()


def disable() -> None:
    """Undo `enable` and restore the previous entries under "turbo" (usually none).

    Models that still use "turbo" then fail with transformers' error for an unknown implementation; switch them with
    ``model.set_attn_implementation``.
    """
    for registry, before in _replaced.items():
        if before is _ABSENT:
            registry._global_mapping.pop(NAME, None)
        else:
            registry.register(NAME, before)
    unfollow()
    _replaced.clear()


@contextmanager
def enabled() -> Iterator[None]:
    """``attn_implementation="turbo"`` is registered inside."""
    enable()
    try:
        yield
    finally:
        disable()
