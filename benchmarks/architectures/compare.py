"""How a sweep differs from the committed one. It has to be empty for `make architectures-check`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .verdict import Finding, Verdict

ROUNDING = 1e-6
"""Errors up to here are float32 rounding, which may differ between processors."""
LARGER = 2.0
"""Largest ratio of an error to the stored one that passes."""


def differences(found: Iterable[Verdict], stored: Iterable[Verdict], whole: bool = True) -> list[str]:
    """One line for each verdict, message or error that is not as stored.

    whole: `found` is a complete sweep, in which architectures that are only stored are missing.
    """
    new, old = ({verdict.name: verdict for verdict in verdicts} for verdicts in (found, stored))
    lines = [f"{name}: not in the stored results" for name in new if name not in old]
    lines += [f"{name}: missing, stored as {old[name].counted.verdict}" for name in old if whole and name not in new]
    return lines + [line for name in new if name in old for line in _of_one(new[name], old[name])]


def _of_one(new: Verdict, old: Verdict) -> Iterator[str]:
    nothing = Finding("not compared")
    yield from _of_finding(f"{new.name}, built", new.built, old.built)
    for kind in dict.fromkeys([*old.found, *new.found]):  # in order
        yield from _of_finding(f"{new.name}, {kind}", new.found.get(kind, nothing), old.found.get(kind, nothing))


def _of_finding(where: str, new: Finding, old: Finding) -> Iterator[str]:
    if new.verdict != old.verdict:
        yield f"{where}: {new.verdict}, stored as {old.verdict}{f' ({new.note})' if new.note else ''}"
    elif new.note != old.note:
        yield f"{where}: says {new.note!r}, stored as {old.note!r}"
    elif (new.error or 0) > (bound := max(LARGER * (old.error or 0), ROUNDING)):
        yield f"{where}: error {new.error:.1e}, at most {bound:.1e} expected (stored as {old.error or 0:.1e})"
