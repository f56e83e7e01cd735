"""Every causal language model of transformers with "turbo": `python -m benchmarks.architectures` in the root of the
repository, or `make architectures`.

Builds a tiny random model of each, compares its logits with eager attention's (judge.py), and writes
benchmarks/results/architectures.json and docs/models.md. Exits with 1 if one is wrong or fails with a foreign error.
With `--check` (`make architectures-check`), writes nothing, and exits with 1 if a result differs from the stored one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os

import transformers

from turboattention.files import write_text

from . import page, tiny
from .compare import differences
from .judge import judge
from .verdict import Finding, Verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures; writes nothing")
    parser.add_argument("--check", action="store_true", help="compare with the stored results; writes nothing")
    parser.add_argument("--page", action="store_true", help="write docs/models.md again from the last results")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each")
    options = parser.parse_args()
    if options.page:
        write_text(page.PAGE, page.of_results())
        return 0
    verdicts = []
    for name in options.only or tiny.names():
        verdicts.append(apart(name, options.timeout))
        say(verdicts[-1], details=bool(options.only))
    if options.check:
        lines = differences(verdicts, page.stored(), whole=not options.only)
        print("\n".join(lines) or f"{len(verdicts)} architectures are as in {page.RESULTS.name}")
        return int(bool(lines))
    if not options.only:
        write(verdicts)
        write_text(page.PAGE, page.of_results())
    findings = [x for verdict in verdicts for x in verdict.found.values()]
    return int(any(x.verdict in ("wrong", "foreign") for x in findings))


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


def processor_time() -> float:
    """Processor seconds of this process and of its children, which other load does not affect."""
    return sum(os.times()[:4])


def say(verdict: Verdict, details: bool) -> None:
    counted = verdict.counted
    print(f"{processor_time():6.0f} s  {verdict.name}: {counted.verdict}  {counted.note[:90]}", flush=True)
    if details and verdict.built.note:
        print(f"{'':10}built: {verdict.built.verdict} {verdict.built.note}", flush=True)
    for kind, found in verdict.found.items():
        if details or found.verdict in ("wrong", "foreign"):
            error = "" if found.error is None else f"{found.error:.1e}"
            print(f"{'':10}{kind}: {found.verdict} {error} {found.note}", flush=True)


def write(verdicts: list[Verdict]) -> None:
    """One line for each architecture, so that a change shows in a diff."""
    lines = ",\n".join(f"  {json.dumps(verdict.brief())}" for verdict in verdicts)
    head = f'"transformers": "{transformers.__version__}", "seconds": {processor_time():.0f}'
    write_text(page.RESULTS, f'{{{head}, "architectures": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    raise SystemExit(main())
