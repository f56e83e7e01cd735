"""Which backend runs a call, and why: data with a query, imported when first used."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import BackendError, InputError


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


# Fastest first: what "auto" tries.
_FOUND = (
    Backend("triton", False, "this version has no Triton kernels"),
    Backend("cpu", False, "this version has no C++ extension"),
    Backend("reference", True, "plain PyTorch, runs on any device"),
)


def backends() -> dict[str, Backend]:
    """Every backend by name: whether it is usable here, and why."""
    return {backend.name: backend for backend in _FOUND}


def choose(name: str) -> Backend:
    """The backend for `name`; "auto" is the fastest usable one.

    Raises:
        InputError: an unknown name. BackendError: a backend named explicitly that cannot run here;
            only "auto" ever falls back.
    """
    found = backends()
    if name == "auto":
        return next(backend for backend in found.values() if backend.usable)
    if name not in found:
        raise InputError(f'backend: expected "auto" or one of {", ".join(sorted(found))}, got {name!r}')
    if not found[name].usable:
        raise BackendError(f"backend: expected one that can run here, got {name!r} ({found[name].reason})")
    return found[name]


def explain_choice(name: str) -> Explanation:
    """What `choose` decides, in words."""
    chosen = choose(name)
    others = {b.name: b.reason for b in backends().values() if not b.usable}
    return Explanation(chosen.name, chosen.reason, others)
