"""`kv.quantizer.Quantizer` for GPUs: the Triton kernels, or PyTorch for heads that they do not support."""

from typing import Any

from torch import Tensor

from ...kernels.inputs import gpu_refusal
from ...kernels.triton import pages, quantize, smoothing
from ...kv.cache import KVCache
from ...kv.layout import PageLayout
from ...kv.quantizer import PYTORCH
from ...validation import check_finite
from . import prompts, steps
from .device import on_own_device

__all__ = ["append", "checks_finite", "decode_pages", "encode_pages", "first_block_mean", "quantize_tokens"]

checks_finite = True


def append(cache: KVCache, k: Tensor, v: Tensor, counts: Tensor | None = None) -> bool:
    return steps.append(cache, k, v, counts) or prompts.append(cache, k, v, counts)


@on_own_device
def decode_pages(layout: PageLayout, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _for(pages, layout.head_dim, layout.v_head_dim).decode_pages(layout, *arguments)


@on_own_device
def encode_pages(layout: PageLayout, *arguments: Any, **options: Any) -> Tensor:
    return _for(pages, layout.head_dim, layout.v_head_dim).encode_pages(layout, *arguments, **options)


@on_own_device
def first_block_mean(codes: Tensor, *arguments: Any) -> Tensor:
    return _for(smoothing, codes.shape[-1]).first_block_mean(codes, *arguments)


@on_own_device
def quantize_tokens(x: Tensor, span: tuple[Tensor, Tensor], *arguments: Any) -> bool:
    kernels = _for(quantize, x.shape[-1])
    if kernels is PYTORCH:
        check_finite("x", x, span[1])  # which it does not do itself
    return kernels.quantize_tokens(x, span, *arguments)


def _for(kernels: Any, head_dim: int, v_head_dim: int | None = None) -> Any:
    return PYTORCH if gpu_refusal((head_dim, v_head_dim or head_dim)) else kernels
