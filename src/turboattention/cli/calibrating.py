"""Shared by `calibrate` and `inspect`: options, and the measurement of a model on a text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundled import text as bundled_text
from ..errors import InputError
from ..words import number_of
from .device import Dtype
from .model import load_weights, open_model
from .naming import named
from .options import MEASURED
from .output import note
from .progress import Bars
from .prompt import read_file

if TYPE_CHECKING:
    from ..calibration import Calibration

CHOICE = "Choice of widths"
TOKENS = 8192
LENGTH = 1024
STRATEGY = "By measured error over all layers, evenly in each layer (for servers), or by the paper's gap x std."

# Options of both commands.
Tokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens of the text.", rich_help_panel=MEASURED)]
Length = Annotated[int, typer.Option(min=1, help="Tokens per forward and backward pass.", rich_help_panel=MEASURED)]


class Strategy(str, Enum):
    error = "error"
    even = "even"
    priority = "priority"


@dataclass(frozen=True)
class Request:
    """The options. `text` is None for the bundled one."""

    model: str | None
    text: str | None
    text_option: str
    bits: float
    strategy: Strategy
    means: bool
    tokens: int
    length: int
    device: str
    dtype: Dtype
    threads: int | None
    json: bool

    def check(self) -> None:
        """Raises InputError, before anything that takes long."""
        if not 2 <= self.bits <= 8:
            raise InputError(f"--bits: expected an average width from 2 to 8, got {self.bits:g}")


def measure(request: Request) -> Calibration:
    """Measure the model on the text.

    Raises:
        InputError: the model or the text does not exist, or the text is too short.
        UnsupportedError: a model that `TurboCache` does not support.
    """
    text = bundled_text() if request.text is None else read_file(request.text_option, request.text)
    bars = Bars(hidden=request.json)
    opened = open_model(request.model, request.device, request.dtype, request.threads, bars)
    from ..integrations.transformers.calibration import calibrate, text_pieces

    whole = opened.encode(text)
    ids = whole[: request.tokens]
    length = min(request.length, opened.context or request.length)
    shortened = "--tokens" if len(ids) < len(whole) else request.text_option
    with named(text=shortened):
        text_pieces(opened.config, ids, length)  # raises for texts and models that cannot be measured
    language = load_weights(opened, bars)
    if len(ids) < min(request.tokens, 2 * length) and not request.json:
        note(f"the text has {number_of(len(ids), 'token')}: a longer text gives better estimates", "warning")
    with bars.task("Measuring") as update:
        found = calibrate(
            language.model,
            ids,
            budget=request.bits,
            strategy=request.strategy.value,
            means=request.means,
            length=length,
            progress=update,
        )
    name = "bundled model" if request.model is None else request.model
    return replace(found, provenance=replace(found.provenance, model=name))
