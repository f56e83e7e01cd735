"""Backend "triton": the GPU kernels, or, for tests, Triton's interpreter."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, cast

import torch

from ...kernels.inputs import gpu_refusal
from ..contract import Availability, CallTraits
from ..kernels import KernelBackend

if TYPE_CHECKING:
    from ...kv.quantizer import Quantizer


class TritonBackend(KernelBackend):
    """`contract.Backend` over `kernels.triton`."""

    name = "triton"
    checks_finite = ("q", "k", "v")
    reorders_pages = False

    def availability(self) -> Availability:
        return _availability(_interpreted())

    def refusal(self, call: CallTraits) -> str | None:
        if call.device.type != "cuda" and not _interpreted():
            return f"the tensors are on {call.device}, its kernels run on GPUs"
        widths = gpu_refusal(call.head_dims) if call.head_dims else None
        return _device_refusal(call.device) or widths or self._refusal(call.config, call.dtype)

    @functools.cached_property
    def _refusal(self) -> Any:
        from ...kernels.triton.attention import refusal

        return refusal

    def slower(self, call: CallTraits | None) -> str | None:
        on_gpu = call.device.type == "cuda" if call else not _interpreted()
        return None if on_gpu else "Triton's interpreter is for tests"

    def quantizer(self, device: torch.device) -> Quantizer | None:
        if device.type != "cuda" or _interpreted() or not self.availability().usable or _device_refusal(device):
            return None
        from . import quantizer

        return cast("Quantizer", quantizer)

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
def _availability(interpreted: bool) -> Availability:
    if not interpreted and not torch.cuda.is_available():  # without importing Triton
        return Availability("triton", False, "no CUDA or ROCm device is there")
    from ...kernels import triton

    reason = triton.available()
    if reason:
        return Availability("triton", False, reason)
    found = "Triton's interpreter, for tests" if interpreted else "Triton kernels on the GPU"
    return Availability("triton", True, found)


def _device_refusal(device: torch.device) -> str | None:
    """Why the GPU kernels do not run on a device, or None."""
    return _configs().refusal(device)


@functools.cache
def _configs() -> Any:
    from ...kernels.triton import configs

    return configs


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU (it looks when kernels are defined)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
