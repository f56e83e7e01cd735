"""Backend "cpu": the C++ extension."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch

from ..contract import Availability, CallTraits
from ..kernels import KernelBackend

if TYPE_CHECKING:
    from ...kv.quantizer import Quantizer

SERIAL_QUERIES = 16
"""Query rows up to which the serial C++ path is faster than PyTorch."""


class CpuBackend(KernelBackend):
    """`contract.Backend` over `kernels.cpu`."""

    name = "cpu"
    checks_finite = ("q", "k", "v")
    reorders_pages = True

    def availability(self) -> Availability:
        try:
            return _availability(os.environ.get("TURBOATTENTION_ISA"))
        except ValueError as error:  # an instruction set that is not available
            return Availability("cpu", False, str(error))

    def refusal(self, call: CallTraits) -> str | None:
        if call.device.type != "cpu":
            return f"the tensors are on {call.device}"
        return self._refusal(call.config, call.dtype)

    @functools.cached_property
    def _refusal(self) -> Any:
        from ...kernels.cpu.attention import refusal

        return refusal

    def slower(self, call: CallTraits | None) -> str | None:
        if call is None or call.queries <= SERIAL_QUERIES:
            return None
        from ...kernels.cpu import in_use

        if in_use() != "serial":
            return None
        return f"its serial path is slower than PyTorch for more than {SERIAL_QUERIES} query rows"

    def quantizer(self, device: torch.device) -> Quantizer | None:
        return _quantizer() if device.type == "cpu" else None

    @functools.cached_property
    def _attention(self) -> Any:
        from . import attention

        return attention

    @functools.cached_property
    def _prompts(self) -> Any:
        from . import prompts

        return prompts

    @functools.cached_property
    def _paged(self) -> Any:
        from . import paged

        return paged


@functools.cache
def _availability(isa: str | None) -> Availability:
    try:
        from ...kernels import cpu
    except ImportError as error:
        missing = "turboattention._cpu" in str(error)
        reason = "its C++ extension was not built (there was no compiler)" if missing else str(error)
        return Availability("cpu", False, reason)
    return Availability("cpu", True, f"C++ kernels for {cpu.in_use()}")


@functools.cache
def _quantizer() -> Quantizer | None:
    try:
        from . import quantizer
    except ImportError:  # not built
        return None
    return quantizer
