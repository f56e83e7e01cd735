"""What a sweep finds of an architecture, and how it is kept."""

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
    """What became of one architecture: how it was built, and by cache the worst finding of all ways to run; "INT8" is a
    `TurboCache` of 8 bits in its own arithmetic, "default sizes" whether one is made for the config as it is, "at once"
    whether transformers itself gives in one forward pass what it gives in several: right, or differs. Of one that
    cannot be compared there is at most the refusal of a `TurboCache`."""

    name: str
    built: Finding
    found: dict[str, Finding] = field(default_factory=dict)

    @property
    def counted(self) -> Finding:
        """What the architecture is counted as."""
        return self.found.get("TurboCache", self.built)

    @property
    def compared(self) -> bool:
        return self.built.verdict == "right"

    def brief(self) -> dict[str, Any]:
        """For JSON, without what is empty."""
        return _brief(asdict(self))

    @classmethod
    def of(cls, brief: dict[str, Any]) -> Verdict:
        """From what `brief` gave."""
        found = {kind: Finding(**finding) for kind, finding in brief["found"].items()}
        return cls(brief["name"], Finding(**brief["built"]), found)


def _brief(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _brief(x) for name, x in value.items() if x is not None and x != ""}
