"""Attention in integers over INT8 rows and packed pages: the launchers of `prefill` and `decode`.

Nothing here reads a tensor's values: grids follow from shapes, lengths and page tables stay on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import TurboConfig
from ...errors import UnsupportedError
from ...kv.layout import WIDEST, PageLayout
from .. import inputs
from ..inputs import BLOCK, Int8Queries, OpenRows, Pages, Standing
from . import configs
from .combine import combine
from .decode import decode
from .operands import bytes_a_block, page_operands, row_operands
from .places import head_places
from .prefill import prefill
from .quantize import quantize_queries

_LARGEST_WINDOW = 1 << 30  # no sequence is longer, and positions plus it stay int32

OPERAND_BYTES = 1 << 28
"""Memory for operands of `prefill`; more where a single KV head of one sequence needs it."""

_MASK_KINDS = {torch.bool: "bool", torch.float32: "add", torch.bfloat16: "add", torch.float16: "add"}
_LOG2_E = 1.4426950408889634


def refusal(config: TurboConfig, dtype: torch.dtype) -> str | None:
    """Why these kernels do not compute this, or None."""
    return inputs.refusal(config, dtype, stored_prefill=False)


def attend(
    config: TurboConfig,
    q: Tensor,
    standing: Standing,
    pages: Pages | None,
    rows: OpenRows | None,
    *,
    kv_heads: int,
    scale: float,
    mean: Tensor | None,
    mean_from: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None,
    quantized: Int8Queries | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Lq, D] over pages, then rows -> out like q (contiguous) and lse float32 [B, Hq, Lq].

    mean: float32 [B, Hkv, D] (rotated space) that keys from block `mean_from` on are stored without,
    or None; mask: bool or float, [1 or B, 1 or Hq, 1 or Lq, 1 or Lk]; `quantized` takes the place
    of q's values. All tensors on one device. Whether q is finite is told by `quantize_queries` alone.

    Raises UnsupportedError for what `refusal` and `configs.refusal` name.
    """
    reason = refusal(config, q.dtype) or configs.refusal(q.device)
    if reason:
        raise UnsupportedError(f'backend: expected a configuration that "triton" computes, got one where {reason}')
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    if quantized is None:
        codes, unit, mean_logit, _ = quantize_queries(q, kv_heads, standing.valid, mean, scale, config.rotate)
        quantized = Int8Queries(codes, unit, mean_logit)
    blocks = (pages.addresses.shape[1] if pages else 0) + (-(-rows.k8.shape[2] // BLOCK) if rows else 0)
    call = _Call(
        config, _with_positive_unit(quantized, scale), standing, pages, rows, kv_heads, blocks, mean_from,
        causal, window, softcap, mask, out, lse,
    )  # fmt: skip
    if call.rows <= configs.LARGEST_DECODE_ROWS or call.queries == 1:
        _few_rows(call)
    else:
        _many_rows(call)
    return out, lse


def _with_positive_unit(quantized: Int8Queries, scale: float) -> Int8Queries:
    """The maximum of a block is looked for among integers: what one of them counts must be positive."""
    if scale > 0:
        return quantized
    if scale < 0:
        return Int8Queries(-quantized.codes, -quantized.unit, quantized.mean_logit)
    return Int8Queries(torch.zeros_like(quantized.codes), torch.ones_like(quantized.unit), quantized.mean_logit)


@dataclass(frozen=True)
class _Call:
    """What both paths need; `blocks` is the most that a sequence may have."""

    config: TurboConfig
    quantized: Int8Queries
    standing: Standing
    pages: Pages | None
    open: OpenRows | None
    kv_heads: int
    blocks: int
    mean_from: int
    causal: bool
    window: int | None
    softcap: float | None
    mask: Tensor | None
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

    @property
    def rows(self) -> int:
        """Query rows of a KV head."""
        return self.group * self.queries

    @property
    def head_dim(self) -> int:
        return self.out.shape[3]

    @property
    def architecture(self) -> configs.Architecture:
        return configs.architecture_of(self.out.device)

    @property
    def wide(self) -> int:
        """head_dim, padded: a power of two, and enough for a product's four 8-bit lanes."""
        return max(64, 1 << (self.head_dim - 1).bit_length())

    def row_arguments(self) -> dict[str, Any]:
        s, x = self.standing, self.quantized
        mean = x.mean_logit if x.mean_logit is not None else x.unit
        names = {"q_ptr": x.codes, "unit_ptr": x.unit, "mean_ptr": mean}
        return names | {"first_ptr": s.first, "valid_ptr": s.valid, "lengths_ptr": s.lengths}

    def sight_arguments(self) -> dict[str, Any]:
        """Of masks, window and softmax: values, and what is compiled in."""
        config, mask = self.config, self.mask
        if mask is not None and mask.dtype not in _MASK_KINDS:
            mask = mask.to(torch.float32)
        kind = "" if mask is None else _MASK_KINDS[mask.dtype]
        if mask is None:
            mask = self.quantized.unit[:1, :1, :1, :1]
        strides = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        return {
            "mask_ptr": mask.view(torch.uint8) if kind == "bool" else mask,
            **dict(zip(("mask_b", "mask_h", "mask_q", "mask_k"), strides, strict=True)),
            # One key's stands for all.
            "mask_keys": mask.shape[3] if mask.shape[3] > 1 else _LARGEST_WINDOW,
            "window": min(self.window or 0, _LARGEST_WINDOW),
            "mean_from": self.mean_from,
            "cap": self.softcap or 0.0,
            "threshold": config.sas_threshold * (1.0 if config.softmax == "sas" else _LOG2_E),
            "FORM": config.softmax,
            # From here on 127 e^-y rounds to zero anyway, within the approximations' errors.
            "CUT": config.softmax != "exp" and config.sas_threshold > -5.7,
            "CAUSAL": self.causal,
            "WINDOW": self.window is not None,
            "CAP": self.softcap is not None,
            "MASK": kind,
            "MEAN": self.quantized.mean_logit is not None,
        }


# -- few rows ---------------------------------------------------------------------------------------------


def _few_rows(call: _Call) -> None:
    """Splits of the sequences over pages as they lie, one launch for each pair of widths among the heads (one
    kernel for all would take the registers of the most demanding), then `combine`."""
    adjusted = call.mask is not None or call.softcap is not None
    launch = configs.decode(call.architecture, call.rows, call.head_dim, adjusted)
    tiles = -(-call.rows // launch.rows)
    device, pages, opened = call.out.device, call.pages, call.open
    splits = configs.splits(call.blocks, call.batch * call.kv_heads * tiles, device)
    shape = call.batch, call.kv_heads, tiles, splits, launch.rows
    acc = torch.empty(*shape, call.wide, dtype=torch.float32, device=device)
    peak, total = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    plain = PageLayout.uniform(call.kv_heads, call.head_dim, BLOCK, WIDEST, call.config.token_scales)
    sinks, compressed = (pages.sinks, pages.compressed) if pages else (plain, None)
    sizes = [layout.page_bytes for layout in (sinks, compressed) if layout is not None]
    arguments = {
        **call.row_arguments(),
        "table_ptr": pages.addresses if pages else None,
        "counts_ptr": pages.counts if pages else None,
        "table_stride": pages.addresses.stride(0) if pages else 0,
        "blank_ptr": _blank(max(sizes), device) if pages else None,
        "sink_blocks": pages.sink_blocks if pages else 0,
        "k8_ptr": opened.k8 if opened else None,
        "v8_ptr": opened.v8 if opened else None,
        "ks_ptr": opened.k_scale if opened else None,
        "vs_ptr": opened.v_scale if opened else None,
        "start_ptr": opened.start if opened else None,
        "width": opened.k8.shape[2] if opened else 0,
        "acc_ptr": acc,
        "peak_ptr": peak,
        "total_ptr": total,
        "kv_heads": call.kv_heads,
        "group": call.group,
        "queries": call.queries,
        "tiles": tiles,
        "D": call.head_dim,
        "WIDE": call.wide,
        "R": launch.rows,
        "ASM": call.architecture.assembly,
        "SINKS": pages is not None and pages.sink_blocks > 0,
        "OPEN": opened is not None,
        "BY_TOKEN": sinks.token_scales,
        **call.sight_arguments(),
        **launch.options,
    }
    for (k_bits, v_bits), heads in _pairs_of_widths(compressed or plain):
        decode[splits, len(heads) * tiles, call.batch](
            **arguments,
            sink_places_ptr=head_places(sinks, heads, device),
            places_ptr=head_places(compressed or plain, heads, device),
            K_BITS=k_bits if compressed else 0,
            V_BITS=v_bits if compressed else 0,
        )
    combine[call.rows, call.kv_heads, call.batch](
        acc, peak, total, call.out, call.lse, splits, tiles, call.group, call.queries,
        D=call.head_dim, WIDE=call.wide, R=launch.rows, SPLITS=1 << (splits - 1).bit_length(),
        ROTATE=call.config.rotate, num_warps=1, **configs.FUSION,
    )  # fmt: skip


# -- many rows --------------------------------------------------------------------------------------------


def _many_rows(call: _Call) -> None:
    """Blocks are made operands once, for as many heads and sequences at a time as memory allows."""
    launch = configs.prefill(call.architecture, call.head_dim, call.mask is not None)
    device = call.out.device
    for sequences, heads in _parts(call):
        shape = len(sequences), len(heads), max(1, call.blocks)
        k, v = (torch.empty(*shape, BLOCK, call.wide, dtype=torch.int8, device=device) for _ in range(2))
        k_scale, v_level = (torch.empty(*shape, BLOCK, dtype=torch.float32, device=device) for _ in range(2))
        operands = k, v, k_scale, v_level, torch.empty(shape, dtype=torch.float32, device=device)
        _make_operands(call, sequences, heads, operands)
        prefill[-(-call.rows // launch.rows), len(heads), len(sequences)](
            **call.row_arguments(),
            **dict(zip(("k_ptr", "v_ptr", "k_scale_ptr", "v_level_ptr", "v_scale_ptr"), operands, strict=True)),
            out_ptr=call.out,
            lse_ptr=call.lse,
            first_head=heads.start,
            first_sequence=sequences.start,
            blocks=shape[2],
            kv_heads=call.kv_heads,
            group=call.group,
            queries=call.queries,
            D=call.head_dim,
            WIDE=call.wide,
            M=launch.rows,
            ROTATE=call.config.rotate,
            SLOW=call.architecture.slow_int_to_float,
            **call.sight_arguments(),
            **launch.options,
        )


def _parts(call: _Call) -> Iterator[tuple[range, range]]:
    """Sequences and KV heads whose operands fit `OPERAND_BYTES`, one of each at least."""
    fitting = max(1, OPERAND_BYTES // max(1, call.blocks * bytes_a_block(call.wide)))
    heads = min(fitting, call.kv_heads)
    sequences = max(1, fitting // call.kv_heads)
    for b in range(0, call.batch, sequences):
        for h in range(0, call.kv_heads, heads):
            yield range(b, min(b + sequences, call.batch)), range(h, min(h + heads, call.kv_heads))


def _make_operands(call: _Call, sequences: range, heads: range, operands: tuple[Tensor, ...]) -> None:
    pages, opened, device = call.pages, call.open, call.out.device
    sizes = {"first_head": heads.start, "first_sequence": sequences.start, "blocks": max(1, call.blocks)}
    shape = {"D": call.head_dim, "WIDE": call.wide}
    if pages is not None:
        columns = pages.addresses.shape[1]
        sinks = min(pages.sink_blocks, columns)
        for layout, first, last in ((pages.sinks, 0, sinks), (pages.compressed, sinks, columns)):
            if layout is None or first == last:
                continue
            for (k_bits, v_bits), chosen in _pairs_of_widths(layout):
                chosen = tuple(h for h in chosen if h in heads)
                if chosen:
                    page_operands[last - first, len(chosen), len(sequences)](
                        pages.addresses, pages.counts, head_places(layout, chosen, device), *operands,
                        pages.addresses.stride(0), first, heads=len(heads), **sizes, **shape,
                        K_BITS=k_bits, V_BITS=v_bits, BY_TOKEN=layout.token_scales, **configs.FUSION,
                    )  # fmt: skip
    if opened is not None:
        row_operands[-(-opened.k8.shape[2] // BLOCK), len(heads), len(sequences)](
            opened.k8, opened.v8, opened.k_scale, opened.v_scale, opened.start, call.standing.lengths, *operands,
            opened.k8.shape[2], call.kv_heads, **sizes, **shape, **configs.FUSION,
        )  # fmt: skip


# -- layouts as the kernels read them ---------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _pairs_of_widths(layout: PageLayout) -> tuple[tuple[tuple[int, int], tuple[int, ...]], ...]:
    """The heads of each pair of widths (K, V)."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for head, pair in enumerate(zip(layout.k_bits, layout.v_bits, strict=True)):
        pairs.setdefault(pair, []).append(head)
    return tuple((pair, tuple(heads)) for pair, heads in pairs.items())


@functools.cache  # for ever, as `head_places`
def _blank(size: int, device: torch.device) -> Tensor:
    """What is read, and not used, where a page was evicted."""
    return torch.zeros(size, dtype=torch.uint8, device=device)
