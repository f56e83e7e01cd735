"""FlashQ: the two stages of quantization (paper section 3; docs/numerics.md)."""

from .head_priority import assign_head_bits, head_priority
from .packing import pack_codes, unpack_codes
from .progressive import progressive_dequantize, progressive_quantize
from .rotation import rotate, rotation_matrix
from .symmetric import dequantize_int8, quantize_int8, quantize_tokens

__all__ = [
    "assign_head_bits",
    "dequantize_int8",
    "head_priority",
    "pack_codes",
    "progressive_dequantize",
    "progressive_quantize",
    "quantize_int8",
    "quantize_tokens",
    "rotate",
    "rotation_matrix",
    "unpack_codes",
]
