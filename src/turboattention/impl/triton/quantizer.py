"""`kv.quantizer.Quantizer` for GPUs, implemented by the Triton kernels."""

from ...kernels.triton import pages, quantize, smoothing
from .device import on_own_device
from .steps import append

__all__ = ["append", "decode_pages", "encode_pages", "first_block_mean", "quantize_tokens"]

decode_pages = on_own_device(pages.decode_pages)
encode_pages = on_own_device(pages.encode_pages)
first_block_mean = on_own_device(smoothing.first_block_mean)
quantize_tokens = on_own_device(quantize.quantize_tokens)
