"""The online softmax, block by block, against its formulas over whole rows."""

from __future__ import annotations

import math

import pytest
import torch

from turboattention.config import TurboConfig
from turboattention.reference.online_softmax import Accumulator, online_softmax_update
from turboattention.softmax import exponential

from ..helpers import normals

# B, Hkv, blocks, group, rows, tokens a block, head_dim
B, H, N, G, R, T, D = 2, 2, 5, 2, 3, 16, 8
DEFAULT = TurboConfig(block_size=16, sink_tokens=16, p_scale="static")
PAPER = TurboConfig.paper(block_size=16)
ROW = DEFAULT.replace(p_scale="row")


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = 3 * normals(B, H, N, G, R, T, seed=seed, dtype=torch.float64)
    v8 = (40 * normals(B, H, N, T, D, seed=seed + 1, dtype=torch.float64)).round().clamp(-119, 119)
    v_scale = normals(B, H, N, T, seed=seed + 2, dtype=torch.float64).abs() + 0.1
    return scores, v8, v_scale


def empty() -> Accumulator:
    return Accumulator.empty(torch.zeros(B, H, G, R, D, dtype=torch.float64))


def run(config: TurboConfig, scores, v8, v_scale, cuts=(N,)) -> tuple[torch.Tensor, torch.Tensor]:
    """All blocks, in pieces that end at `cuts`."""
    state, start = empty(), 0
    for end in cuts:
        span = slice(start, end)
        online_softmax_update(
            config, "sas", state, slice(0, R), scores[:, :, span], v8[:, :, span], v_scale[:, :, span]
        )
        start = end
    return state.finish()


def exact(scores, v8, v_scale) -> tuple[torch.Tensor, torch.Tensor]:
    flat = scores.movedim(2, 4).flatten(4)  # [B, H, G, R, N T]
    values = (v8 * v_scale[..., None]).flatten(2, 3)
    out = flat.softmax(-1).nan_to_num(0.0) @ values[:, :, None]
    return out.flatten(1, 2), flat.logsumexp(-1).flatten(1, 2)


@pytest.mark.parametrize("config", [DEFAULT, PAPER, ROW], ids=["default", "paper", "row"])
def test_row_by_row(config):
    """One row at a time in plain Python floats, as the formulas are written."""
    scores, v8, v_scale = inputs()
    got, lse = run(config, scores, v8, v_scale)
    soft = exponential("sas", config.sas_threshold)
    exp = math.exp if config.rescale == "exact" else lambda x: float(soft(torch.tensor(x, dtype=torch.float64)))
    for b in range(B):
        for h in range(H):
            for g in range(G):
                # A tile of queries shares the paper's s_P: all rows of the head are needed for it.
                row_max, row_sum = [-math.inf] * R, [0.0] * R
                out = torch.zeros(R, D, dtype=torch.float64)
                for n in range(N):
                    block = scores[b, h, n, g]
                    top = block.amax(-1)
                    reference = [
                        max(t, p) if config is PAPER else t for t, p in zip(top.tolist(), row_max, strict=True)
                    ]
                    weights = soft(block - torch.tensor(reference, dtype=torch.float64)[:, None])
                    largest = v_scale[b, h, n].max()
                    if config is PAPER:
                        relative = weights * (v_scale[b, h, n] / largest)
                        unit = relative.max() / 119
                        codes, sums = (relative / unit).round(), weights.sum(-1)
                    elif config is ROW:
                        products = weights * v_scale[b, h, n]
                        unit = products.amax(-1, keepdim=True) / largest / 126.96875
                        codes = (products / largest / unit).round()
                        sums = (weights * 127 * 256).round().sum(-1) / (127 * 256)
                    else:
                        unit = 1 / 127
                        codes, sums = (
                            (weights * 127 * (v_scale[b, h, n] / largest)).round(),
                            (weights * 127).round().sum(-1) / 127,
                        )
                    product = codes @ v8[b, h, n] * largest * unit
                    for r in range(R):
                        new = max(row_max[r], reference[r])
                        old, each = exp(row_max[r] - new) if row_max[r] > -math.inf else 0.0, exp(reference[r] - new)
                        each = 1.0 if config is PAPER else each
                        row_sum[r] = row_sum[r] * old + float(sums[r]) * each
                        out[r] = out[r] * old + product[r] * each
                        row_max[r] = new
                for r in range(R):
                    # float64, but for the order of sums.
                    assert torch.allclose(got[b, h * G + g, r], out[r] / row_sum[r], rtol=0, atol=1e-10)
                    assert float(lse[b, h * G + g, r]) == pytest.approx(row_max[r] + math.log(row_sum[r]), abs=1e-12)


@pytest.mark.parametrize(
    "config", [DEFAULT, PAPER, ROW, DEFAULT.replace(softmax="sas2"), PAPER.replace(rescale="exact")], ids=str
)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (2, 5), (4, 5)])
def test_how_many_blocks_at_a_time_does_not_matter(config, cuts):
    scores, v8, v_scale = inputs(5)
    (want, want_lse), (got, lse) = run(config, scores, v8, v_scale), run(config, scores, v8, v_scale, cuts)
    assert torch.allclose(got, want, rtol=0, atol=1e-10)
    assert torch.allclose(lse, want_lse, rtol=0, atol=1e-12)


def test_with_exact_exponentials_only_the_weights_codes_are_lost():
    """Each weight is off by at most half a level of its block's maximum, relative to V's largest."""
    scores, v8, v_scale = inputs(9)
    config = DEFAULT.replace(softmax="exp")
    got, lse = run(config, scores, v8, v_scale)
    want, want_lse = exact(scores, v8, v_scale)
    # Half a level for the weight and half one for the normalizer, of at most T N tokens; on average far less.
    error = float((got - want).norm() / want.norm())
    assert error < 0.02
    assert float((lse - want_lse).abs().max()) < 0.02
    # With a scale per row half a level is at most as much, and the normalizer is as good as exact.
    got, lse = run(config.replace(p_scale="row"), scores, v8, v_scale)
    assert float((got - want).norm() / want.norm()) < 0.7 * error
    assert float((lse - want_lse).abs().max()) < 16 * N * 0.5 / (127 * 256)


@pytest.mark.parametrize("config", [DEFAULT, PAPER, ROW], ids=["default", "paper", "row"])
def test_rows_and_blocks_that_see_nothing(config):
    scores, v8, v_scale = inputs()
    scores[0, 0, :, 0, 0] = -torch.inf  # a row without keys
    scores[:, :, 2] = -torch.inf  # a block without keys
    scores[1, 1, 0] = -torch.inf  # the first block
    got, lse = run(config, scores, v8, v_scale)
    assert not bool(got[0, 0, 0].any())
    assert float(lse[0, 0, 0]) == -math.inf
    assert bool(got.isfinite().all())
    assert int((lse == -torch.inf).sum()) == 1
    keep = [0, 1, 3, 4]
    want, want_lse = run(config, scores[:, :, keep], v8[:, :, keep], v_scale[:, :, keep], (4,))
    assert torch.allclose(got, want, rtol=0, atol=1e-10)
    assert torch.allclose(lse, want_lse, rtol=0, atol=1e-12)


def test_rows_outside_the_slice_are_left_alone():
    scores, v8, v_scale = inputs()
    state = empty()
    online_softmax_update(DEFAULT, "sas", state, slice(1, 2), scores[:, :, :, :, 1:2], v8, v_scale)
    out, lse = state.finish()
    assert bool((lse[:, :, [0, 2]] == -torch.inf).all())
    want, _ = run(DEFAULT, scores, v8, v_scale)
    assert torch.equal(out[:, :, 1], want[:, :, 1])


def test_the_paper_s_weight_scale_is_per_tile_of_queries():
    """Rows 0 to 15 share a scale, row 16 has its own: a small row there is not rounded away."""
    rows = 17
    scores = torch.full((1, 1, 2, 1, rows, T), -1.0, dtype=torch.float64)
    scores[:, :, 0] = 5.0  # the first block sets every row's maximum ...
    scores[:, :, 1, :, :16, 0] = 5.0  # ... which the second reaches only in the first 16 rows
    v8 = torch.full((1, 1, 2, T, D), 100.0, dtype=torch.float64)
    v8[:, :, 0] = 0
    state = Accumulator.empty(torch.zeros(1, 1, 1, rows, D, dtype=torch.float64))
    ones = torch.ones(1, 1, 2, T, dtype=torch.float64)
    online_softmax_update(PAPER, "sas", state, slice(0, rows), scores, v8, ones)
    weight = float(exponential("sas", PAPER.sas_threshold)(torch.tensor(-6.0, dtype=torch.float64)))
    assert 0 < weight < 0.9996 / 119 / 2  # under the tile's scale it rounds to nothing
    # The last row's weights are 119 codes of their own scale each: exact.
    assert state.out[0, 0, 0, 16].tolist() == pytest.approx([T * weight * 100] * D, rel=1e-12)
    assert state.out[0, 0, 0, 0].tolist() == pytest.approx([0.9996 * 100] * D, rel=1e-12)


@pytest.mark.parametrize("tokens, gap", [(8192, 5.0), (65536, 8.0)])
def test_block_local_maxima_keep_what_a_dominant_token_hides(tokens, gap):
    """The project's table: with a running maximum the other tokens round to zero together."""
    blocks = tokens // 64
    scores = torch.zeros(1, 1, blocks, 1, 1, 64, dtype=torch.float64)
    scores += normals(*scores.shape, dtype=torch.float64) * 0.3
    scores[0, 0, 0, 0, 0, 0] += gap + 3
    v8 = (30 * normals(1, 1, blocks, 64, 8, seed=1, dtype=torch.float64) + 20).round().clamp(-119, 119)
    v8[0, 0, 0, 0] = 0
    ones = torch.ones(1, 1, blocks, 64, dtype=torch.float64)
    want = exact(scores, v8, ones)[0]
    errors = {}
    for name, config in (("default", TurboConfig()), ("paper", TurboConfig.paper(p_scale="static"))):
        state = Accumulator.empty(torch.zeros(1, 1, 1, 1, 8, dtype=torch.float64))
        online_softmax_update(config, "sas", state, slice(0, 1), scores, v8, ones)
        errors[name] = float((state.finish()[0] - want).norm() / want.norm())
    assert errors["default"] < 0.05
    assert errors["paper"] > 0.5


def test_dropped_mass_is_bounded():
    """What threshold and rounding drop is at most 63 * 0.5 / 127 of a block's mass, here 20 %."""
    scores = torch.full((1, 1, 1, 1, 1, 64), math.log(0.499 / 127), dtype=torch.float64)
    scores[..., 0] = 0.0
    v8 = torch.full((1, 1, 1, 64, 8), 100.0, dtype=torch.float64)
    state = Accumulator.empty(torch.zeros(1, 1, 1, 1, 8, dtype=torch.float64))
    config = TurboConfig(softmax="exp", p_scale="static")
    online_softmax_update(config, "sas", state, slice(0, 1), scores, v8, torch.ones(1, 1, 1, 64, dtype=torch.float64))
    kept = float(state.row_sum) / float(scores.exp().sum())
    assert 1 - 63 * 0.5 / 127 <= kept < 0.81
