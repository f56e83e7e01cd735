"""``turboattention chat``: a conversation that keeps its quantized cache between turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..words import number_of
from . import cache_file
from .descriptors import check_input
from .device import Dtype
from .facts import slower_than_kernels
from .interrupt import Interrupt
from .lines import Lines
from .model import check_caches, load_weights, open_model
from .options import (
    INPUT,
    QUANTIZING,
    CalibrationOption,
    Device,
    GuardOption,
    InputModel,
    Kind,
    PresetOption,
    Seed,
    Temperature,
    Threads,
    TopP,
    check_sampling,
)
from .output import note
from .progress import Bars
from .session import Kept, Session, check_conversation
from .settings import Preset, load_calibration, make_setting
from .stream import write_text

if TYPE_CHECKING:
    from ..integrations.transformers.generation import Sampler

HELP = """\
/save PATH  save the conversation and its cache to a file
/load PATH  continue a saved conversation
/clear      start a new conversation
/help       show this list
/exit       quit; also Ctrl-D
Ctrl-C      end the current answer"""


def chat(
    model: InputModel = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The system prompt.", rich_help_panel=INPUT),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Continue a conversation saved with /save.", rich_help_panel=INPUT),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of an answer.", rich_help_panel=INPUT)
    ] = 512,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTH",
            help="Stored width: 8, 4, 3, 2, mixed, or K,V such as 4,3. By default 4.",
            rich_help_panel=QUANTIZING,
            show_default=False,
        ),
    ] = None,
    preset: PresetOption = None,
    guard: GuardOption = None,
    calibration: CalibrationOption = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Kind = Dtype.auto,
    threads: Threads = None,
) -> None:
    """Chat with a model. The quantized cache is kept between turns, and saved to a file with /save.

    Each line of stdin is a message. The cost of each turn is printed on stderr. If a line fails, the error is printed
    there too, and the chat continues with the next line.

    Example: turboattention chat --model SmolLM2-135M-Instruct.Q4_1.gguf --bits 3
    """
    if load is not None and (system is not None or bits or preset or guard or calibration):
        raise InputError(
            "--load: expected no --system, --bits, --preset, --guard or --calibration with it: the file has its own"
        )
    check_sampling(temperature, top_p)
    check_input("chat")
    bits = bits or ("4" if calibration is None else "mixed")
    setting = make_setting(bits, preset or Preset.default, guard, load_calibration(calibration))
    if load is not None:
        cache_file.check_source(load, "--load")
    bars = Bars(hidden=False)
    opened = open_model(model, device, dtype, threads, bars)
    check_conversation(opened, system)
    check_caches(opened, [setting])
    kept = None if load is None else Kept.read(opened, load, "--load")
    language = load_weights(opened, bars)
    import torch

    from ..integrations.transformers import generation, registry

    session = Session(language, setting, system)
    if kept is not None:
        session.take(kept)
    slower = slower_than_kernels(language, setting.config)
    if slower is not None:
        note(slower, "warning")
    sampler = generation.Sampler(temperature, top_p, torch.Generator().manual_seed(seed))
    with registry.enabled():
        if Chat(session, max_new_tokens, sampler, bars).run():
            raise typer.Exit(2)


@dataclass
class Chat:
    """The loop over messages and commands."""

    session: Session
    limit: int
    sampler: Sampler
    bars: Bars

    def run(self) -> bool:
        """Run until the end of input. Errors are printed, and the chat continues. Returns whether any line failed that
        was not typed at a terminal."""
        lines = Lines("chat", ">>> ")
        if lines.typed:
            note(f"{self.session.about}; /help lists commands")
        return lines.each(self._take)

    def _take(self, line: str) -> bool:
        """One message or command; True ends the chat."""
        if line in ("/exit", "/quit", "/bye"):
            return True
        self._command(line) if line.startswith("/") else self._turn(line)
        return False

    def _turn(self, line: str) -> None:
        with Interrupt() as interrupt:
            try:
                result = self.session.answer(line, self.limit, self.sampler, self.bars, write_text, interrupt)
            except KeyboardInterrupt:
                typer.echo()
                note("stopped: this turn is discarded")
                return
        typer.echo()
        stopped = "stopped; " if interrupt.asked else ""
        result.show_cost(f"turn {self.session.turns}: {stopped}")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        path = argument.strip()
        if name in ("/save", "/load") and not path:
            raise InputError(f"{name}: expected a file, as in {name} talk.cache, got none")
        if name == "/help":
            note(HELP, "commands")
        elif name == "/save":
            self.session.save(Path(path))
            note(f"{number_of(self.session.turns, 'turn')}: {cache_file.saved_text(Path(path), self.session.tokens)}")
        elif name == "/load":
            self.session.load(Path(path))
            note(f"{number_of(self.session.turns, 'turn')} from {path}")
        elif name == "/clear":
            self.session.clear()
            note("a new conversation")
        else:
            raise InputError(f"{name}: expected a command that /help lists, got an unknown one")
