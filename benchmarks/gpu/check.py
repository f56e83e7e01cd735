"""GPU kernels checked and measured: `PYTHONPATH=src python3 benchmarks/gpu/check.py`, or `make gpu-check`.

Needs PyTorch, Triton and a GPU; nothing has to be built or installed. Without a GPU it runs every stage on tiny
shapes through Triton's interpreter, measures nothing, and says so.

Stages write benchmarks/results/gpu-STAGE.json as each row completes, so that a time limit loses nothing:
correctness, attention (prefill and decode beside PyTorch's ways), graph (steps as CUDA graphs), throughput. What fails
is recorded, and the rest goes on. Wrong results are not timed: attention and graph look at their own, throughput is
left out where a stage before it found any.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STAGES = ("correctness", "attention", "graph", "throughput")
_MODULES = {"attention": "attention", "graph": "stepping", "throughput": "throughput"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=STAGES, help="a stage to run; again for more")
    parser.add_argument("--skip", action="append", choices=STAGES, default=[], help="a stage to leave out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so many")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            print(f"not measured: {package} is not installed for {sys.executable}")
            return 0 if package == "triton" and not _has_gpu() else 2
    gpu = _has_gpu()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        print("not measured: no GPU. A dry run through Triton's interpreter, on tiny shapes, follows.", flush=True)
    out = options.out or (ROOT / "benchmarks" / "results" if gpu else ROOT / "build" / "gpu-dry-run")
    out.mkdir(parents=True, exist_ok=True)
    wanted = [stage for stage in options.only or STAGES if stage not in options.skip]
    sound = _run(wanted, gpu, out, time.monotonic() + options.seconds)
    print("not measured: no GPU" if not gpu else f"results: {out}/gpu-*.json")
    return 0 if sound else 1


def _run(stages: list[str], gpu: bool, out: Path, deadline: float) -> bool:
    """Whether nothing was found wrong, and nothing failed."""
    import plan
    import timing

    from turboattention.cli.bench_files import write_json

    shapes = plan.REAL if gpu else plan.TINY
    facts: dict[str, Any] = _facts() | {"peaks": timing.peaks() if gpu else {}}
    print(", ".join(f"{name}: {value}" for name, value in facts.items() if value), flush=True)
    wrong = failed = False
    for stage in stages:
        start = time.monotonic()
        if stage == "throughput" and wrong:
            print("throughput: not timed, results are wrong (--only throughput runs it all the same)", flush=True)
            continue
        try:
            if stage == "correctness":
                wrong |= not _right(shapes, facts, out / "gpu-correctness.json", deadline)
            else:
                rows = _measured(stage, shapes, facts, out / f"gpu-{stage}.json", deadline)
                failed |= any(row.refused for row in rows)
                wrong |= any(row.refused and row.error is not None for row in rows)
        except Exception as problem:  # the stages behind it are worth as much
            failed = True
            print(f"{stage}: stopped by {timing.said(problem)}", flush=True)
            write_json(out / f"gpu-{stage}-stopped.json", {"facts": facts, "problem": timing.said(problem)})
        print(f"{stage}: {time.monotonic() - start:.0f} s", flush=True)
        if time.monotonic() > deadline:
            break
    return not (wrong or failed)


def _right(shapes: Any, facts: dict[str, Any], path: Path, deadline: float) -> bool:
    import correctness

    from turboattention.cli.bench_files import write_json

    entries: list[dict[str, Any]] = []
    for entry in correctness.checks(shapes):
        entries.append(entry)
        word = {True: "right", False: "WRONG", None: "not checked"}[entry["passed"]]
        print(f"{word:11} {entry['name']}  {entry.get('problem') or entry.get('error') or ''}", flush=True)
        write_json(path, {"facts": facts, "checks": entries})
        if time.monotonic() > deadline:
            break
    return all(entry["passed"] is not False for entry in entries)


def _measured(stage: str, shapes: Any, facts: dict[str, Any], path: Path, deadline: float) -> list[Any]:
    import report

    from turboattention.benchmarking.records import as_document
    from turboattention.cli.bench_files import write_json

    rows = []
    for row in importlib.import_module(_MODULES[stage]).rows(shapes, facts["peaks"]):
        rows.append(row)
        print(report.line(row), flush=True)
        write_json(path, as_document(rows, facts))
        if time.monotonic() > deadline:
            break
    if report.plot(path.with_suffix(".png"), rows, f"{stage}: {facts['gpu'] or 'dry run, no GPU'}"):
        print(path.with_suffix(".png"))
    return rows


def _facts() -> dict[str, Any]:
    import platform

    import torch
    import triton

    import turboattention
    from turboattention.cli.bench_facts import commit

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "turboattention": turboattention.__version__,
        "commit": commit(),
        "gpu": gpu,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
