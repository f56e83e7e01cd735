"""The public surface: names, returns, backends, and the words of `explain`."""

from __future__ import annotations

import inspect

import pytest
import torch

import turboattention as ta
from turboattention import dispatch
from turboattention.dispatch import Availability
from turboattention.errors import BackendError, ConfigError, DtypeError, InputError, ShapeError, UnsupportedError
from turboattention.reference.exact import exact_attention

from .helpers import qkv, relative_error

OFF = ta.TurboConfig(guard="off")


def parameters(function) -> list[str]:
    return [
        str(p).split(":")[0].split(" =")[0] + ("" if p.default is p.empty else f"={p.default}")
        for p in inspect.signature(function).parameters.values()
    ]


def test_signature_of_turbo_attention():
    assert parameters(ta.turbo_attention) == [
        "q", "k", "v", "attn_mask=None", "is_causal=False", "scale=None", "window_size=None", "softcap=None",
        "return_lse=False", "config=None", "backend=auto",
    ]  # fmt: skip
    kinds = inspect.signature(ta.turbo_attention).parameters
    assert kinds["window_size"].kind is inspect.Parameter.KEYWORD_ONLY
    assert kinds["scale"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_signature_of_attention_over_a_cache():
    assert parameters(ta.turbo_attention_with_kvcache) == [
        "q", "cache", "k_new=None", "v_new=None", "lengths=None", "attn_mask=None", "is_causal=True", "scale=None",
        "window_size=None", "softcap=None", "return_lse=False", "backend=auto",
    ]  # fmt: skip


def test_signature_of_the_cache():
    assert parameters(ta.KVCache) == [
        "batch_size", "num_kv_heads", "head_dim", "config=None", "head_bits=None", "max_tokens=None", "device=None",
        "dtype=None", "window_size=None", "k_mean=None", "v_head_dim=None", "k_order=None",
    ]  # fmt: skip


def test_public_names():
    for name in (
        "turbo_attention", "turbo_attention_with_kvcache", "KVCache", "TurboConfig", "sas", "flashq", "backends",
        "explain", "integrations", "errors", "__version__",
    ):  # fmt: skip
        assert getattr(ta, name) is not None
        assert name in dir(ta)
    for name in (
        "quantize_int8",
        "progressive_quantize",
        "progressive_dequantize",
        "head_priority",
        "assign_head_bits",
    ):
        assert callable(getattr(ta.flashq, name))
    with pytest.raises(AttributeError, match="has no attribute 'turbo'"):
        ta.turbo  # noqa: B018


def test_it_is_a_drop_in_for_sdpa():
    """The same positional call gives about the same."""
    q, k, v = qkv(2, 4, 4, 50, 50, 32)
    mask = torch.rand(50, 50) > 0.2
    sdpa = torch.nn.functional.scaled_dot_product_attention
    # INT8 on normal data: about 0.02.
    assert relative_error(ta.turbo_attention(q, k, v), sdpa(q, k, v)) < 0.06
    assert relative_error(ta.turbo_attention(q, k, v, mask, False, 0.1), sdpa(q, k, v, mask, scale=0.1)) < 0.06
    assert relative_error(ta.turbo_attention(q, k, v, None, True), sdpa(q, k, v, is_causal=True)) < 0.06
    gqa = sdpa(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert relative_error(ta.turbo_attention(q, k[:, :2], v[:, :2]), gqa) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cached", [False, True])
def test_returns(dtype, cached):
    q, k, v = qkv(2, 4, 2, 7, 7, 16, dtype=dtype)

    def run(**options):
        if cached:
            return ta.turbo_attention_with_kvcache(q, ta.KVCache(2, 2, 16, config=OFF), k, v, **options)
        return ta.turbo_attention(q, k, v, is_causal=True, **options)

    out = run()
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
    again, lse = run(return_lse=True)
    assert torch.equal(again, out)
    assert lse.shape == (2, 4, 7)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("cached", [False, True])
def test_lse_is_the_natural_logarithm_also_with_smoothing(cached):
    q, k, v = qkv(1, 2, 1, 150, 150, 32)
    k = k + 4.0  # the mean that is taken off is large
    want = exact_attention(q, k, v, is_causal=True)[1]
    if cached:
        cache = ta.KVCache(1, 1, 32, config=OFF.replace(bits=8))
        cache.append(k[:, :, :100], v[:, :, :100])
        rest = q[:, :, 100:], cache, k[:, :, 100:], v[:, :, 100:]
        lse, want = ta.turbo_attention_with_kvcache(*rest, return_lse=True)[1], want[:, :, 100:]
    else:
        lse = ta.turbo_attention(q, k, v, is_causal=True, return_lse=True)[1]
    assert float(want.abs().max()) > 8
    # Logits of 10 and more in INT8: half a unit of 119 of the largest key channel.
    assert float((lse - want).abs().max()) < 0.2


def test_a_mask_and_causality_combine():
    q, k, v = qkv(1, 2, 2, 60, 90, 16)
    mask = torch.rand(60, 90) > 0.4
    causal = torch.arange(90) <= 30 + torch.arange(60)[:, None]
    both = ta.turbo_attention(q, k, v, mask, True)
    assert torch.allclose(both, ta.turbo_attention(q, k, v, mask & causal), rtol=1e-5, atol=1e-6)
    assert relative_error(both, exact_attention(q, k, v, mask, True)[0]) < 0.06


# -- backends --------------------------------------------------------------------------------------------


def test_the_reference_can_be_named():
    q, k, v = qkv(1, 2, 2, 5, 5, 16)
    named, chosen = (ta.turbo_attention(q, k, v, backend=name) for name in ("reference", "auto"))
    assert relative_error(named, chosen) < 1e-3


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_named_backend_that_cannot_run_raises(name, monkeypatch):
    missing = Availability(name, False, "not here")
    monkeypatch.setattr(type(dispatch.TABLE[name]), "availability", lambda self: missing)
    q, k, v = qkv(1, 2, 2, 5, 5, 16)
    cache = ta.KVCache(1, 2, 16)
    with pytest.raises(BackendError, match=rf"^backend: expected one that can run here, got '{name}' \(not here\)$"):
        ta.turbo_attention(q, k, v, backend=name)
    with pytest.raises(BackendError, match="not here"):
        ta.turbo_attention_with_kvcache(q, cache, k, v, backend=name)
    assert len(cache) == 0
    assert ta.turbo_attention(q, k, v).shape == q.shape


def test_every_usable_backend_has_a_module():
    assert {name for name, backend in ta.backends().items() if backend.usable} <= set(dispatch.TABLE)


def test_explain():
    q, k, v = qkv(1, 2, 2, 5, 5, 16)
    explained = ta.explain(q, k, v, is_causal=True, window_size=3)
    assert explained.backend in ta.backends()
    assert ta.backends()[explained.backend].usable
    assert str(explained).startswith(f"{explained.backend}: {explained.reason}")
    assert set(explained.others) == {name for name, b in ta.backends().items() if not b.usable}


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"k": torch.zeros(1, 3, 5, 16)}, ShapeError),
        ({"q": torch.zeros(1, 2, 5, 16).half()}, DtypeError),
        ({"q": torch.zeros(1, 2, 5, 16, requires_grad=True)}, UnsupportedError),
        ({"backend": "cuda"}, InputError),
    ],
)
def test_explain_refuses_what_the_call_would_refuse(changes, error):
    q, k, v = qkv(1, 2, 2, 5, 5, 16)
    call = {"q": q, "k": k, "v": v, **changes}
    with pytest.raises(error) as wanted:
        ta.turbo_attention(**call)
    with pytest.raises(error) as got:
        ta.explain(**call)
    assert str(got.value) == str(wanted.value)


# -- the cache's own rules -----------------------------------------------------------------------------------


def test_the_cache_s_window_is_the_default():
    q, k, v = qkv(1, 4, 2, 120, 120, 16)
    windowed = ta.KVCache(1, 2, 16, config=OFF, window_size=30)
    plain = ta.KVCache(1, 2, 16, config=OFF)
    got = ta.turbo_attention_with_kvcache(q, windowed, k, v)
    assert torch.equal(got, ta.turbo_attention_with_kvcache(q, plain, k, v, window_size=30))
    assert not torch.equal(got, ta.turbo_attention(q, k, v, is_causal=True))


def test_attention_reads_its_own_new_tokens():
    """It attends, then appends: the new tokens are visible in the same call."""
    q, k, v = qkv(1, 2, 1, 1, 1, 16)
    cache = ta.KVCache(1, 1, 16, config=OFF)
    out = ta.turbo_attention_with_kvcache(q, cache, k, v)
    assert relative_error(out, v.expand(1, 2, 1, 16)) < 0.02
    assert len(cache) == 1
    ta.turbo_attention_with_kvcache(q, cache)
    assert len(cache) == 1


def test_gradients_are_refused_over_a_cache_too():
    q, k, v = qkv(1, 2, 1, 3, 3, 16)
    cache = ta.KVCache(1, 1, 16)
    with pytest.raises(UnsupportedError, match=r"^k_new: expected a tensor without gradients"):
        ta.turbo_attention_with_kvcache(q, cache, k.requires_grad_(), v)
    with torch.no_grad():
        assert ta.turbo_attention_with_kvcache(q, cache, k, v).requires_grad is False


def test_configuration_errors_are_value_errors():
    """As any caller of a Python library expects."""
    with pytest.raises(ValueError, match="bits"):
        ta.TurboConfig(bits=5)
    with pytest.raises(ValueError, match="q: expected"):
        ta.turbo_attention(torch.zeros(1, 3, 5, 16), *[torch.zeros(1, 2, 5, 16)] * 2)
    assert issubclass(ConfigError, ValueError)
