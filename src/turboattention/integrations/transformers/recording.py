"""Records the inputs and outputs of each layer's attention function while a model runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ...errors import UnsupportedError
from .registry import NAME as TURBO

_NAME = "turbo_recording"


@dataclass(frozen=True)
class RecordedCall:
    """One call of a layer's attention function.

    q: [B, Hq, L, D]; k, v: [B, Hkv, L, D], all detached. out: [B, L, Hq, D], part of the autograd graph, so that its
    gradient can be read after a backward pass. options: the call's keyword arguments (`scaling`, `softcap`, ...).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    options: dict[str, Any]


@contextmanager
def recorded_attention(model: Any) -> Iterator[dict[int, RecordedCall]]:
    """Record the attention calls of `model` inside the `with` block; its outputs do not change.

    Yields:
        Layer index -> the layer's first call. Layers that share the keys of another layer attend again later, under
        that layer's index.

    Raises:
        UnsupportedError: the model's attention implementation is not in transformers' registry.
    """
    own = model.config._attn_implementation
    name = "eager" if own == TURBO else own  # "turbo" refuses gradients; every model has "eager"
    attend, mask = AttentionInterface().get(name), AttentionMaskInterface().get(name)
    if mask is None:
        raise UnsupportedError(f"attn_implementation: expected a registered one to record, got {own!r}")
    calls: dict[int, RecordedCall] = {}

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        function = attend or sys.modules[type(module).__module__].eager_attention_forward
        out, weights = function(module, query, key, value, *args, **options)
        if not out.requires_grad:
            out.requires_grad_()  # the first layer: the backward pass need not go further back
        out.retain_grad()
        call = RecordedCall(query.detach(), key.detach(), value.detach(), out, options)
        calls.setdefault(int(module.layer_idx), call)  # type: ignore[arg-type]
        return out, weights

    AttentionInterface.register(_NAME, forward)
    AttentionMaskInterface.register(_NAME, mask)
    model.set_attn_implementation(_NAME)
    try:
        yield calls
    finally:
        model.set_attn_implementation(own)
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(_NAME, None)
