"""Writes to registers that an asynchronous product still reads, found in lines as of NVIDIA's assembly."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from ...scripts import benchmark_script

PRODUCT = ("IGMMA.64x64x32.S8.S8", "R24, R4, gdesc[UR4], R24, gsb0")
WAIT, PARTIAL = (("WARPGROUP.DEPBAR.LE", f"gsb0, {left}") for left in ("0x0", "0x1"))


@pytest.fixture(scope="module")
def compiling():
    with benchmark_script("gpu/compiling.py") as module:
        yield module


@pytest.fixture(scope="module")
def hazards(compiling):
    return compiling.register_hazards


def test_spills_count_in_innermost_loops_alone(compiling):
    code = ["STL", "IMMA", "LDL", "BRA", "LDL.LU", "BRA", "BRA"]
    loops = [(1, 3), (0, 5), (2, 6)]  # the last one branches back into the middle of an inner loop
    numbers = {"warps": 1, "stages": 1, "registers": 255, "spill_bytes": 8, "shared": 0}
    kernel = compiling.Assembly("decode", {}, **numbers, code=code, loops=loops)
    assert kernel.spills_in_loops == 1


@pytest.mark.parametrize(
    "write",
    [
        ("IADD3", "R5, R1, R2, RZ"),
        ("IADD3", "R7, P0, R1, R2, RZ"),
        ("SHFL.BFLY", "PT, R4, R9, 0x1, 0x1f"),
        ("LDG.E.64", "R3, desc[UR6][R40.64]"),
        ("LDS.128", "R1, [R40]"),
        ("LDSM.16.M88.4", "R1, [R40]"),
        ("LDSM.16.MT88.2", "R3, [R40]"),
        ("IMAD.WIDE.U32", "R3, R1, R2, R10"),
    ],
    ids=" ".join,
)
def test_writes_of_every_width_are_found(hazards, write):
    assert hazards([PRODUCT, write, WAIT]) == [" ".join(write)]
    assert hazards([PRODUCT, WAIT, write]) == []


@pytest.mark.parametrize(
    "harmless",
    [
        ("IADD3", "R8, R4, R5, RZ"),
        ("LDSM.16.M88.2", "R2, [R40]"),
        ("LDS.64", "R8, [R4]"),
        ("STS.128", "[R40], R4"),
        ("ISETP.GE.AND", "P0, PT, R4, R5, PT"),
        ("R2P", "PR, R4, 0x7f"),
    ],
    ids=" ".join,
)
def test_others_are_not(hazards, harmless):
    assert hazards([PRODUCT, harmless, WAIT]) == []


def test_an_operand_that_is_kept_for_reuse(hazards):
    product = (PRODUCT[0], "R24, R4.reuse, gdesc[UR4], R24, gsb0")
    assert hazards([product, ("MOV", "R6, R1"), WAIT]) == ["MOV R6, R1"]


def test_a_product_of_shared_memory_reads_no_registers(hazards):
    assert hazards([(PRODUCT[0], "R4, gdesc[UR4], R4, gsb0"), ("MOV", "R4, R1")]) == []


def test_a_wait_for_all_but_some_is_none(hazards):
    assert hazards([PRODUCT, PARTIAL, ("MOV", "R6, R1"), WAIT]) == ["MOV R6, R1"]


def test_a_product_at_a_loops_end_meets_its_beginning(hazards):
    write = ("MOV", "R6, R1")
    assert hazards([write, WAIT, PRODUCT, ("BRA", "`(.L_x_1)")]) == ["MOV R6, R1"]
    assert hazards([WAIT, write, PRODUCT, ("BRA", "`(.L_x_1)")]) == []


def test_loops_of_amds_assembly(compiling):
    """The branch back, and what stands before its label; branches forward are none."""
    lines = [
        ".LBB0_1:",
        "\tv_mov_b32_e32 v1, v2",
        "\ts_cbranch_scc1 .LBB0_3",
        ".LBB0_2:",
        "\tglobal_load_dword v1, v2, s[0:1]",
    ]
    lines += [
        "\tv_mfma_i32_16x16x32_i8 a[0:3], v[0:1], v[2:3], 0",
        "\ts_cbranch_vccnz .LBB0_2",
        ".LBB0_3:",
        "\ts_endpgm",
    ]
    lines += ["    .vgpr_count:     77", "    .private_segment_fixed_size: 12"]
    registers, spilled, code, _, loops = compiling._amd({"amdgcn": "\n".join(lines)})
    assert (registers, spilled, len(code)) == (77, 12, 6)
    assert loops == [(2, 4)]
    assert code[2:5] == ["global_load_dword", "v_mfma_i32_16x16x32_i8", "s_cbranch_vccnz"]
