"""Stage 1 of the Triton kernels against PyTorch, to the last bit."""

from __future__ import annotations

import pytest
import torch

from . import tools  # noqa: F401  (skips without Triton)  # isort: skip

import turboattention as ta
from turboattention import flashq
from turboattention.errors import DtypeError
from turboattention.kernels.triton import quantize as kernels
from turboattention.kernels.triton.ordering import Order
from turboattention.kernels.triton.smoothing import first_block_mean
from turboattention.kv.channel_order import ChannelOrder
from turboattention.kv.quantizer import PYTORCH
from turboattention.kv.queries import ordered_queries, quantize_queries

from ...helpers import normals

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 24, 64, 96, 128, 256)


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


def staged(quantizer, x, span, first, mean, mean_from, rotate, target, width):
    codes = torch.zeros(*x.shape[:2], width, x.shape[3], dtype=torch.int8)
    scales = torch.zeros(*x.shape[:2], width)
    assert quantizer.quantize_tokens(x, span, first, mean, mean_from, rotate, codes, scales, target) is True
    return codes, scales


def an_order(heads: int, head_dim: int) -> torch.Tensor:
    """Another for each head."""
    return normals(heads, head_dim, seed=8).argsort(-1).to(torch.uint8)


def assert_same(x: torch.Tensor, rotate: bool = True, smooth: bool = True, ragged: bool = False) -> None:
    batch, heads, length, head_dim = x.shape
    begin, end = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), length)
    first, target = torch.arange(batch) * 40 + 62, torch.arange(batch) * 3
    if ragged:
        begin[0], end[-1] = min(2, length), length // 2
    mean = normals(batch, heads, head_dim, seed=5).bfloat16() if smooth else None
    given = (x, (begin, end), first, mean, 64, rotate, target, length + 3 * batch)
    for a, b in zip(staged(kernels, *given), staged(PYTORCH, *given), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program takes of many rows; the interpreter is also faster so."""
    shape = kernels.row_shape
    monkeypatch.setattr(kernels, "row_shape", lambda rows, head_dim: shape(1 << 20, head_dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24])
def test_tokens_of_every_dtype(dtype, head_dim):
    x = rows(2, 3, 7, head_dim, dtype=dtype)
    assert_same(x)
    assert_same(x, rotate=False)
    assert_same(x, smooth=False)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tokens_of_every_width(dtype, head_dim):
    assert_same(rows(2, 2, 5, head_dim, dtype=dtype))
    assert_same(rows(2, 2, 5, head_dim, dtype=dtype), rotate=False)


@pytest.mark.parametrize("length", [1, 3, 63, 65])
def test_tokens_of_every_length_and_ragged(length):
    assert_same(rows(3, 2, length, 16, seed=length), ragged=True)
    assert_same(rows(3, 2, length, 16, seed=length), rotate=False, ragged=True)


def test_strided_and_misaligned_tokens():
    x = rows(2, 9, 3, 24).transpose(1, 2)
    assert_same(x)
    assert_same(x[:, ::2, 1::3])
    odd = torch.zeros(x.numel() + 1)[1:]
    odd.copy_(x.reshape(-1))
    assert_same(odd.view(2, 3, 9, 24))
    assert_same(x.contiguous().transpose(2, 3)[..., :8])  # channels apart
    assert_same(x[:, :1].expand(2, 4, 9, 24))


@pytest.mark.usefixtures("large_tiles")
def test_every_bfloat16_and_float16():
    """Every finite 16-bit value within range, unrotated."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        x = torch.where(x.float().abs() <= 1e18, x, torch.zeros((), dtype=dtype))
        assert_same(x.view(1, 2, 128, 256), rotate=False, smooth=False)


def test_padding_is_never_read_and_other_rows_never_written():
    x = rows(2, 2, 10, 16)
    x[0, :, 7:], x[1, :, :4] = torch.nan, torch.inf
    codes, scales = torch.full((2, 2, 20, 16), 77, dtype=torch.int8), torch.full((2, 2, 20), 5.0)
    span = torch.tensor([0, 4]), torch.tensor([7, 10])
    zeros = torch.zeros(2, dtype=torch.int64)
    assert kernels.quantize_tokens(x, span, zeros, None, 0, True, codes, scales, torch.tensor([3, 5]))
    want_codes, want_scales = flashq.quantize_tokens(flashq.rotate(x))
    for row, (begin, end, at) in enumerate(((0, 7, 3), (4, 10, 9))):
        size = end - begin
        assert torch.equal(codes[row, :, at : at + size], want_codes[row, :, begin:end])
        assert torch.equal(scales[row, :, at : at + size], want_scales[row, :, begin:end])
        rest = [i for i in range(20) if not at <= i < at + size]
        assert bool((codes[row][:, rest] == 77).all())
        assert bool((scales[row][:, rest] == 5).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1.1e18, -1.1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_or_too_large_becomes_zeros_and_is_told(bad, dtype):
    zeros, end = torch.zeros(1, dtype=torch.int64), torch.tensor([20])
    x = rows(1, 2, 30, 24).to(dtype)
    mean = normals(1, 2, 24).bfloat16()
    span = (zeros, end)
    want, want_scales = staged(kernels, x, span, zeros, mean, 0, True, zeros, 30)
    x[0, 1, 19, 5] = bad
    codes, scales = torch.ones(1, 2, 30, 24, dtype=torch.int8), torch.zeros(1, 2, 30)
    assert kernels.quantize_tokens(x, span, zeros, mean, 0, True, codes, scales, zeros) is False
    assert not codes[0, 1, 19].any()
    assert scales[0, 1, 19] == 1
    assert torch.equal(codes[0, :, :19], want[0, :, :19])
    assert torch.equal(scales[0, :, :19], want_scales[0, :, :19])
    assert kernels.quantize_tokens(x, (zeros, end - 1), zeros, mean, 0, True, codes, scales, zeros) is True
    got, flag = kernels.quantize_queries(x, 1, end, None, 2.0, True)
    assert flag.tolist() == [1]
    assert not got.codes[0, 0, 1, 19].any()
    assert got.unit[0, 0, 1, 19] == 2
    assert kernels.quantize_queries(x, 1, end - 1, None, 2.0, True)[1].tolist() == [0]
    kept = torch.ones(1, dtype=torch.int32)  # raised by an earlier call: stays
    assert kernels.quantize_queries(x, 1, end - 1, None, 2.0, True, None, kept)[1] is kept
    assert kept.tolist() == [1]


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_queries(dtype, head_dim):
    q = rows(2, 6, 3, head_dim, dtype=dtype, seed=1)
    valid = torch.tensor([3, 2])
    clean = q.clone()
    clean[1, :, 2:], q[1, :, 2:] = 0.0, torch.nan
    mean = normals(2, 2, head_dim, seed=4).bfloat16()
    for config in (ta.TurboConfig(), ta.TurboConfig(rotate=False)):
        order = ChannelOrder(an_order(2, head_dim), torch.tensor([False, True]))
        want = quantize_queries(config, clean, 2, 0.3, mean)
        want_ordered = ordered_queries(config, clean, 2, 0.3, order, want)
        got, flag = kernels.quantize_queries(q, 2, valid, mean, 0.3, config.rotate, Order.of(order, q))
        assert flag.tolist() == [0]
        assert torch.equal(got.codes.float(), want.codes)
        assert torch.equal(got.unit, want.scale)
        assert got.ordered_codes is not None
        assert torch.equal(got.ordered_codes.float(), want_ordered.codes)
        assert torch.equal(got.ordered_unit, want_ordered.scale)
        # Both are sums in float64, in different orders. (The interpreter misreads bfloat16's denormals.)
        assert torch.allclose(got.mean_logit, want.mean_logit, rtol=2e-7, atol=1e-36)
        plain, _ = kernels.quantize_queries(q, 2, valid, None, 0.3, config.rotate)
        assert torch.equal(plain.codes, got.codes)
        assert plain.mean_logit is None
        assert plain.ordered_codes is None


@pytest.mark.usefixtures("large_tiles")
def test_the_scale_of_the_mean_logit_is_not_rounded():
    """To float32 it would be; products of two values, exact in float64, show it."""
    q, mean = normals(1, 1, 64, 8), torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    mean[..., 0] = 3.1
    logit = kernels.quantize_queries(q, 1, torch.tensor([64]), mean, 1 / 3, False)[0].mean_logit
    assert logit is not None
    want = 1 / 3 * (q[..., 0].double() * mean[0, 0, 0].double())
    assert torch.equal(logit[:, 0], want.float())


@pytest.mark.usefixtures("large_tiles")
def test_scales_beside_the_grid():
    """Peaks that make a scale of 4 mantissa bits, and those of the floats next to it."""
    scale = torch.arange(16, 32) / 16
    beside = torch.stack([scale, *(scale.nextafter(torch.tensor(way)) for way in (0.0, 9.0))]).flatten()
    assert_same((beside * 119)[None, None, :, None].expand(1, 1, 48, 8), rotate=False, smooth=False)


@pytest.mark.parametrize("head_dim", [8, 24, 128])
def test_the_mean_of_the_first_block(head_dim):
    codes, scales = flashq.quantize_tokens(rows(3, 2, 70, head_dim) * 3)
    mean, wanted = normals(3, 2, head_dim).bfloat16(), torch.tensor([True, False, True])
    given = (codes, scales, 4, 64, wanted, mean)
    assert torch.equal(first_block_mean(*given), PYTORCH.first_block_mean(*given))


def test_empty_batches_and_no_tokens():
    for shape in ((0, 2, 3, 8), (2, 2, 0, 8)):
        x, mean = torch.zeros(shape), torch.zeros(shape[0], 2, 8, dtype=torch.bfloat16)
        assert_same(x)
        got, _ = kernels.quantize_queries(x, 1, torch.zeros(shape[0]), mean[:, :1], 1.0, True)
        assert got.codes.shape == (shape[0], 1, 2, shape[2], 8)


def test_refusals():
    x, zeros = torch.zeros(1, 1, 2, 8), torch.zeros(1, dtype=torch.int64)
    codes, scales = torch.zeros(1, 1, 2, 8, dtype=torch.int8), torch.zeros(1, 1, 2)
    with pytest.raises(DtypeError, match=r"^x: expected float32, bfloat16 or float16, got torch.float64"):
        kernels.quantize_tokens(x.double(), (zeros, zeros), zeros, None, 0, True, codes, scales, zeros)
    with pytest.raises(DtypeError, match=r"^codes, scales: expected int8 and .* got torch.uint8 and torch.float32"):
        kernels.quantize_tokens(x, (zeros, zeros), zeros, None, 0, True, codes.byte(), scales, zeros)
    with pytest.raises(DtypeError, match=r"^codes, scales: expected contiguous tensors"):
        first_block_mean(codes.mT, scales, 0, 1, zeros, torch.zeros(1, 1, 8, dtype=torch.bfloat16))
