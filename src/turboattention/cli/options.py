"""Options of several commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .device import MAX_THREADS, Dtype
from .settings import Guard, Preset

MEASURED, MACHINE = "Measurement", "Machine and output"
INPUT, QUANTIZING, SAMPLING = "Input", "Quantization", "Sampling"


def model_option(panel: str) -> Any:
    return typer.Option(
        metavar="NAME_OR_PATH",
        help="A model's folder, its GGUF file, or its name on the hub. By default the bundled one.",
        rich_help_panel=panel,
    )


Model = Annotated[str | None, model_option(MEASURED)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)]
Kind = Annotated[Dtype, typer.Option(help="auto: float32 on a CPU, else the model's own.", rich_help_panel=MACHINE)]
Threads = Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads.", rich_help_panel=MACHINE)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.", rich_help_panel=MACHINE)]

# Of the commands that generate text.
InputModel = Annotated[str | None, model_option(INPUT)]
PresetOption = Annotated[
    Preset | None,
    typer.Option("--preset", help="The defaults, or the method as published.", rich_help_panel=QUANTIZING),
]
GuardOption = Annotated[
    Guard | None,
    typer.Option("--guard", help="Action for heads that quantize badly. By default adapt.", rich_help_panel=QUANTIZING),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="DIR",
        help="Folder written by `calibrate` for this model: the widths of --bits mixed, which is then the default. "
        "Without it, mixed is the paper's split of 4 and 2 bits, and --bits 3 is better at the same size.",
        rich_help_panel=QUANTIZING,
    ),
]
SaveCache = Annotated[
    Path | None,
    typer.Option(
        "--save-cache", metavar="PATH", help="Save the cache of the prompt to this file.", rich_help_panel=QUANTIZING
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float,
    typer.Option(help="Sample from the most likely tokens with this total probability.", rich_help_panel=SAMPLING),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=SAMPLING)]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="One JSON object instead of text. Errors stay one line on stderr.", rich_help_panel=MACHINE
    ),
]


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises InputError for invalid sampling parameters."""
    if not math.isfinite(temperature):
        raise InputError(f"--temperature: expected a finite number of at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p: expected a share above 0 and up to 1, got {top_p}")
    if top_p < 1 and not temperature:
        raise InputError("--top-p: expected --temperature above 0 with it, got 0")


def numbers(option: str, text: str | None) -> list[int]:
    """ "1024,512" -> [512, 1024]; none of None. Raises InputError."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option}: expected numbers above 0 such as 1024,4096, got {text!r}")
    return sorted({int(part) for part in parts})
