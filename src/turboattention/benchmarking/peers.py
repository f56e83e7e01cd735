"""Other implementations of the same attention, each in its fastest variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import TurboConfig
from . import ggml, remote, sdpa
from .contenders import Contender, turbo
from .problem import Problem, fill


@dataclass(frozen=True)
class Peer:
    """`make(problem, backend)` builds the contender, `missing()` returns why it cannot run here or None, and `fits`
    whether it applies to a problem. `stores`: over a cache its call stores a token, so TurboAttention's does too."""

    name: str
    about: str
    make: Callable[[Problem, str], Contender]
    missing: Callable[[], str | None] = lambda: None
    fits: Callable[[Problem, TurboConfig], bool] = lambda problem, config: True
    stores: bool = False


def _int4(problem: Problem, backend: str) -> Contender:
    assert problem.cache is not None
    config = problem.cache.config.replace(bits=4)
    narrow = replace(problem, cache=fill(problem.k, problem.v, config))
    return turbo(narrow, backend, config, "turboattention 4 bits")


def _ggml(kind: str, bound: float) -> Callable[[Problem, str], Contender]:
    def make(problem: Problem, backend: str) -> Contender:
        attention = ggml.FlashAttention(
            problem.q, problem.k, problem.v, kind, problem.shape.causal, torch.get_num_threads()
        )
        return Contender(
            f"ggml {kind}",
            attention.compute,
            problem.expected,
            bound,
            detail="flash_attn_ext",
            output=lambda _: attention.output(),
        )

    return make


def _sdpa(dtype: torch.dtype, bound: float, *, folded: bool = False) -> Callable[[Problem, str], Contender]:
    def make(problem: Problem, backend: str) -> Contender:
        q, k, v = (x.to(dtype).contiguous() for x in (problem.q, problem.k, problem.v))
        way, call = sdpa.best(q, k, v, problem.shape.causal, folded=folded)
        shape = problem.q.shape

        def output(result: Tensor) -> Tensor:
            return result.reshape(shape)

        name = f"sdpa {str(dtype).removeprefix('torch.')}" + (" folded" if folded else "")
        return Contender(name, call, problem.expected, bound, detail=way, output=output)

    return make


def _dequantize(problem: Problem, backend: str) -> Contender:
    cache, q, causal = problem.cache, problem.q, problem.shape.causal
    assert cache is not None
    folded = sdpa.can_fold(q, cache.num_kv_heads)

    def call() -> Tensor:
        k, v = (x.to(q.dtype) for x in cache.dequantize())
        return (sdpa.folded if folded else sdpa.grouped)(q, k, v, causal)

    return Contender(
        "dequantize, then sdpa", call, problem.expected_stored, 1e-3, output=lambda result: result.reshape(q.shape)
    )


def _engine(name: str, label: str, kind: str, bound: float) -> Callable[[Problem, str], Contender]:
    def make(problem: Problem, backend: str) -> Contender:
        call = remote.Remote(name, problem, kind, torch.get_num_threads())
        return Contender(f"{label} {kind}", call, problem.expected, bound, detail=call.detail)

    return make


def _of_engine(environment: str, label: str, name: str, kind: str, bound: float, *, prompts: bool = False) -> Peer:
    return Peer(
        name,
        f"{label}, {kind} cache, each call storing a token",
        _engine(environment, label, kind, bound),
        lambda: remote.missing(environment),
        lambda problem, config: _decodes(problem) or (prompts and _is_prompt(problem)),
        stores=True,
    )


def _decodes(problem: Problem) -> bool:
    return problem.cache is not None and problem.shape.queries == 1


def _is_prompt(problem: Problem) -> bool:
    return problem.cache is None and problem.shape.causal and problem.shape.queries == problem.shape.keys


def _reads_cache(problem: Problem, config: TurboConfig) -> bool:
    return problem.cache is not None


def _other_width(problem: Problem, config: TurboConfig) -> bool:
    return problem.cache is not None and config.bits != 4


def _folds(problem: Problem, config: TurboConfig) -> bool:
    return sdpa.can_fold(problem.q, problem.k.shape[1])


def _whole_blocks(problem: Problem, config: TurboConfig) -> bool:
    return problem.shape.head_dim % ggml.BLOCK == 0


# ggml accumulates weighted f16 values in f16, so its error grows with the context: 0.027 at 32k tokens.
_GGML_F16_BOUND = 0.1

_LIST = (
    Peer("sdpa", "PyTorch SDPA in float32", _sdpa(torch.float32, 1e-4)),
    Peer(
        "sdpa-folded",
        "the same with query heads as rows, possible for one query",
        _sdpa(torch.float32, 1e-4, folded=True),
        fits=_folds,
    ),
    Peer("sdpa-bf16", "PyTorch SDPA in bfloat16", _sdpa(torch.bfloat16, 0.03)),
    Peer(
        "sdpa-bf16-folded",
        "the same with query heads as rows",
        _sdpa(torch.bfloat16, 0.03, folded=True),
        fits=_folds,
    ),
    Peer("dequantize", "the same cache turned to float, then SDPA", _dequantize, fits=_reads_cache),
    Peer("int4", "TurboAttention's own 4-bit cache", _int4, fits=_other_width),
    Peer("ggml-f16", "ggml flash_attn_ext, f16 cache", _ggml("f16", _GGML_F16_BOUND), ggml.missing),
    Peer("ggml-q8_0", "ggml flash_attn_ext, q8_0 cache", _ggml("q8_0", 0.05), ggml.missing, _whole_blocks),
    Peer("ggml-q4_0", "ggml flash_attn_ext, q4_0 cache", _ggml("q4_0", 0.3), ggml.missing, _whole_blocks),
    _of_engine("onnxruntime", "ORT GQA", "ort-f32", "float32", 1e-4, prompts=True),
    _of_engine("onnxruntime", "ORT GQA", "ort-int8", "int8", 0.05),
    _of_engine("onnxruntime", "ORT GQA", "ort-int4", "int4", 0.4),
    _of_engine("openvino", "OpenVINO", "openvino-f32", "f32", 1e-3),
    _of_engine("openvino", "OpenVINO", "openvino-u8", "u8", 0.05),
    _of_engine("openvino", "OpenVINO", "openvino-u4", "u4", 0.4),
)

PEERS = {peer.name: peer for peer in _LIST}
"""The peers by their name in `--peers`."""


def peers_for(names: list[str], problem: Problem, config: TurboConfig) -> list[Peer]:
    """The peers that apply to this problem."""
    return [PEERS[name] for name in names if PEERS[name].fits(problem, config)]
