"""`kv.quantizer.Quantizer` for the CPU, implemented by the C++ extension."""

from ...kernels.cpu.quantize import decode_pages, encode_pages, first_block_mean, quantize_tokens
from .steps import append

__all__ = ["append", "checks_finite", "decode_pages", "encode_pages", "first_block_mean", "quantize_tokens"]

checks_finite = True
