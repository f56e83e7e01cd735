"""Stage 1 of the C++ extension against PyTorch, to the last bit, on every instruction set here."""

from __future__ import annotations

import pytest
import torch

from turboattention import flashq
from turboattention.kv.quantizer import PYTORCH

from ...helpers import normals
from .tools import ISAS, every_isa

kernels = pytest.importorskip("turboattention.kernels.cpu.quantize", exc_type=ImportError)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 24, 64, 96, 128, 256)
LENGTHS = (1, 3, 7, 63, 64, 65, 127)


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal rows with what could go wrong among them: zeros, an outlier, denormals, huge values."""
    x = normals(*shape, seed=seed)
    flat = x.view(-1, shape[-1])
    flat[0, -1] = 500.0
    if len(flat) > 6:
        flat[1], flat[2] = 0.0, 0.0
        flat[2, 3] = 1e-41
        flat[3] *= 1e-8
        flat[4] *= 1e3
        flat[5] *= 1e17 if dtype != torch.float16 else 1e3
        flat[6] *= 1e-38 if dtype != torch.float16 else 1e-7
    return x.to(dtype)


def staged(quantizer, x, span, first, mean, mean_from, rotate, target, width, **options):
    codes = torch.zeros(*x.shape[:2], width, x.shape[3], dtype=torch.int8)
    scales = torch.zeros(*x.shape[:2], width)
    fine = quantizer.quantize_tokens(x, span, first, mean, mean_from, rotate, codes, scales, target, **options)
    assert fine is True
    return codes, scales


def assert_same(
    x: torch.Tensor,
    isa: str,
    rotate: bool = True,
    smooth: bool = True,
    ragged: bool = False,
) -> None:
    batch, heads, length, head_dim = x.shape
    begin, end = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), length)
    first, target = torch.arange(batch) * 40, torch.arange(batch) * 3
    if ragged:
        begin[0], end[-1] = min(2, length), length // 2
    mean = normals(batch, heads, head_dim, seed=5).bfloat16() if smooth else None
    given = (x, (begin, end), first, mean, 64, rotate, target, length + 3 * batch)
    got, want = staged(kernels, *given, isa=isa), staged(PYTORCH, *given)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tokens_of_every_width(isa, dtype, head_dim):
    x = rows(2, 3, 65, head_dim, dtype=dtype)
    for rotate in (True, False):
        for smooth in (True, False):
            assert_same(x, isa, rotate, smooth)


@every_isa
@pytest.mark.parametrize("length", LENGTHS)
def test_tokens_of_every_length_and_ragged(isa, length):
    assert_same(rows(3, 2, length, 64, seed=length), isa, ragged=True)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_tokens(isa, dtype):
    x = rows(2, 9, 3, 24, dtype=dtype).transpose(1, 2)
    assert_same(x, isa)
    assert_same(x[:, ::2, 1::3], isa)
    odd = torch.zeros(x.numel() + 1, dtype=dtype)[1:]
    odd.copy_(x.reshape(-1))
    assert_same(odd.view(2, 3, 9, 24), isa)
    assert_same(x.expand(2, 3, 9, 24)[..., 8:16], isa)
    assert_same(x.contiguous().transpose(2, 3)[..., :8], isa)  # channels apart
    assert_same(x[:, :1].expand(2, 4, 9, 24), isa)


@every_isa
def test_every_bfloat16_and_float16(isa):
    """Every finite 16-bit value within range, unrotated."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        x = torch.where(x.float().abs() <= 1e18, x, torch.zeros((), dtype=dtype))
        assert_same(x.view(1, 2, 1024, 32), isa, rotate=False, smooth=False)


@every_isa
def test_values_next_to_a_half_are_rounded_as_a_division_rounds_them(isa):
    """Every half-integer multiple of a scale and the floats around it, for 2,000 scales of all sizes."""
    half = torch.arange(-118, 118).float() + 0.5
    scale = torch.ldexp(16 + torch.arange(2000) % 16, torch.arange(2000) % 140 - 94)  # on the grid of four bits
    x = half * scale[:, None]
    around = [x]
    for _ in range(3):
        around = [x.nextafter(around[0] - x.abs()), *around, x.nextafter(around[-1] + x.abs())]
    rows = torch.cat([119 * scale[:, None], *around], 1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 504)).view(1, 2000, -1, 504)
    rows[..., 0] = 119 * scale[:, None]  # so that this is the scale of every part of 504 channels
    nothing, all_rows = torch.zeros(1, dtype=torch.int64), torch.tensor([rows.shape[2]])
    given = (rows, (nothing, all_rows), nothing, None, 0, False, nothing, rows.shape[2])
    got, want = staged(kernels, *given, isa=isa), staged(PYTORCH, *given)
    assert torch.equal(got[1], scale[None, :, None].expand(got[1].shape))
    assert torch.equal(got[0], want[0])


@every_isa
def test_padding_is_never_read_and_other_rows_never_written(isa):
    x = rows(2, 2, 10, 16)
    x[0, :, 7:], x[1, :, :4] = torch.nan, torch.inf
    codes, scales = torch.full((2, 2, 20, 16), 77, dtype=torch.int8), torch.full((2, 2, 20), 5.0)
    span = torch.tensor([0, 4]), torch.tensor([7, 10])
    zeros = torch.zeros(2, dtype=torch.int64)
    fine = kernels.quantize_tokens(x, span, zeros, None, 0, True, codes, scales, torch.tensor([3, 5]), isa)
    assert fine
    want_codes, want_scales = flashq.quantize_tokens(flashq.rotate(x))
    for row, (begin, end, at) in enumerate(((0, 7, 3), (4, 10, 9))):
        size = end - begin
        assert torch.equal(codes[row, :, at : at + size], want_codes[row, :, begin:end])
        assert torch.equal(scales[row, :, at : at + size], want_scales[row, :, begin:end])
        rest = [i for i in range(20) if not at <= i < at + size]
        assert bool((codes[row][:, rest] == 77).all())
        assert bool((scales[row][:, rest] == 5).all())


@every_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.1e18, -1.1e18])
def test_what_is_not_finite_or_too_large_is_told(isa, bad):
    zeros, end = torch.zeros(1, dtype=torch.int64), torch.tensor([100])
    for dtype in (torch.float32, torch.bfloat16):
        x = rows(1, 2, 130, 24)
        x[0, 1, 99, 5] = bad
        x = x.to(dtype)
        rest = torch.zeros(1, 2, 130, 24, dtype=torch.int8), torch.zeros(1, 2, 130), zeros, isa
        given = zeros, None, 0, True, *rest
        assert not kernels.quantize_tokens(x, (zeros, end), *given)
        assert kernels.quantize_tokens(x, (zeros, end - 1), *given)


@every_isa
@pytest.mark.parametrize("head_dim", [8, 24, 128])
def test_the_mean_of_the_first_block(isa, head_dim):
    codes, scales = flashq.quantize_tokens(rows(3, 2, 70, head_dim) * 3)
    mean, wanted = normals(3, 2, head_dim).bfloat16(), torch.tensor([True, False, True])
    given = (codes, scales, 4, 64, wanted, mean)
    assert torch.equal(kernels.first_block_mean(*given, isa), PYTORCH.first_block_mean(*given))


def test_threads_do_not_change_a_thing():
    x = rows(2, 4, 200, 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_same(x, ISAS[0])
    finally:
        torch.set_num_threads(before)


def test_empty_batches_and_no_tokens():
    for shape in ((0, 2, 3, 8), (2, 2, 0, 8)):
        assert_same(torch.zeros(shape), ISAS[0])
