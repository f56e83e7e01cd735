"""Validation: each error names the argument, the expected and the actual value."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention import errors
from turboattention.validation import LARGEST, check_finite, check_lengths

_SCALE = "scale: expected a number of at most 1e+06 in magnitude, got "

KINDS = {
    "ShapeError": ValueError,
    "DtypeError": TypeError,
    "ConfigError": ValueError,
    "InputError": ValueError,
    "UnsupportedError": NotImplementedError,
    "NonFiniteError": ValueError,
    "FormatError": ValueError,
    "BackendError": RuntimeError,
}


@pytest.mark.parametrize("name, builtin", KINDS.items())
def test_every_error_is_also_a_builtin_kind(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.TurboError)
    assert issubclass(kind, builtin)


def test_there_are_no_other_errors():
    found = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, errors.TurboError)}
    assert found == {*KINDS, "TurboError"}
    assert issubclass(errors.GuardWarning, UserWarning)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


X = zeros(2, 4, 5, 16)  # as q, and as k and v

ATTENTION = {
    "not a tensor": (dict(k=[1.0]), errors.DtypeError, "k: expected a tensor, got list"),
    "integers": (
        dict(q=zeros(2, 4, 5, 16, dtype=torch.int32)),
        errors.DtypeError,
        "q: expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "mixed dtypes": (
        dict(v=zeros(2, 4, 5, 16, dtype=torch.bfloat16)),
        errors.DtypeError,
        "v: expected torch.float32 on cpu, as q is, got torch.bfloat16 on cpu",
    ),
    "devices": (
        dict(k=torch.zeros(2, 4, 5, 16, device="meta")),
        errors.DtypeError,
        "k: expected torch.float32 on cpu, as q is, got torch.float32 on meta",
    ),
    "three dimensions": (
        dict(k=zeros(4, 5, 16)),
        errors.ShapeError,
        "k: expected [batch, heads, tokens, head_dim], got shape (4, 5, 16)",
    ),
    "k and v differ": (
        dict(v=zeros(2, 4, 6, 16)),
        errors.ShapeError,
        "v: expected shape (2, 4, 5, head_dim), as k has it, got (2, 4, 6, 16)",
    ),
    "batch": (
        dict(q=zeros(3, 4, 5, 16)),
        errors.ShapeError,
        "q: expected shape (2, heads, tokens, 16), as the keys have, got (3, 4, 5, 16)",
    ),
    "head_dim": (
        dict(q=zeros(2, 4, 5, 24)),
        errors.ShapeError,
        "q: expected shape (2, heads, tokens, 16), as the keys have, got (2, 4, 5, 24)",
    ),
    "heads": (
        dict(q=zeros(2, 6, 5, 16)),
        errors.ShapeError,
        "q: expected a number of heads that is a multiple of the 4 KV heads, got 6",
    ),
    "fewer query heads": (
        dict(q=zeros(2, 2, 5, 16)),
        errors.ShapeError,
        "q: expected a number of heads that is a multiple of the 4 KV heads, got 2",
    ),
    "mask dtype": (
        dict(attn_mask=zeros(5, 5, dtype=torch.int64)),
        errors.DtypeError,
        "attn_mask: expected bool or a floating-point dtype, got torch.int64",
    ),
    "mask shape": (
        dict(attn_mask=zeros(2, 5, 5)),
        errors.ShapeError,
        "attn_mask: expected a shape that broadcasts to (2, 4, 5, 5), got (2, 5, 5)",
    ),
    "mask of five dimensions": (
        dict(attn_mask=zeros(1, 2, 4, 5, 5)),
        errors.ShapeError,
        "attn_mask: expected a shape that broadcasts to (2, 4, 5, 5), got (1, 2, 4, 5, 5)",
    ),
    "mask with NaN": (
        dict(attn_mask=torch.full((5, 5), torch.nan)),
        errors.NonFiniteError,
        "attn_mask: expected finite values or -inf, got NaN or +inf",
    ),
    "mask with +inf": (
        dict(attn_mask=torch.full((5, 5), torch.inf)),
        errors.NonFiniteError,
        "attn_mask: expected finite values or -inf, got NaN or +inf",
    ),
    "dropout_p in the place of is_causal": (
        dict(is_causal=0.0),
        errors.ConfigError,
        "is_causal: expected True or False (there is no dropout_p before it), got 0.0",
    ),
    "is_causal None": (
        dict(is_causal=None),
        errors.ConfigError,
        "is_causal: expected True or False (there is no dropout_p before it), got None",
    ),
    "scale": (
        dict(scale=float("nan")),
        errors.ConfigError,
        _SCALE + "nan",
    ),
    "scale as text": (
        dict(scale="1"),
        errors.ConfigError,
        _SCALE + "'1'",
    ),
    "scale bool": (
        dict(scale=True),
        errors.ConfigError,
        _SCALE + "True",
    ),
    "softcap bool": (dict(softcap=True), errors.ConfigError, "softcap: expected a positive number, got True"),
    "softcap": (dict(softcap=0.0), errors.ConfigError, "softcap: expected a positive number, got 0.0"),
    "softcap inf": (dict(softcap=float("inf")), errors.ConfigError, "softcap: expected a positive number, got inf"),
    "window": (dict(window_size=0), errors.ConfigError, "window_size: expected an integer of at least 1, got 0"),
    "window float": (
        dict(window_size=2.0),
        errors.ConfigError,
        "window_size: expected an integer of at least 1, got 2.0",
    ),
    "window bool": (
        dict(window_size=True),
        errors.ConfigError,
        "window_size: expected an integer of at least 1, got True",
    ),
    "backend": (
        dict(backend="cuda"),
        errors.InputError,
        "backend: expected \"auto\" or one of cpu, reference, triton, got 'cuda'",
    ),
}


@pytest.mark.parametrize("changes, error, message", ATTENTION.values(), ids=ATTENTION)
def test_attention_refuses(changes, error, message):
    with pytest.raises(error) as caught:
        ta.turbo_attention(**{"q": X, "k": X, "v": X, **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize("changes, error, message", ATTENTION.values(), ids=ATTENTION)
def test_explain_refuses_the_same(changes, error, message):
    with pytest.raises(error) as caught:
        ta.explain(**{"q": X, "k": X, "v": X, **changes})
    assert str(caught.value) == message


def test_a_call_in_the_order_of_sdpa_is_refused():
    """Which has dropout_p behind the mask."""
    with pytest.raises(errors.ConfigError, match=r"^is_causal: .* no dropout_p before it\), got 0\.0$"):
        ta.turbo_attention(X, X, X, None, 0.0, True)
    cache = ta.KVCache(2, 4, 16)
    with pytest.raises(errors.ConfigError, match=r"^is_causal: .* got 0\.0$"):
        ta.turbo_attention_with_kvcache(X, cache, X, X, is_causal=0.0)
    assert len(cache) == 0


@pytest.mark.parametrize("head_dim", [4, 12, 520])
def test_head_dims_refused(head_dim):
    x = zeros(1, 1, 2, head_dim)
    message = f"^q: expected a head_dim that is a multiple of 8 up to 512, got {head_dim}$"
    with pytest.raises(errors.ShapeError, match=message):
        ta.turbo_attention(x, x, x)
    with pytest.raises(errors.ShapeError, match=f"^head_dim: expected a multiple of 8 up to 512, got {head_dim}$"):
        ta.KVCache(1, 1, head_dim)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused_by_name(name):
    inputs = {"q": X, "k": X, "v": X, name: X.clone().requires_grad_()}
    with pytest.raises(
        errors.UnsupportedError, match=rf"^{name}: expected a tensor without gradients .* got requires_grad=True$"
    ):
        ta.turbo_attention(**inputs)
    with torch.no_grad():
        assert ta.turbo_attention(**inputs).shape == X.shape
    with torch.inference_mode():
        assert ta.turbo_attention(**inputs).shape == X.shape


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad, kind", [(torch.nan, "NaN"), (torch.inf, "infinity"), (-torch.inf, "infinity")])
def test_non_finite_values_are_refused_by_name(name, dtype, bad, kind):
    x = torch.randn(2, 4, 5, 16).to(dtype)
    broken = x.clone()
    broken[1, 2, 3, 4] = bad
    with pytest.raises(errors.NonFiniteError) as caught:
        ta.turbo_attention(**{"q": x, "k": x, "v": x, name: broken})
    assert str(caught.value) == f"{name}: expected finite values, got {kind} in 1 of 640 elements"


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_values_that_would_overflow_are_refused(name):
    """Finite ones, but their products in float32 are not: an error, never a silent NaN."""
    x = torch.randn(1, 1, 3, 8)
    broken = x.clone()
    broken[0, 0, 1] = torch.tensor([3e38, -3e38] * 4)  # the sum is zero
    with pytest.raises(
        errors.NonFiniteError, match=rf"^{name}: expected finite values, got a magnitude above 1e\+18 in 8 "
    ):
        ta.turbo_attention(**{"q": x, "k": x, "v": x, name: broken})


def test_the_largest_values_give_finite_results():
    x = torch.randn(1, 2, 70, 256).clamp(-1, 1) * LARGEST
    out, lse = ta.turbo_attention(x, x, x, return_lse=True)
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


def test_check_finite_looks_at_valid_tokens_alone():
    x = torch.zeros(2, 1, 3, 8)
    x[0, :, 2], x[1, :, 1:] = torch.nan, torch.inf
    check_finite("x", x, torch.tensor([2, 1]))
    with pytest.raises(errors.NonFiniteError, match=r"^x: expected finite values, got infinity in 8 of 48 elements$"):
        check_finite("x", x, torch.tensor([2, 2]))


def test_lengths_are_copied():
    lengths = torch.tensor([1, 2])
    checked = check_lengths(lengths, 2, 3)
    lengths[0] = 3
    assert checked.tolist() == [1, 2]
    assert check_lengths(torch.tensor([1, 2], dtype=torch.int32), 2, 3).dtype == torch.int64


LENGTHS = {
    "floats": (torch.tensor([1.0, 2.0]), errors.DtypeError, "lengths: expected integers, got torch.float32"),
    "bools": (torch.tensor([True, False]), errors.DtypeError, "lengths: expected integers, got torch.bool"),
    "shape": (torch.tensor([1]), errors.ShapeError, "lengths: expected shape (2,), got (1,)"),
    "negative": (torch.tensor([-1, 2]), errors.InputError, "lengths: expected values from 0 to 5, got [-1, 2]"),
    "too long": (torch.tensor([1, 6]), errors.InputError, "lengths: expected values from 0 to 5, got [1, 6]"),
}


@pytest.mark.parametrize("lengths, error, message", LENGTHS.values(), ids=LENGTHS)
def test_lengths_refused(lengths, error, message):
    cache = ta.KVCache(2, 4, 16)
    with pytest.raises(error) as caught:
        cache.append(X, X, lengths)
    assert str(caught.value) == message
    with pytest.raises(error) as caught:
        ta.turbo_attention_with_kvcache(X, cache, X, X, lengths=lengths)
    assert str(caught.value) == message
