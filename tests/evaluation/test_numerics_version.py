"""Saved results are reused only if the numerics have not changed: changed outputs need another `NUMERICS`."""

from __future__ import annotations

import pytest
import torch

from turboattention import KVCache, TurboConfig, turbo_attention_with_kvcache
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.baselines.kinds import NUMERICS

VERSION = 3
OUTPUTS = {
    "turbo-8": 0.22835864431,
    "turbo-4": 0.22852149365,
    "turbo-4-reordered": 0.22873502080,
    "turbo-3": 0.22797912117,
    "turbo-3-reordered": 0.22905650256,
    "turbo-2": 0.22668711903,
    "turbo-2-reordered": 0.22849482142,
    "turbo-mixed": 0.22754403395,
    "turbo-paper-4": 0.23030842085,
}
"""Mean magnitude of the outputs below, by method."""


@pytest.mark.parametrize("name", OUTPUTS)
def test_other_outputs_need_another_version_of_the_numerics(name: str) -> None:
    config = METHODS[name].config  # pyright: ignore
    # The softmax is what CPUs and GPUs choose; it moves these outputs by 3e-4, and is not part of the version.
    found = _mean_output(config.replace(softmax="sas") if config.softmax == "auto" else config)
    assert found == pytest.approx(OUTPUTS[name], rel=1e-5), (
        "The numerics changed: raise NUMERICS in evaluation/baselines/kinds.py, and give VERSION and OUTPUTS of this "
        "test their new values."
    )


def test_the_outputs_are_those_of_this_version() -> None:
    assert NUMERICS == VERSION
    assert all(method.numerics == (NUMERICS if name.startswith("turbo-") else 0) for name, method in METHODS.items())


def _mean_output(config: TurboConfig) -> float:
    """A prompt of 200 tokens, then 70 tokens, over channels of two magnitudes, by the reference."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, 64, generator=generator, dtype=torch.float64)
        for heads, tokens in ((4, 70), (2, 270), (2, 270))
    )
    first = torch.randn(1, 4, 200, 64, generator=generator, dtype=torch.float64)
    k[..., ::9] *= 4
    cache = KVCache(1, 2, 64, config=config)
    outs = [turbo_attention_with_kvcache(first, cache, k[:, :, :200], v[:, :, :200], backend="reference")]
    outs.append(turbo_attention_with_kvcache(q, cache, k[:, :, 200:], v[:, :, 200:], backend="reference"))
    return float(torch.cat(outs, 2).abs().mean())
