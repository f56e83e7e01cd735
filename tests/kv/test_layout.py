"""The packed format's arithmetic: offsets of sections and size of a page."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboattention.errors import ConfigError
from turboattention.kv.layout import FORMAT_NAME, FORMAT_VERSION, PageLayout

WIDTHS = st.lists(st.sampled_from((2, 3, 4, 8)), min_size=1, max_size=6)


def page_bytes(head_dim: int, block: int, k_bits: list[int], v_bits: list[int], token_scales: bool) -> int:
    """Written from the format's description, without the package's code."""
    codes = sum(head_dim * block * bits // 8 for bits in (*k_bits, *v_bits))
    steps_and_zeros = 2 * head_dim * sum(bits < 8 for bits in (*k_bits, *v_bits))
    by_token = 2 * len(k_bits) * block if token_scales else 0
    by_head = 2 * 4 * len(k_bits)
    return math.ceil((codes + steps_and_zeros + by_token + by_head) / 16) * 16


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("token_scales", [True, False])
@pytest.mark.parametrize(
    "k_bits, v_bits", [([4], [4]), ([3, 3], [3, 3]), ([2] * 8, [2] * 8), ([8, 8], [8, 8]), ([4, 2, 8], [2, 3, 3])]
)
def test_page_bytes(head_dim, token_scales, k_bits, v_bits):
    layout = PageLayout(head_dim, 64, tuple(k_bits), tuple(v_bits), token_scales)
    assert layout.page_bytes == page_bytes(head_dim, 64, k_bits, v_bits, token_scales)


@pytest.mark.parametrize(
    "bits, head_dim, size",
    [
        # codes, steps and zeros, token scales, scales; 64 tokens, one head
        (4, 128, 2 * (4096 + 256 + 64 + 4) + 8),
        (3, 64, 2 * (1536 + 128 + 64 + 4) + 8),
        (2, 96, 2 * (1536 + 192 + 64 + 4) + 8),
        (8, 256, 2 * (16384 + 64 + 4) + 8),
    ],
)
def test_page_bytes_by_hand(bits, head_dim, size):
    assert PageLayout.uniform(1, head_dim, 64, bits, True).page_bytes == size


@pytest.mark.parametrize("bits, stored", [(4, 4.25), (3, 3.25), (2, 2.25)])
def test_bits_per_element_at_head_dim_128(bits, stored):
    """The project's figures: steps and zeros add a quarter bit, token scales 0.06."""
    layout = PageLayout.uniform(8, 128, 64, bits, True)
    per_element = layout.page_bytes * 8 / (2 * 8 * 64 * 128)
    assert per_element == stored + 8 / 128 + 32 / (64 * 128)


@given(WIDTHS, st.sampled_from((8, 40, 96)), st.sampled_from((16, 64)), st.booleans(), st.randoms())
def test_sections_follow_each_other_without_gaps(k_bits, head_dim, block, token_scales, random):
    v_bits = list(k_bits)
    random.shuffle(v_bits)
    layout = PageLayout(head_dim, block, tuple(k_bits), tuple(v_bits), token_scales)
    at = 0
    for widths, groups in ((k_bits, layout.k_groups), (v_bits, layout.v_groups)):
        assert [g.bits for g in groups] == sorted(set(widths), reverse=True)
        for group in groups:
            assert group.offset == at
            assert group.heads == tuple(h for h, bits in enumerate(widths) if bits == group.bits)
            assert group.head_bytes == head_dim * block * group.bits // 8
            at += len(group.heads) * group.head_bytes
    for widths, coded, steps in (
        (k_bits, layout.k_coded, layout.k_steps),
        (v_bits, layout.v_coded, layout.v_steps),
    ):
        assert list(coded) == sorted((h for h, b in enumerate(widths) if b < 8), key=lambda h: (-widths[h], h))
        assert steps == at
        at += 2 * len(coded) * head_dim
    for offset in (layout.k_token_scales, layout.v_token_scales):
        assert offset == at
        at += len(k_bits) * block if token_scales else 0
    for offset in (layout.k_scales, layout.v_scales):
        assert offset == at
        assert offset % 4 == 0  # read as float32 where it stands
        at += 4 * len(k_bits)
    assert at <= layout.page_bytes < at + 16
    assert layout.page_bytes % 16 == 0
    assert layout.page_bytes == page_bytes(head_dim, block, k_bits, v_bits, token_scales)


def test_uniform():
    assert PageLayout.uniform(3, 64, 32, 8, False) == PageLayout(64, 32, (8, 8, 8), (8, 8, 8), False)
    assert PageLayout.uniform(3, 64, 32, 8, False).num_kv_heads == 3


def test_keys_of_two_widths_take_as_many_bytes():
    layout = PageLayout(48, 64, (4, 3, 2, 8), (4, 4, 4, 4), True, (True,) * 4)
    assert layout.page_bytes == PageLayout(48, 64, (4, 3, 2, 8), (4, 4, 4, 4), True).page_bytes
    parts = {group.bits: group.parts for group in layout.k_groups}
    assert parts == {8: ((8, 48),), 4: ((5, 24), (3, 24)), 3: ((4, 24), (2, 24)), 2: ((3, 24), (1, 24))}
    assert all(group.parts == ((group.bits, 48),) for group in layout.v_groups)
    with pytest.raises(
        ConfigError, match=r"^layout: expected head_dim in multiples of 16 for two widths of K, got 24$"
    ):
        PageLayout(24, 64, (3,), (4,), True, (True,))
    with pytest.raises(ConfigError, match=r"^k_halves: expected 2 entries, got 1$"):
        PageLayout(32, 64, (3, 3), (4, 4), True, (True,))


def test_heads_of_two_widths_come_first():
    layout = PageLayout(16, 64, (3, 3, 8, 3), (4,) * 4, True, (False, True, True, False))
    assert [(group.bits, group.heads, len(group.parts)) for group in layout.k_groups] == [
        (8, (2,), 1), (3, (1,), 2), (3, (0, 3), 1),
    ]  # fmt: skip
    assert layout.k_coded == (1, 0, 3)
    assert layout.k_halves == (False, True, False, False)


def test_name_and_version_are_pinned():
    """Files depend on them: a change of the format is a new version."""
    assert (FORMAT_NAME, FORMAT_VERSION) == ("turboattention-kv", 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (60, 64, (4,), (4,), True),
            r"^layout: expected head_dim in multiples of 8 and block_size in multiples of 16, got 60 and 64$",
        ),
        (
            (64, 24, (4,), (4,), True),
            r"^layout: expected head_dim in multiples of 8 and block_size in multiples of 16, got 64 and 24$",
        ),
        ((64, 64, (4, 4), (4,), True), r"^v_bits: expected 2 widths, as K has, got 1$"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PageLayout(*arguments)
