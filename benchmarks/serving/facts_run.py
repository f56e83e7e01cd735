"""Where and with what engines run."""

from __future__ import annotations

from typing import Any

import engine


def run(spec: dict[str, Any]) -> dict[str, Any]:
    return engine.facts()
