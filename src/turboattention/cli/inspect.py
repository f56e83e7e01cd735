"""``turboattention inspect``: shows the widths and errors of a model's heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..files import write_figure, write_text
from .calibrating import CHOICE, LENGTH, STRATEGY, TOKENS, Length, Request, Strategy, Tokens, measure
from .device import Dtype
from .heads_view import as_json, heads_table, summary
from .naming import named
from .options import MACHINE, MEASURED, AsJson, Device, Kind, Model, Threads
from .output import note, print_json, results
from .settings import load_calibration
from .targets import check_figures, check_target

if TYPE_CHECKING:
    from ..calibration import Calibration

PICTURES = (".png", ".svg", ".pdf")


def inspect(
    model: Model = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A UTF-8 file to measure on; - is stdin. By default the bundled text (4k tokens).",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Show a saved calibration, without running the model.", rich_help_panel=MEASURED
        ),
    ] = None,
    tokens: Tokens = TOKENS,
    length: Length = LENGTH,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Average width of K and V from 2 to 8. By default 3, or the calibration's.", rich_help_panel=CHOICE
        ),
    ] = None,
    strategy: Annotated[Strategy | None, typer.Option(help=STRATEGY, rich_help_panel=CHOICE)] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Also write one page with figures (needs matplotlib).", rich_help_panel=MACHINE
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Also plot the error of quantizing K by layer, as .png, .svg or .pdf (needs matplotlib).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Kind = Dtype.auto,
    threads: Threads = None,
    json: AsJson = False,
) -> None:
    """Show each head's error, the paper's priority, the chosen widths, and outlier channels.

    Example: turboattention inspect --file book.txt --html heads.html
    """
    if calibration is not None and (model is not None or file is not None):
        raise InputError("--calibration: expected no --model or --file with it: it holds what was measured of them")
    if html is not None:
        check_target("--html", html)
        check_figures("--html: the page's figures")
    if picture is not None:
        check_target("--picture", picture)
        check_figures("--picture: the picture")
        if picture.suffix not in PICTURES:
            raise InputError(f"--picture: expected a file named {', '.join(PICTURES)}, got {picture}")
    if calibration is not None:
        found = _chosen(calibration, bits, strategy)
    else:
        request = Request(
            model,
            file,
            "--file",
            3.0 if bits is None else bits,
            strategy or Strategy.error,
            False,
            tokens,
            length,
            device,
            dtype,
            threads,
            json,
        )
        request.check()
        found = measure(request)
    if html is not None:
        from .heads_page import page

        write_text(html, page(found), "--html")
    if picture is not None:
        from .heads_page import keys_by_layer

        write_figure(picture, keys_by_layer(found), "--picture")
    if json:
        print_json(as_json(found))
    else:
        console = results()
        console.print(heads_table(found))
        console.print(summary(found), markup=False)
        if html is not None:
            note(f"written to {html}")
        if picture is not None:
            note(f"drawn in {picture}")


def _chosen(folder: Path, bits: float | None, strategy: Strategy | None) -> Calibration:
    found = load_calibration(folder)
    assert found is not None
    if bits is None and strategy is None:
        return found
    with named(budget="--bits"):
        return found.rechosen(
            found.budget if bits is None else bits, found.strategy if strategy is None else strategy.value
        )
