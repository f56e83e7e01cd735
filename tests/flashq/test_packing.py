"""Codes to bytes: the order spelled out, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboattention.errors import ShapeError
from turboattention.flashq import pack_codes, unpack_codes

WIDTHS = (1, 2, 3, 4, 5, 8)


def uint8(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    "bits, codes, packed",
    [
        # Byte j: code j below, code j + 4 above.
        (4, [1, 2, 3, 4, 5, 6, 7, 15], [0x51, 0x62, 0x73, 0xF4]),
        # Byte j: codes j, j + 2, j + 4, j + 6 from the lowest bits up.
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0b01_11_10_00, 0b00_10_11_01]),
        # Two bytes of the lower two bits as above, then one byte with the highest bit of code j in bit j.
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b10_00_10_00, 0b11_01_11_01, 0b11110000]),
        # The same with four bits below.
        (5, [1, 2, 3, 4, 5, 22, 7, 31], [0x51, 0x62, 0x73, 0xF4, 0b10100000]),
        (1, [1, 0, 0, 1, 0, 0, 1, 1], [0b11001001]),
        (8, [0, 255, 7, 9, 1, 2, 3, 128], [0, 255, 7, 9, 1, 2, 3, 128]),
    ],
)
def test_bytes_by_hand(bits, codes, packed):
    assert pack_codes(uint8(codes), bits).tolist() == packed
    assert unpack_codes(uint8(packed), bits).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_stands_in_the_bits_the_format_says(bits):
    """One code at a time: which bits of which byte it sets."""
    count, value = 32, 2**bits - 1
    planes = {8: [(8, 0)], 5: [(4, 0), (1, 4)], 4: [(4, 0)], 3: [(2, 0), (1, 2)], 2: [(2, 0)], 1: [(1, 0)]}[bits]
    for index in range(count):
        codes = torch.zeros(count, dtype=torch.uint8)
        codes[index] = value
        want, start = [0] * (count * bits // 8), 0
        for width, shift in planes:
            line = count * width // 8
            want[start + index % line] |= (value >> shift & 2**width - 1) << (index // line * width)
            start += line
        assert pack_codes(codes, bits).tolist() == want


@given(st.sampled_from(WIDTHS), st.integers(1, 6), st.data())
def test_unpacking_undoes_packing(bits, eighths, data):
    count = 8 * eighths
    codes = uint8(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == count * bits // 8
    assert torch.equal(unpack_codes(packed, bits), codes)


@given(st.sampled_from(WIDTHS), st.integers(1, 6), st.data())
def test_packing_undoes_unpacking(bits, eighths, data):
    size = bits * eighths
    packed = uint8(data.draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)))
    codes = unpack_codes(packed, bits)
    assert int(codes.max()) < 2**bits
    assert torch.equal(pack_codes(codes, bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_leading_dimensions_are_runs_of_their_own(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 24), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 3, 3 * bits)
    for b in range(2):
        for h in range(3):
            assert torch.equal(packed[b, h], pack_codes(codes[b, h], bits))
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_leaves_its_input_alone(bits):
    codes = torch.randint(0, 2**bits, (16,), dtype=torch.uint8)
    before = codes.clone()
    packed = pack_codes(codes, bits)
    packed.zero_()
    assert torch.equal(codes, before)


def test_a_run_that_does_not_fill_bytes_is_refused():
    with pytest.raises(ShapeError, match=r"^code: expected a multiple of 8 codes in the last dimension, got 12$"):
        pack_codes(torch.zeros(12, dtype=torch.uint8), 4)
