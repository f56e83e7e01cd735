"""SAS, the softmax without FP32 exponentials (docs/numerics.md, "SAS and its base-2 form" and "SAS in 16-bit
integers"; paper section 4).

`sas(x) = LUT[floor(-x)] * P(frac(-x))` for x <= 0: a table of e^-n and one cubic. The base-2 form takes the power of
two in the exponent bits and needs no table; in integers, it is a shift.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import DtypeError

# The paper's least-squares cubic for e^-f on [0, 1], highest power first.
SAS_COEFFICIENTS = (-0.1025, 0.4626, -0.9922, 0.9996)

# Our cubic for 2^-f on [0, 1], highest power first: the minimax fit under P(0) = 1 and P(1) = 1/2,
# which makes the whole function continuous and exact at 0. Relative error at most 1.05e-4.
SAS2_COEFFICIENTS = (-0.0391340, 0.2305558, -0.6914218, 1.0)
SAS2_ERROR = 1.05e-4

# 2^-f = 1 - f (c0 - f (c1 - f c2)) on [0, 1], in units of 2^-15: c0, c1, c2.
SAS16_COEFFICIENTS = (22660, 7570, 1294)
SAS16_ONE = 32767
"""The weight 1."""
SAS16_OCTAVE = 2048
"""The distance of a weight from twice itself."""

_LOG2_E = math.log2(math.e)


@functools.lru_cache(maxsize=32)
def _table(entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """LUT[n] = e^-n for n = 0 .. entries - 1."""
    return torch.exp(-torch.arange(entries, dtype=torch.float64)).to(device, dtype)


def logit_scale(scale: float | None, head_dim: int) -> float:
    """The factor of logits: `1 / sqrt(head_dim)` unless given."""
    return head_dim**-0.5 if scale is None else float(scale)


def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """The factor [..., Hq, L, 1] for outputs with log-sum-exp lse [..., Hq, L] if there are learned sink logits [Hq].

    A softmax with an additional column of logit s is the softmax without it times sigmoid(lse - s)."""
    return torch.sigmoid(lse - sinks.to(lse)[:, None])[..., None]


def sas(x: Tensor, threshold: float = -6.0) -> Tensor:
    """Approximate e^x for x <= 0; 0 where x < threshold.

    Args:
        x: float32 or float64, any shape.
        threshold: negative; smaller x give 0. The paper's is -6.

    Returns:
        The shape and dtype of x. Absolute error at most 4.0e-4 above the threshold; `sas(0)` is 0.9996.

    Raises:
        DtypeError: x has another dtype.

    Source: TurboAttention (arXiv 2412.08585), section 4 (SAS).
    """
    _check(x)
    y = -x
    n = y.floor()
    f = y - n
    lut = _table(int(-threshold) + 2, x.dtype, x.device)
    # Below the threshold (where n may be anything, -inf included) the result is zero anyway.
    power = lut[n.clamp_(0, len(lut) - 1).to(torch.int32)]
    return torch.where(x < threshold, 0.0, power * _cubic(f, SAS_COEFFICIENTS))


def sas2(x: Tensor, threshold: float = -6.0) -> Tensor:
    """The base-2 form of `sas`: e^x = 2^-n P2(f) with n + f = -x log2 e.

    Arguments, result and errors as in `sas`, but with a relative error of at most `SAS2_ERROR` above the threshold, and
    exactly 1 at 0. Not in the paper: see docs/numerics.md, "SAS and its base-2 form".
    """
    _check(x)
    y = x * -_LOG2_E
    n = y.floor()
    f = y - n
    exponent = n.clamp_(0, 127)
    return torch.where(x < threshold, 0.0, torch.exp2(-exponent) * _cubic(f, SAS2_COEFFICIENTS))


def sas16(x: Tensor) -> Tensor:
    """The base-2 form in 16-bit integers: e^x for x <= 0, rounded to multiples of 1 / `SAS16_ONE`.

    x: float32 or float64, any shape, as is the result; `DtypeError` for others. Exactly 1 at 0; absolute error at most
    3e-4; 0 below -15 ln 2. Not in the paper: see docs/numerics.md, "SAS in 16-bit integers".
    """
    _check(x)
    distance = (x * -(_LOG2_E * SAS16_OCTAVE)).clamp(max=65535.0)
    return sas16_power(distance.round().to(torch.int32)).to(x.dtype) / SAS16_ONE


def sas16_power(distance: Tensor) -> Tensor:
    """2^(-distance / `SAS16_OCTAVE`) in units of 1 / `SAS16_ONE`: int32 of any shape, of 0 <= distance < 2^16."""
    c0, c1, c2 = SAS16_COEFFICIENTS
    f = (distance << 5) & 0xFFFF
    slope = c0 - (((c1 - ((c2 * f) >> 16)) * f) >> 16)
    return (SAS16_ONE - ((slope * f) >> 16)) >> (distance >> 11)


def exponential(name: str, threshold: float) -> Callable[[Tensor], Tensor]:
    """The function e^x, x <= 0, that `TurboConfig.softmax_on` names, for float32 and float64 tensors of any shape.

    threshold: that of "sas" and "sas2"; "exp" and "sas16" have none."""
    if name == "exp":
        return torch.exp
    if name == "sas16":
        return sas16
    return functools.partial(sas if name == "sas" else sas2, threshold=threshold)


def _cubic(f: Tensor, coefficients: tuple[float, float, float, float]) -> Tensor:
    a, b, c, d = coefficients
    return ((a * f + b) * f + c) * f + d


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"x: expected float32 or float64, got {x.dtype}")
