"""Measures this processor: every kind of work, compared with every installed peer.

`python benchmarks/this_processor.py` writes benchmarks/results/cpu/PROCESSOR.json, with the commit; a second run
replaces it. `make bench-here` installs the peers before, and writes the pages afterwards.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from turboattention.benchmarking.peak import instruction_set
from turboattention.cli.bench_facts import bench_facts

RESULTS = Path(__file__).parent / "results" / "cpu"
BUSY = 0.25
"""Load average, in threads, above which nothing is measured: other load hardly affects ratios, but affects times."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="another file")
    parser.add_argument("--anyway", action="store_true", help="measure although the machine is busy")
    parser.add_argument("options", nargs="*", help="for `turboattention bench`, after --")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if load > BUSY and not options.anyway:
        print(f"load: expected at most {BUSY:g} threads of other work, got {load:.2f}; --anyway measures nevertheless")
        return 1
    out = options.out or RESULTS / f"{slug(bench_facts('cpu')['cpu'], instruction_set())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "turboattention", "bench", *options.options, "--out", str(out)]
    return subprocess.run(command, check=False).returncode


def slug(cpu: str, isa: str | None) -> str:
    """E.g. "AMD EPYC 7B13" with "avx2": amd-epyc-7b13-avx2."""
    name = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b|@.*", " ", cpu.lower())
    return "-".join(re.findall(r"[a-z0-9]+", name) + ([isa] if isa else []))


if __name__ == "__main__":
    sys.exit(main())
