"""Row arguments of the kernels: float rows of any strides with contiguous channels, and INT8 rows with a scale each."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...errors import DtypeError
from ...kv.layout import FORMAT_VERSION

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def check_size(structure: type[ctypes.Structure], size: int) -> None:
    """Raises ImportError unless a structure has the `size` in bytes that the extension reports."""
    if ctypes.sizeof(structure) != size:
        raise ImportError("turboattention._cpu: expected the build of this version, got another: rebuild it")


def check_format(version: int | None) -> None:
    """Raises ImportError if the extension was built for another `version` of the format (None: unknown)."""
    if version != FORMAT_VERSION:
        got = version or "an earlier one"
        raise ImportError(
            f"turboattention._cpu: expected a build for format {FORMAT_VERSION}, got one for {got}: rebuild it"
        )


class FloatRows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "batch_stride", "head_stride", "token_stride")),
        ("starts", ctypes.c_void_p),
    ]


class Int8Rows(ctypes.Structure):
    """`Int8Rows` of csrc/cpu/attention/arguments.h, field by field."""

    _fields_ = [
        ("codes", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        ("start", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_rows", "head_rows", "ring")),
    ]


def float_rows(x: Tensor) -> tuple[FloatRows, Tensor]:
    """Float rows [B, H, T, D], and the tensor that must outlive their use: a copy if the last stride is not 1."""
    kind, x = _kind(x), _with_contiguous_channels(x)
    return FloatRows(x.data_ptr(), kind, *x.stride()[:3]), x


def flat_rows(x: Tensor, starts: Tensor) -> tuple[FloatRows, Tensor]:
    """The same for concatenated sequences: x [T, H, D], of which sequence b begins at token `starts[b]` (int64,
    contiguous; it must outlive the call, too)."""
    kind, x = _kind(x), _with_contiguous_channels(x)
    token, head, _ = x.stride()
    return FloatRows(x.data_ptr(), kind, 0, head, token, starts.data_ptr()), x


def mean_address(mean: Tensor | None) -> int | None:
    """Address of a mean of K [B, H, D], or None. Raises DtypeError unless it is bfloat16 and contiguous."""
    if mean is None:
        return None
    if mean.dtype != torch.bfloat16 or not mean.is_contiguous():
        raise DtypeError(f"mean: expected contiguous bfloat16, got {mean.dtype} with strides {mean.stride()}")
    return mean.data_ptr()


def _kind(x: Tensor) -> int:
    if x.dtype not in _KINDS:
        raise DtypeError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    return _KINDS[x.dtype]


def _with_contiguous_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
