"""Which backend runs a call, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import BackendError, InputError, UnsupportedError
from .impl.contract import Availability, Backend, CallTraits
from .impl.cpu import CpuBackend
from .impl.pytorch import ReferenceBackend
from .impl.triton import TritonBackend
from .kv.quantizer import Quantizer

__all__ = ["TABLE", "Availability", "CallTraits", "Explanation", "backends", "choose", "explain_choice", "quantizer_on"]

_ALL: tuple[Backend, ...] = (TritonBackend(), CpuBackend(), ReferenceBackend())

TABLE = {backend.name: backend for backend in _ALL}
"""All backends by name, fastest first."""


@dataclass(frozen=True)
class Explanation:
    """The backend that a call takes, why, and why not the others."""

    backend: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.others.items()])


def backends() -> dict[str, Availability]:
    """Every backend by name, fastest first: whether it is usable here, and why."""
    return {name: backend.availability() for name, backend in TABLE.items()}


def choose(name: str, call: CallTraits | None = None) -> Backend:
    """The backend for `name`; "auto" is the fastest usable one that computes `call`.

    Raises:
        InputError: an unknown name. BackendError: a backend named explicitly that cannot run here.
        UnsupportedError: one that does not compute this call. Only "auto" ever falls back.
    """
    if name == "auto":
        for backend in TABLE.values():
            if backend.availability().usable and not _refusal(backend, call) and not backend.slower(call):
                return backend
        raise BackendError("backend: expected one that can run here, got none")
    if name not in TABLE:
        raise InputError(f'backend: expected "auto" or one of {", ".join(sorted(TABLE))}, got {name!r}')
    state = TABLE[name].availability()
    if not state.usable:
        raise BackendError(f"backend: expected one that can run here, got {name!r} ({state.reason})")
    refusal = _refusal(TABLE[name], call)
    if refusal:
        raise UnsupportedError(f"backend: expected one that computes this call, got {name!r} ({refusal})")
    return TABLE[name]


def explain_choice(name: str, call: CallTraits | None = None) -> Explanation:
    """The decision of `choose` as text."""
    chosen, found = choose(name, call).name, backends()
    others = {}
    for other, state in found.items():
        against = state.reason
        if state.usable:
            against = _refusal(TABLE[other], call) or (TABLE[other].slower(call) if name == "auto" else None)
        if against:
            others[other] = against
    return Explanation(chosen, found[chosen].reason, others)


def _refusal(backend: Backend, call: CallTraits | None) -> str | None:
    return None if call is None else backend.refusal(call)


def quantizer_on(device: torch.device) -> Quantizer | None:
    """Stage 1 and the page codec of caches on a device, if kernels have them (`kv.quantizer` asks)."""
    return next(filter(None, (backend.quantizer(device) for backend in TABLE.values())), None)
