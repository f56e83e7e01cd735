"""The same input through the model's own cache and through quantized ones, greedily, and how far they agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .output import guard_warnings
from .progress import Bars, Update
from .settings import Setting

if TYPE_CHECKING:
    from ..integrations.transformers.generation import Generation, LanguageModel, Run

OWN = "own cache"

_WARM_UP_TOKENS = 200
"""A few blocks, so that a warm-up passes through every kind of memory."""


@dataclass(frozen=True)
class Outcome:
    """One way through the model. `kv_bytes` are allocated, `kv_bytes_fp16` the same elements at 2 bytes."""

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
    """How a quantized cache compares with the model's own.

    first_difference: index of the first new token that differs, from 0; None: none does.
    same_tokens: share of positions with the same token, each cache going its own way.
    same_text_chars: characters before the first difference.
    top1: share of the own cache's tokens that the quantized cache also ranks first when it is fed
        that same text, token by token.
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
    language: LanguageModel, ids: Sequence[int], settings: Sequence[Setting], limit: int, bars: Bars
) -> Comparison:
    """One run on the model's own cache, and one for each setting."""
    own, _ = _run(language, ids, None, OWN, limit, bars)
    rows = []
    for setting in settings:
        with guard_warnings(show=False) as said:
            outcome, ranked_first = _run(language, ids, setting, setting.label, limit, bars, own.tokens)
        first = first_difference(own.tokens, outcome.tokens)
        agreement = Agreement(
            first_difference=first,
            same_tokens=same_tokens(own.tokens, outcome.tokens),
            same_text_chars=_shared_chars(language, own, outcome, first),
            top1=same_tokens(own.tokens, ranked_first),
        )
        rows.append(Row(setting, outcome, agreement, list(dict.fromkeys(said))))
    return Comparison(len(ids), own, rows)


def _run(
    language: LanguageModel,
    ids: Sequence[int],
    setting: Setting | None,
    label: str,
    limit: int,
    bars: Bars,
    reference: Sequence[int] = (),
) -> tuple[Outcome, list[int]]:
    """The outcome, and what was ranked first at each token of `reference` after its tokens before."""
    from ..integrations.transformers.generation import Run, generate

    config, calibration = (setting.config, setting.calibration) if setting else (None, None)
    with bars.task(f"{label}: warming up"), guard_warnings(show=False):
        warm_up = Run(language, language.new_cache(config, calibration))
        warm_up.prefill(list(ids[:_WARM_UP_TOKENS]))
        generate(warm_up, 3)
    run = Run(language, language.new_cache(config, calibration))
    with bars.task(f"{label}: prompt") as update:
        start = time.perf_counter()
        run.prefill(ids, update)
        seconds = time.perf_counter() - start
    fork = _ForkAtDifference(run, reference)
    with bars.task(f"{label}: new tokens") as update:

        def on_token(token: int) -> None:
            fork.see(token)
            update(len(fork.seen), limit)

        generation = generate(run, limit, on_token=on_token)
    # Measured now: a copy shares memory with the run, and its own tokens would count.
    outcome = _outcome(language, label, run, generation, seconds)
    with bars.task(f"{label}: fed the own cache's text") as update:
        ranked_first = fork.follow(update)
    return outcome, ranked_first


class _ForkAtDifference:
    """Watches a run, and keeps a copy from where it leaves the reference.

    Up to there, going its own way and being fed the reference are the same computation.
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
