"""Paged attention for servers, which own the memory: block tables, tail slots of INT8 rows, ragged batches.

A page holds a full block of 64 tokens in the packed format (`kv/layout.py`) and is never modified. Incomplete blocks
are INT8 rows in `TailBlocks`, one tail slot per running sequence. Attention follows `TurboConfig.stored_prefill`: a
query in block j reads the blocks before j from their pages, and block j as INT8, so that the bytes of a page do not
depend on how tokens were scheduled.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .config import TurboConfig
from .dispatch import TABLE, CallTraits, choose
from .errors import DtypeError, InputError, ShapeError, UnsupportedError
from .impl.contract import PagedAttention
from .kv.paged import BLOCK, PAGE_UNIT, HeadBits, PagedBatch, PagedFormat, TailBlocks, reserved_bytes
from .paged_exact_rows import write_exact_rows
from .params import AttentionParams
from .softmax import logit_scale
from .validation import check_floats, check_softmax
from .words import number_of

__all__ = [
    "BLOCK",
    "PAGE_UNIT",
    "HeadBits",
    "PagedBatch",
    "PagedFormat",
    "TailBlocks",
    "backend_for",
    "paged_attention",
    "reserved_bytes",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged_attention(
    fmt: PagedFormat,
    layer: int,
    batch: PagedBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    pages: Tensor,
    tail_blocks: TailBlocks,
    *,
    scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> bool:
    """Store the new tokens of all sequences, then write causal attention to `out`.

    Args:
        q, out: [T, Hq, D]; k, v: [T, H, D]. float32, bfloat16 or float16, all on the device of the pages. out has last
            stride 1.
        pages: uint8 [N, page_bytes or more] with last stride 1, the pages of this layer; blocks that fill are written.
        fmt: the page format of all layers. layer: index into its layouts and into `tail_blocks`.
        batch: the sequences of this step: their query rows, lengths, pages and tail slots.
        tail_blocks: INT8 rows of incomplete blocks; this layer's slots are written.
        scale: of the logits, default `1 / sqrt(D)`.
        window_size: in tokens; a query at position p attends to keys `p - window_size + 1` to p. Pages before every
            window are not read.
        sinks: float [Hq], learned sink logits: an additional column of the softmax without a value. Only on CPUs.
        softcap, backend: as in `turbo_attention`.

    Returns:
        Whether all values of q, k and v were finite. Values that are not finite are read as zeros: rows of q as a
        whole, on a GPU also rows of k and v. A GPU always returns True, without waiting: `TailBlocks.poll_nonfinite`
        reports such values later.

    Raises:
        ShapeError: shapes do not match.
        DtypeError: q, k, v and out have different dtypes or an unsupported one, or a tensor is on another device.
        ConfigError: scale or softcap is out of range.
        InputError: layer or window_size is out of range; on a CPU also lengths, tail slots or page numbers (a GPU does
            not check them). Nothing is stored then.
        BackendError, UnsupportedError (gradients): as in `turbo_attention`; UnsupportedError also for `reorder_k` on a
            GPU.

    Examples:
        Rows are the flat query tokens, columns the positions of the token's own sequence; 1 is attended to. Tokens from
        `query_start[R]` on are padding (-), whose output is unspecified::

            query_start=[0, 2, 3], seq_lens=[5, 1], tokens=4
            1 1 1 1 0    # sequence 0, which has 3 earlier tokens
            1 1 1 1 1
            1 0 0 0 0    # sequence 1, its first token
            - - - - -

            query_start=[0, 3, 3, 4], seq_lens=[3, 0, 5], tokens=4, window_size=2
            1 0 0 0 0    # sequence 0
            1 1 0 0 0
            0 1 1 0 0
            0 0 0 1 1    # sequence 2; sequence 1 has no tokens in this step
    """
    _check_tensors(q, k, v, out, pages, tail_blocks, sinks)
    _check_shapes(fmt, q, k, v, out, pages)
    _check_place(fmt, layer, tail_blocks, window_size)
    check_softmax(scale, softcap)
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point()):
        raise ShapeError(f"sinks: expected floats of shape [{q.shape[1]}], got {sinks.dtype} {list(sinks.shape)}")
    which = fmt.config, q.dtype, q.device, backend
    run = batch.once(which, lambda: _chosen(*which)[1])
    params = AttentionParams(True, logit_scale(scale, fmt.head_dim), window_size, softcap)
    finite = run(fmt, layer, batch, q, k, v, out, pages, tail_blocks, params, sinks)
    if tail_blocks.exact_rows:
        write_exact_rows(layer, batch, q, k, v, out, tail_blocks, params, sinks)
    return finite


def backend_for(config: TurboConfig, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> str:
    """The backend of `paged_attention` for tensors of this dtype and device.

    Raises:
        InputError: the backend does not support pages. BackendError, UnsupportedError: as in `turbo_attention`.
    """
    return _chosen(config, dtype, device, backend)[0]


def _chosen(config: TurboConfig, dtype: torch.dtype, device: torch.device, backend: str) -> tuple[str, PagedAttention]:
    chosen = choose(backend, CallTraits(_over_caches(config), dtype, device, queries=1))
    if chosen.paged_attention is None:
        able = sorted(each.name for each in TABLE.values() if each.paged_attention is not None)
        raise InputError(f"backend: expected one of {', '.join(able)} for pages, got {chosen.name!r}")
    if config.reorders_k and not chosen.reorders_pages:
        raise UnsupportedError(
            f"config: expected reorder_k=False for pages with backend {chosen.name!r}, got True: its kernels for pages "
            "read keys of one width per head"
        )
    return chosen.name, chosen.paged_attention


@cache
def _over_caches(config: TurboConfig) -> TurboConfig:
    """The configuration to choose a backend for. All backends with kernels for pages support `stored_prefill` there,
    even if they do not support it over caches."""
    return config.replace(stored_prefill=False)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, pages: Tensor, tail_blocks: TailBlocks, sinks: Tensor | None
) -> None:
    """One dtype of those that the kernels read, one device, no gradients."""
    if isinstance(q, Tensor) and q.dtype not in _DTYPES:
        raise DtypeError(f"q: expected float32, bfloat16 or float16, got {q.dtype}")
    check_floats(q=q, k=k, v=v, out=out)
    for name, x in (("pages", pages), ("tail_blocks", tail_blocks.codes[0]), ("sinks", sinks)):
        if x is not None and x.device != q.device:
            raise DtypeError(f"{name}: expected memory on {q.device}, as q is, got {x.device}")


def _check_shapes(fmt: PagedFormat, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pages: Tensor) -> None:
    heads, head_dim = fmt.kv_heads, fmt.head_dim
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % heads or out.shape != q.shape:
        raise ShapeError(
            f"q, out: expected [tokens, a multiple of {heads} heads, {head_dim}] both, got {list(q.shape)} and "
            f"{list(out.shape)}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.shape != (q.shape[0], heads, head_dim):
            raise ShapeError(f"{name}: expected [{q.shape[0]}, {heads}, {head_dim}], got {list(x.shape)}")
    if out.stride(-1) != 1:
        raise ShapeError(f"out: expected last stride 1, got strides {out.stride()}")
    if pages.dim() != 2 or pages.dtype != torch.uint8 or pages.shape[1] < fmt.page_bytes or pages.stride(1) != 1:
        raise ShapeError(
            f"pages: expected uint8 [pages, {fmt.page_bytes} or more], got {pages.dtype} {list(pages.shape)}"
        )


def _check_place(fmt: PagedFormat, layer: int, tail_blocks: TailBlocks, window_size: int | None) -> None:
    shape = tail_blocks.codes[0].shape
    if (shape[2], shape[4]) != (fmt.kv_heads, fmt.head_dim):
        raise ShapeError(
            f"tail_blocks: expected {number_of(fmt.kv_heads, 'head')} of {fmt.head_dim} channels, got {shape[2]} of "
            f"{shape[4]}"
        )
    if not 0 <= layer < min(shape[0], len(fmt.layouts)):
        raise InputError(f"layer: expected one of {min(shape[0], len(fmt.layouts))}, got {layer}")
    if window_size is not None and window_size < 1:
        raise InputError(f"window_size: expected at least 1, or None, got {window_size}")
