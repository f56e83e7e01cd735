"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import InputError
from .device import MAX_THREADS, Dtype

MEASURED, MACHINE = "What is measured", "Machine and output"


def model_option(panel: str) -> Any:
    return typer.Option(
        metavar="NAME_OR_PATH",
        help="A model's folder, or its name on the hub. By default the bundled one.",
        rich_help_panel=panel,
    )


Model = Annotated[str | None, model_option(MEASURED)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)]
Kind = Annotated[Dtype, typer.Option(help="auto: float32 on a CPU, else the model's own.", rich_help_panel=MACHINE)]
Threads = Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads.", rich_help_panel=MACHINE)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.", rich_help_panel=MACHINE)]


def numbers(option: str, text: str | None) -> list[int]:
    """ "1024,512" -> [512, 1024]; none of None. Raises InputError."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option}: expected numbers above 0 such as 1024,4096, got {text!r}")
    return sorted({int(part) for part in parts})
