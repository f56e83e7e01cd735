"""Which backend runs a call, and why: data with a query, imported when first used."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass

import torch

from .config import TurboConfig
from .errors import BackendError, InputError, UnsupportedError
from .kv import quantizer


@dataclass(frozen=True)
class Backend:
    """One backend as found on this machine; `reason` says why it is usable or not."""

    name: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The backend a call takes, why, and what spoke against the others."""

    backend: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.others.items()])


@dataclass(frozen=True)
class Call:
    """What of a call decides who can run it."""

    config: TurboConfig
    dtype: torch.dtype
    device: torch.device
    queries: int = 1
    head_dims: tuple[int, int] | None = None
    """Of keys and of values, where they are known."""


SERIAL_QUERIES = 16
"""Query rows up to which the serial C++ path is faster than PyTorch."""


def backends() -> dict[str, Backend]:
    """Every backend by name, fastest first: whether it is usable here, and why."""
    found = (
        _triton(),
        _cpu(),
        Backend("reference", True, "plain PyTorch, runs on any device"),
    )
    return {backend.name: backend for backend in found}


def choose(name: str, call: Call | None = None) -> Backend:
    """The backend for `name`; "auto" is the fastest usable one that computes `call`.

    Raises:
        InputError: an unknown name. BackendError: a backend named explicitly that cannot run here.
        UnsupportedError: one that does not compute this call. Only "auto" ever falls back.
    """
    found = backends()
    if name == "auto":
        fit = (backend for backend in found.values() if backend.usable)
        return next(backend for backend in fit if not _refusal(backend.name, call) and not _slower(backend, call))
    if name not in found:
        raise InputError(f'backend: expected "auto" or one of {", ".join(sorted(found))}, got {name!r}')
    if not found[name].usable:
        raise BackendError(f"backend: expected one that can run here, got {name!r} ({found[name].reason})")
    refusal = _refusal(name, call)
    if refusal:
        raise UnsupportedError(f"backend: expected one that computes this call, got {name!r} ({refusal})")
    return found[name]


def explain_choice(name: str, call: Call | None = None) -> Explanation:
    """What `choose` decides, in words."""
    chosen = choose(name, call)
    others = {}
    for backend in backends().values():
        against = backend.reason
        if backend.usable:
            against = _refusal(backend.name, call) or (_slower(backend, call) if name == "auto" else None)
        if against:
            others[backend.name] = against
    return Explanation(chosen.name, chosen.reason, others)


def _refusal(name: str, call: Call | None) -> str | None:
    """Why a usable backend does not compute a call, or None."""
    if name == "reference" or call is None:
        return None
    if name == "cpu" and call.device.type != "cpu":
        return f"the tensors are on {call.device}"
    if name == "triton" and call.device.type != "cuda" and not _interpreted():
        return f"the tensors are on {call.device}, its kernels run on GPUs"
    refusal = (_device_refusal(call.device) or _width_refusal(call.head_dims)) if name == "triton" else None
    kernels = f"turboattention.kernels.{name}.attention"
    return refusal or importlib.import_module(kernels).refusal(call.config, call.dtype)


def _width_refusal(head_dims: tuple[int, int] | None) -> str | None:
    """Why the GPU kernels do not compute heads of these sizes, or None."""
    return importlib.import_module("turboattention.kernels.inputs").gpu_refusal(head_dims) if head_dims else None


def _device_refusal(device: torch.device) -> str | None:
    """Why the GPU kernels do not run on a device, or None."""
    return importlib.import_module("turboattention.kernels.triton.configs").refusal(device)


def _slower(backend: Backend, call: Call | None) -> str | None:
    """Why "auto" leaves a call to the next backend although this one computes it, or None."""
    if backend.name == "triton" and (call.device.type != "cuda" if call else _interpreted()):
        return "Triton's interpreter is for tests"
    if backend.name != "cpu" or call is None or call.queries <= SERIAL_QUERIES:
        return None
    if importlib.import_module("turboattention.kernels.cpu").in_use() != "serial":
        return None
    return f"its serial path is slower than PyTorch for more than {SERIAL_QUERIES} query rows"


def _triton() -> Backend:
    return _triton_with(_interpreted())


@functools.cache
def _triton_with(interpreted: bool) -> Backend:
    if not interpreted and not torch.cuda.is_available():  # without importing Triton
        return Backend("triton", False, "no CUDA or ROCm device is there")
    reason = importlib.import_module("turboattention.kernels.triton").available()
    if reason:
        return Backend("triton", False, reason)
    return Backend("triton", True, "Triton's interpreter, for tests" if interpreted else "Triton kernels on the GPU")


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU (it looks when kernels are defined)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _cpu() -> Backend:
    try:
        return _cpu_with(os.environ.get("TURBOATTENTION_ISA"))
    except ValueError as error:  # an instruction set that is not here
        return Backend("cpu", False, str(error))


@functools.cache
def _cpu_with(isa: str | None) -> Backend:
    try:
        kernels = importlib.import_module("turboattention.kernels.cpu")
    except ImportError as error:
        missing = "turboattention._cpu" in str(error)
        reason = "its C++ extension was not built (there was no compiler)" if missing else str(error)
        return Backend("cpu", False, reason)
    return Backend("cpu", True, f"C++ kernels for {kernels.in_use()}")


def _quantizer(device: torch.device) -> quantizer.Quantizer | None:
    """Stage 1 and the page codec of caches on a device, where kernels have them."""
    if device.type == "cpu":
        return _cpu_quantizer()
    found = _triton_quantizer() if device.type == "cuda" else None
    return None if found is None or _device_refusal(device) else found


@functools.cache
def _triton_quantizer() -> quantizer.Quantizer | None:
    if not _triton().usable or _interpreted():
        return None
    return importlib.import_module("turboattention.execution.triton_quantizer")  # type: ignore[return-value]


@functools.cache
def _cpu_quantizer() -> quantizer.Quantizer | None:
    try:
        return importlib.import_module("turboattention.execution.cpu_quantizer")  # type: ignore[return-value]
    except ImportError:
        return None  # not built


quantizer.install(_quantizer)
