"""Kernels compiled ahead by many processes at once, into the cache that the steps after find them in.

A launch on tensors in host memory compiles for the GPU as `compiling` does; what it was compiled from, and so its place
in Triton's cache, is that of the launch on the GPU.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboattention.kernels.triton.configs import Launch

Work = Callable[[], object]


def works() -> dict[str, Work]:
    """By name, what the sweeps and the gates launch."""
    import kernels
    import paged_kernels
    import sweeping

    found: dict[str, Work] = {}
    for bits, launch in itertools.product((4, 3, 2), sweeping.DECODE):
        found[f"decode int{bits} {launch}"] = functools.partial(_decode, bits, launch)
    for form, launch in itertools.product(sweeping.FORMS, sweeping.PREFILL):
        found[f"prefill {form} {launch}"] = functools.partial(_prefill, form, launch)
    # What reads restored pages is the same at every width, and kernels.py has 4 bits at the first launch.
    for bits in (3, 2):
        found[f"pages int{bits}"] = paged_kernels.mixed(128, bits)
        found[f"pages int{bits}, restored once"] = paged_kernels.restored(128, bits)
    for launch in sweeping.RESTORED[1:]:
        found[f"pages int4, restored once, {launch}"] = functools.partial(_restored, launch)
    for form in sweeping.FORMS:
        found[f"prefill {form}, other rescaling"] = functools.partial(_other_prefill, form)
    return found | {name: work for name, work in kernels.calls(quick=True) if "mask" not in name}


def _decode(bits: int, launch: Launch) -> None:
    import kernels
    import sweeping

    with sweeping.launched(decode=launch):
        kernels._decode(kernels.CONFIG, 128, (bits,) * kernels.KV_HEADS, kernels.GROUP)()


def _prefill(form: str, launch: Launch) -> None:
    import kernels
    import sweeping

    with sweeping.launched(prefill=launch):
        kernels._prefill(kernels.CONFIG.replace(softmax=form), 128)()


def _restored(launch: Launch) -> None:
    import paged_kernels
    import sweeping

    with sweeping.launched(restored=launch):
        paged_kernels.restored(128, 4)()


def _other_prefill(form: str) -> None:
    import sweeping

    with sweeping.other_rescaling():
        _prefill(form, sweeping.PREFILL[0])


def compile_all(target: str, processes: int | None = None) -> list[dict[str, Any]]:
    """A row for each kernel: registers, spills, shared memory, instructions."""
    names = list(works())
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        for part in pool.map(_compiled, [(target, name) for name in names]):
            rows += part
    return rows


def _compiled(which: tuple[str, str]) -> list[dict[str, Any]]:
    import torch
    from compiling import cross_compiling

    target, name = which
    start = time.perf_counter()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), cross_compiling(target) as compiled:
            works()[name]()
    except Exception as problem:  # one that does not compile is a row
        return [{"key": name, "refused": f"{type(problem).__name__}: {problem}"[:300]}]
    return [
        {
            "key": f"{name} {kernel.kernel}",
            "registers": kernel.registers,
            "spilled": kernel.spill_bytes,
            "shared": kernel.shared,
            "instructions": kernel.instructions,
            "seconds": round(time.perf_counter() - start, 1),
        }
        for kernel in compiled
    ]
