"""Several workloads one after another, each through an engine of its own in this process."""

from __future__ import annotations

from typing import Any

import throughput_run


def run(spec: dict[str, Any]) -> dict[str, Any]:
    return {"loads": [throughput_run.run(load) for load in spec["loads"]]}
