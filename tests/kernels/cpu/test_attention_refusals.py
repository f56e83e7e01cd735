"""Options that the C++ attention does not support: a named backend raises, "auto" uses the reference."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention import dispatch
from turboattention.errors import BackendError, UnsupportedError
from turboattention.kernels.cpu.rows import check_format
from turboattention.kv.cache import KVCache
from turboattention.kv.layout import FORMAT_VERSION

from ...helpers import qkv
from . import tools
from .attending import prefill_both

REFUSED = {
    "inputs are float64, which only the reference supports": (ta.TurboConfig(), torch.float64),
    "block_size is 32, its kernels are written for 64": (ta.TurboConfig(block_size=32), torch.float32),
    "row_max is 'running', its kernels compute 'block'": (ta.TurboConfig(row_max="running"), torch.float32),
    "p_scale is 'tile', its kernels compute 'row' and 'static'": (
        ta.TurboConfig(p_scale="tile"),
        torch.float32,
    ),
    "rescale is 'sas', its kernels compute 'exact'": (ta.TurboConfig(rescale="sas"), torch.float32),
    "stored_prefill is True, its kernels compute False": (ta.TurboConfig.paper(stored_prefill=True), torch.float32),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_named_backend_says_what_it_does_not_compute(why):
    config, dtype = REFUSED[why]
    q, k, v = qkv(1, 2, 1, 5, 70, 16, dtype=dtype)
    cache = KVCache(1, 1, 16, config=config)
    for call in (
        lambda: ta.turbo_attention(q, k, v, config=config, backend="cpu"),
        lambda: ta.turbo_attention_with_kvcache(q, cache, k[:, :, :5], v[:, :, :5], backend="cpu"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            call()
        assert str(caught.value) == f"backend: expected one that computes this call, got 'cpu' ({why})"
    assert len(cache) == 0


@pytest.mark.parametrize("why", REFUSED)
def test_auto_leaves_it_to_the_reference(why):
    config, dtype = REFUSED[why]
    q, k, v = qkv(1, 2, 1, 5, 70, 16, dtype=dtype)
    call = dispatch.CallTraits(config, dtype, q.device)
    assert dispatch.choose("auto", call).name == "reference"
    assert dispatch.explain_choice("auto", call).others["cpu"] == why
    want = ta.turbo_attention(q, k, v, config=config, return_lse=True, backend="reference")
    got = ta.turbo_attention(q, k, v, config=config, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    caches = [KVCache(1, 1, 16, config=config) for _ in range(2)]
    for cache in caches:
        cache.append(k, v)
    out = [
        ta.turbo_attention_with_kvcache(q, cache, backend=name)
        for cache, name in zip(caches, ("auto", "reference"), strict=True)
    ]
    assert torch.equal(*out)


def test_auto_takes_the_kernels_for_everything_else():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for fields in ({}, {"softmax": "exp"}, {"bits": 2}, {"token_scales": False}, {"rotate": False}):
            call = dispatch.CallTraits(ta.TurboConfig(**fields), dtype, torch.device("cpu"))
            assert dispatch.choose("auto", call).name == "cpu"
        for fields in ({}, {"rescale": "exact"}, {"softmax": "exp"}, {"token_scales": True}, {"bits": "mixed"}):
            call = dispatch.CallTraits(ta.TurboConfig.paper(**fields), dtype, torch.device("cpu"))
            assert dispatch.choose("auto", call).name == "cpu"


def test_the_launcher_refuses_too():
    """Whoever calls it without asking `dispatch` gets no wrong numbers."""
    attention = pytest.importorskip("turboattention.kernels.cpu.attention", exc_type=ImportError)
    for why, (config, dtype) in REFUSED.items():
        assert attention.refusal(config, dtype) == why
    assert attention.refusal(ta.TurboConfig(), torch.bfloat16) is None


def test_tensors_elsewhere_are_refused():
    meta = [x.to("meta") for x in qkv(1, 2, 1, 5, 70, 16)]
    with pytest.raises(UnsupportedError, match=r"got 'cpu' \(the tensors are on meta\)$"):
        ta.turbo_attention(*meta, backend="cpu")
    call = dispatch.CallTraits(ta.TurboConfig(), torch.float32, torch.device("meta"))
    assert dispatch.choose("auto", call).name == "reference"


def test_an_instruction_set_that_is_not_here(monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", "nonsense")
    backend = ta.backends()["cpu"]
    assert not backend.usable
    assert backend.reason == f'TURBOATTENTION_ISA: expected one of {", ".join(tools.ISAS)}, got "nonsense"'
    q, k, v = qkv(1, 2, 1, 5, 70, 16)
    with pytest.raises(BackendError, match=r"got 'cpu' \(TURBOATTENTION_ISA: expected one of .*serial, got \"nonsense"):
        ta.turbo_attention(q, k, v, backend="cpu")
    assert dispatch.choose("auto").name == "reference"
    monkeypatch.delenv("TURBOATTENTION_ISA")
    assert ta.backends()["cpu"].usable


@pytest.mark.parametrize("isa", tools.ISAS)
def test_an_instruction_set_by_name(isa, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    assert ta.backends()["cpu"].reason == f"C++ kernels for {isa}"
    prefill_both(*qkv(1, 2, 1, 5, 70, 16))
    monkeypatch.setenv("TURBOATTENTION_ISA", "")  # as if it were not set
    assert ta.backends()["cpu"].reason == f"C++ kernels for {tools.ISAS[0]}"


@pytest.mark.parametrize("version", [None, FORMAT_VERSION - 1])
def test_an_extension_built_for_another_format_is_refused(version):
    """As after an update of the source alone: it would read and write other bytes."""
    with pytest.raises(ImportError, match=rf"expected a build for format {FORMAT_VERSION}, got one for .*: rebuild it"):
        check_format(version)
