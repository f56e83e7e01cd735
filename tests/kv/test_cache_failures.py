"""A refused or failed call leaves the cache as it was, and memory not yet written is never read."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention.errors import NonFiniteError, TurboError

from .tools import PLAIN, attend, content, filled, tokens


def spoiled(name: str, value: float):
    """Tokens for lengths (9, 4), with one bad value among the valid ones."""
    k, v = tokens(2, 2, 9, 16)
    (k if name == "k" else v)[1, 1, 3, 5] = value
    return k, v


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("length", [0, 60, 190])
def test_non_finite_tokens_leave_the_cache_as_it_was(name, value, length):
    cache, *_ = filled([length, length])
    before = content(cache), cache.nbytes
    k, v = spoiled(name, value)
    lengths = torch.tensor([9, 4])
    with pytest.raises(NonFiniteError, match=rf"^{name}: expected finite values, got .* in 1 of 576 elements$"):
        cache.append(k, v, lengths)
    with pytest.raises(NonFiniteError, match=rf"^{name}_new: expected finite values"):
        ta.turbo_attention_with_kvcache(torch.zeros(2, 4, 9, 16), cache, k, v, lengths=lengths)
    assert (content(cache), cache.nbytes) == before
    cache.append(k, v, torch.tensor([9, 3]))  # the bad row is padding now
    assert cache.seq_lens.tolist() == [length + 9, length + 3]


BAD_CALLS = {
    "shape of k": dict(k_new=torch.zeros(2, 3, 9, 16)),
    "shape of v": dict(v_new=torch.zeros(2, 2, 8, 16)),
    "dtype": dict(v_new=torch.zeros(2, 2, 9, 16).double()),
    "lengths": dict(lengths=torch.tensor([9, 10])),
    "q NaN": dict(q=torch.full((2, 4, 9, 16), torch.nan)),
    "q heads": dict(q=torch.zeros(2, 3, 9, 16)),
    "mask": dict(attn_mask=torch.zeros(9, 9, dtype=torch.bool)),
    "mask NaN": dict(attn_mask=torch.full((1, 1), torch.nan)),
    "scale": dict(scale=torch.nan),
    "softcap": dict(softcap=-1.0),
    "window": dict(window_size=0),
    "backend": dict(backend="cuda"),
    "gradients": dict(k_new=torch.zeros(2, 2, 9, 16, requires_grad=True)),
}


@pytest.mark.parametrize("changes", BAD_CALLS.values(), ids=BAD_CALLS)
def test_refused_calls_leave_the_cache_as_it_was(changes):
    cache, *_ = filled([190, 60])
    before = content(cache), cache.nbytes
    k, v = tokens(2, 2, 9, 16)
    call = {"q": torch.zeros(2, 4, 9, 16), "k_new": k, "v_new": v, **changes}
    with pytest.raises(TurboError):
        ta.turbo_attention_with_kvcache(call.pop("q"), cache, **call)
    assert (content(cache), cache.nbytes) == before


def test_a_failure_in_a_backend_leaves_the_cache_as_it_was(monkeypatch, backend):
    cache, *_ = filled([190, 60])
    before = content(cache), cache.nbytes

    def broken(*_, **__):
        raise RuntimeError("kernel failed")

    cpu = ("turboattention.impl.cpu.attention.attend", "turboattention.kernels.cpu.step.Step.run")
    for function in {"reference": ("turboattention.reference.decode.attend",), "cpu": cpu}[backend]:
        monkeypatch.setattr(function, broken)
    for lengths in (None, torch.tensor([9, 8])):  # which prompts on a CPU take two ways
        with pytest.raises(RuntimeError, match="kernel failed"):
            ta.turbo_attention_with_kvcache(
                torch.zeros(2, 4, 9, 16), cache, *tokens(2, 2, 9, 16), lengths=lengths, backend=backend
            )
        assert (content(cache), cache.nbytes) == before


def test_uninitialized_memory_is_never_read(monkeypatch):
    """Results do not depend on the content of `torch.empty`."""
    want_cache, k, v = filled([200, 131, 3], config=PLAIN.replace(bits=3))
    want, want_lse = attend(want_cache)
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(name):
        def make(*args, **kwargs):
            out = originals[name](*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else 0x5B)

        return make

    for name in originals:
        monkeypatch.setattr(torch, name, poisoned(name))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *s, **o: poisoned("empty")(*s, dtype=x.dtype, **o))
    cache = ta.KVCache(3, 2, 16, config=PLAIN.replace(bits=3))
    cache.append(k, v, torch.tensor([200, 131, 3]))
    assert content(cache) == content(want_cache)
    got, lse = attend(cache)
    assert torch.equal(got, want)
    assert torch.equal(lse, want_lse)


def test_repr_names_what_matters():
    cache, *_ = filled([5, 3])
    assert repr(cache).startswith("KVCache(batch_size=2, num_kv_heads=2, head_dim=16, tokens=5, bits=4, nbytes=")
