"""Stage 1 of the queries, and what smoothing took off their scores."""

from __future__ import annotations

import pytest
import torch

from turboattention.config import TurboConfig
from turboattention.flashq import quantize_int8, rotate
from turboattention.kv.queries import quantize_queries

from ..helpers import bits_of, normals


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
def test_one_scale_a_row_after_rotation(rows):
    q = normals(2, 6, rows, 24)
    got = quantize_queries(TurboConfig(), q, 2, 0.25, None)
    codes, scales = quantize_int8(rotate(q), 1)
    assert torch.equal(got.codes, codes.float().unflatten(1, (2, 3)))
    assert torch.equal(got.scale, (scales * 0.25).unflatten(1, (2, 3)))
    assert got.mean_logit is None


@pytest.mark.parametrize("rows", [1, 64, 130])
def test_the_paper_s_tiles_share_a_scale(rows):
    q = normals(2, 4, rows, 16)
    got = quantize_queries(TurboConfig.paper(), q, 2, 0.25, None)
    for start in range(0, rows, 64):
        tile = q[:, :, start : start + 64]
        scale = tile.abs().amax((2, 3)) / 119
        part = slice(start, start + 64)
        assert torch.equal(got.scale[:, :, :, part].flatten(1, 2), (scale * 0.25)[:, :, None].expand(tile.shape[:3]))
        want = (tile / scale[:, :, None, None]).round()
        assert torch.equal(got.codes[:, :, :, part].flatten(1, 2), want)


def test_the_mean_s_share_of_a_logit():
    q, mean = normals(2, 6, 5, 16, dtype=torch.float64), normals(2, 2, 16, seed=1, dtype=torch.float64)
    got = quantize_queries(TurboConfig(rotate=False), q, 2, 0.5, mean).mean_logit
    want = 0.5 * (q.unflatten(1, (2, 3)) * mean[:, :, None, None]).sum(-1)
    # Two orders of summing 16 float64 products.
    assert torch.allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64])
def test_a_row_does_not_depend_on_how_many_there_are(head_dim, rows):
    """Bit for bit: a logit in its last bit may turn a weight's code."""
    q, mean = normals(2, 4, 193, head_dim), normals(2, 2, head_dim, seed=1)
    whole = quantize_queries(TurboConfig(), q, 2, 0.3, mean)
    for part in (slice(0, rows), slice(100, 100 + rows)):
        got = quantize_queries(TurboConfig(), q[:, :, part], 2, 0.3, mean)
        for name in ("codes", "scale", "mean_logit"):
            assert torch.equal(bits_of(getattr(got, name)), bits_of(getattr(whole, name)[:, :, :, part]))
    alone = quantize_queries(TurboConfig(), q[:1, :2], 1, 0.3, mean[:1, :1]).mean_logit
    assert torch.equal(bits_of(alone), bits_of(whole.mean_logit[:1, :1]))
