"""A mask that only attention functions can read: it raises an error in models that compute attention themselves.

Such models accept "turbo" silently and get its masks, which have another meaning in their formulas: True, for
"visible", is added to scores as 1.0 or interpreted as "hidden", and a mask [B, Lk] broadcasts over any tensor with Lk
columns.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UnsupportedError

_HARMLESS = frozenset(
    "__get__ __set__ __len__ __repr__ __format__ __hash__ __deepcopy__ __reduce_ex__ dim numel stride element_size "
    "is_floating_point is_contiguous get_device data_ptr untyped_storage to cpu cuda clone detach contiguous "
    "requires_grad_ record_stream".split()
)
"""Functions that do not change the meaning of a mask."""

_PARTS = frozenset("__getitem__ size expand index_select select narrow repeat_interleave unsqueeze squeeze".split())
"""Functions that select parts of a matrix [B, 1, Lq, Lk]; a mask [B, Lk] lacks the dimensions they expect."""


COMPUTES_BESIDE = {"axk2", "deepseek_v32", "dots3_note_text", "git", "glm_moe_dsa", "hy_v4"}
"""Architectures whose decoders compute attention by themselves, or choose by masks which keys it gets, in modules that
know the interface for other parts. "turbo" refuses them over any cache."""


class GuardedMask(Tensor):
    """A boolean mask [B, Lk] or [B, 1, Lq, Lk]. Computing with it raises an error; parts of it are such masks again."""

    kind: str
    """The architecture, for messages."""

    @staticmethod
    def of(mask: Tensor, kind: str) -> GuardedMask:
        guarded = mask.as_subclass(GuardedMask)
        guarded.kind = kind
        return guarded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            mask = args[0] if args and isinstance(args[0], GuardedMask) else None
            if mask is not None and (func.__name__ in _HARMLESS or (func.__name__ in _PARTS and mask.dim() == 4)):
                result = func(*args, **(kwargs or {}))
                if not isinstance(result, Tensor):
                    return result
                if result.dtype == torch.bool:
                    return result if isinstance(result, GuardedMask) else GuardedMask.of(result, mask.kind)
        operands = [
            x for arg in (*args, *(kwargs or {}).values()) for x in (arg if isinstance(arg, list | tuple) else [arg])
        ]
        raise _refusal(next((x.kind for x in operands if isinstance(x, GuardedMask)), "unknown"))


def check_declared(config: Any) -> None:
    """The model of a config, as far as transformers has it, calls its attention interface. Needed where masks go into
    compiled graphs, which take plain tensors only.

    Raises:
        UnsupportedError: neither its module knows the interface, nor does one of its models declare to follow it.
    """
    kind = str(getattr(config, "model_type", "unknown"))
    if config is None or torch.compiler.is_dynamo_compiling():
        return
    if kind in COMPUTES_BESIDE or _computes_by_itself(type(config)):
        raise _refusal(kind)


@cache
def _computes_by_itself(config: type) -> bool:
    module = sys.modules.get(config.__module__.replace("configuration_", "modeling_"))
    if module is None or module.__name__ == config.__module__ or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return False
    models = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    return bool(models) and not any(x._supports_attention_backend for x in models)


def _refusal(kind: str) -> UnsupportedError:
    return UnsupportedError(
        f'attn_implementation: the architecture {kind!r} is not supported with "turbo": it uses the attention mask in '
        'computations of its own; load it with attn_implementation="eager"'
    )
