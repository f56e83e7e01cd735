"""``turboattention calibrate``: measures a model, chooses widths per head, and saves them in a file with the means of K
and the weights of its channels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .calibrating import CHOICE, LENGTH, STRATEGY, TOKENS, Length, Request, Strategy, Tokens, measure
from .device import Dtype
from .heads_view import as_json, summary, widths_table
from .options import MACHINE, MEASURED, AsJson, Device, Kind, Model, Threads
from .output import note, print_json, results


def calibrate(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for calibration.json.", rich_help_panel=MACHINE)],
    model: Model = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A UTF-8 file, similar to the texts in use; - is stdin. By default the bundled text (4k tokens).",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    tokens: Tokens = TOKENS,
    length: Length = LENGTH,
    bits: Annotated[
        float,
        typer.Option(help="Average width of K and V from 2 to 8, without scales.", rich_help_panel=CHOICE),
    ] = 3.0,
    strategy: Annotated[Strategy, typer.Option(help=STRATEGY, rich_help_panel=CHOICE)] = Strategy.error,
    means: Annotated[
        bool,
        typer.Option(
            "--means", help="Smooth K with the measured means instead of those of each text.", rich_help_panel=CHOICE
        ),
    ] = False,
    device: Device = "auto",
    dtype: Kind = Dtype.auto,
    threads: Threads = None,
    json: AsJson = False,
) -> None:
    """Measure the cost of each width for every head of a model, and choose widths under a budget.

    The file also has the order of K's channels in every head, for caches and servers with reorder_k, at any width.

    Example: turboattention calibrate --text book.txt --bits 3 --out calibrated
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: expected a folder, got the file {out}")
    request = Request(model, text, "--text", bits, strategy, means, tokens, length, device, dtype, threads, json)
    request.check()
    calibration = measure(request)
    calibration.save(out)
    if json:
        print_json(as_json(calibration) | {"file": str(out / "calibration.json")})
        return
    console = results()
    console.print(widths_table(calibration))
    console.print(summary(calibration), markup=False)
    note(f'{out / "calibration.json"}: TurboCache(model.config, calibration=Calibration.load("{out}"))')
