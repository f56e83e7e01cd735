"""Unpacking in PTX, which the interpreter has not: its instructions by themselves, and decode by both ways."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.interpreter import InterpreterBuilder

from ...helpers import normals
from . import ptx
from .attending import OFF, filled, kernels_and_reference

from turboattention.kernels.triton import configs  # isort: skip


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kernels take their PTX; the texts that were evaluated."""
    seen: set[str] = set()
    own = dataclasses.replace(configs.ARCHITECTURES["interpreter"], assembly="ptx")
    monkeypatch.setattr(configs, "architecture_of", lambda device: own)
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", ptx.inline_asm(seen))
    return seen


def test_instructions():
    a, b = np.array([0x80000001, 0x12345678], np.uint32), np.array([0xF0F0F0F0, 7], np.uint32)
    assert ptx.evaluated("and.b32 $0, $1, $2;", a, b).tolist() == [0x80000000, 0]
    assert ptx.evaluated("xor.b32 $0, $1, 0x80808080;", a).tolist() == [0x00808081, 0x92B4D6F8]
    assert ptx.evaluated("{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 255; }", a).tolist() == [0, 0x67]
    assert ptx.evaluated("shf.l.wrap.b32 $0, $1, $1, 33;", a).tolist() == [3, 0x2468ACF0]
    with pytest.raises(KeyError):
        ptx.evaluated("sub.u32 $0, $1, 1;", a)


# What each width takes: planes' fields, the third bits at any place, and the shift of half a line.
TEXTS = {8: 1, 4: 2, 3: 4 + 8 + 1, 2: 4}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_decode_is_the_same_to_the_last_bit(bits, head_dim, monkeypatch, assembled):
    cache = filled([200, 70], head_dim, OFF.replace(bits=bits, sink_tokens=0))
    q = normals(2, 4, 1, head_dim, seed=1)
    got, _ = kernels_and_reference(q, cache)
    assert len(assembled) == TEXTS[bits]
    monkeypatch.undo()
    want, _ = kernels_and_reference(q, cache)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
