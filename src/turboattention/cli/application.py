"""The application, its commands and common options."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .ask import ask
from .bench import bench
from .calibrate import calibrate
from .chat import chat
from .descriptors import check_results
from .doctor import doctor
from .evaluate import evaluate
from .failures import CleanGroup
from .generate import generate
from .inspect import inspect
from .output import never_fail_on_characters

app = typer.Typer(
    name="turboattention",
    cls=CleanGroup,
    help="INT8/INT4 attention and a quantized KV cache for LLM inference.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"turboattention {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    check_results()
    never_fail_on_characters()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(generate)
app.command()(chat)
app.command()(ask)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(inspect)
app.command()(bench)
app.command()(doctor)
