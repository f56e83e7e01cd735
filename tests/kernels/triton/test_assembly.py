"""Assembly of the kernels, compiled without a GPU: integer matrix instructions for both products, and no spills.

Compiled in processes of their own, which do not interpret; Triton keeps what it has compiled. Minutes for each target:
`make test-long` runs them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch

from turboattention.kernels.triton import configs, widths

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "assembly.py"
every_target = pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
LEAST_COLUMNS = {"sm_90": 8, "sm_80": 8, "gfx942": 16}
MASKS = ("", "bool", "add", "add")  # without, and those of benchmarks/gpu/kernels.py
ONE_WIDTH = {widths.pair_of(bits, bits): bits for bits in (2, 3, 4)}
TWO_WIDTHS = {widths.pair_of(widths.TWO_WIDTHS + bits, bits): bits for bits in (2, 3, 4)}
BOTH = {one + two: bits for (one, bits), two in zip(ONE_WIDTH.items(), TWO_WIDTHS, strict=True)}
PAIRS = ONE_WIDTH | TWO_WIDTHS | BOTH
"""`page_offsets.pairs_mask` where V of all heads has as many bits as K, which has one width, two, or either."""
NAMES = {"sm_90": ("IGMMA",), "sm_80": ("IMMA",), "gfx942": ("v_mfma_i32",)}

LATER = tuple(map(int, metadata.version("triton").split(".")[:2])) > (3, 6)


def decode_product(target: str, row: dict[str, Any]) -> str | tuple[str, ...]:
    """How its instructions begin. IGMMA takes four warps, and Triton takes it for 16 columns (after 3.6, 8) or more."""
    fewest = 8 if LATER else 16
    return "IMMA" if target == "sm_90" and (row["warps"] < 4 or row["constants"]["R"] < fewest) else NAMES[target]


@functools.cache
def compiled(target: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2] / "src")
    command = [sys.executable, str(SCRIPT), target, "--quick", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def of(target: str, kernel: str) -> list[dict[str, Any]]:
    return [row for row in compiled(target) if row["kernel"] == kernel]


# Of a thread, with Triton 3.6 as on GPUs so far, and with later releases.
MOST_SPILLED = 96 if LATER else 0


@every_target
def test_no_launch_spills(target):
    """Later releases of Triton spill a few words of decode in one warp, which cost less than launches that spill
    nothing: two warps take 1.2 to 1.9 times as long on an H100."""
    rows = compiled(target)
    assert {row["purpose"]: row["spill_bytes"] for row in rows if row["spill_bytes"] > MOST_SPILLED} == {}
    plain = [row for row in rows if row["kernel"] == "prefill" and not row["constants"]["MASK"]]
    assert all(row["spill_bytes"] == 0 for row in plain)
    assert all(0 < row["registers"] <= (512 if target == "gfx942" else 255) for row in rows)


@every_target
def test_programs_take_no_more_shared_memory_than_there_is(target):
    """Configurations of sm_80 also run on sm_86, sm_89 and sm_120, whose programs can have less."""
    most = {"sm_80": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}[target]
    assert {row["purpose"]: row["shared"] for row in compiled(target) if row["shared"] > most} == {}


@every_target
def test_resident_programs_of_decode_are_counted_from_what_its_launches_take(target, monkeypatch):
    """`configs.resident`, from which splits follow, against the compiled registers and shared memory of kernels without
    masks, which take no more than it says. A processor: A100's, H100's or MI300's."""
    shared = {"sm_80": 164 << 10, "sm_90": 228 << 10, "gfx942": 64 << 10}[target]
    monkeypatch.setattr(configs, "architecture_of", lambda device: configs.ARCHITECTURES[target])
    monkeypatch.setattr(configs, "_processors", lambda device: 1)
    monkeypatch.setattr(configs, "_shared_memory", lambda device: shared)
    configs.resident.cache_clear()
    wrong = {}
    for row in (*of(target, "decode"), *of(target, "paged_decode")):
        c = row["constants"]
        if c.get("MASK"):
            continue
        launch = configs.Launch(c["R"], row["warps"], row["stages"])
        wide = max(c["WIDE"], c.get("V_WIDE", 0))
        pairs = tuple((k, v) for k in range(16) for v in range(9) if c["PAIRS"] & widths.pair_of(k, v))
        said = configs.resident(launch, wide, pairs, torch.device("meta"))
        registers = -(-row["registers"] // 8) * 8
        fitting = min(2048 // registers // row["warps"], shared // (row["shared"] + 1024))
        # Later releases exchange more through shared memory; what counts is how many programs fit.
        if said > fitting or (not LATER and configs.shared_bytes(launch, wide, pairs) < row["shared"]):
            wrong[row["purpose"]] = said, fitting, row["shared"]
    configs.resident.cache_clear()
    assert wrong == {}


@every_target
def test_both_products_of_prefill_are_integer_matrix_instructions(target):
    rows = of(target, "prefill")
    shipped = [(d, mask) for d in (64, 128, 256) for mask in MASKS]
    assert [(row["constants"]["D"], row["constants"]["MASK"]) for row in rows] == shipped
    for row in rows:
        c = row["constants"]
        assert all(name.startswith(NAMES[target]) for name in row["products"])
        # q k^T and p v, of 64 keys each, in the loop over whole blocks, which masks do without, and in the other.
        loops = 1 if c["MASK"] else 2
        assert row["multiplications"] >= 2 * loops * c["M"] * 64 * c["WIDE"]


@every_target
def test_both_products_of_decode_are_integer_matrix_instructions(target):
    rows = of(target, "decode")
    shipped = [(d, bits, mask) for d in (128, 256) for bits in (4, 3, 2) for mask in MASKS]
    shipped += [(128, bits, "") for bits in (4, 4, 4, 3, 3, 3, 2, 2, 2)]
    shipped += [(128, bits, "") for bits in (4, 3, 2)]  # with a softcap
    found = [(row["constants"]["D"], PAIRS[row["constants"]["PAIRS"]], row["constants"]["MASK"]) for row in rows]
    assert found == shipped
    for row in rows:
        c = row["constants"]
        assert all(name.startswith(decode_product(target, row)) for name in row["products"]), row["products"]
        values = max(LEAST_COLUMNS[target], c["R"])
        # A query times a packed key's steps is two columns, a high and a low part.
        keys = max(LEAST_COLUMNS[target], 2 * c["R"])
        # Packed pages (of either kind) beside INT8 pages and tail rows.
        kinds = 2 if c["PAIRS"] in BOTH else 1
        wanted = kinds * (keys + values) + 2 * 2 * values
        assert row["multiplications"] >= 64 * c["WIDE"] * wanted


@every_target
def test_both_products_over_pages_of_a_server_are_integer_matrix_instructions(target):
    rows = of(target, "paged_prefill")
    found = [(row["constants"]["D"], row["constants"]["RESTORED"]) for row in rows]
    assert found == [(d, restored) for d in (64, 128, 256) for restored in (False, False, True)]
    for row in rows:
        c = row["constants"]
        assert all(name.startswith(NAMES[target]) for name in row["products"])
        # Whole pages, pages that some rows see, and tail blocks.
        assert row["multiplications"] >= 2 * 3 * c["M"] * 64 * c["WIDE"]
    rows = of(target, "paged_decode")
    assert {(row["constants"]["WIDE"], row["constants"]["R"]) for row in rows} == {
        (wide, 16 if target == "gfx942" else size) for wide, size in ((64, 4), (128, 4), (128, 8), (256, 4), (256, 8))
    }
    for row in rows:
        c = row["constants"]
        assert all(name.startswith(decode_product(target, row)) for name in row["products"]), row["products"]
        values, keys = (max(LEAST_COLUMNS[target], n * c["R"]) for n in (1, 2))
        assert row["multiplications"] >= 64 * c["WIDE"] * (keys + values + 2 * values)


@every_target
def test_a_flush_reads_all_rows_before_it_writes_over_them(target):
    """Rows move within the buffer: threads read what others write."""
    (row,) = (row for row in of(target, "fill_pages") if not row["constants"]["PAGED"])
    # Keys' move and values', of all rows at once; other loads and stores are fewer.
    assert len(re.findall(r"L{5,}B+S{5,}", row["accesses"])) == 2, row["accesses"]


@every_target
def test_no_operation_depends_on_which_bytes_share_a_register(target):
    """The compiler orders the registers of a tile as it likes, and has done so differently from release to release:
    inline assembly over packed lanes may not say what each of them holds. Words are packed in the code instead."""
    rows = compiled(target)
    assert {row["purpose"]: row["packed_lanes"] for row in rows if row["packed_lanes"]} == {}
    if target.startswith("sm"):
        assert any(row["inline_assembly"] for row in of(target, "decode"))


@every_target
def test_no_product_on_tensor_cores_reads_registers_that_are_written_again(target):
    """Before CUDA 13.3 the assembler may reuse registers that an asynchronous product still reads as its first operand.
    What is checked: `register_hazards` of benchmarks/gpu/compiling.py."""
    assert {row["purpose"]: row["overwritten"] for row in compiled(target) if row["overwritten"]} == {}
    if target == "sm_90":  # else the check would look at nothing: weights times values is such a product
        assert all(row["from_registers"] for row in of(target, "prefill"))
