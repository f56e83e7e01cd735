"""Every causal language model of transformers under "turbo": `python -m benchmarks.architectures` in the root of the
repository, or `make architectures`.

Builds a tiny random model of each, compares its logits with eager attention's (judge.py), and writes
benchmarks/results/architectures.json and docs/models.md. Exits with 1 where one is wrong or fails with a foreign error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from turboattention.files import write_text

from . import tiny
from .judge import Finding, Verdict, judge
from .page import of, page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures; writes nothing")
    parser.add_argument("--page", action="store_true", help="write docs/models.md again from the last results")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each")
    options = parser.parse_args()
    if options.page:
        write_page()
        return 0
    start, verdicts = time.time(), []
    for name in options.only or tiny.names():
        verdicts.append(apart(name, options.timeout))
        say(verdicts[-1], time.time() - start, details=bool(options.only))
    if not options.only:
        write(verdicts, time.time() - start)
        write_page()
    return int(any(x.verdict in ("wrong", "foreign") for verdict in verdicts for x in verdict.found.values()))


def apart(name: str, timeout: float) -> Verdict:
    """`judge` in a process of its own, so that a crash or a hang ends one architecture only."""
    fork = multiprocessing.get_context("fork")  # what is imported already is not imported again
    mine, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: theirs.send(judge(name)), daemon=True)
    process.start()
    theirs.close()
    try:
        if mine.poll(timeout):
            return mine.recv()
        return Verdict(name, Finding("not built", f"it takes longer than {timeout:.0f} s"))
    except EOFError:
        process.join()
        return Verdict(name, Finding("not built", f"its process ended with {process.exitcode}"))
    finally:
        process.kill()
        process.join()
        mine.close()


def say(verdict: Verdict, seconds: float, details: bool) -> None:
    found = of(verdict)
    print(f"{seconds:6.0f} s  {verdict.name}: {found.verdict}  {found.note[:90]}", flush=True)
    for kind, found in verdict.found.items():
        if details or found.verdict in ("wrong", "foreign"):
            error = "" if found.error is None else f"{found.error:.1e}"
            print(f"{'':10}{kind}: {found.verdict} {error} {found.note}", flush=True)


def write(verdicts: list[Verdict], seconds: float) -> None:
    """One line for each architecture, so that a change shows in a diff."""
    lines = ",\n".join(f"  {json.dumps(_brief(asdict(verdict)))}" for verdict in verdicts)
    head = f'"transformers": "{transformers.__version__}", "seconds": {seconds:.0f}'
    write_text(RESULTS, f'{{{head}, "architectures": [\n{lines}\n]}}\n')


def _brief(value: Any) -> Any:
    """Without what is empty, which the defaults say."""
    if not isinstance(value, dict):
        return value
    return {name: _brief(x) for name, x in value.items() if x is not None and x != ""}


def write_page() -> None:
    results = json.loads(RESULTS.read_text())
    verdicts = [
        Verdict(x["name"], Finding(**x["built"]), {kind: Finding(**found) for kind, found in x["found"].items()})
        for x in results["architectures"]
    ]
    write_text(PAGE, page(verdicts, results["transformers"], results["seconds"]))


if __name__ == "__main__":
    raise SystemExit(main())
