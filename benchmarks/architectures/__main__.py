"""Every causal language model of transformers under "turbo": `python -m benchmarks.architectures`, or `make
architectures`, in the root of the repository.

Builds a tiny random model of each, compares its logits with eager attention's (judge.py), and writes
benchmarks/results/architectures.json and docs/models.md. Exits with 1 where one is wrong or fails with a foreign error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict

from . import tiny
from .judge import Finding, Verdict, judge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures; writes nothing")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each")
    options = parser.parse_args()
    start = time.time()
    for name in options.only or tiny.names():
        verdict = apart(name, options.timeout)
        print(f"{time.time() - start:6.0f} s  {name}: {verdict.built.verdict} {verdict.built.note}", flush=True)
        for way, found in verdict.found.items():
            print(
                f"            {way}: {found.verdict} {'' if found.error is None else f'{found.error:.1e}'} {found.note}",
                flush=True,
            )
    return 0


def apart(name: str, timeout: float) -> Verdict:
    """`judge` in a process of its own, so that a crash or a hang ends one architecture only."""
    fork = multiprocessing.get_context("fork")
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


if __name__ == "__main__":
    raise SystemExit(main())
