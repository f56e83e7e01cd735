"""SAS, the softmax without FP32 exponentials (docs/numerics.md, "SAS and its base-2 form"; paper section 4).

`sas(x) = LUT[floor(-x)] * P(frac(-x))` for x <= 0: a table of e^-n and one cubic. The base-2 form
takes the power of two from the exponent bits and needs no table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .config import TurboConfig
from .errors import DtypeError

# The paper's least-squares cubic for e^-f on [0, 1], highest power first.
SAS_COEFFICIENTS = (-0.1025, 0.4626, -0.9922, 0.9996)

# Our cubic for 2^-f on [0, 1], highest power first: the minimax fit under P(0) = 1 and P(1) = 1/2,
# which makes the whole function continuous and exact at 0. Relative error at most 1.05e-4.
SAS2_COEFFICIENTS = (-0.0391340, 0.2305558, -0.6914218, 1.0)
SAS2_ERROR = 1.05e-4

_LOG2_E = math.log2(math.e)


@functools.lru_cache(maxsize=32)
def _table(entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """LUT[n] = e^-n for n = 0 .. entries - 1."""
    return torch.exp(-torch.arange(entries, dtype=torch.float64)).to(device, dtype)


def logit_scale(scale: float | None, head_dim: int) -> float:
    """The factor of logits: `1 / sqrt(head_dim)` unless given."""
    return head_dim**-0.5 if scale is None else float(scale)


def sas(x: Tensor, threshold: float = -6.0) -> Tensor:
    """Approximate e^x for x <= 0 (any shape, float32 or float64); 0 where x < threshold.

    Maximum error 4.0e-4 above the threshold. `sas(0)` is 0.9996. Raises `DtypeError` for other
    dtypes.
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

    Relative error at most `SAS2_ERROR` above the threshold, and exactly 1 at 0.
    """
    _check(x)
    y = x * -_LOG2_E
    n = y.floor()
    f = y - n
    exponent = n.clamp_(0, 127)
    return torch.where(x < threshold, 0.0, torch.exp2(-exponent) * _cubic(f, SAS2_COEFFICIENTS))


def exponential(config: TurboConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The exponential that `config.softmax` names for tensors on `device`, threshold included (``"exp"`` has none)."""
    name = config.softmax_on(device)
    if name == "exp":
        return torch.exp
    form = sas if name == "sas" else sas2
    return functools.partial(form, threshold=config.sas_threshold)


def _cubic(f: Tensor, coefficients: tuple[float, float, float, float]) -> Tensor:
    a, b, c, d = coefficients
    return ((a * f + b) * f + c) * f + d


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"x: expected float32 or float64, got {x.dtype}")
