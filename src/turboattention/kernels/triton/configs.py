"""Launch configurations: a table by architecture, head_dim and rows.

The entries of sm_90 at head_dim 128, for decode with up to four rows and for prefill, were within 5 % of the fastest of
a sweep on an H100 at every width (benchmarks/gpu/sweeping.py; benchmarks/results/gpu-h100/after.jsonl). The others were
chosen by reading the assembly. The configurations that benchmarks/gpu/kernels.py lists as quick spill nothing with
Triton 3.6, at most 96 bytes per thread with later releases, and prefill without masks nothing with either
(tests/kernels/triton/test_assembly.py). On sm_90 decode with two warps spills nothing with later releases, but took 1.2
to 1.3 times as long at 4 bits and 1.8 to 1.9 times at 3 (metadata.jsonl there). An architecture also represents later
ones with as much shared memory (`architecture_of`).
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from ...errors import ConfigError
from .widths import TWO_WIDTHS

FUSION = {"enable_fp_fusion": True}
"""For kernels whose results need not be bit-identical across backends. Explicit, since Triton's default will change."""

EXACT = {"enable_fp_fusion": False}
"""For the others: fused multiply-adds would make results differ from those of other backends."""


@dataclass(frozen=True)
class Launch:
    """Launch parameters: query rows per program, warps, pipeline stages, and registers per thread at most (0: as many
    as the compiler takes; only NVIDIA's has such a limit)."""

    rows: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit, **FUSION}


@dataclass(frozen=True)
class Architecture:
    """Properties of a device.

    assembly: "ptx" if inline PTX may be used, else "". slow_int_to_float: whether integer conversion has low
    throughput, so that adding a magic number is faster. skips_rescaling: whether prefill skips rescaling if no row max
    increased. restores_pages: whether prefill over a server's pages restores them once per step (`restored_pages`).
    registers: of a thread in decode at most, up to head_dim 128 and beyond
    (tests/kernels/triton/test_assembly.py).
    """

    name: str
    assembly: str
    slow_int_to_float: bool
    skips_rescaling: bool
    restores_pages: bool
    registers: tuple[int, int]


# On an H100, limits of 168 and 128 registers gained 4 % at INT3 and were slower otherwise: more warps run, but their
# spills cost as much as the latency they hide.
ARCHITECTURES = {
    "sm_80": Architecture("sm_80", "ptx", True, False, True, (256, 256)),
    "sm_90": Architecture("sm_90", "ptx", False, False, True, (256, 256)),
    "gfx942": Architecture("gfx942", "", False, False, True, (256, 512)),
    "interpreter": Architecture("interpreter", "", False, True, False, (256, 256)),
}

# By head_dim, up to and including the key.
_PREFILL = {
    "sm_80": {64: Launch(128, 8, 2), 128: Launch(32, 4, 2), 256: Launch(32, 4, 1)},
    "sm_90": {64: Launch(128, 8, 2), 128: Launch(64, 4, 3), 256: Launch(64, 8, 3)},
    "gfx942": {64: Launch(128, 8, 1), 128: Launch(64, 4, 1), 256: Launch(32, 4, 1)},
    "interpreter": {256: Launch(64, 4, 1)},
}

# With a mask, whose addresses and values need registers; other entries are as without.
_MASKED_PREFILL = {
    "sm_80": {256: Launch(32, 8, 1)},
    "sm_90": {128: Launch(64, 8, 2)},
    "gfx942": {64: Launch(128, 4, 1)},
}

# Over pages that are restored in memory; other entries are as for `prefill`, which reads the like.
_RESTORED_PREFILL = {"sm_80": {256: Launch(32, 8, 1)}, "gfx942": {64: Launch(128, 4, 1)}}

# Over a server's pages, by head_dim as above. Programs are wide: all rows of one share what restoring a page takes.
_PAGED_PREFILL = {
    "sm_80": {64: Launch(128, 8, 2), 128: Launch(64, 8, 1), 256: Launch(32, 8, 1)},
    "sm_90": {128: Launch(128, 8, 2), 256: Launch(64, 8, 3)},
    "gfx942": {64: Launch(128, 4, 1), 128: Launch(64, 4, 1), 256: Launch(32, 4, 1)},
    "interpreter": {256: Launch(64, 4, 1)},
}

# By head_dim, and by columns of the product: query rows per KV head, a power of two.
_DECODE = {
    "sm_80": {
        128: {4: Launch(4, 1, 2), 8: Launch(8, 4, 3), 16: Launch(16, 4, 3)},
        256: {4: Launch(4, 2, 3), 8: Launch(8, 4, 3)},
    },
    "sm_90": {
        128: {4: Launch(4, 1, 3), 8: Launch(8, 1, 2), 16: Launch(16, 4, 3)},
        256: {4: Launch(4, 2, 4), 8: Launch(8, 4, 2)},
    },
    "gfx942": {256: {16: Launch(16, 4, 1)}},
    "interpreter": {256: {4: Launch(4, 1, 1), 8: Launch(8, 1, 1), 16: Launch(16, 1, 1)}},
}

# With a mask or softcap; other entries are as above. Without a limit, the compiler takes 168 registers where there is a
# softcap on sm_90, and spills 16 bytes.
_ADJUSTED_DECODE = {
    "sm_80": {128: {4: Launch(4, 2, 3)}},
    "sm_90": {128: {4: Launch(4, 2, 3, 255), 8: Launch(8, 4, 3, 255), 16: Launch(16, 4, 2)}},
}

# Over heads of several pairs of widths, whose loops follow each other; other entries are as above.
_MIXED_DECODE = {"sm_80": {128: {4: Launch(4, 2, 3)}}}


@functools.cache
def architecture_of(device: torch.device) -> Architecture:
    """The entry for a device; for a CPU, the interpreter's."""
    if device.type == "cpu":
        return ARCHITECTURES["interpreter"]
    if torch.version.hip:
        return ARCHITECTURES["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    # Programs can use 227 KiB of shared memory on these, 99 KiB on sm_120.
    return ARCHITECTURES["sm_90" if major in (9, 10) else "sm_80"]


@functools.cache
def refusal(device: torch.device) -> str | None:
    """Why the kernels do not run on a device, or None."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"{device} has compute capability {major}.{minor}, its kernels need 8.0"


@functools.cache
def prefill(architecture: Architecture, head_dim: int, masked: bool) -> Launch:
    """Configuration of prefill; `masked`: with an `attn_mask`."""
    table = _PREFILL[architecture.name]
    size = min(size for size in table if size >= head_dim)
    return _MASKED_PREFILL.get(architecture.name, {}).get(size, table[size]) if masked else table[size]


@functools.cache
def paged_prefill(architecture: Architecture, head_dim: int) -> Launch:
    """Configuration of prefill over a server's pages."""
    table = _PAGED_PREFILL[architecture.name]
    return table[min(size for size in table if size >= head_dim)]


@functools.cache
def restored_prefill(architecture: Architecture, head_dim: int) -> Launch:
    """Configuration of prefill over a server's pages that are restored in memory."""
    table = _PREFILL[architecture.name]
    size = min(size for size in table if size >= head_dim)
    return _RESTORED_PREFILL.get(architecture.name, {}).get(size, table[size])


@functools.cache
def decode(architecture: Architecture, rows: int, head_dim: int, adjusted: bool, mixed: bool) -> Launch:
    """Configuration of decode. rows: query rows per KV head, split into programs of at most `Launch.rows`.
    adjusted: with an `attn_mask` or a softcap; mixed: over heads of several pairs of widths."""
    widths = _DECODE[architecture.name]
    size = min(size for size in widths if size >= head_dim)
    fitting = [columns for columns in widths[size] if columns >= rows]
    columns = min(fitting) if fitting else max(widths[size])
    launch = widths[size][columns]
    for applies, table in ((mixed, _MIXED_DECODE), (adjusted, _ADJUSTED_DECODE)):
        if applies:
            launch = table.get(architecture.name, {}).get(size, {}).get(columns, launch)
    return launch


LARGEST_GRID = 65535
"""Maximum size of a grid's second and third axes."""

LARGEST_DECODE_ROWS = 16
"""Maximum number of query rows per KV head for which the decode kernel is used."""


LARGEST_SPLITS = 256

_SPLIT_BLOCKS = 2
"""Overhead of a split (reading queries, writing and combining results), in blocks."""


@functools.lru_cache(maxsize=4096)
def splits(blocks: int, programs: int, held: int) -> int:
    """The number of splits of a sequence of `blocks` blocks that minimizes the estimated time.

    There are `programs` programs per split, which run in rounds of `held`, as many as are resident on the device.
    """
    most = max(1, min(-(-held // max(1, programs)) + 1, -(-blocks // 2), LARGEST_SPLITS))

    def time(splits: int) -> int:
        return -(-programs * splits // held) * (-(-blocks // splits) + _SPLIT_BLOCKS)

    return min(range(1, most + 1), key=time)


_LANE_REGISTERS = 2048
"""Registers of a processor per lane of a warp: 64 Ki over 32 lanes (NVIDIA), four SIMDs of 512 (AMD)."""

_RESERVED_SHARED = 1024
"""Bytes of shared memory that the driver takes for every program."""


@functools.lru_cache(maxsize=1024)
def resident(launch: Launch, wide: int, widths: tuple[tuple[int, int], ...], device: torch.device) -> int:
    """Programs of a decode launch that run on a device at once, as its registers and shared memory allow.

    wide: padded head_dim, of K or V if larger; widths: the pairs of widths of K (`page_offsets.key_widths`) and V."""
    registers = launch.registers or architecture_of(device).registers[wide > 128]
    by_registers = _LANE_REGISTERS // registers // launch.warps
    by_shared = _shared_memory(device) // (shared_bytes(launch, wide, widths) + _RESERVED_SHARED)
    return max(1, min(by_registers, by_shared)) * _processors(device)


def shared_bytes(launch: Launch, wide: int, widths: tuple[tuple[int, int], ...]) -> int:
    """Shared memory of a decode program without a mask, at most: codes of the pages that are copied ahead, and what
    its threads exchange."""
    bits = [(k_bits % TWO_WIDTHS or k_bits, v_bits) for k_bits, v_bits in widths]
    copied = (launch.stages - 1) * max((8 * wide * (k + v) for k, v in bits), default=0)
    two = any(k_bits > TWO_WIDTHS for k_bits, _ in widths)
    if launch.warps > 2 or wide < 128 or two or any(3 in pair for pair in bits):
        # Words of values change threads on their way to the product.
        return copied + 64 * wide + launch.warps * launch.rows * max(64, wide // 2)
    return max(copied, 64 * wide) + launch.warps * launch.rows * wide


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Of a processor, in bytes."""
    if device.type != "cuda":
        return 1 << 20
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def load(path: Path) -> None:
    """Use the launches that a sweep chose (`launches.json` of benchmarks/gpu/day.py) instead of the table's, for calls
    without masks and softcaps on devices of that architecture, up to that head_dim and number of query rows per KV
    head. Called on import with the file that TURBOATTENTION_LAUNCHES names. Raises ConfigError."""
    try:
        chosen = json.loads(path.read_text(encoding="utf-8"))
        name, head_dim, rows = chosen["architecture"], chosen["head_dim"], chosen["rows"]
        launches = {work: Launch(**chosen[work]) for work in ("decode", "prefill") if work in chosen}
        if not all(type(x) is int and x >= 0 for launch in launches.values() for x in astuple(launch)):
            raise ValueError("expected sizes of launches")
        tables = _DECODE[name], _PREFILL[name]
        decode_size, prefill_size = (min(size for size in table if size >= head_dim) for table in tables)
        if "decode" in launches:
            columns = tables[0][decode_size]
            columns[min(size for size in columns if size >= rows)] = launches["decode"]
        if "prefill" in launches:
            tables[1][prefill_size] = launches["prefill"]
    except (OSError, KeyError, TypeError, ValueError) as problem:
        raise ConfigError(
            f"launches: expected a file that benchmarks/gpu/day.py wrote, got {path}: {problem}"
        ) from None
    decode.cache_clear()
    prefill.cache_clear()
    restored_prefill.cache_clear()


if _file := os.environ.get("TURBOATTENTION_LAUNCHES"):
    load(Path(_file))
