"""Attention without a cache: the C++ kernels against the reference."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta

from ...helpers import normals, qkv
from . import tools  # noqa: F401
from .attending import prefill_both

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 24, 40, 64, 72, 96, 128, 200, 256)
LENGTHS = (1, 3, 7, 17, 63, 64, 65, 127, 193)
SIGHTS = (
    {},
    {"is_causal": True},
    {"is_causal": True, "window_size": 1},
    {"is_causal": True, "window_size": 70},
    {"window_size": 30},
    {"window_size": 300},
)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_and_dtypes(head_dim, dtype):
    """Both code paths of a block: decode rows and prefill rows."""
    for queries in (3, 40):
        out, _ = prefill_both(*qkv(2, 4, 2, queries, 150, head_dim, dtype=dtype), is_causal=True)
        assert out.dtype == dtype


@pytest.mark.parametrize("options", SIGHTS, ids=str)
@pytest.mark.parametrize("queries", LENGTHS)
def test_lengths_and_what_is_seen(queries, options):
    for keys in {1, queries, queries + 64, 70, 193}:
        prefill_both(*qkv(2, 2, 1, queries, keys, 24, seed=keys), **options)


@pytest.mark.parametrize("causal", [True, False])
def test_every_edge_of_windows_and_blocks(causal):
    """Whole groups of rows whose first or last row just sees, or just misses, a block's edge."""
    q, k, v = qkv(1, 1, 1, 256, 256, 8)
    for window in range(62, 132):
        prefill_both(q, k, v, is_causal=causal, window_size=window)
    for keys in range(256, 322):
        longer = (x.repeat(1, 1, 2, 1)[:, :, :keys] for x in (k, v))
        prefill_both(q, *longer, is_causal=causal)


@pytest.mark.parametrize("queries", [1, 4, 16, 17, 100])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_groups_of_query_heads(group, queries):
    prefill_both(*qkv(1, 3 * group, 3, queries, 130, 40), is_causal=True)
    prefill_both(*qkv(2, 2 * group, 2, queries, 70, 16), window_size=20)


@pytest.mark.parametrize("options", SIGHTS, ids=str)
def test_several_tiles_of_rows(options):
    """More rows than one task takes."""
    prefill_both(*qkv(1, 2, 2, 300, 300, 8), **options)
    prefill_both(*qkv(2, 8, 1, 100, 260, 16), **options)


@pytest.mark.parametrize("options", SIGHTS, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_several_runs_of_blocks(queries, options):
    """More keys than one task takes, where there is one tile of rows."""
    prefill_both(*qkv(2, 2, 1, queries, 2100, 16), **options)


@pytest.mark.parametrize("queries", [1, 2, 33])
def test_five_thousand_keys(queries):
    q, k, v = qkv(1, 2, 1, queries, 5000, 64)
    prefill_both(q, k, v, is_causal=True)
    prefill_both(q * 4, k, v, is_causal=True, window_size=3000)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rows", [1, 0])
@pytest.mark.parametrize("keys", [1, 150])
def test_masks_of_every_shape(batch, heads, rows, keys, additive):
    for queries in (3, 70):
        q, k, v = qkv(2, 4, 2, queries, 150, 16)
        shape = batch, heads, rows or queries, keys
        drawn = normals(*shape, seed=3)
        mask = drawn.masked_fill(drawn > 1, -torch.inf) if additive else drawn > -0.5
        for options in ({}, {"is_causal": True}, {"window_size": 40, "softcap": 3.0}):
            prefill_both(q, k, v, mask, **options)


def test_masks_of_fewer_dimensions_and_other_strides():
    q, k, v = qkv(2, 4, 2, 20, 150, 16)
    for shape in ((150,), (20, 1), (20, 150), (4, 1, 150)):
        prefill_both(q, k, v, normals(*shape) > 0)
    whole = normals(2, 150, 20, 4)
    prefill_both(q, k, v, whole.permute(0, 3, 2, 1))
    prefill_both(q, k, v, whole.permute(0, 3, 2, 1) > 0)
    prefill_both(q, k, v, normals(1, 1, 41, 301)[:, :, 1::2, 1::2] > 0)
    prefill_both(q, k, v, normals(1, 1, 20, 150).expand(2, 4, 20, 150))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_additive_masks_of_other_dtypes(dtype):
    prefill_both(*qkv(2, 4, 2, 20, 90, 16), normals(20, 90, dtype=dtype))


@pytest.mark.parametrize("queries", [1, 3, 65])
def test_rows_that_see_nothing(queries):
    q, k, v = qkv(2, 4, 2, queries, 150, 16)
    for mask in (torch.ones(2, 4, queries, 150, dtype=torch.bool), torch.zeros(2, 4, queries, 150)):
        unseen = False if mask.dtype == torch.bool else -torch.inf
        mask[0, 1], mask[1, :, queries // 2], mask[..., 64:128] = unseen, unseen, unseen
        out, lse = prefill_both(q, k, v, mask)
        for empty in ((0, 1), (1, slice(None), queries // 2)):
            assert not bool(out[empty].any())
            assert bool((lse[empty] == -torch.inf).all())
        assert bool(lse[0, 0].isfinite().all())
        prefill_both(q, k, v, mask, is_causal=True, window_size=30)


@pytest.mark.parametrize("queries", [9, 65, 193])
def test_more_queries_than_keys(queries):
    """Rows before the first key see nothing."""
    q, k, v = qkv(2, 4, 2, queries, 7, 16)
    out, lse = prefill_both(q, k, v, is_causal=True)
    assert not bool(out[:, :, : queries - 7].any())
    assert bool((lse[:, :, : queries - 7] == -torch.inf).all())
    assert bool(lse[:, :, queries - 7 :].isfinite().all())


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0, 1e3, 1e6])
@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.3])
def test_softcap_and_scale(softcap, scale):
    for queries in (2, 40):
        q, k, v = qkv(2, 4, 2, queries, 150, 16)
        prefill_both(q, k, v, is_causal=True, softcap=softcap, scale=scale)
        prefill_both(q, k, v, scale=scale)


@pytest.mark.parametrize("softmax", ["sas", "sas2", "exp"])
@pytest.mark.parametrize("threshold", [-0.3, -1.0, -5.6, -6.0, -40.0])
def test_every_exponential(softmax, threshold):
    config = ta.TurboConfig(softmax=softmax, sas_threshold=threshold)
    for queries, spread in ((3, 1.0), (40, 1.0), (3, 6.0), (40, 6.0)):
        q, k, v = qkv(2, 4, 2, queries, 150, 16)
        prefill_both(q * spread, k, v, is_causal=True, config=config)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.parametrize("token_scales", [True, False])
def test_stage_1_without_its_parts(rotate, smooth_k, token_scales):
    config = ta.TurboConfig(rotate=rotate, smooth_k=smooth_k, token_scales=token_scales)
    for queries in (1, 7, 70):
        q, k, v = qkv(2, 4, 2, queries, 150, 24)
        k[..., 3] += 5.0
        prefill_both(q, k, v, is_causal=True, config=config)
        prefill_both(q, k, v, window_size=20, config=config)


def odd_storage(x: torch.Tensor) -> torch.Tensor:
    room = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    room[1:] = x.reshape(-1)
    return room[1:].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [2, 70])
def test_strides_and_storage_offsets_do_not_matter(dtype, queries):
    q, k, v = qkv(2, 4, 2, queries, 130, 24, dtype=dtype)
    want = prefill_both(q, k, v, is_causal=True)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_channel = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    wider = [torch.cat((x, x * torch.nan), 3)[..., :24] for x in (q, k, v)]
    sparse = [x.repeat_interleave(2, 2)[:, :, ::2] for x in (q, k, v)]
    for given in (by_token, by_channel, wider, sparse, [odd_storage(x) for x in (q, k, v)]):
        got = ta.turbo_attention(*given, is_causal=True, return_lse=True, backend="cpu")
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    shared = k[:, :1].expand(2, 2, 130, 24), v[:1].expand(2, 2, 130, 24)
    prefill_both(q, *shared, is_causal=True)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 5), (2, 2, 1, 0, 5), (2, 2, 1, 3, 0), (2, 4, 2, 70, 0)])
def test_nothing_to_compute(shape):
    batch, heads, kv_heads, queries, keys = shape
    for options in ({}, {"is_causal": True, "window_size": 3}):
        out, lse = prefill_both(*qkv(batch, heads, kv_heads, queries, keys, 8), **options)
        assert (out.shape, lse.shape) == ((batch, heads, queries, 8), (batch, heads, queries))


def test_inputs_are_left_as_they_are():
    q, k, v = given = qkv(1, 2, 1, 40, 70, 16)
    before = [x.clone() for x in given]
    ta.turbo_attention(q, k, v, is_causal=True, backend="cpu")
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
