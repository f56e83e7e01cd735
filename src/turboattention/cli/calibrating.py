"""What `calibrate` and `inspect` share: a model, a text, and the measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundled import model_path
from ..bundled import text as bundled_text
from ..errors import InputError
from .device import MAX_THREADS, Dtype, choose, use_threads
from .output import note
from .progress import Bars
from .prompt import read_file

if TYPE_CHECKING:
    from ..calibration import Calibration

SOURCE, CHOICE, MACHINE = "What is measured", "Which widths are chosen", "Machine and output"
TOKENS = 8192
LENGTH = 1024

# Options of both commands.
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_PATH",
        help="A model's folder, or its name on the hub. By default the bundled one.",
        rich_help_panel=SOURCE,
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the text at most.", rich_help_panel=SOURCE)]
Length = Annotated[
    int, typer.Option(min=1, help="Tokens that go through the model at once, and back.", rich_help_panel=SOURCE)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)]
Kind = Annotated[Dtype, typer.Option(help="auto: float32 on a CPU, else the model's own.", rich_help_panel=MACHINE)]
Threads = Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads.", rich_help_panel=MACHINE)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.", rich_help_panel=MACHINE)]


class Strategy(str, Enum):
    error = "error"
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
        """Raises InputError before anything long begins."""
        if not 2 <= self.bits <= 8:
            raise InputError(f"--bits: expected an average width from 2 to 8, got {self.bits:g}")
        if self.model is not None and not self.model.strip():
            raise InputError(f"--model: expected a folder or a name such as org/model, got {self.model!r}")


def measure(request: Request) -> Calibration:
    """Runs the model over the text.

    Raises:
        InputError: no such model or text, or too short a text. UnsupportedError: a model that caches refuse.
    """
    text = bundled_text() if request.text is None else read_file(request.text_option, request.text)
    bars = Bars(hidden=request.json)
    with bars.task("Loading the model"):
        from ..integrations.transformers import calibrate, generation

        use_threads(request.threads)
        name = str(model_path()) if request.model is None else request.model
        language = generation.load(name, *choose(request.device, request.dtype))
    ids = language.encode(text)
    length = min(request.length, language.context or request.length)
    if len(ids) < min(request.tokens, 2 * length) and not request.json:
        note(f"the text has {len(ids):,} tokens: a longer one measures better", "warning")
    with bars.task("Measuring") as update:
        found = calibrate(
            language.model,
            ids[: request.tokens],
            budget=request.bits,
            strategy=request.strategy.value,
            means=request.means,
            length=length,
            progress=update,
        )
    named = "bundled model" if request.model is None else request.model
    return replace(found, provenance=replace(found.provenance, model=named))
