"""Writes the tables of docs/numerics.md: `python benchmarks/numerics.py` prints them as Markdown."""

from __future__ import annotations

from turboattention.evaluation.errors_by_preset import (
    EARLY,
    LONG_CONTEXT,
    PRESETS,
    early_error,
    long_context_error,
    preset_error,
)
from turboattention.evaluation.synthetic import KINDS

WIDTHS = (8, 4, 3, 2)


def main() -> None:
    for index, title in enumerate(("storage alone", "whole integer path")):
        print(f"\nRelative error at 8 / 4 / 3 / 2 bits, {title}:\n")
        print("| |", " | ".join(KINDS), "|")
        print("|---" * (len(KINDS) + 1) + "|")
        for name, config in PRESETS.items():
            cells = [" / ".join(f"{preset_error(kind, bits, config)[index]:.3f}" for bits in WIDTHS) for kind in KINDS]
            print(f"| {name} |", " | ".join(cells), "|")
    print("\nRelative error of the default at 8 bits, storage / whole integer path, from the first row on:\n")
    print("| |", " | ".join(KINDS), "|")
    print("|---" * (len(KINDS) + 1) + "|")
    for name, (rows, known_mean) in EARLY.items():
        cells = [" / ".join(f"{error:.3f}" for error in early_error(kind, rows, known_mean)) for kind in KINDS]
        print(f"| {name} |", " | ".join(cells), "|")
    print("\nOne decode query, INT8 storage:\n")
    print("| tokens, gap |", " | ".join(LONG_CONTEXT), "|")
    print("|---" * (len(LONG_CONTEXT) + 1) + "|")
    for tokens, gap in ((8192, 5.0), (65536, 5.0), (65536, 8.0)):
        cells = [f"{long_context_error(tokens, gap, config):.3f}" for config in LONG_CONTEXT.values()]
        print(f"| {tokens:,}, {gap:g} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
