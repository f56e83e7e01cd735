"""A session on a GPU, unattended: `PYTHONPATH=src python3 benchmarks/gpu/day.py`, or `make gpu-day`.

From the plain source tree, with the machine's own Python, PyTorch and Triton; nothing is built or installed. Steps in
order of their worth (`--list`), each a process with a time limit. The output folder gets `results.jsonl`, written row
by row, `log.txt`, `launches.json`, `compiled.tar.xz`, and `reports.txt` of profilers. Run again with the same folder,
it goes on with what is not done.

--rehearse runs every step without a GPU, on tiny shapes through Triton's interpreter, with a step that crashes and one
that hangs among them: nothing is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

BUDGET = 540.0
"""Seconds of a session, by default."""

ROOT = Path(__file__).parents[2]
# In front of all: another package `tests`, or another turboattention, may be installed.
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(Path(__file__).parent)]

from supervising import CRASHED, DONE, NO_TIME, SKIPPED, TIMED_OUT, WRONG, Results, outlook, run_steps  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-day", help="folder of the results")
    parser.add_argument("--budget", type=float, help="seconds in all (540; 3600 to rehearse); other steps are skipped")
    parser.add_argument("--only", action="append", default=[], help="a step to run; again for more")
    parser.add_argument("--skip", action="append", default=[], help="a step to leave out; again for more")
    parser.add_argument("--again", action="store_true", help="also what earlier results say is done")
    parser.add_argument("--commit", default="", help="the commit that the sources are, where .git is not there")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on tiny shapes")
    parser.add_argument("--device-check", action="store_true", help="say what is there, and end")
    parser.add_argument("--list", action="store_true", help="name the steps, and end")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.budget is None:
        options.budget = 3600.0 if options.rehearse else BUDGET  # the interpreter is slow
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if options.device_check:
        return _device_check()
    import steps

    table = steps.steps(options.rehearse)
    names = [step.name for step in table]
    unknown = [name for name in (*options.only, *options.skip) if name not in names]
    if unknown:
        parser.error(f"expected steps of {', '.join(names)}, got {unknown[0]}")
    if options.list:
        lines = (f"{step.name:24} about {step.expected:3.0f}, at most {step.seconds:3.0f} s" for step in table)
        print("\n".join(lines))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.jsonl")
    if options.step:
        return steps.run(options.step, results, options.rehearse)
    if not options.rehearse and not _gpu():
        print("no GPU for PyTorch here: --rehearse runs the steps without one, --device-check says what is there")
        return 2
    if options.again or options.rehearse:
        results.path.unlink(missing_ok=True)
    commit = options.commit or _commit()
    if kept := results.keep_apart(commit):
        print(f"results of other sources are in {kept.name} now, and every step runs")
    results.write("session", commit=commit, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(options.out).resolve().parent / "gpu-day-compiled"))
    chosen = [s for s in table if s.name not in options.skip and (not options.only or s.name in options.only)]
    if not options.rehearse:  # expected times are those of a GPU
        ended = results.ended()
        within, beyond = outlook([step for step in chosen if ended.get(step.name) != DONE], options.budget)
        print(f"probably within {options.budget:.0f} s: {', '.join(within) or 'none'}")
        print(f"probably not: {', '.join(beyond) or 'none'}", flush=True)
    rest = ["--out", str(options.out), *(["--rehearse"] if options.rehearse else [])]

    def command(step: steps.Step) -> list[str]:
        return [sys.executable, __file__, "--step", step.name, *rest]

    counts = run_steps(chosen, command, results, options.out / "log.txt", options.budget)
    steps.summary(results)
    said = (f"{counts[name]} {name}" for name in (DONE, WRONG, CRASHED, TIMED_OUT, SKIPPED))
    print(f"steps: {', '.join(said)}" + ("; rehearsed without a GPU, nothing measured" if options.rehearse else ""))
    injected = {step.name: steps.INJECTED[step.name] for step in chosen if step.name in steps.INJECTED}
    ended = results.ended()
    bad = [name for name, status in ended.items() if status in (WRONG, CRASHED, TIMED_OUT) and name not in injected]
    met = all(ended[name] == status for name, status in injected.items())
    late = options.rehearse and results.skipped_for(NO_TIME)  # a rehearsal goes through all steps
    return 0 if met and not bad and not late else 1


def _device_check() -> int:
    """What this machine has of what the steps use."""
    print(f"python {sys.version.split()[0]} at {sys.executable}")
    for package in ("torch", "triton", "numpy", "safetensors", "transformers", "matplotlib"):
        found = importlib.util.find_spec(package)
        version = __import__(package).__version__ if found else "not installed"
        print(f"{package:14} {version}")
    for tool in ("nvidia-smi", "ncu", "compute-sanitizer", "cuobjdump", "nvcc"):
        try:
            said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
            print(f"{tool:18} {(said.strip().splitlines() or ['no version'])[-1]}")
        except (OSError, subprocess.TimeoutExpired):
            print(f"{tool:18} not found")
    print(f"GPU: {_gpu() or 'none for PyTorch'}; {os.cpu_count()} processors")
    return 0


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return sources(ROOT)


def sources(root: Path) -> str:
    """What identifies the measured sources where there is no repository: a digest of their contents."""
    digest = hashlib.sha256()
    for folder in ("src/turboattention", "benchmarks/gpu"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"sources-{digest.hexdigest()[:16]}"


if __name__ == "__main__":
    sys.exit(main())
