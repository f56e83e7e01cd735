"""Arguments of attention kernels: queries, the softmax, and a whole call of `attention.attend`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...config import TurboConfig
from ...params import AttentionParams
from ..inputs import Int8Queries, Pages, QueryPositions, TailRows
from . import configs
from .softmax import LOG2_E

FORMS = ("auto", "sas", "sas2", "exp")
"""Supported values of `TurboConfig.softmax`."""

_LARGEST_WINDOW = 1 << 30  # no sequence is longer, and positions plus it stay int32
_MASK_KINDS = {torch.bool: "bool", torch.float32: "add", torch.bfloat16: "add", torch.float16: "add"}


def padded(head_dim: int) -> int:
    """head_dim padded to a power of two, at least 64: products use four 8-bit lanes."""
    return max(64, 1 << (head_dim - 1).bit_length())


def with_positive_unit(quantized: Int8Queries, scale: float) -> Int8Queries:
    """The same logits with positive units: the maximum of a block is computed on integers, before scaling."""
    if scale > 0:
        return quantized
    if scale < 0:
        return _mapped(quantized, torch.neg, torch.neg)
    return _mapped(quantized, torch.zeros_like, torch.ones_like)


def _mapped(x: Int8Queries, of_codes: Callable[[Tensor], Tensor], of_units: Callable[[Tensor], Tensor]) -> Int8Queries:
    ordered = (None, None)
    if x.ordered_codes is not None and x.ordered_unit is not None:
        ordered = of_codes(x.ordered_codes), of_units(x.ordered_unit)
    return Int8Queries(of_codes(x.codes), of_units(x.unit), x.mean_logit, *ordered)


def query_arguments(x: Int8Queries) -> dict[str, Any]:
    """Kernel arguments of quantized queries."""
    mean = x.unit if x.mean_logit is None else x.mean_logit
    return {"q_ptr": x.codes, "unit_ptr": x.unit, "mean_ptr": mean, "MEAN": x.mean_logit is not None}


def ordered_arguments(x: Int8Queries) -> dict[str, Any]:
    """Kernel arguments of queries with reordered channels, for compressed pages; None if the order is the same."""
    return {"ordered_q_ptr": x.ordered_codes, "ordered_unit_ptr": x.ordered_unit}


def softmax_arguments(config: TurboConfig, device: torch.device, params: AttentionParams) -> dict[str, Any]:
    """Kernel arguments of the window, the softcap and the exponentials, constexpr ones included."""
    form, by_row = config.softmax_on(device), config.p_scale == "row"
    if form == "sas16":  # "auto" in the interpreter, whose tensors are on a CPU
        form = "sas"
    return {
        "window": min(params.window_size or 0, _LARGEST_WINDOW),
        "cap": params.softcap or 0.0,
        "threshold": config.sas_threshold * (1.0 if form == "sas" else LOG2_E.value),
        "FORM": form,
        # Else 127 e^-y rounds to zero beyond the threshold, within the approximations' errors.
        "CUT": form != "exp" and (by_row or config.sas_threshold > -5.7),
        "ROW": by_row,
        "WINDOW": params.window_size is not None,
        "CAP": params.softcap is not None,
    }


@dataclass(frozen=True)
class Fresh:
    """Keys and values before quantization: floats k [B, Hkv, L, D], v [B, Hkv, L, Dv]. mean: bfloat16 [B, Hkv, D],
    subtracted from the keys after the first block, or None. flag: int32 [1], nonzero if a value of the call is not
    finite; results are then NaN."""

    k: Tensor
    v: Tensor
    mean: Tensor | None
    flag: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """A prepared call of `attention.attend`. Keys are in pages and tail rows, or fresh. `blocks`: upper bound of the
    blocks of a sequence."""

    config: TurboConfig
    quantized: Int8Queries
    query_positions: QueryPositions
    pages: Pages | None
    tail: TailRows | None
    fresh: Fresh | None
    kv_heads: int
    blocks: int
    mean_from_block: int
    params: AttentionParams
    out: Tensor
    lse: Tensor

    @property
    def batch(self) -> int:
        return self.out.shape[0]

    @property
    def queries(self) -> int:
        return self.out.shape[2]

    @property
    def group(self) -> int:
        return self.out.shape[1] // self.kv_heads

    def parts(self, largest: int) -> Iterator[AttentionCall]:
        """Split the call into calls with at most `largest` sequences each. Not for fresh keys."""
        if self.batch <= largest:
            yield self
            return
        for begin in range(0, self.batch, largest):
            some = slice(begin, begin + largest)

            def of(x: Any, some: slice = some) -> Any:
                """Slice the tensors [B, ...] of a dataclass; its other fields do not depend on the sequence."""
                if x is None:
                    return None
                tensors = {f.name: getattr(x, f.name) for f in fields(x)}
                return replace(x, **{name: y[some] for name, y in tensors.items() if isinstance(y, Tensor)})

            params, mask = self.params, self.params.attn_mask
            if mask is not None and mask.shape[0] > 1:
                params = replace(params, attn_mask=mask[some])
            yield replace(
                self, quantized=of(self.quantized), query_positions=of(self.query_positions), pages=of(self.pages),
                tail=of(self.tail), params=params, out=self.out[some], lse=self.lse[some],
            )  # fmt: skip

    @property
    def rows(self) -> int:
        """Query rows per KV head."""
        return self.group * self.queries

    @property
    def head_dim(self) -> int:
        """Channels of queries and keys."""
        return self.quantized.codes.shape[4]

    @property
    def v_head_dim(self) -> int:
        return self.out.shape[3]

    @property
    def architecture(self) -> configs.Architecture:
        return configs.architecture_of(self.out.device)

    @property
    def wide(self) -> int:
        return padded(self.head_dim)

    @property
    def v_wide(self) -> int:
        return padded(self.v_head_dim)

    def row_arguments(self) -> dict[str, Any]:
        """Kernel arguments of queries and their positions."""
        s = self.query_positions
        where = {"first_ptr": s.first, "valid_ptr": s.valid, "lengths_ptr": s.lengths}
        return query_arguments(self.quantized) | where

    def visibility_arguments(self) -> dict[str, Any]:
        """Kernel arguments of the mask, the window and the softmax, constexpr ones included."""
        mask = self.params.attn_mask
        if mask is not None and mask.dtype not in _MASK_KINDS:
            mask = mask.to(torch.float32)
        kind = "" if mask is None else _MASK_KINDS[mask.dtype]
        if mask is None:
            mask = self.quantized.unit[:1, :1, :1, :1]
        strides = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        return {
            "mask_ptr": mask.view(torch.uint8) if kind == "bool" else mask,
            **dict(zip(("mask_b", "mask_h", "mask_q", "mask_k"), strides, strict=True)),
            # A mask with one key is broadcast to all keys.
            "mask_keys": mask.shape[3] if mask.shape[3] > 1 else _LARGEST_WINDOW,
            "mean_from_block": self.mean_from_block,
            "CAUSAL": self.params.is_causal,
            "MASK": kind,
            **softmax_arguments(self.config, self.out.device, self.params),
        }
