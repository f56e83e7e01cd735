"""The attention function of "turbo": over a layer of a `TurboCache` if there is one, else over full-precision keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...config import TurboConfig
from ...errors import UnsupportedError
from .call import LayerCall, aligned
from .compiled import attend_in_graph
from .dense import attend_dense
from .dense_guard import check_first_prompt
from .layer import layer_of
from .masks import MaskPlan, read_mask
from .repeated import other_keys


def turbo_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    config: TurboConfig | None = None,
    backend: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, Hq, Lq, D] queries -> ([B, Lq, Hq, Dv], no weights).

    With a `TurboCache`, `key` carries a reference to its layer, which attends over the packed cache and appends the new
    tokens. This part is excluded from compiled graphs.

    Raises:
        UnsupportedError: dropout, attention weights, position biases, continuous batching, gradients.
    """
    _refuse(module, dropout, kwargs)
    _refuse_gradients(query, key, value)
    tracing = torch.compiler.is_dynamo_compiling()
    layer = layer_of(key)
    held = None if tracing else other_keys(module, key, layer is not None)
    if held is not None and (holder := layer_of(held)) is not None:
        holder.refuse_other_keys()
    if layer is not None:
        layer.check_values(key, value)
    plan = read_mask(attention_mask)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = _window(plan, causal, sliding_window)
    if layer is None:
        query, key, value = aligned(query, key, value)
        call = LayerCall(scaling, softcap, window, s_aux, config, backend)
        out = (attend_in_graph if tracing else attend_dense)(query, key, value, plan, causal, call)
        if not tracing:
            check_first_prompt(module, out, (query, key, value), plan, causal, call)
    else:
        attend = _attend_layer_outside if tracing else _attend_layer
        positions = kwargs.get("position_ids")
        out = attend(module, query, key, plan, causal, scaling, softcap, window, s_aux, positions)
    return out.transpose(1, 2).contiguous(), None


def _attend_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    plan: MaskPlan | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
    window: int | None,
    s_aux: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    layer = layer_of(key)
    assert layer is not None
    call = LayerCall(scaling, softcap, window, s_aux, backend=layer.backend)
    return layer.attend(module, query, plan, causal, call, positions)


_attend_layer_outside: Any = torch.compiler.disable(_attend_layer)


def _window(plan: MaskPlan | None, causal: bool, sliding_window: int | None) -> int | None:
    """The mask's window if the mask has one; a padding mask has none, and the layer's applies."""
    if plan is not None and (plan.from_function or not plan.is_causal):
        return plan.window
    return sliding_window if causal or plan is not None else None


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedError(f"dropout: expected 0 (call model.eval()), got {dropout}")
    if kwargs.get("output_attentions"):
        raise UnsupportedError(
            'output_attentions: attn_implementation="turbo" does not compute attention weights; use "eager"'
        )
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError('position_bias: not supported by attn_implementation="turbo"')
    if kwargs.get("cache") is not None:
        raise UnsupportedError('cache: continuous batching is not supported by attn_implementation="turbo"')


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UnsupportedError('gradients: attn_implementation="turbo" is for inference; call it under torch.no_grad()')
