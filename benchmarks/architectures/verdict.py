"""The findings of a sweep for an architecture, and their JSON form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

WORSE = ["right", "refused", "as eager", "foreign", "wrong"]


@dataclass
class Finding:
    """`verdict`: right, refused, as eager, foreign, wrong, or not built. "as eager": the logits are wrong, and eager
    attention over such a cache gives the same. "foreign": an error that is not this package's. `note`: the message or
    the reason. `error`: the largest relative error of the logits, of a model that ran."""

    verdict: str
    note: str = ""
    error: float | None = None


@dataclass
class Verdict:
    """The result for one architecture: how it was built, and by cache the worst finding over all ways to run. "INT8" is
    a `TurboCache` of 8 bits with actual quantization; "default sizes": whether a `TurboCache` accepts the unmodified
    config; "at once": whether transformers itself gives the same logits in one forward pass as in several (right, or
    differs). If an architecture cannot be compared, there is at most the error of a `TurboCache`."""

    name: str
    built: Finding
    found: dict[str, Finding] = field(default_factory=dict)

    @property
    def counted(self) -> Finding:
        """The finding by which the architecture is counted."""
        return self.found.get("TurboCache", self.built)

    @property
    def compared(self) -> bool:
        return self.built.verdict == "right"

    def brief(self) -> dict[str, Any]:
        """The JSON value, without empty fields."""
        return _brief(asdict(self))

    @classmethod
    def of(cls, brief: dict[str, Any]) -> Verdict:
        """Inverse of `brief`."""
        found = {kind: Finding(**finding) for kind, finding in brief["found"].items()}
        return cls(brief["name"], Finding(**brief["built"]), found)


def _brief(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _brief(x) for name, x in value.items() if x is not None and x != ""}
