"""Stage 1 of new tokens: where they land, how they are scaled, and that nothing else matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import turboattention as ta
from turboattention.flashq import quantize_tokens, rotate
from turboattention.kv.stage1 import MEAN_SKIPS, fresh_state, stage

from ..flashq import formulas
from ..helpers import normals
from .tools import PLAIN, filled, stage_of, tokens

CPU = torch.device("cpu")
BARE = ta.TurboConfig(smooth_k=False, rotate=False, guard="off")


def staged(config, k, v, counts=None, dtype=torch.float32):
    state = fresh_state(config, k.shape[0], k.shape[1], k.shape[3], CPU, dtype)
    counts = torch.full((k.shape[0],), k.shape[2]) if counts is None else torch.tensor(counts)
    return stage(config, state, k, v, counts)


def test_without_rotation_and_smoothing_rows_are_just_quantized():
    k, v = tokens(2, 2, 70, 8)
    got = staged(BARE, k, v)
    for x, codes, scales in ((k, got.tiles.k8, got.tiles.k_scale), (v, got.tiles.v8, got.tiles.v_scale)):
        want_codes, want_scales = quantize_tokens(x)
        assert codes.shape == (2, 2, 128, 8)  # a multiple of the block size
        assert torch.equal(codes[:, :, :70], want_codes)
        assert torch.equal(scales[:, :, :70], want_scales)
        assert not bool(codes[:, :, 70:].any())
        assert not bool(scales[:, :, 70:].any())
    assert got.lengths.tolist() == [70, 70]
    assert got.start.tolist() == [0, 0]


@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_rotation_and_smoothing_by_the_formulas(head_dim):
    k, v = tokens(1, 2, 150, head_dim, dtype=torch.float64)
    got = staged(PLAIN, k, v, dtype=torch.float64)
    matrix = formulas.rotation(head_dim)
    for head in range(2):
        keys, values = k[0, head].numpy() @ matrix, v[0, head].numpy() @ matrix
        codes, scales = formulas.quantize_rows(keys[:64])
        mean = formulas.bfloat((codes[4:] * scales[4:, None]).mean(0))
        keys[64:] -= mean
        assert np.array_equal(got.k_mean[0, head].double().numpy(), mean)
        for side, x in (("k", keys), ("v", values)):
            codes, scales = formulas.quantize_rows(x)
            assert np.array_equal(getattr(got.tiles, f"{side}8")[0, head, :150].numpy(), codes)
            assert np.array_equal(getattr(got.tiles, f"{side}_scale")[0, head, :150].numpy(), scales)


def test_the_mean_leaves_out_the_first_tokens():
    assert MEAN_SKIPS == 4
    k, v = torch.ones(1, 1, 64, 8), torch.ones(1, 1, 64, 8)
    k[:, :, :4] = 1000.0
    mean = staged(ta.TurboConfig(rotate=False), k, v).k_mean
    # 1 / 119 goes up to the grid, so a code stands for a little more or less than 1: by half a unit.
    assert float((mean - 1).abs().max()) <= 0.5 * 9 / 1024


@pytest.mark.parametrize("length", [1, 4, 5, 63])
def test_no_mean_before_the_first_block_is_full(length):
    k, v = tokens(1, 2, length, 8)
    got = staged(PLAIN, k, v)
    assert not bool(got.k_mean.any())
    codes, scales = quantize_tokens(rotate(k))
    assert torch.equal(got.tiles.k8[:, :, :length], codes)
    assert torch.equal(got.tiles.k_scale[:, :, :length], scales)


def test_a_given_mean_is_subtracted_from_the_first_token_on():
    k, v = tokens(1, 2, 70, 16)
    given = normals(2, 16, seed=3)
    cache = ta.KVCache(1, 2, 16, config=PLAIN, k_mean=given)
    got = stage_of(cache, k, v)
    mean = rotate(given).bfloat16()
    codes, scales = quantize_tokens(rotate(k) - mean.float()[None, :, None])
    assert torch.equal(got.tiles.k8[:, :, :70], codes)
    assert torch.equal(got.tiles.k_scale[:, :, :70], scales)
    assert torch.equal(got.k_mean, mean[None])


@pytest.mark.parametrize("config", [PLAIN, BARE, ta.TurboConfig.paper()], ids=["default", "bare", "paper"])
def test_padding_is_never_read(config):
    k, v = tokens(3, 2, 130, 16)
    counts = [130, 7, 0]
    clean = staged(config, k, v, counts)
    for row, count in enumerate(counts):
        k[row, :, count:], v[row, :, count:] = torch.nan, torch.inf
    dirty = staged(config, k, v, counts)
    for tiles in ("tiles", "stored"):
        for name in ("k8", "v8", "k_scale", "v_scale"):
            assert torch.equal(getattr(getattr(clean, tiles), name), getattr(getattr(dirty, tiles), name))


def test_new_tokens_stand_behind_what_is_buffered():
    cache, k, _ = filled([70, 3, 130], config=BARE)
    more = tokens(3, 2, 5, 16, seed=4)
    got = stage_of(cache, *more, torch.tensor([5, 2, 0]))
    assert got.before.tolist() == [70, 3, 130]
    assert got.lengths.tolist() == [75, 5, 130]
    assert got.start.tolist() == [64, 0, 128]
    for row, (start, old, new) in enumerate(((64, 6, 5), (0, 3, 2), (128, 2, 0))):
        want = torch.cat((k[row, :, start : start + old], more[0][row, :, :new]), 1)
        codes, scales = quantize_tokens(want)
        assert torch.equal(got.tiles.k8[row, :, : old + new], codes)
        assert torch.equal(got.tiles.k_scale[row, :, : old + new], scales)
        assert not bool(got.tiles.k8[row, :, old + new :].any())


def test_staging_changes_nothing():
    cache, k, v = filled([70, 3])
    before = cache.dequantize()
    stage_of(cache, k, v, torch.tensor([70, 3]))
    assert cache.seq_lens.tolist() == [70, 3]
    for got, want in zip(cache.dequantize(), before, strict=True):
        assert torch.equal(got, want)


# -- the paper's preset -----------------------------------------------------------------------------

PAPER = ta.TurboConfig.paper()


def by_tile(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One tile [H, T, D] -> codes and one scale a head."""
    scale = x.abs().amax((1, 2)) / 119
    return (x / scale[:, None, None]).round(), scale


def test_paper_attends_tiles_with_a_scale_each():
    k, v = tokens(1, 2, 150, 16)
    got = staged(PAPER, k, v)
    for x, codes, scales in ((k, got.tiles.k8, got.tiles.k_scale), (v, got.tiles.v8, got.tiles.v_scale)):
        for start in (0, 64, 128):
            end = min(start + 64, 150)
            want_codes, want_scale = by_tile(x[0, :, start:end])
            assert torch.equal(codes[0, :, start:end].float(), want_codes)
            assert torch.equal(scales[0, :, start:end], want_scale[:, None].expand(2, end - start))


def test_paper_stores_the_rest_under_the_universal_scale():
    k, v = tokens(1, 2, 150, 16)
    got = staged(PAPER, k, v)
    for side, x in enumerate((k, v)):
        universal = x[0].abs().amax((1, 2)) / 119
        assert torch.equal(got.universal[side, 0], universal)
        codes = (got.stored.k8, got.stored.v8)[side]
        scales = (got.stored.k_scale, got.stored.v_scale)[side]
        for start in (0, 64):  # complete blocks keep their own
            assert torch.equal(scales[0, :, start], by_tile(x[0, :, start : start + 64])[1])
        assert torch.equal(scales[0, :, 128:150], universal[:, None].expand(2, 22))
        assert torch.equal(codes[0, :, 128:150].float(), (x[0, :, 128:] / universal[:, None, None]).round())


def test_paper_buffers_what_is_stored_not_what_is_attended():
    k, v = tokens(1, 2, 150, 16)
    cache = ta.KVCache(1, 2, 16, config=PAPER)
    cache.append(k, v)
    buffer = cache.tail.tiles()
    for side, codes, scales, x in ((0, buffer.k8, buffer.k_scale, k), (1, buffer.v8, buffer.v_scale, v)):
        universal = x[0].abs().amax((1, 2)) / 119
        assert torch.equal(cache.universal[side, 0], universal)
        assert torch.equal(scales[0, :, :22], universal[:, None].expand(2, 22))
        assert torch.equal(codes[0, :, :22].float(), (x[0, :, 128:] / universal[:, None, None]).round())


def test_paper_clamps_later_outliers_to_119():
    k, v = torch.rand(1, 1, 10, 8) - 0.5, torch.rand(1, 1, 10, 8) - 0.5
    k[0, 0, 0, 0], v[0, 0, 0, 0] = 1.19, 1.19
    cache = ta.KVCache(1, 1, 8, config=PAPER)
    cache.append(k, v)
    more = torch.full((1, 1, 2, 8), 0.5)
    more[0, 0, 1, :2] = torch.tensor([700.0, -700.0])
    got = stage_of(cache, more, -more)
    assert float(got.universal[0, 0, 0]) == pytest.approx(0.01, rel=1e-6)
    assert got.tiles.k8[0, 0, 10:12].tolist() == [[50] * 8, [119, -119] + [50] * 6]
    assert got.tiles.v8[0, 0, 10:12].tolist() == [[-50] * 8, [-119, 119] + [-50] * 6]


def test_the_universal_scale_comes_from_the_first_append_of_each_sequence():
    k, v = tokens(2, 2, 10, 16)
    cache = ta.KVCache(2, 2, 16, config=PAPER)
    cache.append(k, v, torch.tensor([10, 0]))
    cache.append(2 * k, 2 * v)
    peaks = torch.stack((k[0].abs().amax((1, 2)), 2 * k[1].abs().amax((1, 2)))) / 119
    assert torch.equal(cache.universal[0], peaks)
    cache.crop(torch.tensor([0, 5]))
    cache.append(3 * k, 3 * v, torch.tensor([10, 1]))
    assert torch.equal(cache.universal[0, 0], 3 * k[0].abs().amax((1, 2)) / 119)
    assert torch.equal(cache.universal[0, 1], peaks[1])


def test_a_block_that_fills_up_in_pieces_is_stored_under_the_universal_scale():
    """Nothing that was buffered is scaled again."""
    k, v = tokens(1, 1, 100, 16)
    cache = ta.KVCache(1, 1, 16, config=PAPER)
    cache.append(k[:, :, :40], v[:, :, :40])
    got = stage_of(cache, k[:, :, 40:], v[:, :, 40:])
    assert len(got.stored.k_scale[0, 0, :64].unique()) == 1
    assert got.stored.k_scale[0, 0, 0] == cache.universal[0, 0, 0]
