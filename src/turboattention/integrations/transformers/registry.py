"""`enable` and `disable`: the name "turbo" in transformers' two registries, and out of them again."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ... import dispatch
from ...config import TurboConfig
from ...validation import check_config
from .attention import turbo_attention_forward
from .followed import follow, unfollow
from .masks import turbo_mask

NAME = "turbo"

_ABSENT = object()
# What stood under the name before `enable`, per registry; empty while disabled.
_replaced: dict[type, Any] = {}


def enable(config: TurboConfig | None = None, backend: str = "auto") -> None:
    """Register ``attn_implementation="turbo"``. Calling it again replaces `config` and `backend`.

    Args:
        config: for calls without a `TurboCache` (which has its own); `TurboConfig()` by default.
        backend: for calls without a `TurboCache`, as in `turbo_attention`.

    Raises:
        ConfigError, InputError, BackendError: what a call would raise for them; nothing is then registered.
    """
    check_config(config)
    dispatch.choose(backend)
    forward = partial(turbo_attention_forward, config=config, backend=backend)
    for registry, function in ((AttentionInterface, forward), (AttentionMaskInterface, turbo_mask)):
        _replaced.setdefault(registry, registry._global_mapping.get(NAME, _ABSENT))
        registry.register(NAME, function)
    follow()


def disable() -> None:
    """Undo `enable`: what stood under "turbo" before (usually nothing) stands there again.

    Models that still ask for "turbo" then fail with transformers' own error for an unknown
    implementation; switch them with ``model.set_attn_implementation``.
    """
    for registry, before in _replaced.items():
        if before is _ABSENT:
            registry._global_mapping.pop(NAME, None)
        else:
            registry.register(NAME, before)
    unfollow()
    _replaced.clear()
