"""What a session on a GPU does, step by step (`day.py`): gates, sweeps of launches, peers, whole steps, profiles."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from supervising import CRASHED, FOUND_WRONG, LEFT_OUT, TIMED_OUT, Results, Step

from turboattention.files import write_text

GATES = ("stages", "chained products", "prefill", "decode", "steps", "streams", "repeats")
PAGED_GATES = ("paged", "pages restored once", "pages of other sizes")
WIDTHS = (4, 3, 2)
_DECODE_GATE, _PREFILL_GATE = ("gate decode",), ("gate prefill",)

INJECTED = {"a crash": CRASHED, "a hang": TIMED_OUT}
"""Steps of a rehearsal, and how they have to end."""


def steps(rehearse: bool) -> list[Step]:
    """In order of their worth: is it right, is it faster than the peers, which launches and variants would be faster
    still, and then whole models and profiles. Gates run while kernels compile, since nothing is timed in them.

    Expected times are those of runs on an H100 (benchmarks/results/gpu-h100), or guesses for what those did not end."""
    table = [Step("facts", 40, 7), Step("compile", 150, 70, beside=not rehearse)]
    table += [Step(f"gate {gate}", 150, 80, beside=not rehearse) for gate in GATES]
    table += [
        Step("peers decode", 150, 60, sound=_DECODE_GATE),
        Step("peers prefill", 60, 22, sound=_PREFILL_GATE),
        Step("graph", 60, 8, sound=("gate steps",)),
    ]
    table += [Step(f"gate {gate}", 150, 90, beside=not rehearse) for gate in (*PAGED_GATES, "generate")]
    table += [Step(f"sweep decode {bits}", 60, 10, sound=_DECODE_GATE) for bits in WIDTHS]
    table += [
        Step("sweep prefill", 60, 30, sound=_PREFILL_GATE),
        Step("sweep pages", 60, 30, sound=("gate paged", "gate pages restored once")),
        Step("launches", 20, 3),
        Step("cubins", 30, 5),
        Step("throughput", 120, 110, sound=("gate decode", "gate steps")),
        Step("peers decode again", 150, 60, sound=_DECODE_GATE),
        Step("peers prefill again", 60, 22, sound=_PREFILL_GATE),
        Step("generate", 90, 75, sound=("gate generate",)),
        Step("trace", 30, 12, sound=_PREFILL_GATE),
        Step("profile decode 4", 50, 12, sound=_DECODE_GATE),
        Step("profile prefill", 50, 12, sound=_PREFILL_GATE),
        Step("large model", 120, 120, sound=("gate generate",)),
        Step("torch.compile", 60, 60, sound=("gate steps",)),
        Step("flex", 40, 22, sound=_PREFILL_GATE),
        Step("sanitizer", 60, 18),
        Step("profile decode 3", 50, 12, sound=_DECODE_GATE),
        Step("profile decode 2", 50, 12, sound=_DECODE_GATE),
    ]
    if rehearse:  # the interpreter takes its time
        table = [replace(step, seconds=600.0) for step in table]
        table[3:3] = [Step(name, 3) for name in INJECTED]
    return table


def run(name: str, results: Results, rehearse: bool) -> int:
    """The step, here and now: its exit status."""
    import plan

    shapes = plan.TINY if rehearse else plan.REAL
    kind, _, which = name.partition(" ")
    start = time.monotonic()
    print(f"-- {name}", flush=True)
    call = _OF.get(name) or _OF[kind]
    before, rows = results.rows(name), []
    for row in call(shapes, which, results):
        print({"step": name, **row}, flush=True)
        results.write(name, **row)
        rows.append(row)
    print(f"-- {name}: {time.monotonic() - start:.1f} s", flush=True)
    return status_of(rows, before)


Rows = Iterable[dict[str, Any]]


def status_of(rows: Rows, before: Rows = ()) -> int:
    """Exit status of a step that ran to its end. before: its rows of earlier runs, which it need not find again.

    Rows with `note` describe the step; `refused` says what a try failed with, `missing` what there is not on this
    machine, `skipped` why something was left out for this time."""
    tried = [row for row in rows if "note" not in row]
    if any(row.get("passed") is False or "WRONG" in (row.get("refused") or "") for row in tried):
        return FOUND_WRONG
    if any("skipped" in row for row in tried) or (tried and all("missing" in row for row in tried)):
        return LEFT_OUT
    return 0 if any(found(row) for row in (*before, *tried)) else 1


def found(row: dict[str, Any]) -> bool:
    """Whether the row says what was found, and not why nothing was."""
    return not (row.get("refused") or row.keys() & {"note", "missing", "skipped"})


def _facts(shapes: Any, which: str, results: Results) -> Rows:
    import platform

    import timing
    import torch
    import triton

    gpu = torch.cuda.is_available()
    facts = {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
    }
    yield facts
    yield {"peaks": timing.peaks() if gpu else {}}


def _compile(shapes: Any, which: str, results: Results) -> Rows:
    """Nothing to compile for in a rehearsal: the interpreter takes the kernels as they are."""
    if _rehearsed():
        yield {"missing": "a GPU"}
        return
    import ahead
    import torch
    from compiling import TARGETS

    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    if target not in TARGETS:
        yield {"missing": f"{target} among the targets of compiling.py"}
        return
    yield from ahead.compile_all(target)


def _cubins(shapes: Any, which: str, results: Results) -> Rows:
    """What was compiled, in one file beside the results."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", results.path.parent))
    found = sorted(path for path in folder.rglob("*") if path.suffix in _COMPILED)
    if _rehearsed() or not found:
        yield {"missing": "a GPU" if _rehearsed() else "compiled kernels"}
        return
    path = results.path.parent / "compiled.tar.xz"
    with tarfile.open(path, "w:xz", preset=1) as archive:
        for each in found:
            archive.add(each, each.relative_to(folder))
    yield {"files": len(found), "bytes": path.stat().st_size, "log": path.name}


_COMPILED = (".cubin", ".hsaco", ".json")
"""Files of Triton's cache: machine code, and what it was compiled with."""


def _gate(shapes: Any, which: str, results: Results) -> Rows:
    import correctness

    checks = correctness.checks(shapes)[which]
    if not checks:  # a gate of sizes that only a GPU can take
        yield {"missing": "a GPU"}
    for name, check in checks.items():
        yield correctness.outcome(name, check)


def _sweep(shapes: Any, which: str, results: Results) -> Rows:
    import sweeping

    have = {row["key"] for row in results.rows(f"sweep {which}") if found(row)}
    kind, _, bits = which.partition(" ")
    if kind == "pages":
        return sweeping.pages(shapes, have)
    return sweeping.prefill(shapes, have) if kind == "prefill" else sweeping.decode(shapes, int(bits), have)


def _launches(shapes: Any, which: str, results: Results) -> Rows:
    """The best launches of the sweeps as a file beside the results, which the package can load."""
    import json

    import sweeping

    swept = [row for bits in WIDTHS for row in results.rows(f"sweep decode {bits}")]
    chosen = sweeping.chosen(shapes, swept, results.rows("sweep prefill"))
    if not chosen.keys() & {"decode", "prefill"}:
        yield {"missing": "sweeps"}
        return
    path = results.path.with_name("launches.json")
    write_text(path, json.dumps(chosen, indent=1) + "\n")
    yield {**chosen, "log": path.name}


def _peers(shapes: Any, which: str, results: Results) -> Rows:
    """Beside their peers, in turns. "again": behind the sweeps, with the launches that they found best."""
    import attention

    if which.startswith("prefill"):
        for form in ("sas", "exp"):
            with _best(results, prefill=form):
                yield from _plain(attention.prefill(shapes, form))
        return
    for bits in WIDTHS:
        with _best(results, decode=bits):
            yield from _plain(attention.decode(replace(shapes, bits=(bits,)), _peaks(results)))


def _graph(shapes: Any, which: str, results: Results) -> Rows:
    import stepping

    with _best(results, decode=4):
        yield from _plain(stepping.rows(shapes, _peaks(results)))


def _throughput(shapes: Any, which: str, results: Results) -> Rows:
    import throughput

    with _best(results, decode=4):
        yield from _plain(throughput.rows(shapes, _peaks(results)))


def _trace(shapes: Any, which: str, results: Results) -> Rows:
    """Where a call's time goes: PyTorch's profile of kernels and host calls, as a report."""
    import profiling

    for work in ("prefill", "decode"):
        yield {"work": work, "log": _report(results, f"trace {work}", profiling.traced(work))}


def _report(results: Results, title: str, text: str) -> str:
    """Append a text to the one file of reports, whose name is returned: one file is easier to copy from a
    machine than many."""
    path = results.path.with_name("reports.txt")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"==== {title} ====\n{text.rstrip()}\n\n")
    return path.name


def _flex(shapes: Any, which: str, results: Results) -> Rows:
    import attention

    yield from _plain(attention.flex(shapes))


def _profile(shapes: Any, which: str, results: Results) -> Rows:
    """Nsight Compute's report of the kernel."""
    work, _, bits = which.partition(" ")
    sections = ("SpeedOfLight", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis", "Occupancy",
                "InstructionStats", "LaunchStats", "ComputeWorkloadAnalysis")  # fmt: skip
    command = ["ncu", "--kernel-name", work, "--launch-count", "1", "--clock-control", "none"]
    command += ["--print-details", "all"]  # what warps wait for, each by itself
    for section in sections:
        command += ["--section", section]
    yield from _tool(command, [work, bits or "4"], results, f"ncu {which}")


def _sanitizer(shapes: Any, which: str, results: Results) -> Rows:
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", str(_ERRORS)]
    for work in ("decode", "prefill"):
        yield from _tool(command, [work, "3", "--small"], results, f"sanitizer {work}")


_ERRORS = 9
"""Exit status of compute-sanitizer where it found errors."""


def _tool(command: list[str], arguments: list[str], results: Results, title: str) -> Rows:
    script = str(Path(__file__).with_name("profiling.py"))
    try:
        done = subprocess.run(
            [*command, sys.executable, script, *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        yield {"missing": command[0]}
        return
    log = _report(results, title, done.stdout + done.stderr)
    row = {"tool": command[0], "arguments": arguments, "status": done.returncode, "log": log}
    if done.returncode == _ERRORS:
        row["passed"] = False
    elif done.returncode:
        row["refused"] = f"{command[0]} ended with {done.returncode}"
    yield row


def _rehearsed() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _generate(shapes: Any, which: str, results: Results, *parts: str, step: str = "generate") -> Rows:
    """Its timing, or the parts named, within the time limit of the step."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        yield {"missing": "transformers"}
        return
    import generating

    limit = next(each.seconds for each in steps(_rehearsed()) if each.name == step)
    yield from generating.rows(parts or generating.TIMED, 0.8 * limit)  # the rest is for the part begun last


def _generate_gate(shapes: Any, which: str, results: Results) -> Rows:
    import generating

    yield from _generate(shapes, which, results, *generating.GATE, step="gate generate")


def _torch_compile(shapes: Any, which: str, results: Results) -> Rows:
    yield from _generate(shapes, which, results, "torch.compile", step="torch.compile")


def _large_model(shapes: Any, which: str, results: Results) -> Rows:
    yield from _generate(shapes, which, results, "large", step="large model")


def _plain(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    import report

    for row in rows:
        print(report.line(row), flush=True)
        yield asdict(row)


def _peaks(results: Results) -> dict[str, float]:
    return next((row["peaks"] for row in results.rows("facts") if "peaks" in row), {})


@contextlib.contextmanager
def _best(results: Results, decode: int | None = None, prefill: str | None = None) -> Iterator[None]:
    """The best launches that were swept, where they were; else those of configs.py."""
    import sweeping

    few = sweeping.best(results.rows(f"sweep decode {decode}"), bits=str(decode)) if decode else None
    many = sweeping.best(results.rows("sweep prefill"), softmax=prefill) if prefill else None
    with sweeping.launched(few, many):
        yield


_Call = Callable[[Any, str, Results], Rows]


def _crash(shapes: Any, which: str, results: Results) -> Rows:
    os.abort()


def _hang(shapes: Any, which: str, results: Results) -> Rows:
    time.sleep(3600)
    return ()


_OF: dict[str, _Call] = {
    "facts": _facts, "compile": _compile, "gate": _gate, "sweep": _sweep, "peers": _peers, "graph": _graph,
    "trace": _trace, "gate generate": _generate_gate, "torch.compile": _torch_compile, "large model": _large_model,
    "profile": _profile, "throughput": _throughput, "generate": _generate, "sanitizer": _sanitizer, "flex": _flex,
    "cubins": _cubins, "launches": _launches, "a crash": _crash, "a hang": _hang,
}  # fmt: skip


def summary(results: Results) -> None:
    """What was found, in short."""
    import sweeping

    for row in results.rows("facts"):
        print(", ".join(f"{name}: {value}" for name, value in row.items() if name != "step" and value))
    for row in results.rows():
        if row.get("passed") is False:
            print(f"WRONG {row.get('name', row['step'])}: {row.get('problem', row)}")
        for why in ("skipped", "missing"):
            if why in row:
                print(f"{why} {', '.join(filter(None, (row['step'], row.get('part'))))}: {row[why]}")
    for bits in WIDTHS:
        found = sweeping.best(results.rows(f"sweep decode {bits}"), bits=str(bits))
        if found:
            print(f"decode {bits}: {found}")
    for form in sweeping.FORMS:
        found = sweeping.best(results.rows("sweep prefill"), softmax=form)
        if found:
            rows = [row["TOPS"] for row in results.rows("sweep prefill") if row["softmax"] == form and "TOPS" in row]
            print(f"prefill {form}: {found}, {max(rows):.4g} TOPS")
    for row in results.rows("sweep pages"):
        if "seconds" in row:
            print(f"{row['key']}: {row['seconds'] * 1e3:.4g} ms")
