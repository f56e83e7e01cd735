"""Attention without a `TurboCache` as an operator, so that `torch.compile` keeps a model in one graph.

Which keys and masks are cut depends on values that are not known during tracing; the operator reads them when it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv.handle import LIBRARY
from ...ops import config_of
from .call import LayerCall
from .dense import attend_dense
from .masks import MaskPlan


def attend_in_graph(
    query: Tensor, key: Tensor, value: Tensor, plan: MaskPlan | None, is_causal: bool, call: LayerCall
) -> Tensor:
    """`attend_dense` for code that is traced by Dynamo."""
    mask, mask_window, made_here = (None, None, False) if plan is None else (plan.mask, plan.window, plan.from_function)
    return torch.ops.turboattention.attend_dense(
        query,
        key,
        value,
        mask,
        mask_window,
        made_here,
        is_causal,
        call.scale,
        call.softcap,
        call.window,
        call.sinks,
        "" if call.config is None else call.config.text,
        call.backend,
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_window: int | None,
    from_function: bool,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    config: str,
    backend: str,
) -> Tensor:
    plan = None if mask is None else MaskPlan(mask, mask_window, from_function)
    call = LayerCall(scale, softcap, window, sinks, config_of(config), backend)
    return attend_dense(query, key, value, plan, is_causal, call).contiguous()


def _fake_attend(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    return torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)


LIBRARY.define(
    "attend_dense(Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt? mask_window, bool from_function, "
    "bool is_causal, float? scale, float? softcap, SymInt? window, Tensor? sinks, str config, str backend) -> Tensor"
)
LIBRARY.impl("attend_dense", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("turboattention::attend_dense", _fake_attend, lib=LIBRARY)
