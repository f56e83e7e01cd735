"""``turboattention generate``: text from a language model with a quantized KV cache, or in comparison with its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from . import cache_file
from .comparison import compare
from .comparison_view import as_json, show
from .device import Dtype
from .facts import facts, slower_than_kernels
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
    Seed,
    Temperature,
    Threads,
    TopP,
    check_sampling,
)
from .output import note, print_json, results
from .plain import Start, config_of, continue_text
from .progress import Bars
from .prompt import check_length, prompt_source, read_prompt
from .settings import Guard, Preset, Setting, load_calibration, make_setting
from .stream import write_text

if TYPE_CHECKING:
    from ..config import TurboConfig
    from ..integrations.transformers.language_model import Described, LanguageModel, Opened


@dataclass(frozen=True)
class Request:
    """The options, checked for consistency. `source`: the option that names the prompt."""

    settings: list[Setting]
    prompt: str | None
    source: str
    chat: bool
    limit: int
    temperature: float
    top_p: float
    seed: int
    compare: bool
    json: bool
    save_cache: Path | None
    load_cache: Path | None


def generate(
    model: InputModel = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text to continue.", rich_help_panel=INPUT)
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A UTF-8 file with the text to continue; - is stdin.", rich_help_panel=INPUT),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="Continue the text that ships with the package (4k tokens).", rich_help_panel=INPUT
        ),
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Answer the text as a message, in the model's chat template.", rich_help_panel=INPUT
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Maximum number of new tokens.", rich_help_panel=INPUT)
    ] = 128,
    bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTH",
            help="Stored width: 8, 4, 3, 2, mixed, or K,V such as 4,3. By default 4. With --compare it may be "
            "repeated; --demo --compare takes 4, 3 and mixed.",
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
            "--compare",
            help="Also run with the model's own attention and cache, and compare.",
            rich_help_panel=QUANTIZING,
        ),
    ] = False,
    save_cache: SaveCache = None,
    load_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Start from a saved cache; without a prompt, continue its text.",
            rich_help_panel=QUANTIZING,
        ),
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Kind = Dtype.auto,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a text with a quantized KV cache; with --compare, also with the model's own.

    Example: turboattention generate --demo --compare --bits 4 --bits 3
    """
    request = Request(
        settings=_settings(bits, preset, guard, demo, compare, load_cache, calibration),
        prompt=read_prompt(prompt, file, demo),
        source=prompt_source(prompt, file, demo, load_cache),
        chat=chat,
        limit=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        compare=compare,
        json=json,
        save_cache=save_cache,
        load_cache=load_cache,
    )
    _check(request)
    bars = Bars(hidden=json)
    opened = open_model(model, device, dtype, threads, bars)
    from ..integrations.transformers import registry

    with registry.enabled():
        _compare(request, opened, bars) if compare else _continue(request, opened, bars)


def _settings(
    bits: list[str] | None,
    preset: Preset | None,
    guard: Guard | None,
    demo: bool,
    compare: bool,
    load_cache: Path | None,
    calibration: Path | None,
) -> list[Setting]:
    if load_cache is not None and (bits or preset or guard or calibration):
        raise InputError(
            "--load-cache: expected no --bits, --preset, --guard or --calibration with it: the file has its own "
            "quantization"
        )
    if not bits:
        bits = ["4", "3", "mixed"] if demo and compare else ["4" if calibration is None else "mixed"]
    if len(bits) > 1 and not compare:
        raise InputError(f"--bits: expected one value without --compare, got {len(bits)}")
    measured = load_calibration(calibration)
    return [make_setting(text, preset or Preset.default, guard, measured) for text in bits]


def _check(request: Request) -> None:
    """Raises InputError for options that exclude each other, before anything that takes long."""
    if request.compare and (request.save_cache or request.load_cache):
        raise InputError("--compare: expected no --save-cache or --load-cache with it")
    if request.prompt is None and request.load_cache is None:
        raise InputError("--prompt: expected a text (or a file with --file, or --demo), got none")
    if request.chat and request.prompt is None:
        raise InputError("--chat: expected --prompt TEXT or --file PATH with it, got none")
    check_sampling(request.temperature, request.top_p)
    if request.compare and request.temperature:
        raise InputError("--compare: expected --temperature 0 (the likeliest token each time)")
    if not request.limit and (request.compare or not request.save_cache):
        raise InputError("--max-new-tokens: expected at least 1 (0 is for --save-cache alone), got 0")
    if request.save_cache is not None:
        cache_file.check_target(request.save_cache)
    if request.load_cache is not None:
        cache_file.check_source(request.load_cache)


def _compare(request: Request, opened: Opened, bars: Bars) -> None:
    assert request.prompt is not None
    ids = _ids(request, opened, request.prompt)
    check_caches(opened, request.settings)
    language = load_weights(opened, bars)
    config = request.settings[0].config  # the settings do not differ in what kernels support
    warnings = _warned(request, language, config)
    comparison = compare(language, ids, request.settings, request.limit, bars, _stop(request, language))
    if request.json:
        print_json(facts(language, config) | as_json(comparison) | {"warnings": warnings})
    else:
        show(comparison, request.prompt, facts(language, config), results())


def _warned(request: Request, language: LanguageModel, config: TurboConfig) -> list[str]:
    """Notes before a long run: printed now, or collected for the JSON."""
    slower = slower_than_kernels(language, config)
    if slower is None:
        return []
    if not request.json:
        note(slower, "warning")
    return [slower]


def _continue(request: Request, opened: Opened, bars: Bars) -> None:
    import torch

    from ..integrations.transformers.generation import Sampler

    start = _start(request, opened)
    language = load_weights(opened, bars)
    warnings = _warned(request, language, config_of(start.cache))
    sampler = Sampler(request.temperature, request.top_p, torch.Generator().manual_seed(request.seed))
    write = None if request.json else write_text
    result = continue_text(
        language,
        start,
        request.limit,
        sampler,
        bars,
        save_to=request.save_cache,
        write=write,
        stop=_stop(request, language),
    )
    if request.json:
        said = {"warnings": [*warnings, *result.warnings]}
        print_json(facts(language, result.config) | result.as_json() | said)
        return
    if request.limit:
        typer.echo()
    result.show_cost()


def _start(request: Request, opened: Opened) -> Start:
    if request.load_cache is None:
        assert request.prompt is not None
        ids, setting = _ids(request, opened, request.prompt), request.settings[0]
        return Start(ids, opened.new_cache(setting.config, setting.calibration))  # type: ignore[arg-type]
    cache, cached = cache_file.load(opened, request.load_cache)
    ids = _fitting(request, opened, cached) if request.prompt is None else _ids(request, opened, request.prompt)
    return Start(ids, cache, cache_file.reuse(cache, cached, ids))


def _ids(request: Request, language: Described, prompt: str) -> list[int]:
    """The tokens of the prompt. Raises InputError if they and the new tokens do not fit into the context."""
    if not request.chat:
        return _fitting(request, language, language.encode(prompt))
    from ..integrations.transformers import chat

    rendered = chat.render(language, [{"role": "user", "content": prompt}])
    return _fitting(request, language, chat.encode(language, rendered))


def _fitting(request: Request, language: Described, ids: list[int]) -> list[int]:
    check_length(len(ids), request.limit, language.context, request.source)
    return ids


def _stop(request: Request, language: LanguageModel) -> frozenset[int] | None:
    if not request.chat:
        return None
    from ..integrations.transformers import chat

    return chat.stop_tokens(language)
