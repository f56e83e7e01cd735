"""Pages restored for many query rows: in PTX, which the interpreter has not, as without it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.interpreter import InterpreterBuilder

from ...paging import UNIFORM, Server, serve, tokens
from . import ptx

from turboattention.kernels.triton import configs  # isort: skip


def test_instructions():
    a, b = np.array([0x80000001, 0x12345678], np.uint32), np.array([0xF0F0F0F0, 7], np.uint32)
    assert ptx.evaluated("bfe.u32 $0, $1, 8, 8;", a).tolist() == [0, 0x56]
    assert ptx.evaluated("mul.lo.u32 $0, $1, $2;", a, b).tolist() == [0xF0F0F0F0, 0x7F6E5D48]
    assert ptx.evaluated("mad.lo.u32 $0, $1, $2, $1;", a, b).tolist() == [0x70F0F0F1, 0x91A2B3C0]
    assert ptx.evaluated("add.u32 $0, $1, $2;", a, b).tolist() == [0x70F0F0F1, 0x1234567F]
    assert ptx.evaluated("prmt.b32 $0, $1, $2, 0x5410;", a, b).tolist() == [0xF0F00001, 0x00075678]


@pytest.mark.parametrize("bits, head_dim", [(8, 64), (4, 64), (3, 24), (2, 24)])
def test_restored_pages_are_the_same_to_the_last_bit(bits, head_dim, monkeypatch):
    sequence = tokens(1, 66, head_dim)
    want = serve(Server(UNIFORM[bits], head_dim, backend="triton"), {0: sequence}, [{0: 66}])[0]
    seen: set[str] = set()
    own = dataclasses.replace(configs.ARCHITECTURES["interpreter"], assembly="ptx")
    monkeypatch.setattr(configs, "architecture_of", lambda device: own)
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", ptx.inline_asm(seen))
    got = serve(Server(UNIFORM[bits], head_dim, backend="triton"), {0: sequence}, [{0: 66}])[0]
    assert any("mad.lo" in text for text in seen) == (bits < 8)
    assert torch.equal(got, want)
