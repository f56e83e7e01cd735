"""Stage 1 and the page codec: the launchers of csrc/cpu/quantize.

Each computes what its namesake in `kv.quantizer` (`kv.pages` for pages) does, with bit-equal results. Tensors are on
the CPU; float64 is left to PyTorch. `isa` selects an instruction set of `_cpu.isas()`, by default the best.
"""

from __future__ import annotations

import ctypes
import importlib

import torch
from torch import Tensor

from ...errors import DtypeError
from ...kv.channel_order import ChannelOrder
from ...kv.layout import PageLayout
from .attention import PageSections, channel_table, page_sections
from .rows import FloatRows, float_rows, mean_address

# By name: static analysis has no module for the extension and would take it for the whole package.
_cpu = importlib.import_module("turboattention._cpu")


def quantize_tokens(
    x: Tensor,
    span: tuple[Tensor, Tensor],
    first: Tensor,
    mean: Tensor | None,
    mean_from: int,
    rotate: bool,
    codes: Tensor,
    scales: Tensor,
    target: Tensor,
    isa: str = "",
) -> bool:
    """Rotate, smooth and quantize tokens `span[0][b] .. span[1][b]` of each sequence of x [B, H, T, D].

    Token t has position `first[b] + t`; from position `mean_from` on, mean (bfloat16 [B, H, D]) is subtracted. Token t
    is written to row `target[b] + t` of codes int8 [B, H, W, D] and scales float32 [B, H, W]. No other tokens of x are
    read, and no other rows are written. span, first and target: int64 [B].

    Returns whether all values read were finite and at most 1e18 in magnitude.
    """
    batch, heads, _, head_dim = x.shape
    rows, alive = float_rows(x)
    begin, end, first, target = (_indices(i) for i in (*span, first, target))
    a = _Tokens(batch=batch, heads=heads, head_dim=head_dim, rotate=rotate, x=rows, mean_from=mean_from)
    a.begin, a.end, a.first, a.target = (i.data_ptr() for i in (begin, end, first, target))
    a.mean = mean_address(mean)
    a.codes, a.scales, a.batch_rows, a.head_rows = _tile(codes, scales)
    a.threads = torch.get_num_threads()
    finite = _cpu.quantize_tokens(ctypes.addressof(a), isa)
    del alive
    return finite


def first_block_mean(
    codes: Tensor, scales: Tensor, begin: int, end: int, wanted: Tensor, mean: Tensor, isa: str = ""
) -> Tensor:
    """bfloat16 [B, H, D]: `mean`, but for the sequences `wanted` (bool [B]) the mean of their rows `begin` to `end`
    (exclusive) of codes [B, H, W, D] with scales [B, H, W]."""
    mean = mean.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
    batch, heads, _, head_dim = codes.shape
    wanted = _indices(wanted)
    a = _Mean(batch=batch, heads=heads, head_dim=head_dim, begin=begin, end=end, wanted=wanted.data_ptr())
    a.codes, a.scales, a.batch_rows, a.head_rows = _tile(codes, scales)
    a.mean = mean.data_ptr()
    _cpu.first_block_mean(ctypes.addressof(a), isa)
    return mean


def encode_pages(
    layout: PageLayout,
    k8: Tensor,
    v8: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    search: bool,
    order: ChannelOrder | None = None,
    rotated: bool = False,
    isa: str = "",
) -> Tensor:
    """Tiles k8 int8 [N, H, B, D], v8 int8 [N, H, B, Dv] with scales float32 [N, H, B] -> uint8 [N, page_bytes]."""
    codes = [x.contiguous() for x in (k8, v8)]
    scales = [x.to(torch.float32).contiguous() for x in (k_scale, v_scale)]
    pages = torch.zeros(len(k8), layout.page_bytes, dtype=torch.uint8)
    a, channels = _page_arguments(layout, pages, codes, scales), channel_table(order)
    a.search, a.rotated = search, rotated
    a.order = None if channels is None else channels.data_ptr()
    _cpu.encode_pages(ctypes.addressof(a), isa)
    del channels
    return pages


def decode_pages(layout: PageLayout, pages: Tensor, isa: str = "") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of `encode_pages` up to the error of stage 2: k8, v8, k_scale, v_scale."""
    shape = (len(pages), layout.num_kv_heads, layout.block_size)
    codes = [torch.empty(*shape, width, dtype=torch.int8) for width in (layout.head_dim, layout.v_head_dim)]
    scales = [torch.empty(shape, dtype=torch.float32) for _ in range(2)]
    pages = pages.contiguous()
    a = _page_arguments(layout, pages, codes, scales)
    _cpu.decode_pages(ctypes.addressof(a), isa)
    return codes[0], codes[1], scales[0], scales[1]


def _page_arguments(layout: PageLayout, pages: Tensor, codes: list[Tensor], scales: list[Tensor]) -> _Pages:
    a = _Pages(pages=len(pages), heads=layout.num_kv_heads, block=layout.block_size)
    a.head_dim, a.value_dim = layout.head_dim, layout.v_head_dim
    a.head_rows, a.page_bytes = layout.block_size, layout.page_bytes
    a.layout, a.bytes = page_sections(layout), pages.data_ptr()
    a.codes[:] = [x.data_ptr() for x in codes]
    a.scales[:] = [x.data_ptr() for x in scales]
    a.threads = torch.get_num_threads()
    return a


# -- the structs of csrc/cpu/quantize/interface.h, field by field -------------------------------------


def _words(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class _Tokens(ctypes.Structure):
    _fields_ = [
        *_words("batch heads head_dim rotate"),
        ("x", FloatRows),
        *_pointers("begin end first target mean"),
        *_words("mean_from"),
        *_pointers("given_scale codes scales"),
        *_words("batch_rows head_rows threads"),
    ]


class _Mean(ctypes.Structure):
    _fields_ = [
        *_words("batch heads head_dim begin end"),
        *_pointers("wanted codes scales"),
        *_words("batch_rows head_rows"),
        *_pointers("mean"),
    ]


class _Pages(ctypes.Structure):
    _fields_ = [
        *_words("pages heads head_dim value_dim block head_rows page_bytes search"),
        ("layout", PageSections),
        *_pointers("bytes"),
        ("codes", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        *_pointers("order"),
        *_words("rotated threads"),
    ]


def _check_structs() -> None:
    sizes = tuple(map(ctypes.sizeof, (_Tokens, _Mean, _Pages)))
    built = tuple(getattr(_cpu, "quantize_bytes", ()))
    if sizes != built:
        raise ImportError(f"turboattention._cpu: expected structs of {sizes} bytes, got a build with {built}")


_check_structs()


def _indices(x: Tensor) -> Tensor:
    return x.to(torch.int64).contiguous()


def _tile(codes: Tensor, scales: Tensor) -> tuple[int, int, int, int]:
    """Addresses of codes [B, H, W, D] and scales [B, H, W], and rows between sequences and heads."""
    _, heads, width, _ = codes.shape
    if codes.dtype != torch.int8 or scales.dtype != torch.float32:
        raise DtypeError(f"codes, scales: expected int8 and float32, got {codes.dtype} and {scales.dtype}")
    if not codes.is_contiguous() or not scales.is_contiguous():
        raise DtypeError("codes, scales: expected contiguous tensors, got others")
    return codes.data_ptr(), scales.data_ptr(), heads * width, width
