"""The script for a session on a GPU, rehearsed without one: it survives the crash and the hang among its steps."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from turboattention.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "day.py"
INJECTED = ["--only", "facts", "--only", "a crash", "--only", "a hang"]
PLACEHOLDERS = ["compile", "profile decode 4", "profile decode 3", "profile decode 2", "profile prefill", "sanitizer"]
PLACEHOLDERS += ["gate pages of other sizes", "cubins"]
"""Steps that a machine without a GPU, and thus without its tools, leaves out."""


@pytest.fixture
def imported(monkeypatch):
    """Imports modules of the script's folder, for one test."""
    folder, before = str(SCRIPT.parent), set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("selected", "done", "skipped"),
    [(INJECTED, 1, 0), pytest.param([], 36 - len(PLACEHOLDERS), len(PLACEHOLDERS), marks=pytest.mark.long)],
    ids=["injected", "all"],
)
def test_rehearsal(tmp_path, selected, done, skipped):
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path), *selected]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3700)
    last = ended.stdout.strip().splitlines()[-1]
    assert last.startswith(f"steps: {done} done, 0 wrong, 1 crashed, 1 timed out, {skipped} skipped"), ended.stdout
    assert ended.returncode == 0


REFUSED, MEASURED = {"key": "b", "refused": "IndexError: 1"}, {"key": "a", "seconds": 1.0}
NOTE, MISSING = {"note": "time", "seconds": 2.0}, {"missing": "a GPU"}


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([], "crashed"),
        ([NOTE, REFUSED, REFUSED], "crashed"),
        ([REFUSED, MISSING], "crashed"),
        ([NOTE, REFUSED, MEASURED], "done"),
        ([MEASURED | {"refused": None}, MISSING], "done"),
        ([MISSING, NOTE], "skipped"),
        ([MEASURED, {"part": "speed", "skipped": "no time left after 61 s"}], "skipped"),
        ([MEASURED, {"refused": "WRONG"}], "wrong"),
        ([{"passed": False}, {"skipped": "no time left"}], "wrong"),
        ([REFUSED, {"passed": True}], "done"),
    ],
)
def test_a_step_is_done_where_it_found_something(imported, tmp_path, monkeypatch, rows, status):
    steps, supervising = imported("steps"), imported("supervising")
    results = supervising.Results(tmp_path / "results.jsonl")
    monkeypatch.setitem(steps._OF, "sweep", lambda *_: rows)
    ended = steps.run("sweep decode 4", results, rehearse=True)
    assert supervising._ENDS.get(ended, supervising.CRASHED) == status
    assert results.rows() == [{"step": "sweep decode 4", **row} for row in rows]


def test_a_sweep_that_goes_on_tries_again_what_was_refused(imported, tmp_path, monkeypatch):
    steps, sweeping = imported("steps"), imported("sweeping")
    results = imported("supervising").Results(tmp_path / "results.jsonl")
    results.write("sweep decode 4", **REFUSED)
    results.write("sweep decode 4", **MEASURED)
    found = []
    monkeypatch.setattr(sweeping, "decode", lambda shapes, bits, have: found.append((bits, have)) or [])
    assert steps.run("sweep decode 4", results, rehearse=True) == 0  # what is there is not measured again
    assert found == [(4, {"a"})]


def test_what_is_compiled_ahead(imported):
    """Names do not hide each other, and each work can be called; nothing is compiled."""
    works = imported("ahead").works()
    sweeping, kernels = imported("sweeping"), imported("kernels")
    assert all(map(callable, works.values()))
    quick = [name for name, _ in kernels.calls(quick=True) if "mask" not in name]
    assert len(set(quick)) == len(quick)
    launches = 3 * len(sweeping.DECODE) + len(sweeping.FORMS) * (len(sweeping.PREFILL) + 1)
    assert len(works) == launches + 2 * 2 + len(sweeping.RESTORED) - 1 + len(quick)


def test_the_default_budget_holds_the_gates_the_peers_and_the_sweeps(imported):
    steps, day = imported("steps"), imported("day")
    within, _ = imported("supervising").outlook(steps.steps(rehearse=False), day.BUDGET)
    places = {name: place for place, name in enumerate(within)}
    gates = [places[f"gate {name}"] for name in steps.GATES]
    peers = [places[f"peers {name}"] for name in ("decode", "prefill")]
    sweeps = [place for name, place in places.items() if name.startswith("sweep")]
    assert max(gates) < min(peers) < max(peers) < min(sweeps)
    order = [step.name for step in steps.steps(rehearse=False)]
    again = [order.index(f"peers {name} again") for name in ("decode", "prefill")]
    assert max(order.index(name) for name in places if name.startswith("sweep")) < order.index("launches") < min(again)
    assert len(sweeps) == len(steps.WIDTHS) + 2


def test_a_session_begins_with_what_probably_fits(imported, tmp_path, monkeypatch, capsys):
    day = imported("day")
    monkeypatch.setattr(day, "_gpu", lambda: "a GPU")
    monkeypatch.setattr(day, "run_steps", lambda *_: Counter())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["day.py", "--out", str(tmp_path), "--budget", "100"])
    assert day.main() == 0
    within, beyond, *_ = capsys.readouterr().out.splitlines()
    assert within.startswith("probably within 100 s: facts, compile, gate stages,")
    assert beyond.startswith("probably not: peers decode, peers prefill,")


def test_launches_that_the_sweeps_chose_are_a_file_that_the_package_loads(imported, tmp_path, monkeypatch):
    """The best over shapes and widths, relative to the best of each; the other entries stay as they are."""
    steps, supervising = imported("steps"), imported("supervising")
    results = supervising.Results(tmp_path / "results.jsonl")
    assert steps.run("launches", results, rehearse=True) == supervising.LEFT_OUT, "nothing was swept"
    shape = {"batch": 1, "keys": 192, "registers": 0}
    for bits, warps, seconds in ((4, 1, 1.0), (4, 2, 1.2), (3, 1, 3.0), (3, 2, 2.0)):
        launch = {"rows": 2, "warps": warps, "stages": 2}
        results.write(f"sweep decode {bits}", key=f"{bits} {warps}", bits=str(bits), seconds=seconds, **launch, **shape)
    ordered = {"rows": 2, "warps": 4, "stages": 1, "bits": "3, keys in order"}
    results.write("sweep decode 3", key="ordered", seconds=0.1, **ordered, **shape)
    for form, rows, seconds in (("exp", 32, 2.0), ("exp", 16, 1.0), ("sas", 32, 0.5)):
        launch = {"rows": rows, "warps": 4, "stages": 1, "softmax": form}
        results.write("sweep prefill", key=f"{form} {rows}", seconds=seconds, **launch, **shape)
    assert steps.run("launches", results, rehearse=True) == 0
    configs = importlib.import_module("turboattention.kernels.triton.configs")
    decode, prefill = configs._DECODE["interpreter"], configs._PREFILL["interpreter"]
    monkeypatch.setitem(configs._DECODE, "interpreter", {size: {**launches} for size, launches in decode.items()})
    monkeypatch.setitem(configs._PREFILL, "interpreter", {**prefill})
    interpreter = configs.ARCHITECTURES["interpreter"]
    before = configs.decode(interpreter, 8, 64, False, False)
    configs.load(tmp_path / "launches.json")
    try:
        assert configs.decode(interpreter, 2, 64, False, False) == configs.Launch(2, 2, 2)
        assert configs.decode(interpreter, 8, 64, False, False) == before
        assert configs.prefill(interpreter, 64, False) == configs.Launch(16, 4, 1)
        (tmp_path / "launches.json").write_text('{"architecture": "sm_1"}')
        with pytest.raises(ConfigError, match=r"^launches: expected a file that benchmarks/gpu/day.py wrote, got"):
            configs.load(tmp_path / "launches.json")
    finally:
        for cached in (configs.decode, configs.prefill, configs.restored_prefill):
            cached.cache_clear()


def test_what_was_compiled_is_one_file(imported, tmp_path, monkeypatch):
    steps = imported("steps")
    results = imported("supervising").Results(tmp_path / "results.jsonl")
    cache = tmp_path / "compiled"
    for path, content in {"a/decode.cubin": b"code", "a/decode.json": b"{}", "a/decode.ttir": b"text"}.items():
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_bytes(content)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert steps.run("cubins", results, rehearse=False) == 0
    (row,) = results.rows("cubins")
    assert row["files"] == 2
    with tarfile.open(tmp_path / row["log"]) as archive:
        assert archive.getnames() == ["a/decode.cubin", "a/decode.json"]
        archive.extractall(tmp_path / "again", filter="data")
    assert (tmp_path / "again" / "a" / "decode.cubin").read_bytes() == b"code"


def test_products_that_are_not_exact_are_found(imported, monkeypatch):
    """The interpreter's are; where one is off, the gate says so."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chained = imported("chained")
    chained.check(16, 64, 1, 1)
    monkeypatch.setattr(chained, "BLOCKS", 2)
    kernel = chained._chained

    class Off:
        def __getitem__(self, grid):
            def launch(q, k, v, out, *rest, **options):
                kernel[grid](q, k, v, out, *rest, **options)
                out[1, 3, 5] += 1

            return launch

    monkeypatch.setattr(chained, "_chained", Off())
    with pytest.raises(AssertionError, match=r"^1 of 3072 differ$"):
        chained.check(16, 64, 1, 1)


def test_sources_without_a_repository_are_identified_by_their_contents(imported, tmp_path):
    """So that results of an older copy do not count as those of a newer one."""
    day, kernel = imported("day"), tmp_path / "src" / "turboattention" / "kernel.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("one")
    first = day.sources(tmp_path)
    assert day.sources(tmp_path) == first
    kernel.write_text("two")
    second = day.sources(tmp_path)
    kernel.rename(kernel.with_name("other.py"))
    assert len({first, second, day.sources(tmp_path)}) == 3
