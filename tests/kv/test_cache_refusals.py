"""Errors of a cache: each message names the argument, the expected and the actual value."""

from __future__ import annotations

import pytest
import torch

import turboattention as ta
from turboattention import errors

from ..test_validation import X, zeros

CACHES = {
    "batch": (dict(batch_size=-1), errors.ConfigError, "batch_size: expected an integer of at least 0, got -1"),
    "batch float": (dict(batch_size=1.0), errors.ConfigError, "batch_size: expected an integer of at least 0, got 1.0"),
    "heads": (dict(num_kv_heads=0), errors.ConfigError, "num_kv_heads: expected an integer of at least 1, got 0"),
    "heads bool": (
        dict(num_kv_heads=True),
        errors.ConfigError,
        "num_kv_heads: expected an integer of at least 1, got True",
    ),
    "max_tokens": (dict(max_tokens=-5), errors.ConfigError, "max_tokens: expected an integer of at least 0, got -5"),
    "head_dim": (
        dict(head_dim=20),
        errors.ShapeError,
        "head_dim: expected a multiple of 8 up to 512, got 20",
    ),
    "v_head_dim": (
        dict(v_head_dim=12),
        errors.ShapeError,
        "v_head_dim: expected a multiple of 8 up to 512, got 12",
    ),
    "head_dim float": (
        dict(head_dim=16.0),
        errors.ShapeError,
        "head_dim: expected a multiple of 8 up to 512, got 16.0",
    ),
    "window": (dict(window_size=0), errors.ConfigError, "window_size: expected an integer of at least 1, got 0"),
    "dtype": (dict(dtype=torch.int8), errors.DtypeError, "dtype: expected a floating-point dtype, got torch.int8"),
    "mean shape": (
        dict(k_mean=zeros(4, 8)),
        errors.ShapeError,
        "k_mean: expected shape (4, 16), got (4, 8)",
    ),
    "mean without smoothing": (
        dict(k_mean=zeros(4, 16), config=ta.TurboConfig(smooth_k=False)),
        errors.ConfigError,
        "k_mean: expected none, because smooth_k is off, got a tensor",
    ),
    "mean NaN": (
        dict(k_mean=torch.full((4, 16), torch.nan)),
        errors.NonFiniteError,
        "k_mean: expected finite values, got NaN in 64 of 64 elements",
    ),
}


@pytest.mark.parametrize("changes, error, message", CACHES.values(), ids=CACHES)
def test_cache_refuses(changes, error, message):
    with pytest.raises(error) as caught:
        ta.KVCache(**{"batch_size": 2, "num_kv_heads": 4, "head_dim": 16, **changes})
    assert str(caught.value) == message


APPENDS = {
    "heads": (
        (zeros(2, 3, 5, 16), zeros(2, 3, 5, 16)),
        errors.ShapeError,
        "k: expected shape (2, 4, tokens, 16), got (2, 3, 5, 16)",
    ),
    "dimensions": (
        (zeros(2, 4, 16), zeros(2, 4, 16)),
        errors.ShapeError,
        "k: expected shape (2, 4, tokens, 16), got (2, 4, 16)",
    ),
    "v": ((X, zeros(2, 4, 5, 8)), errors.ShapeError, "v: expected shape (2, 4, tokens, 16), got (2, 4, 5, 8)"),
    "tokens": (
        (X, zeros(2, 4, 6, 16)),
        errors.ShapeError,
        "v: expected 5 tokens like k, got 6",
    ),
    "dtypes": (
        (X, X.double()),
        errors.DtypeError,
        "v: expected torch.float32 on cpu, as k is, got torch.float64 on cpu",
    ),
    "integers": (
        (X.int(), X.int()),
        errors.DtypeError,
        "k: expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "v NaN": ((X, X * torch.nan), errors.NonFiniteError, "v: expected finite values, got NaN in 640 of 640 elements"),
}


@pytest.mark.parametrize("tensors, error, message", APPENDS.values(), ids=APPENDS)
def test_append_refuses(tensors, error, message):
    cache = ta.KVCache(2, 4, 16)
    with pytest.raises(error) as caught:
        cache.append(*tensors)
    assert str(caught.value) == message
    assert cache.seq_lens.tolist() == [0, 0]


@pytest.mark.parametrize("tensors, error, message", APPENDS.values(), ids=APPENDS)
def test_attention_over_a_cache_calls_new_tokens_by_its_own_names(tensors, error, message):
    cache = ta.KVCache(2, 4, 16)
    q = X.to(tensors[0].dtype) if tensors[0].is_floating_point() else X
    with pytest.raises(error) as caught:
        ta.turbo_attention_with_kvcache(q, cache, *tensors)
    name, rest = str(caught.value).split(":", 1)
    assert name == message.split(":")[0] + "_new"
    assert ", got " in rest


def test_tokens_on_another_device_than_the_cache_s():
    cache = ta.KVCache(2, 4, 16, device="cpu")
    x = torch.zeros(2, 4, 5, 16, device="meta")
    with pytest.raises(errors.DtypeError, match=r"^k: expected a tensor on cpu, as the cache is, got meta$"):
        cache.append(x, x)


def test_new_values_come_with_new_keys():
    cache = ta.KVCache(2, 4, 16)
    with pytest.raises(errors.InputError, match=r"^v_new: expected a tensor, as k_new is, got None$"):
        ta.turbo_attention_with_kvcache(X, cache, X)
    with pytest.raises(errors.InputError, match=r"^v_new: expected None, as k_new is, got a tensor$"):
        ta.turbo_attention_with_kvcache(X, cache, None, X)


def test_lengths_need_tokens_and_a_row_each():
    cache = ta.KVCache(2, 4, 16)
    with pytest.raises(errors.InputError, match=r"^lengths: expected None without k_new and v_new, got a tensor$"):
        ta.turbo_attention_with_kvcache(X, cache, lengths=torch.tensor([1, 1]))
    with pytest.raises(
        errors.ShapeError, match=r"^q: expected as many rows as k_new has tokens, with lengths, got 3 rows$"
    ):
        ta.turbo_attention_with_kvcache(X[:, :, :3], cache, X, X, lengths=torch.tensor([1, 1]))


def test_a_mask_over_a_cache_covers_old_and_new_tokens():
    cache = ta.KVCache(2, 4, 16)
    cache.append(X, X)
    with pytest.raises(errors.ShapeError, match=r"broadcasts to \(2, 4, 5, 10\), got \(5, 5\)$"):
        ta.turbo_attention_with_kvcache(X, cache, X, X, attn_mask=torch.ones(5, 5, dtype=torch.bool))


def test_a_window_wider_than_the_cache_s():
    cache = ta.KVCache(2, 4, 16, window_size=8)
    with pytest.raises(errors.InputError, match=r"^window_size: expected at most the cache's own 8 .* got 9$"):
        ta.turbo_attention_with_kvcache(X, cache, X, X, window_size=9)


@pytest.mark.parametrize(
    "index, error, message",
    [
        (
            torch.tensor([[0]]),
            errors.ShapeError,
            r"^index: expected a vector of integers, got torch.int64 of shape \(1, 1\)$",
        ),
        (
            torch.tensor([0.0]),
            errors.ShapeError,
            r"^index: expected a vector of integers, got torch.float32 of shape \(1,\)$",
        ),
        (
            torch.tensor([True, False]),
            errors.ShapeError,
            r"^index: expected a vector of integers, got torch.bool of shape \(2,\)$",
        ),
        (torch.tensor([0, 2]), errors.InputError, r"^index: expected values from 0 to 1, got \[0, 2\]$"),
        (torch.tensor([-1]), errors.InputError, r"^index: expected values from 0 to 1, got \[-1\]$"),
    ],
)
def test_reorder_refuses(index, error, message):
    cache = ta.KVCache(2, 4, 16)
    cache.append(X, X)
    with pytest.raises(error, match=message):
        cache.reorder(index)
    assert cache.seq_lens.tolist() == [5, 5]


@pytest.mark.parametrize("length", [-1, torch.tensor([3, -1])])
def test_crop_refuses_negative_lengths(length):
    cache = ta.KVCache(2, 4, 16)
    cache.append(X, X)
    with pytest.raises(errors.InputError, match=r"^length: expected at least 0, got -1$"):
        cache.crop(length)
    assert cache.seq_lens.tolist() == [5, 5]
