"""ggml's ``flash_attn_ext`` on the CPU, called through the shared libraries of llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

FOLDER = "TURBOATTENTION_GGML"
"""Environment variable: a folder with libggml-base.so and libggml-cpu.so, in place of the installed package's."""

_F32, _F16 = 0, 1
_KINDS = {"f16": _F16, "q4_0": 2, "q8_0": 8}
"""Types of a cache, and their numbers in ``enum ggml_type``."""

BLOCK = 32
"""Elements per block of the quantized types."""

_BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}

_OVERHEAD = 16 << 20
"""Bytes for the metadata of a few tensors and one graph; their data is allocated by the backend."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int] + [c_int64] * 4),
    "ggml_flash_attn_ext": (c_void_p, [c_void_p] * 5 + [c_float] * 3),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p] + [c_int64] * 3 + [POINTER(c_float)]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


def missing() -> str | None:
    """Why ggml cannot be used here; None if it can."""
    folder = _folder()
    if folder is None:
        return f"llama-cpp-python is not installed, and {FOLDER} names no folder with ggml's libraries"
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"ggml's libraries in {folder} cannot be used: {error}"
    return None


def version() -> str | None:
    """The version of ggml; None if ggml is missing or too old to report it."""
    if missing() is not None or not hasattr(_library(), "ggml_version"):
        return None
    found = _library().ggml_version
    found.restype, found.argtypes = c_char_p, []
    text = found()
    return text.decode() if text else None


def _folder() -> Path | None:
    named = os.environ.get(FOLDER)
    if named:
        return Path(named) if (Path(named) / "libggml-base.so").exists() else None
    spec = find_spec("llama_cpp")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / "lib" / "libggml-base.so").exists():
            return Path(place) / "lib"
    return None


@cache
def _library() -> ctypes.CDLL:
    """The library of the CPU backend, through which functions of the base library are found too."""
    folder = _folder()
    assert folder is not None
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class FlashAttention:
    """One call of ``flash_attn_ext`` as a graph that can be computed repeatedly.

    Args:
        q: [1, Hq, Lq, D]; k, v: [1, Hkv, Lk, D]. Queries stay float32, keys and values become `kind`.
        causal: aligned to the bottom right, by a mask, as ggml has no flag for it.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, kind: str, causal: bool, threads: int):
        self._backend = self._context = self._buffer = None
        if q.shape[0] != 1:
            raise ValueError(f"q: expected a batch of 1, got {q.shape[0]}")
        self._ggml = library = _library()
        self._shape = q.shape
        self._backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._context = library.ggml_init(_InitParams(_OVERHEAD, None, True))
        masked = causal and q.shape[2] > 1
        tensors = [self._tensor(_F32, q.shape), *(self._tensor(_KINDS[kind], x.shape) for x in (k, v))]
        # Older releases require the rows of the mask padded to a multiple of 64.
        mask = self._tensor(_F16, (1, 1, -(-q.shape[2] // 64) * 64, k.shape[2])) if masked else None
        self._result = library.ggml_flash_attn_ext(self._context, *tensors, mask, q.shape[3] ** -0.5, 0.0, 0.0)
        self._graph = library.ggml_new_graph(self._context)
        library.ggml_build_forward_expand(self._graph, self._result)
        self._buffer = library.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        if not self._buffer:
            raise MemoryError("ggml could not allocate its tensors")
        self._set(tensors[0], q.float().contiguous())
        for tensor, x in zip(tensors[1:], (k, v), strict=True):
            self._set(tensor, _stored(library, x, kind))
        if mask is not None:
            self._set(mask, _causal_mask(q.shape[2], k.shape[2]))

    def compute(self) -> None:
        status = self._ggml.ggml_backend_graph_compute(self._backend, self._graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute: expected status 0, got {status}")

    def output(self) -> Tensor:
        """The result of the last `compute`: float32 [1, Hq, Lq, D]."""
        batch, heads, queries, head_dim = self._shape
        out = torch.empty(batch, queries, heads, head_dim)
        self._ggml.ggml_backend_tensor_get(self._result, out.data_ptr(), 0, out.nbytes)
        return out.transpose(1, 2)

    def __del__(self) -> None:
        if self._buffer:
            self._ggml.ggml_backend_buffer_free(self._buffer)
        if self._context:
            self._ggml.ggml_free(self._context)
        if self._backend:
            self._ggml.ggml_backend_free(self._backend)

    def _tensor(self, kind: int, shape: tuple[int, ...]) -> int:
        """ggml names the fastest dimension first."""
        return self._ggml.ggml_new_tensor_4d(self._context, kind, *reversed(shape))

    def _set(self, tensor: int, data: Tensor) -> None:
        expected = self._ggml.ggml_nbytes(tensor)
        if data.nbytes != expected:
            raise ValueError(f"tensor: expected {expected} bytes, got {data.nbytes}")
        self._ggml.ggml_backend_tensor_set(tensor, data.data_ptr(), 0, data.nbytes)


def _stored(library: ctypes.CDLL, x: Tensor, kind: str) -> Tensor:
    """Keys or values as a cache of this kind holds them; quantized kinds in blocks along D."""
    if kind == "f16":
        return x.to(torch.float16).contiguous()
    rows = x.float().contiguous().flatten(0, 2)
    out = torch.empty(len(rows), rows.shape[1] // BLOCK * _BLOCK_BYTES[kind], dtype=torch.uint8)
    library.ggml_quantize_chunk(_KINDS[kind], rows.data_ptr(), out.data_ptr(), 0, len(rows), rows.shape[1], None)
    return out


def _causal_mask(queries: int, keys: int) -> Tensor:
    """float16 [padded queries, keys]: 0 where a query sees a key, else -inf."""
    row = torch.arange(-(-queries // 64) * 64)[:, None]
    return torch.where(torch.arange(keys) <= row + keys - queries, 0.0, float("-inf")).to(torch.float16)
