"""What an iteration of each loop of a kernel takes, compiled without a GPU. For decode's loop over 4-bit pages:

    PYTHONPATH=src python3 benchmarks/gpu/loop_counts.py "decode d128 int4, group 4" --kernel decode

The name is of a call of kernels.py, whose loops over pages are those with products. docs/gpu.md has tables of these
counts: instructions, copies to shared memory, other loads from global memory, and waits (barriers and waits for
copies).
"""

from __future__ import annotations

import argparse
import os
from collections import Counter

COUNTED = {
    "products": ("IGMMA", "IMMA", "v_mfma"),
    "copies": ("LDGSTS",),
    "global loads": ("LDG", "global_load", "buffer_load"),
    "waits": ("BAR", "DEPBAR", "s_barrier"),
    "spilled words read": ("LDL", "scratch_load"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", help="name of a call of kernels.py")
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "gfx942"))
    parser.add_argument("--kernel", default="", help="only this kernel")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected it unset, got 1: interpreted kernels cannot be compiled")
    import kernels
    import torch
    import triton
    from compiling import cross_compiling

    calls = dict(kernels.calls())
    if options.call not in calls:
        parser.error(f"expected a call of {'; '.join(calls)}, got {options.call}")
    with torch.inference_mode(), cross_compiling(options.target) as compiled:
        calls[options.call]()
    print(f"Triton {triton.__version__}, {options.target}: {options.call}")
    for kernel in compiled:
        if options.kernel not in ("", kernel.kernel):
            continue
        print(f"{kernel.kernel}: {kernel.instructions} instructions, {kernel.spill_bytes} bytes spilled")
        for start, end in kernel.loops:
            names = Counter(_kind(name) for name in kernel.code[start : end + 1])
            counts = {what: sum(names[name] for name in which) for what, which in COUNTED.items()}
            said = ", ".join(f"{count} {what}" for what, count in counts.items())
            print(f"  loop of {end - start + 1} instructions: {said}")


def _kind(instruction: str) -> str:
    """Its name without what says of which width or form it is: NVIDIA's up to a dot, of AMD's the first two words."""
    return "_".join(instruction.split(".")[0].split("_")[:2])


if __name__ == "__main__":
    main()
