"""``turboattention eval``: accuracy of KV cache quantization methods relative to the model's own cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundled import model_path, text
from .device import Dtype
from .evaluate_options import check_chat, check_methods, check_outside, outside
from .evaluate_view import failures, show, write
from .model import load_weights, open_model
from .options import MACHINE, MEASURED, AsJson, Device, Kind, Model, Threads, numbers
from .output import note, print_json, results
from .progress import Bars
from .prompt import read_file
from .settings import load_calibration
from .targets import check_figures

PIECE = 16  # the same as in evaluation.subject, which imports torch

if TYPE_CHECKING:
    from ..evaluation.baselines import CacheMethod
    from ..evaluation.suite import Options
    from ..integrations.transformers.language_model import LanguageModel

HOW = "Amount"
METHODS = "fp16,turbo-4,turbo-3,turbo-mixed,turbo-2"
TASKS = "perplexity,recall,needle,arithmetic"


@dataclass(frozen=True)
class Request:
    """The options, checked."""

    methods: list[CacheMethod]
    tasks: list[str]
    options: Options
    out: Path | None
    json: bool
    begin: str | None
    chat: bool


def evaluate(
    model: Model = None,
    methods: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Cache methods, or all.", rich_help_panel=MEASURED)
    ] = METHODS,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="perplexity (with KL, total variation and top-1), growth (the same over generated text), heads, "
            "recall, needle, copy, arithmetic; from files in --data gsm8k, aqua, bbh, bbh/TASK; lm-eval/TASK "
            "of lm-evaluation-harness.",
            rich_help_panel=MEASURED,
        ),
    ] = TASKS,
    file: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="PATH",
            help="A UTF-8 text for perplexity, heads and needle; - is stdin. By default the bundled one (4k tokens).",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with gsm8k, aqua and bbh as published; lm-eval/gsm8k and lm-eval/bbh_* read it too.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Ask gsm8k, aqua and bbh in the model's chat template, with the worked examples as earlier turns.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with more tasks for lm-evaluation-harness.", rich_help_panel=MEASURED),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder written by `calibrate`, for the methods turbo-calibrated and turbo-calibrated-BITS.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passages, questions at each length, or questions of a benchmark. By default 8, 32, and all.",
            rich_help_panel=HOW,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a passage. By default up to 4,096 as the model takes them.", rich_help_panel=HOW
        ),
    ] = None,
    piece: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens per forward pass, which attend to each other unquantized. 64 takes half the time of the "
            "default.",
            rich_help_panel=HOW,
        ),
    ] = PIECE,
    begin: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Prefix of every text, such as '<|endoftext|>'. By default BOS if the tokenizer adds it.",
            rich_help_panel=HOW,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Contexts of recall, needle, copy and arithmetic, in tokens. By default 512 to 4,096.",
            rich_help_panel=HOW,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write results.json, report.html and one file per method and task here; existing results are not "
            "measured again.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Kind = Dtype.auto,
    threads: Threads = None,
    json: AsJson = False,
) -> None:
    """Measure accuracy through the cache: perplexity, KL, recall, needles, sums, benchmarks.

    Example: turboattention eval --methods all --tasks perplexity,heads,recall --text book.txt --out results
    """
    from ..evaluation import suite
    from ..evaluation.baselines import parse_methods

    chosen = parse_methods(methods, load_calibration(calibration))
    names = [part.strip() for part in tasks.split(",") if part.strip()]
    suite.check_names(names, data)
    check_outside(names, include)
    check_chat(chat, names)
    source = "bundled text" if file is None else "stdin" if file == "-" else Path(file).name
    options = suite.Options(
        text=text() if file is None else read_file("--text", file),
        source=source,
        limit=limit,
        context=context,
        piece=piece,
        lengths=tuple(numbers("--lengths", lengths)),
        data=data,
        outside=lambda name: outside(name, limit, data, include),
    )
    check_methods(chosen)
    if out is not None:
        check_figures("--out: the report's figures")
    request = Request(chosen, names, options, out, json, begin, chat)
    _run(request, model, device, dtype, threads)


def _run(request: Request, name: str | None, device: str, dtype: Dtype, threads: int | None) -> None:
    from ..evaluation import suite
    from ..evaluation.heap import release_large_blocks
    from ..evaluation.records import Records

    release_large_blocks()
    records = Records(request.out)
    bars = Bars(hidden=request.json)
    opened = open_model(name, device, dtype, threads, bars)
    from ..evaluation.hf.subject import TransformersSubject, renderer
    from ..integrations.transformers import registry

    options = replace(request.options, render=renderer(opened, request.begin) if request.chat else None)
    chosen = suite.make_tasks(request.tasks, options, opened.context)
    language = load_weights(opened, bars)
    facts, units = _facts(language, request.begin), []
    subject = TransformersSubject(language, request.begin, chats=request.chat)
    try:
        with registry.enabled():
            for unit in suite.run(subject, request.methods, chosen, records, facts, bars.task):
                units.append(unit)
    finally:
        # An interrupted run still writes a report of its results.
        document = suite.document(facts, request.methods, units)
        if units:
            write(request.out, document)
    if request.json:
        print_json(document)
    else:
        show(document, results())
    reused = sum(bool(unit.get("reused")) for unit in units)
    if reused:
        note(f"results reused: {reused} of {len(units)}")
    if request.out is not None:
        note(f"written to {request.out / 'report.html'} and results.json beside it")
    failed = failures(document)
    for line in failed:
        note(line, "warning")
    if failed:
        raise typer.Exit(1)


def _facts(language: LanguageModel, begin: str | None) -> dict[str, Any]:
    """The facts that every result depends on."""
    from .. import __version__

    model = language.model
    name = "bundled model" if language.name == str(model_path()) else language.name
    return {
        "model": name,
        "weights": language.fingerprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "turboattention": __version__,
    } | ({} if begin is None else {"begin": begin})
