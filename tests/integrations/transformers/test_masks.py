"""The masks of "turbo" agree with transformers' own."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    padding_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from turboattention.errors import InputError, ShapeError, UnsupportedError
from turboattention.integrations.transformers.attention import turbo_attention_forward
from turboattention.integrations.transformers.masks import read_mask, turbo_mask


def meaning(mask: torch.Tensor, queries: int) -> torch.Tensor:
    """bool [B, 1, Lq, Lk]: the keys that attention sees with a mask."""
    plan = read_mask(mask)
    if not plan.is_causal:
        return plan.mask
    keys = plan.width
    position, key = keys - queries + torch.arange(queries)[:, None], torch.arange(keys)
    seen = key <= position
    if plan.window is not None:
        seen = seen & (key > position - plan.window)
    return (seen & plan.mask[:, None, :])[:, None]


@given(
    past=st.integers(0, 12),
    new=st.integers(1, 8),
    window=st.none() | st.integers(1, 9),
    padding=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    offset=st.integers(0, 3),
    spare=st.integers(0, 4),
    skip=st.booleans(),
)
def test_causal_and_sliding_masks(past, new, window, padding, offset, spare, skip):
    """Dynamic caches (keys end with the queries), sliding ones (an offset) and static ones (spare keys)."""
    offset = min(offset, past)
    tokens = torch.ones(2, past + new, dtype=torch.bool)
    for row, pads in enumerate(padding):
        tokens[row, : min(pads, past + new - 1)] = False
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    options = {
        "batch_size": 2,
        "q_length": new,
        "kv_length": past + new - offset + spare,
        "q_offset": past,
        "kv_offset": offset,
        "mask_function": function,
        "attention_mask": tokens,
        "local_size": window,
    }
    expected = sdpa_mask(**options, allow_is_causal_skip=False)
    result = turbo_mask(**options, allow_is_causal_skip=skip)
    assert result.dim() == (2 if skip and not spare else 4)
    # Rows of padded queries may say anything: their results are dropped.
    real = tokens[:, None, past:, None]
    assert torch.equal(meaning(result, new) & real, expected & real)


FUNCTIONS = {
    "chunked": chunked_causal_mask_function(4, torch.tensor([0, 2])),
    "packed": and_masks(causal_mask_function, packed_sequence_mask_function(torch.arange(10).expand(2, -1) // 4)),
    "prefix": or_masks(causal_mask_function, lambda b, h, q, kv: kv < 3),
    "window or prefix": or_masks(sliding_window_causal_mask_function(3), lambda b, h, q, kv: kv < 2),
    "causal and padding": and_masks(causal_mask_function, padding_mask_function(torch.arange(10).expand(2, -1) > 1)),
    "bidirectional": bidirectional_mask_function,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_other_patterns_become_matrices(name, padded):
    tokens = torch.ones(2, 10, dtype=torch.bool)
    tokens[1, :2] = not padded
    options = {"batch_size": 2, "q_length": 10, "kv_length": 10, "mask_function": FUNCTIONS[name]}
    result = turbo_mask(**options, attention_mask=tokens)
    expected = sdpa_mask(**options, attention_mask=tokens, allow_is_causal_skip=False)
    assert torch.equal(read_mask(result).mask, expected)
    assert not read_mask(result).is_causal


def test_a_window_counts_the_query():
    """transformers and this package mean the same by a window of w: w keys, the query's own among them."""
    mask = turbo_mask(1, 9, 9, mask_function=sliding_window_causal_mask_function(4))
    assert read_mask(mask).window == 4
    assert meaning(mask, 9)[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


def test_a_plan_is_independent_of_the_callers_mask():
    tokens = torch.ones(1, 6, dtype=torch.bool)
    plan = read_mask(turbo_mask(1, 6, 6, attention_mask=tokens))
    tokens[:] = False
    assert plan.visible is None


def test_masks_narrower_than_the_keys_are_refused():
    with pytest.raises(InputError, match=r"attention_mask: expected one column for each of the 7 .* got 2"):
        turbo_mask(1, 2, 7, q_offset=5, attention_mask=torch.ones(1, 2, dtype=torch.bool))


class TestMasksOfTheUser:
    def test_additive_matrices(self):
        mask = torch.tensor([[0.0, -torch.inf, torch.finfo(torch.float32).min, -3.0]])[None, None]
        plan = read_mask(mask)
        assert plan.visible.tolist() == [[True, False, False, True]]
        assert plan.matrix.tolist() == [[[[0.0, -torch.inf, -torch.inf, -3.0]]]]

    def test_boolean_matrices(self):
        mask = torch.tensor([[True, False], [True, True]])[None, None]
        assert read_mask(mask).visible is None
        assert torch.equal(read_mask(mask).matrix, mask)
        assert read_mask(torch.ones_like(mask)).matrix is None

    def test_integers_are_read_as_booleans(self):
        assert read_mask(torch.tensor([[0, 1, 2]])).visible.tolist() == [[False, True, True]]

    def test_no_mask(self):
        assert read_mask(None) is None

    @pytest.mark.parametrize("mask", [torch.ones(2, 3, 4), "mask"])
    def test_anything_else_is_refused(self, mask):
        with pytest.raises(ShapeError, match=r"attention_mask: expected a tensor \[B, Lk\]"):
            read_mask(mask)

    def test_a_plan_of_padding_does_not_know_a_window(self):

        assert not read_mask(torch.ones(1, 3, dtype=torch.bool)).from_function


class TestWhereAWindowComesFrom:
    """A mask made by "turbo" decides the window; with a padding mask, the layer's window applies."""

    @pytest.fixture
    def attend(self, exact_core):
        q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))

        def run(mask, window=None, causal=None):
            module = torch.nn.Module()
            options = {"sliding_window": window, "is_causal": causal}
            return turbo_attention_forward(module, q, k, v, mask, **options)[0]

        return run

    def test_the_mask(self, attend):
        windowed = turbo_mask(1, 9, 9, mask_function=sliding_window_causal_mask_function(4))
        full = turbo_mask(1, 9, 9)
        assert torch.equal(attend(windowed), attend(windowed, window=4))
        assert torch.equal(attend(full), attend(full, window=4))
        assert not torch.equal(attend(full), attend(windowed))

    def test_the_layer(self, attend):
        windowed = attend(turbo_mask(1, 9, 9, mask_function=sliding_window_causal_mask_function(4)))
        assert torch.equal(attend(None, window=4), windowed)
        assert torch.equal(attend(torch.ones(1, 9, dtype=torch.bool), window=4), windowed)

    def test_neither_without_causality(self, attend):
        everything = turbo_mask(1, 9, 9, mask_function=bidirectional_mask_function)
        assert torch.equal(attend(None, window=4, causal=False), attend(everything))
        assert not torch.equal(attend(None), attend(everything))


class TestGuard:
    """Masks are only for attention functions: other computations with them raise an error."""

    SIZES: ClassVar = {"batch_size": 2, "q_length": 5, "kv_length": 5}

    @pytest.fixture(params=[causal_mask_function, bidirectional_mask_function], ids=["tokens", "matrix"])
    def mask(self, request):
        return turbo_mask(**self.SIZES, mask_function=request.param, config=LlamaConfig())

    @pytest.mark.parametrize(
        "use",
        [
            lambda mask: torch.zeros(5, 5) + mask,
            lambda mask: mask + torch.zeros(5, 5),
            lambda mask: torch.zeros(5, 5).masked_fill(mask, -1.0),
            lambda mask: torch.where(mask, 0.0, -1.0),
            lambda mask: ~mask,
            lambda mask: mask == 0,
            lambda mask: torch.cat([mask, mask], -1),
            lambda mask: mask.to(torch.float32),
            lambda mask: torch.baddbmm(mask, torch.ones(2, 5, 3), torch.ones(2, 3, 5)),
        ],
    )
    def test_computing_with_it_is_refused(self, mask, use):
        with pytest.raises(UnsupportedError, match="the architecture 'llama' is not supported"):
            use(mask)

    def test_a_part_of_a_matrix_is_a_mask_still(self):
        mask = turbo_mask(**self.SIZES, mask_function=causal_mask_function, allow_is_causal_skip=False)
        part = mask[:, :, -2:, :].clone()
        assert torch.equal(read_mask(part).mask, torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()[:, :, -2:])
        with pytest.raises(UnsupportedError, match="not supported"):
            torch.zeros(2, 1, 2, 5) + part

    def test_rows_of_a_mask_of_tokens_are_not_cut(self):
        with pytest.raises(UnsupportedError, match="not supported"):
            turbo_mask(**self.SIZES)[:, :, :, :3]
