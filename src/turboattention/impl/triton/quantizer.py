"""`kv.quantizer.Quantizer` for GPUs, implemented by the Triton kernels; by PyTorch for heads that these refuse."""

from typing import Any

from torch import Tensor

from ...kernels.inputs import gpu_refusal
from ...kernels.triton import pages, quantize, smoothing
from ...kv.layout import PageLayout
from ...kv.quantizer import PYTORCH
from .device import on_own_device
from .steps import append

__all__ = ["append", "checks_finite", "decode_pages", "encode_pages", "first_block_mean", "quantize_tokens"]

checks_finite = False


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
def quantize_tokens(x: Tensor, *arguments: Any) -> bool:
    return _for(quantize, x.shape[-1]).quantize_tokens(x, *arguments)


def _for(kernels: Any, head_dim: int, v_head_dim: int | None = None) -> Any:
    return PYTORCH if gpu_refusal((head_dim, v_head_dim or head_dim)) else kernels
