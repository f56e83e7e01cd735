"""What caches on a GPU quantize and append with (`kv.quantizer.Quantizer`): the Triton kernels."""

from ..kernels.triton.pages import decode_pages, encode_pages
from ..kernels.triton.quantize import first_block_mean, quantize_tokens
from .triton_steps import append

__all__ = ["append", "decode_pages", "encode_pages", "first_block_mean", "quantize_tokens"]
