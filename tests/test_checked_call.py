"""A call over a cache is checked once, whichever path computes it."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from types import FrameType

import pytest
import torch

import turboattention as ta
from turboattention import validation
from turboattention.checked_call import check_call

from .helpers import normals
from .kv.tools import filled

OFF = ta.TurboConfig(guard="off")


def checks_of(call) -> Counter[str]:
    """How often each function of validation.py runs during a call."""
    found: Counter[str] = Counter()

    def record(frame: FrameType, event: str, _) -> None:
        if event == "call" and frame.f_code.co_filename == validation.__file__:
            found[frame.f_code.co_name] += 1

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("tokens", [1, 130])
def test_every_argument_is_checked_once(tokens, backend):
    cache, *_ = filled([150, 90], config=OFF)
    q, k, v = (normals(2, heads, tokens, 16, seed=heads) for heads in (4, 2, 2))
    options = {"lengths": torch.tensor([tokens, 1]), "attn_mask": torch.zeros(1, 1, 1, 150 + tokens)}
    found = checks_of(lambda: ta.turbo_attention_with_kvcache(q, cache, k, v, backend=backend, **options))
    once = ("check_floats", "check_token_shapes", "check_query", "check_lengths", "check_mask", "check_softmax")
    assert {name: found[name] for name in once} == dict.fromkeys(once, 1)


def test_an_append_is_checked_once():
    cache, *_ = filled([150, 90], config=OFF)
    k, v = (normals(2, 2, 130, 16, seed=seed) for seed in (1, 2))
    found = checks_of(lambda: cache.append(k, v, torch.tensor([130, 1])))
    assert found["check_floats"] == found["check_token_shapes"] == found["check_lengths"] == 1


def test_a_checked_call_cannot_be_changed():
    cache, *_ = filled([3], config=OFF)
    q, k, v = (normals(1, heads, 1, 16) for heads in (4, 2, 2))
    call = check_call(q, cache, k, v, None, None, True, None, None, None)
    assert (call.counts, call.params.attn_mask, call.params.scale) == (None, None, 0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.q = k
