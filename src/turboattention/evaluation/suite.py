"""The tasks, and running every task with every method."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import GuardWarning, InputError, TurboError
from . import questions, tasks
from .baselines import CacheMethod
from .generated import GeneratedTask
from .growth_task import GrowthTask
from .head_task import HeadTask
from .question_task import QuestionTask
from .records import VERSION, Parts, Records, fingerprint
from .subject import PIECE, Progress, Subject, attending
from .text_metrics import TextTask

MEASURES = ("perplexity", "growth", "heads", *tasks.TASKS)
"""Tasks that need no data files."""
OUTSIDE = "lm-eval/"
PASSAGES, QUESTIONS, HEAD_TOKENS, GENERATED = 8, 32, 1024, 2048
LENGTHS = (512, 1024, 2048, 4096)
MARGIN = 96
"""Tokens of the model's context that generated tasks do not use."""


class Task(Protocol):
    """A measurement of a model over methods' caches."""

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on, except the model and the method; a JSON object."""
        ...

    def together(self, subject: Any) -> int:
        """The largest number of methods in one forward pass."""
        ...

    def run(
        self, subject: Any, methods: Sequence[CacheMethod], parts: Parts, progress: Progress
    ) -> list[dict[str, Any]]:
        """Per method a JSON object with `metrics`: name -> {"value", "low", "high"}, and `bits_per_element`.
        Intermediate results are saved in `parts` and reused from there."""
        ...


@dataclass(frozen=True)
class Options:
    """Options of tasks.

    Attributes:
        text, source: a text and its name in results.
        limit: number of passages, of questions per length, or of questions; None means 8, 32, and all.
        context: tokens of a passage. piece: tokens per forward pass. lengths: context lengths of generated tasks.
        data: folder with GSM8K, AQuA and BBH.
        render: renders a conversation, for questions in the model's chat template; None asks them as plain text.
    """

    text: str
    source: str
    limit: int | None = None
    context: int | None = None
    piece: int = PIECE
    lengths: tuple[int, ...] = ()
    data: Path | None = None
    render: questions.Render | None = field(default=None, compare=False)
    outside: Callable[[str], Task] | None = field(default=None, compare=False)


def check_names(names: Sequence[str], data: Path | None) -> None:
    """Raises InputError for unknown tasks and missing files, before anything that takes long."""
    if not names:
        raise InputError("--tasks: expected at least one, got none")
    for name in names:
        if questions.is_question_set(name):
            if data is None:
                raise InputError(f"--data: expected the folder with the files of {name}, got none")
            questions.load(name, data)
        elif name not in MEASURES and not name.startswith(OUTSIDE):
            raise InputError(
                f"--tasks: expected some of {', '.join(MEASURES)}, gsm8k, aqua, bbh, bbh/TASK, {OUTSIDE}TASK; "
                f"got {name!r}"
            )


def make_tasks(names: Sequence[str], options: Options, context: int | None) -> list[Task]:
    """The tasks, for a model with this context length."""
    return [task for name in dict.fromkeys(names) for task in _make(name, options, context or max(LENGTHS))]


def _make(name: str, options: Options, context: int) -> list[Task]:
    source = f"{options.source} ({len(options.text):,} characters, {fingerprint(options.text)})"
    if name == "perplexity":
        # One token is left for a BOS.
        size = min(options.context or max(LENGTHS), context - 1)
        return [TextTask(options.text, source, size, options.limit or PASSAGES, options.piece)]
    if name == "growth":
        size = min(options.context or GENERATED, context - 1)
        return [GrowthTask(options.text, source, size, options.limit or 1, options.piece)]
    if name == "heads":
        return [HeadTask(options.text, source, min(options.context or HEAD_TOKENS, context - 1))]
    if name in tasks.TASKS:
        most = context - MARGIN
        wanted = options.lengths or tuple(length for length in LENGTHS if length <= context)
        lengths = sorted({min(length, most) for length in wanted})
        return [GeneratedTask(name, lengths, options.limit or QUESTIONS, options.text, source)]
    if name.startswith(OUTSIDE):
        assert options.outside is not None
        return [options.outside(name)]
    assert options.data is not None
    found = questions.load(name, options.data)
    if options.render is not None:
        found = [questions.as_conversation(one, options.render) for one in found]
    return [QuestionTask(one, options.limit) for one in found]


def run(
    subject: Subject,
    methods: Sequence[CacheMethod],
    chosen: Sequence[Task],
    records: Records,
    facts: dict[str, Any],
    doing: Callable[[str], Any],
) -> Iterator[dict[str, Any]]:
    """One unit per task and method, saved when it is complete; saved units are not measured again.

    Args:
        facts: everything that all results depend on: the model, its dtype, the version.
        doing: returns a context manager with a `Progress` for a line of text, like `Bars.task`.

    A unit that fails with an error of this package has the message in `failed` and is not saved.
    """
    for number, task in enumerate(chosen, 1):
        settings = {m.name: _settings(facts, m, task) for m in methods}
        found = {m.name: records.find(m.name, task.name, settings[m.name]) for m in methods}
        missing = [method for method in methods if found[method.name] is None]
        size, made = task.together(subject), {}
        for method in methods:
            unit = found[method.name]
            if unit is not None:
                yield unit | {"reused": True}
                continue
            if method.name not in made:
                group, missing = missing[:size], missing[size:]
                # Parts that other units can use, such as answers to questions, are kept.
                lasting = getattr(task, "part_settings", None)
                parts = records.parts(
                    task.name, {one.name: settings[one.name] | ({"task": lasting} if lasting else {}) for one in group}
                )
                with doing(f"{number}/{len(chosen)} {task.name}: {', '.join(one.title for one in group)}") as progress:
                    for one in _measure(subject, group, task, parts, progress):
                        made[one["method"]] = one | {"version": VERSION, "settings": settings[one["method"]]}
                        if "failed" not in one:
                            records.keep(made[one["method"]])
                        if "failed" not in one and lasting is None:
                            parts.drop(one["method"])
            yield made[method.name]


def _settings(facts: dict[str, Any], method: CacheMethod, task: Task) -> dict[str, Any]:
    """Everything that a result depends on."""
    numerics = {"numerics": method.numerics} if method.numerics else {}
    return {"facts": facts, "method": method.settings, "task": task.settings} | numerics


def _measure(
    subject: Subject, methods: Sequence[CacheMethod], task: Task, parts: Parts, progress: Progress
) -> Iterator[dict[str, Any]]:
    """One unit per method. `seconds` is its share of the common time."""
    begun = time.perf_counter()
    names = [{"method": method.name, "title": method.title, "task": task.name} for method in methods]
    with _guard_warnings() as said:
        try:
            results = task.run(subject, methods, parts, progress)
        except TurboError as error:
            if len(methods) == 1:
                yield names[0] | {"failed": str(error)}
                return
            results = None
    if results is None:  # measure them separately, so that one failure does not affect the others
        for method in methods:
            yield from _measure(subject, [method], task, parts, progress)
        return
    seconds = (time.perf_counter() - begun) / len(methods)
    for method, name, result in zip(methods, names, results, strict=True):
        heard = [message for speaker, message in said if speaker in (None, method.name)]
        yield name | {"seconds": seconds} | result | {"warnings": list(dict.fromkeys(heard))}


@contextmanager
def _guard_warnings() -> Iterator[list[tuple[str | None, str]]]:
    """Collects the guard's warnings inside, with the method if several share a forward pass; other warnings are passed
    on."""
    said: list[tuple[str | None, str]] = []
    show = warnings.showwarning

    def take(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if issubclass(category, GuardWarning):
            said.append((attending.get(), str(message)))
        else:
            show(message, category, *rest, **named)

    with warnings.catch_warnings():
        warnings.simplefilter("always", GuardWarning)
        warnings.showwarning = take
        yield said


def document(facts: dict[str, Any], methods: Sequence[CacheMethod], units: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All results as one JSON object, read by `report.evaluation.html` and `benchmarks/accuracy.py`."""
    described = [{name: getattr(m, name) for name in ("name", "title", "source", "settings")} for m in methods]
    return {"version": VERSION, "facts": facts, "methods": described, "units": list(units)}
