"""Compile Triton kernels for GPUs that are not here, as their own launchers would launch them, and read the assembly.

    with cross_compiling("sm_90") as compiled:
        attend(...)                        # on CPU tensors: their addresses' alignment is what a launch looks at
    compiled[0].count("IGMMA"), compiled[0].registers, compiled[0].spill_bytes

Launching then means compiling, and nothing runs: results are whatever memory held. Works without a GPU or a driver in
Triton 3.6 to 3.9, and not under TRITON_INTERPRET=1 (kernels are then interpreted functions, which cannot be compiled).
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from turboattention.kernels.triton import configs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_PRODUCT = re.compile(r"IGMMA\.(\d+)x(\d+)x(\d+)\.S8\.S8|IMMA\.(16)(8)(32)\.S8\.S8|v_mfma_i32_(\d+)x(\d+)x(\d+)_?i8")
_ACCESSES = {"LDG": "L", "STG": "S", "BAR": "B"} | {
    "global_load": "L", "buffer_load": "L", "global_store": "S", "buffer_store": "S", "s_barrier": "B"
}  # fmt: skip
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Assembly:
    """One compiled kernel. registers: of a thread (AMD: with accumulators); spill_bytes: local or scratch memory of a
    thread; shared: bytes of a program; code: its instructions, without operands; inline_assembly: operations of
    that kind, packed_lanes: those of them over several elements at once; overwritten: `register_hazards`;
    from_registers: asynchronous products that read their first operand from registers; loops: their first instruction
    and the branch back to it, as instruction indices. For AMD, `overwritten` is empty and `from_registers` 0."""

    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared: int
    code: list[str] = field(repr=False)
    inline_assembly: int = 0
    packed_lanes: int = 0
    overwritten: list[str] = field(default_factory=list)
    from_registers: int = 0
    loops: list[tuple[int, int]] = field(default_factory=list)

    @functools.cached_property
    def mnemonics(self) -> Counter:
        """How often each instruction stands in the code."""
        return Counter(self.code)

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.mnemonics.items() if name.startswith(prefixes))

    @property
    def instructions(self) -> int:
        return len(self.code)

    @property
    def spills_in_loops(self) -> int:
        """Reads and writes of spilled registers in innermost loops; always 0 for AMD. An outer loop is one within which
        another ends: it may branch back into the middle of itself."""
        inner = [(a, b) for a, b in self.loops if not any(a < end < b for _, end in self.loops)]
        return sum(name.startswith(("LDL", "STL")) for a, b in inner for name in self.code[a : b + 1])

    @property
    def accesses(self) -> str:
        """Loads (L) and stores (S) of global memory and barriers (B), as they follow each other in the code."""
        return "".join(letter for name in self.code for prefix, letter in _ACCESSES.items() if name.startswith(prefix))

    @property
    def products(self) -> dict[str, int]:
        """Matrix instructions over INT8, and how often each stands in the code."""
        return {name: n for name, n in sorted(self.mnemonics.items()) if _PRODUCT.match(name)}

    @property
    def multiplications(self) -> int:
        """INT8 products that each matrix instruction in the code makes once, by all warps."""
        total = 0
        for name, count in self.products.items():
            wide = _PRODUCT.match(name)
            assert wide is not None
            rows, columns, depth = (int(x) for x in wide.groups() if x)
            # IGMMA is made by four warps together.
            total += rows * columns * depth * count * self.warps // (4 if name.startswith("IGMMA") else 1)
        return total


@contextlib.contextmanager
def cross_compiling(target: str) -> Iterator[list[Assembly]]:
    """Within, every launch of a kernel compiles it for `target` instead; the list has each compiled kernel once."""
    found: dict[int, Assembly] = {}
    result: list[Assembly] = []
    gpu, run = TARGETS[target], JITFunction.run
    here = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: gpu,
        get_active_torch_device=lambda: None,
    )

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self not in fresh:  # what it holds may be another target's
            self.device_caches.clear()
            fresh.append(self)
        kernel = _twice(lambda: run(self, *args, grid=grid, warmup=True, **options))
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if id(kernel) not in found:
            names = dict(zip(self.arg_names, args, strict=False)) | options
            constants = {p.name: names.get(p.name) for p in self.params if p.is_constexpr}
            found[id(kernel)] = _read(target, kernel, self.fn.__name__, constants)
            kept.append(kernel)
            result.append(found[id(kernel)])
        return kernel

    kept: list[Any] = []  # or an id could be used again
    fresh: list[JITFunction] = []
    architecture_of = configs.architecture_of
    triton.runtime.driver.set_active(here)  # type: ignore[arg-type]
    JITFunction.run = compile_only
    configs.architecture_of = lambda device: configs.ARCHITECTURES[target]
    try:
        yield result
    finally:
        JITFunction.run, configs.architecture_of = run, architecture_of
        triton.runtime.driver._active = None


def _twice(compile_it: Any) -> Any:
    """The assembler is a process of its own, which a busy machine may refuse once."""
    try:
        return compile_it()
    except OSError:
        time.sleep(1)
        return compile_it()


def _read(target: str, kernel: Any, name: str, constants: dict[str, Any]) -> Assembly:
    meta = kernel.metadata
    read = _nvidia if target.startswith("sm") else _amd
    registers, spill, code, lines, loops = read(kernel.asm)
    packed = [
        int(match) for match in re.findall(r"elementwise_inline_asm.*?packed_element = (\d+)", kernel.asm["ttgir"])
    ]
    from_registers = sum(
        name.startswith("IGMMA") and _REGISTER_A.match(operands) is not None for name, operands in lines
    )
    return Assembly(
        name, constants, meta.num_warps, meta.num_stages, registers, spill, meta.shared, code,
        len(packed), sum(lanes > 1 for lanes in packed), register_hazards(lines), from_registers, loops,
    )  # fmt: skip


_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Zx0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_REGISTER_A = re.compile(r"R\d+, R(\d+)(?:\.reuse)?, gdesc")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
_AMD_LINE = re.compile(r"^\t((?:[vs]|ds|global|buffer|flat|scratch)_[a-z0-9_]+)\s*(\S*)")
_WRITTEN = re.compile(r"(?:U?P\w+, )*R(\d+)\b")
_WIDTH = re.compile(r"\.(128|64|WIDE)\b|^LDSM.*\.([24])$")
_REGISTERS = {"128": 4, "64": 2, "WIDE": 2, "4": 4, "2": 2}
_PLAIN_STORES = (
    "ST",
    "RED",
    "ATOM",
    "BAR",
    "WARPGROUP",
    "BRA",
    "EXIT",
    "ISETP",
    "FSETP",
    "PLOP3",
    "R2UR",
    "R2P",
    "DSETP",
    "HSETP",
    "FCHK",
    "U",
    "LDGSTS",
)


def register_hazards(lines: list[tuple[str, str]]) -> list[str]:
    """Instructions that write a register which an asynchronous product before them, not yet waited for, reads as its
    first operand (64 x 32 INT8 of it are four registers). lines: mnemonics and operands of NVIDIA's assembly.

    They are read in the order of the code, twice, so that products at a loop's end meet what stands at its beginning;
    branches are not followed. A wait for all but some products counts as none. Not looked at: accumulators of later
    products, which follow each other in order."""
    busy: set[int] = set()
    found: dict[str, None] = {}
    for name, operands in (*lines, *lines):
        if name.startswith("WARPGROUP.DEPBAR"):
            if operands.endswith(" 0x0"):
                busy.clear()
        elif name.startswith("IGMMA"):
            if match := _REGISTER_A.match(operands):
                busy |= {int(match[1]) + i for i in range(4)}
        elif busy and not name.startswith(_PLAIN_STORES) and (match := _WRITTEN.match(operands)):
            wide = _WIDTH.search(name)
            count = _REGISTERS[wide[1] or wide[2]] if wide else 1
            if busy & {int(match[1]) + i for i in range(count)}:
                found[f"{name} {operands}"] = None
    return list(found)


_Read = tuple[int, int, list[str], list[tuple[str, str]], list[tuple[int, int]]]


def _nvidia(asm: dict[str, Any]) -> _Read:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(_TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        text = _output(_TOOLS / "nvdisasm", "-c", file.name)
    size = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(lines)
        elif (match := _SASS.match(line)) and match[1] != "NOP":
            lines.append((match[1], match[2]))
    loops = []
    for end, (name, operands) in enumerate(lines):
        target = re.search(r"\.L_\w+", operands) if name.startswith("BRA") else None
        if target and (start := labels.get(target[0], end)) < end:
            loops.append((start, end))
    return size["REG"], size["STACK"] + size["LOCAL"], [name for name, _ in lines], lines, loops


def _amd(asm: dict[str, Any]) -> _Read:
    text = asm["amdgcn"]
    number = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    names: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if match := _AMD_LABEL.match(line):
            labels[match[1]] = len(names)
        elif match := _AMD_LINE.match(line):
            target = labels.get(match[2]) if match[1].startswith(("s_branch", "s_cbranch")) else None
            if target is not None:
                loops.append((target, len(names)))
            names.append(match[1])
    return number["vgpr_count"], number["private_segment_fixed_size"], names, [], loops


def _output(*command: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
