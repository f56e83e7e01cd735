"""Questions about one document over the model's own cache and over quantized caches, and their agreement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from . import cache_file
from .comparison import OWN, Agreement, Outcome, agreement, go_on, new_run, warm_up
from .document import Document, Ready
from .output import guard_warnings
from .progress import Bars
from .settings import Setting

if TYPE_CHECKING:
    from ..integrations.transformers.language_model import LanguageModel


class Audience(Protocol):
    """Receives the progress of a comparison."""

    def document(self, label: str, seconds: float) -> None:
        """One kind of cache has read the document."""
        ...

    def answer(self, question: str, outcome: Outcome, agreement: Agreement | None) -> None:
        """A question is answered over it; `agreement` is None over the model's own cache."""
        ...


@dataclass(frozen=True)
class Prompted:
    """One kind of cache: the size and time of the document, and the outcome of every question.

    `kv_bytes` are allocated for the document; `kv_bytes_fp16` is the size of the same elements at 2 bytes. Questions
    start from a file of `file_bytes`, loaded in `load_seconds`; for the model's own cache, which is copied, both are
    None.
    """

    label: str
    setting: Setting | None
    read_seconds: float
    kv_bytes: int
    kv_bytes_fp16: int
    file_bytes: int | None
    load_seconds: float | None
    outcomes: list[Outcome]
    agreements: list[Agreement]
    warnings: list[str]

    @property
    def ratio(self) -> float:
        return self.kv_bytes_fp16 / self.kv_bytes

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed over all answers."""
        timed = [(len(x.tokens) - 1, x.decode_tokens_per_second) for x in self.outcomes if x.decode_tokens_per_second]
        return sum(n for n, _ in timed) / sum(n / speed for n, speed in timed) if timed else None

    @property
    def same_tokens(self) -> float:
        return self._over_tokens([x.same_tokens for x in self.agreements])

    @property
    def top1(self) -> float:
        return self._over_tokens([x.top1 for x in self.agreements])

    def _over_tokens(self, shares: Sequence[float]) -> float:
        counts = [len(x.tokens) for x in self.outcomes]
        return sum(share * n for share, n in zip(shares, counts, strict=True)) / sum(counts)


@dataclass(frozen=True)
class Answers:
    """`caches` starts with the model's own cache."""

    document_tokens: int
    questions: list[str]
    caches: list[Prompted]


def compare(
    language: LanguageModel,
    document: Document,
    asked: Sequence[tuple[str, list[int]]],
    settings: Sequence[Setting],
    limit: int,
    bars: Bars,
    audience: Audience | None = None,
) -> Answers:
    """Read the document once per kind of cache, and answer every question from there.

    asked: questions, and the token ids of the document with each.
    """
    caches: list[Prompted] = []
    for setting in (None, *settings):
        own = caches[0].outcomes if caches else None
        caches.append(_over(language, document, asked, setting, limit, bars, own, audience))
    return Answers(len(document.prefix), [question for question, _ in asked], caches)


def _over(
    language: LanguageModel,
    document: Document,
    asked: Sequence[tuple[str, list[int]]],
    setting: Setting | None,
    limit: int,
    bars: Bars,
    own: Sequence[Outcome] | None,
    audience: Audience | None,
) -> Prompted:
    label = OWN if setting is None else setting.label
    outcomes, agreements = [], []
    with guard_warnings(show=False) as said:
        warm_up(language, document.prefix, setting, label, bars)
        ready = Ready.read(document, new_run(language, setting), bars, f"{label}: ")
        size = ready.run.kv_bytes, ready.run.kv_bytes_fp16
        if audience is not None:
            audience.document(label, ready.seconds)
        stored = None if setting is None else _through_file(ready)
        for index, (question, ids) in enumerate(asked):
            run, shared = (stored[0] if stored else ready).ask(ids)
            begun = time.perf_counter()
            run.prefill(ids[shared:])
            seconds = time.perf_counter() - begun
            reference = own[index].tokens if own else ()
            outcome, ranked = go_on(run, label, limit, bars, ready.stop, reference, seconds)
            outcomes.append(outcome)
            if own:
                agreements.append(agreement(language, own[index], outcome, ranked))
            if audience is not None:
                audience.answer(question, outcome, agreements[-1] if own else None)
    file_bytes, load_seconds = stored[1:] if stored else (None, None)
    warnings = list(dict.fromkeys(said))
    return Prompted(label, setting, ready.seconds, *size, file_bytes, load_seconds, outcomes, agreements, warnings)


def _through_file(ready: Ready) -> tuple[Ready, int, float]:
    """The document's cache after saving and loading, the size of the file in bytes, and the seconds of loading."""
    from ..integrations.transformers.generation import Run

    with TemporaryDirectory() as folder:
        path = Path(folder) / "document.cache"
        cache_file.save(ready.run.cache, ready.document.prefix, path)  # type: ignore[arg-type]
        begun = time.perf_counter()
        start = ready.document.load(path)
        seconds = time.perf_counter() - begun
        run = Run(ready.run.language, start.cache)
        return Ready(ready.document, run, start.reused, 0.0), path.stat().st_size, seconds
