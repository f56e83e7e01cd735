"""Stage 2 against the formulas in Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboattention.errors import ConfigError, DtypeError, ShapeError
from turboattention.flashq import progressive_dequantize, progressive_quantize

from . import formulas

WIDTHS = (8, 5, 4, 3, 2, 1)


def random_codes(*shape: int, seed: int = 0, spread: float = 40.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).round().clamp(-119, 119).to(torch.int8)


@st.composite
def tiles(draw) -> torch.Tensor:
    rows, channels = draw(st.integers(1, 20)), draw(st.integers(1, 3))
    low = draw(st.integers(-119, 119))
    high = draw(st.integers(low, 119))
    values = st.lists(st.integers(low, high), min_size=rows * channels, max_size=rows * channels)
    return torch.tensor(draw(values), dtype=torch.int8).view(rows, channels)


@st.composite
def any_tiles(draw) -> torch.Tensor:
    """All of int8: what crops bring back."""
    rows, channels = draw(st.integers(1, 20)), draw(st.integers(1, 3))
    values = st.lists(st.sampled_from([-128, -127, -126, -120, 0, 119, 120, 126, 127]) | st.integers(-128, 127))
    flat = draw(values.map(lambda x: (x + [0] * rows * channels)[: rows * channels]))
    return torch.tensor(flat, dtype=torch.int8).view(rows, channels)


def check(codes: torch.Tensor, bits: int, search: bool) -> None:
    code, step, zero = progressive_quantize(codes, bits, search)
    assert (code.dtype, step.dtype, zero.dtype) == (torch.uint8, torch.int8, torch.int8)
    assert code.shape == codes.shape
    assert step.shape == zero.shape == (*codes.shape[:-2], 1, codes.shape[-1])
    want_code, want_step, want_zero = formulas.stage2(codes.numpy(), bits, search)
    assert np.array_equal(step[0].numpy(), want_step)
    assert np.array_equal(zero[0].numpy(), want_zero)
    assert np.array_equal(code.numpy(), want_code)
    assert np.array_equal(progressive_dequantize(code, step, zero).numpy(), want_code * want_step + want_zero)


@pytest.mark.parametrize("search", [False, True], ids=["min-max", "search"])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 256])
def test_exact_on_random_tiles(bits, search, rows):
    check(random_codes(rows, 8, seed=rows), bits, search)


@given(tiles(), st.sampled_from(WIDTHS), st.booleans())
def test_exact_on_any_tile(codes, bits, search):
    check(codes, bits, search)


def test_hand_computed_two_bits():
    codes = torch.tensor([[-119, 5], [0, 5], [119, 6]], dtype=torch.int8)
    code, step, zero = progressive_quantize(codes, 2)
    # 238 / 3 = 79.3 -> 80; 119 / 80 = 1.49 -> 1; 238 / 80 = 2.98 -> 3. A range of 1 has step 1.
    assert step.tolist() == [[80, 1]]
    assert zero.tolist() == [[-119, 5]]
    assert code.tolist() == [[0, 0], [1, 0], [3, 1]]
    assert progressive_dequantize(code, step, zero).tolist() == [[-119, 5], [-39, 5], [121, 6]]


def test_ties_go_to_the_even_code():
    codes = torch.tensor([[0], [1], [3], [5], [7], [30]], dtype=torch.int8)
    code, step, _ = progressive_quantize(codes, 4)
    assert int(step) == 2
    assert code.flatten().tolist() == [0, 0, 2, 2, 4, 15]  # 0.5, 1.5, 2.5, 3.5


@pytest.mark.parametrize("step", range(1, 81))
def test_every_tie_of_every_step(step):
    """Values `step * (n + 1/2)` above zero for even steps; the neighbours for odd ones."""
    bits = 2 if step > 34 else 3 if step > 16 else 4
    levels = 2**bits - 1
    top = min(step * levels, 238)
    if -(-top // levels) != step:
        top = step * levels - levels + 1
    values = torch.arange(top + 1) - 119
    code, got_step, zero = progressive_quantize(values.to(torch.int8)[:, None], bits)
    assert (int(got_step), int(zero)) == (step, -119)
    assert code.flatten().tolist() == [formulas.half_even(x, step) for x in range(top + 1)]


@pytest.mark.parametrize("bits, largest", [(8, 119), (5, 123), (4, 126), (3, 125), (2, 121)])
def test_reconstruction_stays_inside_int8_for_every_range(bits, largest):
    """Every value of every range within +-119, by range: what INT8's top must leave room for."""
    values = torch.arange(-119, 120)
    low, high = torch.meshgrid(values, values, indexing="ij")
    keep = low <= high
    tile = torch.minimum(torch.maximum(values[:, None], low[keep]), high[keep]).to(torch.int8)
    code, step, zero = progressive_quantize(tile, bits)
    wide = code.to(torch.int16) * step.to(torch.int16) + zero.to(torch.int16)
    assert int(wide.max()) == largest
    assert int(wide.min()) == -119
    assert torch.equal(progressive_dequantize(code, step, zero).to(torch.int16), wide)
    assert int(step.max()) == {8: 1, 5: 8, 4: 16, 3: 34, 2: 80}[bits]
    assert int(step.min()) == 1


@given(any_tiles(), st.sampled_from((5, 4, 3, 2, 1)), st.booleans())
def test_reconstruction_stays_inside_int8_for_all_of_it(codes, bits, search):
    code, step, zero = progressive_quantize(codes, bits, search)
    wide = code.to(torch.int16) * step.to(torch.int16) + zero.to(torch.int16)
    assert torch.equal(progressive_dequantize(code, step, zero).to(torch.int16), wide)
    # A range wider than the levels reach ends short: by 3 at 3 bits, by 7 at 5, and by 128 at one bit.
    short = {5: 7, 3: 3, 1: 128}.get(bits, 0)
    error = (wide - codes.to(torch.int16)).abs()
    assert search or bool((2 * error <= step.to(torch.int16) + 2 * short).all())
    check(codes, bits, search)


@given(tiles(), st.sampled_from(WIDTHS))
def test_min_max_error_is_at_most_half_a_step(codes, bits):
    code, step, zero = progressive_quantize(codes, bits)
    error = (progressive_dequantize(code, step, zero).to(torch.int16) - codes.to(torch.int16)).abs()
    short = 111 if bits == 1 else 0  # steps end at 127, and a range of 238 then ends 111 short
    assert bool((2 * error <= step.to(torch.int16) + 2 * short).all())


@given(tiles())
def test_eight_bits_lose_nothing(codes):
    assert torch.equal(progressive_dequantize(*progressive_quantize(codes, 8)), codes)


def squared(codes: torch.Tensor, bits: int, search: bool) -> torch.Tensor:
    back = progressive_dequantize(*progressive_quantize(codes, bits, search))
    return ((back.long() - codes.long()) ** 2).sum(-2)


@given(tiles(), st.sampled_from((5, 4, 3, 2, 1)))
def test_search_is_never_worse_than_min_max(codes, bits):
    assert bool((squared(codes, bits, True) <= squared(codes, bits, False)).all())


@pytest.mark.parametrize(
    "bits, values, step, zero",
    [
        (3, [-17, 6, 11, 9, 8, -13, -15], 4, -18),  # zero -16 has the same error
        (2, [19, -12, 4, -7], 10, -14),  # as has -9
        (2, [0, 1, 2, 3], 1, 0),  # min-max is exact already
        (4, list(range(16)), 1, 0),
    ],
)
def test_equal_candidates_keep_the_earlier_one(bits, values, step, zero):
    """By hand: the shift down is tried before the shift up."""
    _, got_step, got_zero = progressive_quantize(torch.tensor(values, dtype=torch.int8)[:, None], bits, search=True)
    assert (int(got_step), int(got_zero)) == (step, zero)


@pytest.mark.parametrize("bits", [5, 4, 3, 2, 1])
def test_search_helps_on_normal_data(bits):
    codes = random_codes(64, 128)
    assert int(squared(codes, bits, True).sum()) < 0.95 * int(squared(codes, bits, False).sum())


@given(tiles(), st.sampled_from((3, 2, 1)))
def test_searched_ranges_stay_inside_int8(codes, bits):
    """The levels of 4 and 5 bits reach beyond the data, and int8, where the data hardly varies; none of those is used
    (see above)."""
    _, step, zero = progressive_quantize(codes, bits, search=True)
    top = zero.to(torch.int16) + step.to(torch.int16) * (2**bits - 1)
    assert int(step.min()) >= 1
    assert int(top.max()) <= 127


def test_search_leaves_eight_bits_alone():
    codes = random_codes(64, 16)
    for got, want in zip(progressive_quantize(codes, 8, True), progressive_quantize(codes, 8), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("search", [False, True])
@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_leading_dimensions_are_tiles_of_their_own(search, seed):
    codes = random_codes(2, 3, 16, 8, seed=seed)
    code, step, zero = progressive_quantize(codes, 3, search)
    assert step.shape == (2, 3, 1, 8)
    for b in range(2):
        for h in range(3):
            alone = progressive_quantize(codes[b, h], 3, search)
            for whole, part in zip((code, step, zero), alone, strict=True):
                assert torch.equal(whole[b, h], part)


@pytest.mark.parametrize(
    "codes, bits, error, message",
    [
        (torch.zeros(4, 8, dtype=torch.int8), 6, ConfigError, r"^bits: expected one of 8, 5, 4, 3, 2, 1, got 6$"),
        (torch.zeros(4, 8), 4, DtypeError, r"^codes: expected int8, got torch.float32$"),
        (
            torch.zeros(8, dtype=torch.int8),
            4,
            ShapeError,
            r"^codes: expected \[\.\.\., tokens, channels\] .*, got \(8,\)$",
        ),
        (torch.zeros(0, 8, dtype=torch.int8), 4, ShapeError, r"at least one token, got \(0, 8\)$"),
    ],
)
def test_refusals(codes, bits, error, message):
    with pytest.raises(error, match=message):
        progressive_quantize(codes, bits)
