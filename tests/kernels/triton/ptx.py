"""The few PTX instructions that unpacking is written in, on NumPy's 32-bit lanes (PTX ISA 9.7: integers, logic)."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.uint64]
_WORD = np.uint64(0xFFFFFFFF)


def _shifted_left(low: Lanes, high: Lanes, by: Lanes) -> Lanes:
    """shf.l.wrap: the upper word of [high, low] shifted left by the lowest five bits of `by`."""
    return ((high << np.uint64(32) | low) << (by & np.uint64(31))) >> np.uint64(32)


def _permuted(low: Lanes, high: Lanes, selector: Lanes) -> Lanes:
    """prmt: of the bytes of [high, low], those that the selector's four hexadecimal digits name."""
    both, result = high << np.uint64(32) | low, low & np.uint64(0)
    for place in range(4):
        at = (selector >> np.uint64(4 * place) & np.uint64(7)) * np.uint64(8)
        result |= (both >> at & np.uint64(255)) << np.uint64(8 * place)
    return result


INSTRUCTIONS: dict[str, Callable[..., Lanes]] = {
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> np.minimum(b, np.uint64(32)),
    "shf.l.wrap.b32": _shifted_left,
    "bfe.u32": lambda a, at, bits: a >> at & (np.uint64(1) << bits) - np.uint64(1),
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _permuted,
}


def evaluated(text: str, *inputs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """`$0` of a block of instructions over registers `$1`, `$2`, ..."""
    registers = {f"${i}": x.astype(np.uint64) for i, x in enumerate(inputs, 1)}
    for statement in text.strip().strip("{}").split(";"):
        words = re.split(r"[\s,]+", statement.strip())
        if words[0] in ("", ".reg"):
            continue
        name, target, *operands = words
        values = (registers[x] if x in registers else np.uint64(int(x, 0)) for x in operands)
        registers[target] = INSTRUCTIONS[name](*values) & _WORD
    return registers["$0"].astype(np.uint32)


def inline_asm(seen: set[str]) -> Callable[..., SimpleNamespace]:
    """In place of the interpreter's `create_inline_asm`, which has none; `seen` takes the texts."""
    from triton.runtime.interpreter import TensorHandle

    def create(builder, text, constraints, values, types, pure, pack) -> SimpleNamespace:
        assert pack == 4
        assert all(value.data.dtype == np.uint8 for value in values)
        seen.add(text)
        lanes = (np.ascontiguousarray(value.data).reshape(-1).view(np.uint32) for value in values)
        data = evaluated(text, *lanes).view(np.uint8).reshape(values[0].data.shape)
        return SimpleNamespace(get_result=lambda index: TensorHandle(data, values[0].dtype))

    return create
