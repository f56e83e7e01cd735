"""Attention in integers over INT8 rows and packed pages: the launcher of csrc/cpu/attention."""

from __future__ import annotations

import ctypes
import functools
import importlib

import numpy as np
import torch
from torch import Tensor

from ...config import TurboConfig
from ...errors import NonFiniteError, UnsupportedError
from ...kv.channel_order import ChannelOrder
from ...kv.layout import WIDEST, PageLayout
from ...params import AttentionParams
from .. import inputs
from ..inputs import Int8Queries, Pages, QueryPositions, TailRows
from .rows import FloatRows, Int8Rows, check_format, check_size, float_rows, mean_address

# By name: static analysis has no module for the extension and would take it for the whole package.
_cpu = importlib.import_module("turboattention._cpu")

_HOST = torch.device("cpu")
_SOFTMAX = {"sas": 0, "sas2": 1, "exp": 2, "sas16": 3}
_MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def refusal(config: TurboConfig, dtype: torch.dtype) -> str | None:
    """The reason why these kernels do not support a configuration, or None. They support the paper's running maximum
    and weight scales per tile only in combination."""
    if config.row_max != "running" or config.p_scale != "tile":
        return inputs.refusal(config, dtype)
    together = {"row_max": ("running",), "p_scale": ("tile",), "rescale": ("exact", "sas"), "stored_prefill": (False,)}
    return inputs.refusal(config, dtype, **together)


def attend(
    config: TurboConfig,
    q: Tensor,
    query_positions: QueryPositions,
    pages: Pages | None,
    rows: TailRows | None,
    params: AttentionParams,
    *,
    kv_heads: int,
    v_head_dim: int,
    mean: Tensor | None,
    mean_from_block: int,
    order: ChannelOrder | None = None,
    quantized: Int8Queries | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, Lq, D] over pages and later rows: out [B, Hq, Lq, Dv] and lse float32 [B, Hq, Lq].

    mean: bfloat16 [B, Hkv, D] (in the space of INT8 rows), subtracted from keys from block `mean_from_block` on, or
    None; order: of the channels of K in compressed pages, or
    None; `quantized` replaces the values of q.

    Raises UnsupportedError for what `refusal` names, NonFiniteError if a valid row of q is not finite or beyond 1e18.
    """
    reason = refusal(config, q.dtype)
    if reason:
        raise UnsupportedError(f'backend: expected a configuration that "cpu" computes, got one where {reason}')
    batch, heads, count, head_dim = q.shape
    out = torch.empty(*q.shape[:-1], v_head_dim, dtype=q.dtype)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32)
    a = Arguments(batch=batch, heads=kv_heads, group=heads // kv_heads, queries=count)
    a.head_dim, a.value_dim = head_dim, v_head_dim
    channels = channel_table(order)
    alive = fill_queries(a, config, q, out, channels, params.scale, mean)
    if quantized is not None:
        a.q.data = None
        a.q_codes, a.q_unit = quantized.codes.data_ptr(), quantized.unit.data_ptr()
        a.q_mean_logit = quantized.mean_logit.data_ptr() if quantized.mean_logit is not None else None
    a.first_position, a.valid_rows = query_positions.first.data_ptr(), query_positions.valid.data_ptr()
    a.lengths, a.mean_from_block = query_positions.lengths.data_ptr(), mean_from_block
    none = torch.zeros(batch, dtype=torch.int64)
    a.page_counts = a.tail.start = none.data_ptr()
    if pages is not None:
        fill_pages(a, pages)
    if rows is not None:
        a.tail.codes[:] = rows.k8.data_ptr(), rows.v8.data_ptr()
        a.tail.scales[:] = rows.k_scale.data_ptr(), rows.v_scale.data_ptr()
        a.tail.start = rows.start.data_ptr()
        a.tail.batch_rows, a.tail.head_rows = kv_heads * rows.k8.shape[2], rows.k8.shape[2]
    mask = fill_call(a, config, params)
    a.lse, a.threads = lse.data_ptr(), torch.get_num_threads()
    refuse_non_finite(0 if _cpu.attend(ctypes.addressof(a)) else 1)
    del alive, channels, mask
    return out, lse


def refuse_non_finite(which: int) -> None:
    """Raise NonFiniteError unless a kernel returned 0; 1, 2, 3: q, k, v has a value that is not finite."""
    if which:
        name = ("q", "k", "v")[which - 1]
        raise NonFiniteError(f"{name}: expected finite values up to 1e18 in magnitude, got others")


def fill_queries(
    a: Arguments,
    config: TurboConfig,
    q: Tensor,
    out: Tensor,
    order: Tensor | None,
    scale: float,
    mean: Tensor | None,
) -> Tensor:
    """Set the addresses of queries and results; `order` from `channel_table`. Returns a tensor that must outlive the
    call, as the arguments must."""
    a.q, alive = float_rows(q)
    a.out, _ = float_rows(out)
    a.rotate, a.scale = config.rotate, scale
    a.order = None if order is None else order.data_ptr()
    a.mean = mean_address(mean)
    return alive


def channel_table(order: ChannelOrder | None) -> Tensor | None:
    """`ChannelOrder.table`, or None without an order."""
    return None if order is None else order.table


def fill_pages(a: Arguments, pages: Pages) -> None:
    """Set the page tables, which must outlive the call."""
    a.pages, a.page_counts = pages.addresses.data_ptr(), pages.counts.data_ptr()
    a.page_stride, a.sink_blocks = pages.addresses.shape[1], pages.sink_blocks
    a.sinks, a.compressed = page_sections(pages.sinks), page_sections(pages.compressed or pages.sinks)


def fill_call(a: Arguments, config: TurboConfig, params: AttentionParams) -> Tensor | None:
    """Set the options of a call. Returns the mask, which must outlive the call."""
    a.softmax, a.threshold, a.softcap = _SOFTMAX[config.softmax_on(_HOST)], config.sas_threshold, params.softcap or 0.0
    a.row_scale, a.by_tile = config.p_scale == "row", config.p_scale == "tile"
    a.approximate_rescale = config.rescale == "sas"
    a.causal, a.window, a.stored = params.is_causal, params.window_size or 0, config.stored_prefill
    a.mask_kind, mask = 0, params.attn_mask
    if mask is not None:
        mask = mask if mask.dtype in _MASK_KINDS else mask.to(torch.float32)
        a.mask_kind = _MASK_KINDS[mask.dtype]
        a.mask, a.mask_keys = mask.data_ptr(), mask.shape[3]
        a.mask_stride[:] = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
    return mask


class PageSections(ctypes.Structure):
    """`PageSections` of csrc/cpu, with the table that its first field points to."""

    table: np.ndarray
    _fields_ = [
        ("offsets", ctypes.c_void_p),
        ("token_scales", ctypes.c_int64 * 2),
        ("scales", ctypes.c_int64 * 2),
    ]


class Arguments(ctypes.Structure):
    """`AttendArgs` of csrc/cpu/attention/arguments.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "group", "queries", "head_dim", "value_dim")),
        ("q", FloatRows),
        *((name, ctypes.c_int64) for name in ("rotate",)),
        ("order", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("mean", "non_finite", "q_codes", "q_unit", "q_mean_logit")),
        *((name, ctypes.c_void_p) for name in ("first_position", "valid_rows", "lengths")),
        ("mean_from_block", ctypes.c_int64),
        ("pages", ctypes.c_void_p),
        ("page_counts", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("sink_blocks", ctypes.c_int64),
        ("sinks", PageSections),
        ("compressed", PageSections),
        ("tail", Int8Rows),
        ("stored", ctypes.c_int64),
        ("softmax", ctypes.c_int64),
        ("threshold", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("row_scale", "by_tile", "approximate_rescale")),
        ("causal", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("mask_kind", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64 * 4),
        ("mask_keys", ctypes.c_int64),
        ("out", FloatRows),
        ("lse", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


check_format(getattr(_cpu, "format", None))
check_size(Arguments, _cpu.attend_bytes)


@functools.cache
def page_sections(layout: PageLayout) -> PageSections:
    """Cached permanently, with the table that it points to: a model has few different layouts."""
    table = _head_offsets(layout)
    sections = PageSections(
        table.ctypes.data,
        (layout.k_token_scales, layout.v_token_scales) if layout.token_scales else (-1, -1),
        (layout.k_scales, layout.v_scales),
    )
    sections.table = table
    return sections


def _head_offsets(layout: PageLayout) -> np.ndarray:
    """int64 [H, 2, 5]: widths of both halves of the channels and offsets of codes, steps and zeros of each head's K
    and V."""
    table = np.full((layout.num_kv_heads, 2, 5), -1, np.int64)
    sides = (
        (layout.k_groups, layout.k_coded, layout.k_steps, layout.head_dim),
        (layout.v_groups, layout.v_coded, layout.v_steps, layout.v_head_dim),
    )
    for side, (groups, coded, steps, channels) in enumerate(sides):
        for group in groups:
            for index, head in enumerate(group.heads):
                table[head, side, :2] = group.parts[0][0], group.parts[-1][0]
                table[head, side, 2] = group.offset + index * group.head_bytes
                if group.bits < WIDEST:
                    place = coded.index(head)
                    table[head, side, 3:] = [steps + n * channels for n in (place, len(coded) + place)]
    return table
