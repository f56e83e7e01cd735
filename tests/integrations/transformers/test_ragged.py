"""Packing rows of unequal length, and putting results back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboattention.integrations.transformers.ragged import alike, pack_index, put_back, take, take_columns, take_rows

MASKS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4).map(torch.tensor)


@given(valid=MASKS, side=st.sampled_from(["left", "right"]))
def test_putting_back_is_the_inverse_of_taking(valid, side):
    x = torch.randn(len(valid), 2, 6, 3)
    index, counts = pack_index(valid, side)
    assert index.shape[1] == int(valid.sum(1).max())
    packed = take(x, index)
    for row, count in enumerate(counts.tolist()):
        kept = packed[row, :, :count] if side == "left" else packed[row, :, packed.shape[2] - count :]
        assert torch.equal(kept, x[row][:, valid[row]])
    back = put_back(packed, index, valid)
    assert torch.equal(back, torch.where(valid[:, None, :, None], x, 0.0))


@given(valid=MASKS)
def test_columns_of_a_mask_follow_the_tokens(valid):
    mask = torch.rand(len(valid), 1, 4, 6) < 0.5
    packed = take_columns(mask, valid, hidden=False)
    for row, count in enumerate(valid.sum(1).tolist()):
        assert torch.equal(packed[row, :, :, :count], mask[row][..., valid[row]])
        assert not packed[row, :, :, count:].any()


def test_masks_that_broadcast():
    valid = torch.tensor([[True, True, False], [False, True, True]])
    shared = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    assert take_columns(shared, valid, -torch.inf)[:, 0, 0].tolist() == [[0.0, 1.0], [1.0, 2.0]]
    index, _ = pack_index(valid)
    assert take_rows(shared, index) is shared


@given(valid=MASKS)
def test_groups_of_equal_rows(valid):
    groups = alike(valid)
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == list(range(len(valid)))
    for rows, columns in groups:
        for row in rows:
            assert valid[row].nonzero().flatten().tolist() == columns.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_valid(side):
    index, counts = pack_index(torch.zeros(2, 5, dtype=torch.bool), side)
    assert index.shape == (2, 0)
    assert counts.tolist() == [0, 0]
