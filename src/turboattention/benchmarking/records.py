"""The results of a measurement as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .statistics import Spread

SCHEMA = 1
"""Version of the files that `--out` writes."""


@dataclass(frozen=True)
class Rival:
    """The measurement of one peer.

    ratio: the peer's time divided by the subject's, paired; above 1 the subject is faster.
    refused: why it was not timed (missing, or wrong result); then `seconds` and `ratio` are None.
    """

    name: str
    peer: str
    detail: str = ""
    error: float | None = None
    seconds: Spread | None = None
    gops: float | None = None
    ratio: Spread | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    work: "prefill", "chunk", "decode", "steps", "compress" or "memory".
    error: relative error of the subject against exact attention (decode: over the stored keys and values).
    refused: why the subject was not timed; then there are no rivals.
    figures: further measurements of this kind of work.
    limit: the limit of the processor that the subject comes nearest, and the share of it that it reaches.
    """

    work: str
    shape: dict[str, Any]
    bits: str | None
    subject: str
    dtype: str
    error: float | None = None
    seconds: Spread | None = None
    gops: float | None = None
    rivals: list[Rival] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    limit: str | None = None
    limit_share: float | None = None


def rows_of(document: dict[str, Any]) -> list[Row]:
    """The rows in the content of a file. Raises ValueError for another version."""
    if document.get("schema") != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA}, got {document.get('schema')!r}")
    return [
        Row(**(row | {"seconds": _spread(row["seconds"]), "rivals": [_rival(rival) for rival in row["rivals"]]}))
        for row in document.get("rows", [])
    ]


def _rival(values: dict[str, Any]) -> Rival:
    spreads: dict[str, Any] = {name: _spread(values[name]) for name in ("seconds", "ratio")}
    return Rival(**(values | spreads))


def _spread(values: dict[str, Any] | None) -> Spread | None:
    return None if values is None else Spread(**values)


def as_document(rows: list[Row], facts: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "facts": facts, "rows": [asdict(row) for row in rows]}
