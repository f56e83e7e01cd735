"""``turboattention ask``: many questions about one document, which is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bundled
from ..errors import InputError
from . import cache_file
from .ask_view import answers_json, show
from .asking import compare
from .descriptors import check_input
from .device import Dtype
from .document import Document, Ready
from .facts import facts, slower_than_kernels
from .interrupt import Interrupt
from .lines import Lines
from .model import check_model, load_model
from .options import (
    INPUT,
    QUANTIZING,
    CalibrationOption,
    Device,
    GuardOption,
    InputModel,
    Json,
    Kind,
    PresetOption,
    SaveCache,
    Threads,
)
from .output import note, print_json, results
from .plain import Result, Start, config_of, continue_text
from .progress import Bars
from .prompt import check_text, read_file
from .settings import Preset, Setting, load_calibration, make_setting
from .stream import write_text

if TYPE_CHECKING:
    from ..integrations.transformers.language_model import LanguageModel


@dataclass(frozen=True)
class Request:
    """The options, checked for consistency. `questions` is None if they come from stdin."""

    text: str
    questions: list[str] | None
    settings: list[Setting]
    limit: int
    compare: bool
    json: bool
    save_cache: Path | None
    load_cache: Path | None


def ask(
    model: InputModel = None,
    file: Annotated[
        str | None, typer.Option(metavar="PATH", help="The document, UTF-8; - is stdin.", rich_help_panel=INPUT)
    ] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="The document and the questions that ship with the package.", rich_help_panel=INPUT
        ),
    ] = False,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question",
            "-q",
            metavar="TEXT",
            help="A question; may be repeated. Without any, each line of stdin is one.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of an answer.", rich_help_panel=INPUT)
    ] = 128,
    bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTH",
            help="Stored width: 8, 4, 3, 2, mixed, or K,V such as 4,3. By default 4; --compare takes several, by "
            "default 4 and 3.",
            rich_help_panel=QUANTIZING,
            show_default=False,
        ),
    ] = None,
    preset: PresetOption = None,
    guard: GuardOption = None,
    calibration: CalibrationOption = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also answer over the model's own cache, and compare.", rich_help_panel=QUANTIZING
        ),
    ] = False,
    save_cache: SaveCache = None,
    load_cache: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Start from the saved cache of the document.", rich_help_panel=QUANTIZING),
    ] = None,
    device: Device = "auto",
    dtype: Kind = Dtype.auto,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Ask a model about a document. The document is read once, and every question starts from its cache.

    Where questions come from stdin, Ctrl-C ends an answer, and the next question follows.

    Example: turboattention ask --model model.gguf --file report.txt -q "Who wrote this?" -q "What is it about?"
    """
    if load_cache is not None and (bits or preset or guard or calibration):
        raise InputError(
            "--load-cache: expected no --bits, --preset, --guard or --calibration with it: the file says how it is "
            "quantized"
        )
    if compare and (save_cache or load_cache):
        raise InputError("--compare: expected no --save-cache or --load-cache with it")
    request = Request(
        text=_document(file, demo),
        questions=_questions(file, question, demo),
        settings=_settings(bits, preset, guard, calibration, compare),
        limit=max_new_tokens,
        compare=compare,
        json=json,
        save_cache=save_cache,
        load_cache=load_cache,
    )
    if save_cache is not None:
        cache_file.check_target(save_cache)
    check_model(model)
    language = load_model(model, device, dtype, threads, Bars(hidden=json))
    from ..integrations.transformers import registry

    with registry.enabled():
        _compare(request, language) if compare else _answer(request, language)


def _document(file: str | None, demo: bool) -> str:
    if demo and file is not None:
        raise InputError("--file: expected none with --demo, which has its document, got one")
    if demo:
        return bundled.document()
    if file is None:
        raise InputError("--file: expected a document, or --demo, got none")
    return read_file("--file", file)


def _questions(file: str | None, given: list[str] | None, demo: bool) -> list[str] | None:
    """None if the questions come from stdin."""
    for text in given or ():
        check_text("--question", text)
    if not given and demo:
        return bundled.questions()
    if not given and file == "-":
        raise InputError("--question: expected at least one with --file -, which takes stdin, got none")
    if not given:
        check_input("stdin")
    return given or None


def _settings(
    bits: list[str] | None, preset: Preset | None, guard: Any, calibration: Path | None, compare: bool
) -> list[Setting]:
    if not bits:
        bits = ["mixed"] if calibration is not None else ["4", "3"] if compare else ["4"]
    if len(bits) > 1 and not compare:
        raise InputError(f"--bits: expected one value without --compare, got {len(bits)}")
    measured = load_calibration(calibration)
    return [make_setting(text, preset or Preset.default, guard, measured) for text in bits]


def _compare(request: Request, language: LanguageModel) -> None:
    questions = list(_asked(request))
    if not questions:
        raise InputError("--question: expected at least one, got none")
    config = request.settings[0].config
    found = compare(
        language,
        Document(language, request.text),
        questions,
        request.settings,
        request.limit,
        Bars(hidden=request.json),
    )
    if request.json:
        print_json(facts(language, config) | answers_json(found))
    else:
        show(found, facts(language, config), results())


def _asked(request: Request) -> Iterable[str]:
    return Lines("stdin", "? ") if request.questions is None else request.questions


def _answer(request: Request, language: LanguageModel) -> None:
    document, bars = Document(language, request.text), Bars(hidden=request.json)
    document.check_length("", request.limit)
    ready = _ready(request, document, language, bars)
    config = config_of(ready.run.cache)  # type: ignore[arg-type]
    slower = slower_than_kernels(language, config)
    if slower is not None and not request.json:
        note(slower, "warning")
    several = request.questions is not None and len(request.questions) > 1
    answered = []
    for question in _asked(request):
        ids = document.check_length(question, request.limit)
        if several and not request.json:
            typer.echo(f"> {question}")
        if request.json:
            answered.append({"question": question} | _continued(request, ready, ids, bars).as_json())
        elif request.questions is None:
            _until_stopped(request, ready, ids, bars)
        else:
            _show(_continued(request, ready, ids, bars))
    if request.json:
        read = {"document_tokens": len(document.prefix), "document_seconds": ready.seconds}
        warnings = {"warnings": [] if slower is None else [slower]}
        print_json(facts(language, config) | read | {"answers": answered} | warnings)


def _ready(request: Request, document: Document, language: LanguageModel, bars: Bars) -> Ready:
    if request.load_cache is not None:
        ready = Ready.load(document, language, request.load_cache, bars)
    else:
        from ..integrations.transformers.generation import Run

        setting = request.settings[0]
        ready = Ready.read(document, Run(language, language.new_cache(setting.config, setting.calibration)), bars)
    if request.save_cache is not None:
        with bars.task("Saving the cache"):
            cache_file.save(ready.run.cache, ready.held, request.save_cache)  # type: ignore[arg-type]
    if not request.json:
        tokens = len(document.prefix)
        sources = [f"{ready.loaded:,} from {request.load_cache}"] if request.load_cache else []
        if ready.loaded < tokens:
            sources.append(f"{tokens - ready.loaded:,} read in {ready.seconds:.2f} s")
        note(f"document of {tokens:,} tokens: {', '.join(sources)}")
    return ready


def _until_stopped(request: Request, ready: Ready, ids: list[int], bars: Bars) -> None:
    """Answer a question of stdin. Ctrl-C ends the answer: the next question follows."""
    with Interrupt() as interrupt:
        try:
            result = _continued(request, ready, ids, bars, interrupt.enough)
        except KeyboardInterrupt:
            typer.echo()
            note("stopped before there was an answer")
            return
    _show(result, "stopped; " if interrupt.asked else "")


def _show(result: Result, stopped: str = "") -> None:
    typer.echo()
    result.show_cost(stopped)


def _continued(
    request: Request, ready: Ready, ids: list[int], bars: Bars, enough: Callable[[], bool] | None = None
) -> Result:
    """The answer to the question at the end of `ids`, written on stdout except with --json."""
    from ..integrations.transformers.generation import Sampler

    run, shared = ready.ask(ids)
    start = Start(ids, run.cache, shared)  # type: ignore[arg-type]
    write, stop = None if request.json else write_text, ready.document.stop
    return continue_text(run.language, start, request.limit, Sampler(), bars, write=write, stop=stop, enough=enough)
