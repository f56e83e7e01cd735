"""Checks the tensors in a saved cache's file against its metadata, before they are read.

The sizes in a header are unverified: the header of a sparse file of a few kilobytes can state terabytes. Therefore the
name, dtype and shape of every tensor must follow from the metadata, and the small tensors that determine the number of
pages (lengths, block table) are read first. Exact checks follow when the cache is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from .channel_order import permutation_dtype
from .layout import PageLayout
from .page_table import EVICTED
from .stage1 import MEAN_DTYPE

MOST = 2**16
"""The largest number of sequences, and of heads, of a saved cache."""
LONGEST = 2**31 - 1
_MOST_BLOCKS = 2**24  # entries of a block table: 64 MiB, a billion tokens
_LARGEST_STATE = 2**24  # elements, of one sequence
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

Sizes = Sequence[int | range]
"""The size of each dimension, or the sizes that it may have."""


class TensorFile:
    """The tensors of an open safetensors file, of which only the header has been read."""

    def __init__(self, file: Any):
        self._file = file
        self._unclaimed: set[str] = set(file.keys())

    def claim(self, name: str, dtypes: Sequence[torch.dtype], sizes: Sizes) -> tuple[int, ...] | None:
        """The shape of a tensor, whose name thereby belongs to the cache; None if there is no such tensor.

        Raises:
            FormatError: it has another dtype, or not one of the `sizes` in each dimension.
        """
        if name not in self._unclaimed:
            return None
        dtype, shape = self._claimed(name)
        fits = len(shape) == len(sizes) and all(map(_is_one, shape, sizes))
        if not fits or dtype not in dtypes:
            expected = f"{' or '.join(map(str, dtypes))} ({', '.join(map(_text, sizes))})"
            raise FormatError(f"{name}: expected {expected}, got {dtype} {shape}")
        return shape

    def claim_state(self, name: str, sequences: int | range) -> None:
        """As `claim`, for floats of any shape with a first dimension of `sequences`."""
        dtype, shape = self._claimed(name)
        fits = bool(shape) and _is_one(shape[0], sequences) and math.prod(shape[1:]) <= _LARGEST_STATE
        if not fits or dtype not in FLOATS:
            expected = f"floats of {_text(sequences)} sequences, each at most {_LARGEST_STATE}"
            raise FormatError(f"{name}: expected {expected}, got {dtype} {shape}")

    def _claimed(self, name: str) -> tuple[Any, tuple[int, ...]]:
        """Its dtype and shape. Raises KeyError if there is no such tensor, or it was claimed before."""
        self._unclaimed.remove(name)
        view = self._file.get_slice(name)
        return _DTYPES.get(view.get_dtype(), view.get_dtype()), tuple(view.get_shape())

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def read_all(self) -> dict[str, Tensor]:
        """Raises `FormatError` if there is a tensor that was not claimed."""
        if self._unclaimed:
            one = min(self._unclaimed)[:60]
            raise FormatError(
                f"path: expected a file of the tensors of a cache, got {len(self._unclaimed)} others ({one!r})"
            )
        return {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118 (not a dict)


def _is_one(size: int, of: int | range) -> bool:
    return size in of if isinstance(of, range) else size == of


def _text(sizes: int | range) -> str:
    return f"{sizes[0]} to {sizes[-1]}" if isinstance(sizes, range) else str(sizes)


def claim_cache(file: TensorFile, metadata: dict[str, Any], prefix: str, longest: int = LONGEST) -> int:
    """Claim the tensors of one cache, with `prefix` before each name; the number of its sequences, which have at most
    `longest` tokens.

    Raises:
        FormatError: a tensor does not fit the metadata. KeyError, TypeError, ValueError: nor does the metadata itself.
    """
    config = metadata["config"]
    heads, dim = counted(metadata, "num_kv_heads", MOST), counted(metadata, "head_dim", MOST)
    value_dim = counted(metadata, "v_head_dim", MOST) if "v_head_dim" in metadata else dim
    block, lag = counted(config, "block_size", LONGEST), counted(config, "flush_lag", LONGEST, 0)
    lengths = file.claim(f"{prefix}lengths", [torch.int64], [range(MOST + 1)])
    if lengths is None:
        raise FormatError(f"{prefix}lengths: expected a tensor of that name, got none")
    (batch,) = lengths
    rows, scales = range(block + lag), (torch.bfloat16, torch.float32)
    order = [permutation_dtype(dim)]
    fixed: dict[str, tuple[Sequence[torch.dtype], Sizes]] = {
        "head_bits": ([torch.int64], (2, heads)),
        "frozen_bits": ([torch.int64], (2, heads)),
        "given_mean": (FLOATS, (heads, dim)),
        "given_order": (order, (heads, dim)),
        "given_halved": ([torch.bool], (heads,)),
        "k_order": (order, (heads, dim)),
        "k_halved": ([torch.bool], (heads,)),
        "k_mean": ([MEAN_DTYPE, torch.float32], (batch, heads, dim)),
        "universal": ([torch.float32], (2, batch, heads)),
        "query_energy": ([torch.float64], (heads, dim)),
        "buffer.k8": ([torch.int8], (batch, heads, rows, dim)),
        "buffer.v8": ([torch.int8], (batch, heads, rows, value_dim)),
        "buffer.k_scale": (scales, (batch, heads, rows)),
        "buffer.v_scale": (scales, (batch, heads, rows)),
    }
    for name, (dtypes, sizes) in fixed.items():
        file.claim(prefix + name, dtypes, sizes)
    pages = _pages(file, prefix, batch, block, longest)
    widest = PageLayout.uniform(heads, dim, block, 8, True, value_dim).page_bytes
    for name in ("sinks", "pages"):
        file.claim(prefix + name, [torch.uint8], (range(pages + 1), range(1, widest + 1)))
    return batch


def counted(metadata: dict[str, Any], name: str, most: int, least: int = 1) -> int:
    """An integer of the metadata. Raises `FormatError` for other values, and larger ones than `most`."""
    value = metadata[name]
    if type(value) is not int or value < least:
        raise FormatError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value > most:
        raise FormatError(f"{name}: expected at most {most}, got {value}")
    return value


def _pages(file: TensorFile, prefix: str, batch: int, block: int, longest: int) -> int:
    """Upper bound of the number of pages that the block table refers to, in either pool."""
    lengths, name = file.read(f"{prefix}lengths"), f"{prefix}table"
    if bool(((lengths < 0) | (lengths > longest)).any()):
        found = f"{int(lengths.min())} to {int(lengths.max())}"
        raise FormatError(f"{prefix}lengths: expected 0 to {longest} tokens, got {found}")
    blocks = int(lengths.max()) // block if batch else 0
    if blocks * batch > _MOST_BLOCKS:
        raise FormatError(f"{name}: expected at most {_MOST_BLOCKS} blocks, got {blocks} of {batch} sequences")
    if file.claim(name, [torch.int32], (batch, range(blocks + 1))) is None:
        return 0
    table = file.read(name)
    return len(table[table > EVICTED].unique())
