"""Greedy decoding of the same input over the model's own cache and over quantized caches, and their agreement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .output import guard_warnings
from .progress import Bars, Update
from .settings import Setting

if TYPE_CHECKING:
    from ..integrations.transformers.generation import Generation, Run
    from ..integrations.transformers.language_model import LanguageModel

OWN = "own cache"

_WARM_UP_TOKENS = 200
"""A few blocks, so that the warm-up uses every kind of storage."""


@dataclass(frozen=True)
class Outcome:
    """The result over one cache. `kv_bytes` are allocated; `kv_bytes_fp16` is the same elements at 2 bytes."""

    label: str
    text: str
    tokens: list[int]
    ended: bool
    prefill_seconds: float
    decode_tokens_per_second: float | None
    kv_bytes: int
    kv_bytes_fp16: int

    @property
    def ratio(self) -> float:
        return self.kv_bytes_fp16 / self.kv_bytes

    @property
    def bits_per_element(self) -> float:
        return 16 / self.ratio


@dataclass(frozen=True)
class Agreement:
    """Agreement of a quantized cache with the model's own.

    first_difference: index of the first new token that differs, from 0; None if none does.
    same_tokens: fraction of positions with the same token, with each cache generating its own text.
    same_text_chars: characters before the first difference.
    top1: fraction of the own cache's tokens that the quantized cache also ranks first, when fed the own cache's text
        token by token.
    """

    first_difference: int | None
    same_tokens: float
    same_text_chars: int
    top1: float


@dataclass(frozen=True)
class Row:
    setting: Setting
    outcome: Outcome
    agreement: Agreement
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    prompt_tokens: int
    own: Outcome
    rows: list[Row]


def compare(
    language: LanguageModel,
    ids: Sequence[int],
    settings: Sequence[Setting],
    limit: int,
    bars: Bars,
    stop: frozenset[int] | None = None,
) -> Comparison:
    """One run over the model's own cache, and one per setting; `stop` as in `generate`."""
    own, _ = _run(language, ids, None, OWN, limit, bars, stop)
    rows = []
    for setting in settings:
        with guard_warnings(show=False) as said:
            outcome, ranked_first = _run(language, ids, setting, setting.label, limit, bars, stop, own.tokens)
        rows.append(Row(setting, outcome, agreement(language, own, outcome, ranked_first), list(dict.fromkeys(said))))
    return Comparison(len(ids), own, rows)


def agreement(language: LanguageModel, own: Outcome, outcome: Outcome, ranked_first: Sequence[int]) -> Agreement:
    """The agreement of an outcome with the own cache's, given the top-ranked token at each token of the latter."""
    first = first_difference(own.tokens, outcome.tokens)
    return Agreement(
        first_difference=first,
        same_tokens=same_tokens(own.tokens, outcome.tokens),
        same_text_chars=_shared_chars(language, own, outcome, first),
        top1=same_tokens(own.tokens, ranked_first),
    )


def _run(
    language: LanguageModel,
    ids: Sequence[int],
    setting: Setting | None,
    label: str,
    limit: int,
    bars: Bars,
    stop: frozenset[int] | None,
    reference: Sequence[int] = (),
) -> tuple[Outcome, list[int]]:
    """The outcome, and the top-ranked token at each position of `reference`, given the tokens before it."""
    warm_up(language, ids, setting, label, bars)
    run = new_run(language, setting)
    with bars.task(f"{label}: prompt") as update:
        start = time.perf_counter()
        run.prefill(ids, update)
        seconds = time.perf_counter() - start
    return go_on(run, label, limit, bars, stop, reference, seconds)


def new_run(language: LanguageModel, setting: Setting | None) -> Run:
    """A run on an empty cache, quantized according to `setting` or the model's own."""
    from ..integrations.transformers.generation import Run

    config, calibration = (setting.config, setting.calibration) if setting else (None, None)
    return Run(language, language.new_cache(config, calibration))


def warm_up(language: LanguageModel, ids: Sequence[int], setting: Setting | None, label: str, bars: Bars) -> None:
    """Run a few tokens through a separate cache to warm up."""
    from ..integrations.transformers.generation import generate

    with bars.task(f"{label}: warming up"), guard_warnings(show=False):
        run = new_run(language, setting)
        run.prefill(list(ids[:_WARM_UP_TOKENS]))
        generate(run, 3)


def go_on(
    run: Run,
    label: str,
    limit: int,
    bars: Bars,
    stop: frozenset[int] | None,
    reference: Sequence[int],
    prefill_seconds: float,
) -> tuple[Outcome, list[int]]:
    """The outcome of a run that has read its prompt, and its top-ranked token at each token of `reference`."""
    from ..integrations.transformers.generation import generate

    fork = _ForkAtDifference(run, reference)
    with bars.task(f"{label}: new tokens") as update:

        def on_token(token: int) -> None:
            fork.see(token)
            update(len(fork.seen), limit)

        generation = generate(run, limit, on_token=on_token, stop=stop)
    # Measured now: a copy shares memory with the run, and its own tokens would count.
    outcome = _outcome(run.language, label, run, generation, prefill_seconds)
    with bars.task(f"{label}: fed the own cache's text") as update:
        ranked_first = fork.follow(update)
    return outcome, ranked_first


class _ForkAtDifference:
    """Watches a run, and keeps a copy from the first token that differs from the reference.

    Up to that token, generating freely and being fed the reference are the same computation.
    """

    def __init__(self, run: Run, reference: Sequence[int]):
        self._run, self._reference = run, reference
        self._fork: Run | None = None
        self._ranked: list[int] = []
        self.seen: list[int] = []

    def see(self, token: int) -> None:
        at = len(self.seen)
        self.seen.append(token)
        if self._fork is None and at < len(self._reference) and token != self._reference[at]:
            self._fork = self._run.fork()
            self._ranked = list(self.seen)

    def follow(self, update: Update) -> list[int]:
        """Feeds the rest of the reference: the token ranked first at each of its positions."""
        if self._fork is None:
            return self.seen[: len(self._reference)]
        ranked = self._ranked
        while len(ranked) < len(self._reference):
            self._fork.advance(self._reference[len(ranked) - 1])
            ranked.append(int(self._fork.logits.argmax()))
            update(len(ranked), len(self._reference))
        return ranked


def _outcome(language: LanguageModel, label: str, run: Run, generation: Generation, prefill_seconds: float) -> Outcome:
    return Outcome(
        label=label,
        text=language.decode(generation.tokens),
        tokens=generation.tokens,
        ended=generation.ended,
        prefill_seconds=prefill_seconds,
        decode_tokens_per_second=generation.tokens_per_second,
        kv_bytes=run.kv_bytes,
        kv_bytes_fp16=run.kv_bytes_fp16,
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first position at which two lists differ, or at which one of them has ended."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None if shared == len(a) == len(b) else shared


def same_tokens(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of equal positions, of the longer list."""
    longer = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longer if longer else 1.0


def _shared_chars(language: LanguageModel, own: Outcome, other: Outcome, first: int | None) -> int:
    if first is None:
        return len(own.text)
    head = language.decode(own.tokens[:first])
    # Half a character at the end of the shared tokens is not shared text.
    while head and not (own.text.startswith(head) and other.text.startswith(head)):
        head = head[:-1]
    return len(head)
