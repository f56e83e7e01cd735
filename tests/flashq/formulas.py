"""FlashQ's formulas in plain Python integers and NumPy, sharing no code with the package."""

from __future__ import annotations

import math

import numpy as np

SIGNS = 0x9E3779B97F4A7C15


def half_even(numerator: int, denominator: int) -> int:
    """`numerator / denominator` (positive) rounded to the nearest integer, ties to the even one."""
    quotient, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and quotient % 2):
        quotient += 1
    return quotient


def encode(values: list[int], step: int, zero: int, bits: int) -> list[int]:
    return [min(max(half_even(x - zero, step), 0), 2**bits - 1) for x in values]


def min_max(values: list[int], bits: int) -> tuple[int, int]:
    """(step, zero) of one channel; beyond stage 1's 119 the range ends at 127 at the most."""
    low, high, levels = min(values), max(values), 2**bits - 1
    step = min(max(1, math.ceil((high - low) / levels)), min(127, 255 // levels))
    return step, low if high <= 119 else min(low, 127 - step * levels)


def squared_error(values: list[int], step: int, zero: int, bits: int) -> int:
    codes = encode(values, step, zero, bits)
    return sum((code * step + zero - x) ** 2 for code, x in zip(codes, values, strict=True))


def search(values: list[int], bits: int) -> tuple[int, int]:
    """Min-max, then steps of 16/16 to 8/16 (one bit: 12/16 to 4/16) of its step, at 4 and 5 bits its step and that less
    one, each centred and shifted by -1/4 and +1/4 of a step; the first of least squared error."""
    levels = 2**bits - 1
    widest, zero = min_max(values, bits)
    best = (squared_error(values, widest, zero, bits), widest, zero)
    shrinks = range(12, 3, -1) if bits == 1 else range(16, 7, -1)
    steps = [widest, widest - 1] if bits > 3 else [math.ceil(widest * shrink / 16) for shrink in shrinks]
    for step in (max(1, step) for step in steps):
        for quarter in (0, -1, 1):
            zero = math.floor((2 * (min(values) + max(values)) - 2 * step * levels + quarter * step) / 4)
            zero = max(min(zero, 127 - step * levels), -128)
            error = squared_error(values, step, zero, bits)
            if error < best[0]:
                best = (error, step, zero)
    return best[1:]


def stage2(codes: np.ndarray, bits: int, searched: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One tile [T, D] -> code [T, D], step [D], zero [D]."""
    out, steps, zeros = np.zeros(codes.shape, int), [], []
    for channel in range(codes.shape[1]):
        values = [int(x) for x in codes[:, channel]]
        step, zero = search(values, bits) if searched and bits < 8 else min_max(values, bits)
        out[:, channel] = encode(values, step, zero, bits)
        steps.append(step)
        zeros.append(zero)
    return out, np.array(steps), np.array(zeros)


def restored(codes: np.ndarray, bits: int, searched: bool = False) -> np.ndarray:
    """A tile through stage 2 and back."""
    code, step, zero = stage2(codes, bits, searched)
    return code * step + zero


def bfloat(x: np.ndarray) -> np.ndarray:
    """Rounded to float32, then to its 8 leading bits, ties to even."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float32).astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def grid_up(scale: float) -> float:
    """The smallest number with 4 mantissa bits behind the leading one that is not below `scale`."""
    if scale == 0:
        return 1.0
    mantissa, exponent = math.frexp(scale)  # scale = mantissa 2^exponent, 0.5 <= mantissa < 1
    return max(math.ldexp(math.ceil(mantissa * 32), exponent - 5), 2.0**-100)


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token scales: [T, D] -> codes [T, D], scales [T]."""
    scales = np.array([grid_up(float(np.abs(row).max()) / 119) for row in x])
    return np.rint(x / scales[:, None]).astype(int), scales


def rotation(head_dim: int) -> np.ndarray:
    """Signs times blocks of Sylvester's Hadamard matrix, (-1)^popcount(i & j) / sqrt(block)."""
    block = 1
    while head_dim % (2 * block) == 0:
        block *= 2
    matrix = np.zeros((head_dim, head_dim))
    for i in range(head_dim):
        sign = -1 if SIGNS >> (i % 64) & 1 else 1
        for j in range(head_dim):
            if i // block == j // block:
                matrix[i, j] = sign * (-1) ** bin(i % block & j % block).count("1") / math.sqrt(block)
    return matrix
