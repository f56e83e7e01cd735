"""``turboattention ask``: many questions about one document, which is read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bundled
from ..errors import InputError
from ..words import number_of
from . import cache_file
from .ask_view import Live, answers_json
from .asking import compare
from .descriptors import check_input
from .device import Dtype
from .document import Document, Ready
from .facts import facts, slower_than_kernels
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
    from ..integrations.transformers.language_model import LanguageModel, Opened


@dataclass(frozen=True)
class Request:
    """The options, checked for consistency. `source`: the option that names the document. `questions` is None if they
    come from stdin one by one."""

    text: str
    source: str
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
            help="A question; may be repeated. Without it, each line of stdin is a question.",
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

    If questions come from stdin, Ctrl-C ends the current answer, and the next question is read.

    Example: turboattention ask --model model.gguf --file report.txt -q "Who wrote this?" -q "What is it about?"
    """
    if load_cache is not None and (bits or preset or guard or calibration):
        raise InputError(
            "--load-cache: expected no --bits, --preset, --guard or --calibration with it: the file has its own "
            "quantization"
        )
    if compare and (save_cache or load_cache):
        raise InputError("--compare: expected no --save-cache or --load-cache with it")
    settings = _settings(bits, preset, guard, calibration, compare)
    if save_cache is not None:
        cache_file.check_target(save_cache)
    if load_cache is not None:
        cache_file.check_source(load_cache)
    request = Request(
        text=_document(file, demo),
        source="--demo" if demo else "--file",
        questions=_questions(file, question, demo, at_once=compare or json),
        settings=settings,
        limit=max_new_tokens,
        compare=compare,
        json=json,
        save_cache=save_cache,
        load_cache=load_cache,
    )
    bars = Bars(hidden=json)
    opened = open_model(model, device, dtype, threads, bars)
    from ..integrations.transformers import registry

    with registry.enabled():
        _compare(request, opened, bars) if compare else _answer(request, opened, bars)


def _document(file: str | None, demo: bool) -> str:
    if demo and file is not None:
        raise InputError("--file: expected none with --demo, which has its document, got one")
    if demo:
        return bundled.document()
    if file is None:
        raise InputError("--file: expected a document, or --demo, got none")
    return read_file("--file", file)


def _questions(file: str | None, given: list[str] | None, demo: bool, *, at_once: bool) -> list[str] | None:
    """None if the questions come from stdin and are read one at a time (not `at_once`)."""
    for text in given or ():
        check_text("--question", text)
    if not given and demo:
        return bundled.questions()
    if not given and file == "-":
        raise InputError("--question: expected at least one with --file -, which takes stdin, got none")
    if not given:
        check_input("stdin")
        given = list(Lines("stdin", "? ")) if at_once else None
    if given == []:
        raise InputError("--question: expected at least one, got none")
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


def _compare(request: Request, opened: Opened, bars: Bars) -> None:
    assert request.questions is not None
    document = Document(opened, request.text, request.source)
    asked = [(question, document.check_length(question, request.limit)) for question in request.questions]
    check_caches(opened, request.settings)
    language = load_weights(opened, bars)
    described = facts(language, request.settings[0].config)
    live = None if request.json else Live(results(), described, len(document.prefix))
    found = compare(language, document, asked, request.settings, request.limit, bars, live)
    if live is None:
        print_json(described | answers_json(found))
    else:
        live.end(found)


def _answer(request: Request, opened: Opened, bars: Bars) -> None:
    document = Document(opened, request.text, request.source)
    prompts = [document.check_length(question, request.limit) for question in request.questions or [""]]
    start = _start(request, document, opened)
    language = load_weights(opened, bars)
    config = config_of(start.cache)
    slower = slower_than_kernels(language, config)
    if slower is not None and not request.json:
        note(slower, "warning")
    ready = _ready(request, document, start, language, bars)
    if request.questions is None:
        _answer_lines(request, ready, bars)
        return
    answered = []
    for question, ids in zip(request.questions, prompts, strict=True):
        if request.json:
            answered.append({"question": question} | _continued(request, ready, ids, bars).as_json())
            continue
        if len(prompts) > 1:
            typer.echo(f"> {question}")
        _show(_continued(request, ready, ids, bars))
    if request.json:
        read = {"document_tokens": len(document.prefix), "document_seconds": ready.seconds}
        warnings = {"warnings": [] if slower is None else [slower]}
        print_json(facts(language, config) | read | {"answers": answered} | warnings)


def _start(request: Request, document: Document, opened: Opened) -> Start:
    """The document's saved cache, or an empty one."""
    if request.load_cache is not None:
        return document.load(request.load_cache)
    setting = request.settings[0]
    return Start(document.prefix, opened.new_cache(setting.config, setting.calibration))  # type: ignore[arg-type]


def _ready(request: Request, document: Document, start: Start, language: LanguageModel, bars: Bars) -> Ready:
    from ..integrations.transformers.generation import Run

    ready = Ready.read(document, Run(language, start.cache), bars, loaded=start.reused)
    if request.save_cache is not None:
        with bars.task("Saving the cache"):
            cache_file.save(start.cache, start.ids, request.save_cache)
        if not request.json:
            note(cache_file.saved_text(request.save_cache, len(start.ids)))
    if not request.json:
        tokens = len(document.prefix)
        sources = [f"{ready.loaded:,} from {request.load_cache}"] if request.load_cache else []
        if ready.loaded < tokens:
            sources.append(f"{tokens - ready.loaded:,} read in {ready.seconds:.2f} s")
        note(f"document of {number_of(tokens, 'token')}: {', '.join(sources)}")
    return ready


def _answer_lines(request: Request, ready: Ready, bars: Bars) -> None:
    """Answer the questions from stdin one at a time. A pipe without questions is an error, unless the document is to
    be saved."""
    lines, asked = Lines("stdin", "? "), 0

    def answer(question: str) -> None:
        nonlocal asked
        asked += 1
        _until_stopped(request, ready, ready.document.check_length(question, request.limit), bars)

    if lines.each(answer):
        raise typer.Exit(2)
    if not asked and not lines.typed and request.save_cache is None:
        raise InputError("--question: expected at least one, or a question in each line of stdin, got none")


def _until_stopped(request: Request, ready: Ready, ids: list[int], bars: Bars) -> None:
    """Answer a question from stdin. Ctrl-C ends only this answer."""
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
    write = None if request.json else write_text
    return continue_text(
        run.language, start, request.limit, Sampler(), bars, write=write, stop=ready.stop, enough=enough
    )
