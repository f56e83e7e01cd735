"""Validation of arguments at the API boundary. Messages name the argument, the expected value and the actual one."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TurboConfig
from .errors import ConfigError, DtypeError, InputError, NonFiniteError, ShapeError, UnsupportedError
from .words import number_of

MAX_HEAD_DIM = 512
LARGEST = 1e18
"""Magnitude from which on products of queries and keys could overflow float32."""
LARGEST_SCALE = 1e6
"""Of logits: beyond it those of ordinary queries and keys would overflow."""
_LARGEST_WINDOW = 1 << 40
_DEFAULT = TurboConfig()
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_config(config: TurboConfig | None) -> TurboConfig:
    """The config given, or the default."""
    if config is not None and not isinstance(config, TurboConfig):
        raise ConfigError(f"config: expected a TurboConfig, got {type(config).__name__}")
    return config or _DEFAULT


def check_sizes(
    batch_size: int,
    num_kv_heads: int,
    head_dims: tuple[int, int],
    max_tokens: int | None,
    window_size: int | None,
    dtype: torch.dtype | None,
) -> None:
    """The constructor arguments of a cache."""
    limits = {"batch_size": (batch_size, 0), "num_kv_heads": (num_kv_heads, 1)}
    limits |= {"max_tokens": (max_tokens, 0)} if max_tokens is not None else {}
    for name, (value, least) in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")
    for name, head_dim in zip(("head_dim", "v_head_dim"), head_dims, strict=True):
        check_head_dim(name, head_dim)
    check_window(window_size)
    if dtype is not None and dtype not in FLOATS:
        raise DtypeError(f"dtype: expected a floating-point dtype, got {dtype}")


def check_head_dim(name: str, head_dim: int) -> None:
    if not isinstance(head_dim, int) or head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        what = "" if name.endswith("head_dim") else "a head_dim that is "
        raise ShapeError(f"{name}: expected {what}a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim!r}")


def check_window(window_size: int | None) -> int | None:
    """The window, clamped to the maximum length of a sequence, so that sums of it and positions fit int64."""
    if window_size is None:
        return None
    if not isinstance(window_size, int) or isinstance(window_size, bool) or window_size < 1:
        raise ConfigError(f"window_size: expected an integer of at least 1, got {window_size!r}")
    return min(window_size, _LARGEST_WINDOW)


def check_mean(k_mean: Tensor | None, config: TurboConfig, heads: int, head_dim: int) -> Tensor | None:
    """A calibrated mean of K: finite float [Hkv, D], only where keys are smoothed."""
    if k_mean is None:
        return None
    if not config.smooth_k:
        raise ConfigError("k_mean: expected none, because smooth_k is off, got a tensor")
    if k_mean.shape != (heads, head_dim):
        raise ShapeError(f"k_mean: expected shape ({heads}, {head_dim}), got {tuple(k_mean.shape)}")
    check_finite("k_mean", k_mean)
    return k_mean.detach().clone()


def check_new(expected: tuple[int, int, int, int], device: torch.device | None, k: Tensor, v: Tensor) -> None:
    """New tokens k, v of a cache of (batch, heads, head_dim, v_head_dim) on a device; not their values."""
    check_floats(k=k, v=v)
    check_token_shapes(expected, device, k, v, ("k", "v"))


def check_token_shapes(
    expected: tuple[int, int, int, int],
    device: torch.device | None,
    k: Tensor,
    v: Tensor,
    names: tuple[str, str],
) -> None:
    """Shapes and device of new tokens of a cache of (batch, heads, head_dim, v_head_dim), which `check_floats` passed.
    names: the names of k and v in messages."""
    batch, heads, *head_dims = expected
    for name, x, head_dim in zip(names, (k, v), head_dims, strict=True):
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
            raise ShapeError(f"{name}: expected shape ({batch}, {heads}, tokens, {head_dim}), got {tuple(x.shape)}")
    if k.shape[2] != v.shape[2]:
        raise ShapeError(f"{names[1]}: expected {number_of(k.shape[2], 'token')} like {names[0]}, got {v.shape[2]}")
    if device is not None and k.device != device:
        raise DtypeError(f"{names[0]}: expected a tensor on {device}, as the cache is, got {k.device}")


def check_lengths(lengths: Tensor, batch: int, tokens: int) -> Tensor:
    """int64 [B] on the CPU, each from 0 to `tokens`."""
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise DtypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ShapeError(f"lengths: expected shape ({batch},), got {tuple(lengths.shape)}")
    lengths = lengths.to("cpu", torch.int64)
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= tokens:
        raise InputError(f"lengths: expected values from 0 to {tokens}, got {lengths.tolist()}")
    return lengths.clone()


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes [B, Hq, Lq, D], [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv]; Hkv divides Hq."""
    check_floats(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ShapeError(f"{name}: expected [batch, heads, tokens, head_dim], got shape {tuple(x.shape)}")
    if k.shape[:3] != v.shape[:3]:
        batch, heads, tokens = k.shape[:3]
        raise ShapeError(f"v: expected shape ({batch}, {heads}, {tokens}, head_dim), as k has it, got {tuple(v.shape)}")
    check_query((k.shape[0], k.shape[1], k.shape[3]), q)
    check_head_dim("q", q.shape[3])
    check_head_dim("v", v.shape[3])


def check_query(expected: tuple[int, int, int], q: Tensor) -> None:
    """A query against keys of (batch, KV heads, head_dim), of which head_dim is not checked."""
    batch, heads, head_dim = expected
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (batch, head_dim):
        raise ShapeError(
            f"q: expected shape ({batch}, heads, tokens, {head_dim}), as the keys have, got {tuple(q.shape)}"
        )
    if not heads or not q.shape[1] or q.shape[1] % heads:
        raise ShapeError(f"q: expected a number of heads that is a multiple of the {heads} KV heads, got {q.shape[1]}")


def check_floats(**tensors: Tensor) -> None:
    """One floating dtype and device, no gradients."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise DtypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise DtypeError(
                f"{name}: expected {first.dtype} on {first.device}, as {first_name} is, got {x.dtype} on {x.device}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            refuse_gradients(**{name: x})


def refuse_gradients(**tensors: Tensor | None) -> None:
    """No tensor that requires gradients, in grad mode. Compiled code checks this during tracing, because the graph
    runs without gradients."""
    for name, x in tensors.items():
        if x is not None and torch.is_grad_enabled() and x.requires_grad:
            raise UnsupportedError(
                f"{name}: expected a tensor without gradients (quantized attention has no backward pass; "
                "use torch.no_grad()), got requires_grad=True"
            )


def check_mask(mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """A boolean or additive mask that broadcasts to [B, Hq, Lq, Lk], where q is; returned with four dimensions. Its
    values are not looked at."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise DtypeError(f"attn_mask: expected a tensor, got {type(mask).__name__}")
    if torch.is_grad_enabled() and mask.requires_grad:
        raise UnsupportedError("attn_mask: expected a tensor without gradients, got requires_grad=True")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DtypeError(f"attn_mask: expected bool or a floating-point dtype, got {mask.dtype}")
    if mask.device != q.device:
        raise DtypeError(f"attn_mask: expected a tensor on {q.device}, as q is, got one on {mask.device}")
    full = (*q.shape[:3], keys)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise ShapeError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")
    return mask.reshape(shape)


def check_mask_values(mask: Tensor | None) -> None:
    """No NaN and no +inf in an additive mask."""
    # NaN if any is, in one pass and without a copy.
    if mask is not None and mask.is_floating_point() and mask.numel() and not bool(mask.amax() < torch.inf):
        raise NonFiniteError("attn_mask: expected finite values or -inf, got NaN or +inf")


def check_causal(is_causal: bool) -> None:
    """Arguments in SDPA's order would put its dropout_p here."""
    if not isinstance(is_causal, bool):
        raise ConfigError(f"is_causal: expected True or False (there is no dropout_p before it), got {is_causal!r}")


def check_softmax(scale: float | None, softcap: float | None) -> None:
    if scale is not None and not (_is_number(scale) and abs(scale) <= LARGEST_SCALE):
        raise ConfigError(f"scale: expected a number of at most {LARGEST_SCALE:.0e} in magnitude, got {scale!r}")
    if softcap is not None and not (_is_number(softcap) and 0 < softcap < float("inf")):
        raise ConfigError(f"softcap: expected a positive number, got {softcap!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_finite(name: str, x: Tensor, counts: Tensor | None = None) -> None:
    """No NaN, infinity or value beyond `LARGEST` in [B, H, T, D], or in the first `counts[b]` tokens
    of each sequence. Minimum and maximum are computed first; only if they are out of range, values are checked."""
    if not x.numel() or bool(torch.stack(x.aminmax()).double().abs().amax() <= LARGEST):
        return
    bad = ~(x.double().abs() <= LARGEST)
    if counts is not None:
        bad &= (torch.arange(x.shape[2]) < counts[:, None]).to(x.device)[:, None, :, None]
    if bool(bad.any()):
        kinds = {"NaN": x.isnan(), "infinity": x.isinf(), f"a magnitude above {LARGEST:.0e}": bad}
        kind = next(kind for kind, found in kinds.items() if bool((found & bad).any()))
        raise NonFiniteError(f"{name}: expected finite values, got {kind} in {int(bad.sum())} of {x.numel()} elements")
