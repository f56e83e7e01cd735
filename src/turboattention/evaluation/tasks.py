"""Generated tasks that need long context and exactness, from a seed.

Four families, each an `Episode` of text spans where some spans are answers:

- ``recall``: a table of two-word keys and four-digit values, then look-ups (key-value recall);
- ``needle``: sentences with a five-digit number hidden in prose, asked for at the end;
- ``copy``: lines of random words, one of which has to be repeated from its first two words;
- ``arithmetic``: additions with the digit sums and carries written out, lowest digit first.

An episode fills a budget, measured by a `measure` function (characters by default, tokens with a tokenizer), so that
the same task is available at any context length. The same seed gives the same text on every machine.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TASKS = ("recall", "needle", "copy", "arithmetic")

Measure = Callable[[str], int]
Span = tuple[str, bool]

ADJECTIVES = (
    "amber azure black blue bold brave bright broad brown calm clear cold cool dark deep dry "
    "dull early fair fast fine firm free fresh gentle glad gold grand gray great green happy "
    "hard heavy high hollow kind large late light long loud low mild narrow new old pale plain "
    "proud quick quiet rare red rich round sharp short silent silver small soft still strange "
    "sweet swift tall thin true warm white wide wild wise young"
).split()
NOUNS = (
    "apple arrow barn bell bird boat bread bridge brook castle cat chair cloud coat crown deer "
    "door dove dream drum eagle field fire fish flower forest fox garden gate ghost hammer harbor "
    "hill horse house island jar key king lake lamp leaf letter lion moon mountain nest night "
    "oak ocean owl paper path pearl pine queen rain ring river road rock rose salt sea shadow "
    "ship shore snow song star stone storm sun table tower tree valley wall wave well wheel wind "
    "window wolf wood"
).split()
NAMES = (
    "Alice Arthur Clara Daniel Edith Edward Eleanor Emma Francis George Grace Harold Helen Henry "
    "Jacob James Jane John Joseph Laura Lucy Margaret Martha Mary Oliver Peter Philip Ralph "
    "Richard Robert Rose Samuel Sarah Simon Thomas Walter William"
).split()


@dataclass(frozen=True)
class Episode:
    """One generated text. `spans` are (text, is_answer) in reading order; the last is an answer."""

    task: str
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)


def generate(
    task: str,
    seed: int,
    budget: int,
    *,
    measure: Measure = len,
    questions: int = 1,
    prose: str | None = None,
) -> Episode:
    """One episode of `task` with a size of about `budget`, never more.

    `questions` is the number of answers at the end. `prose` is the text in which ``needle`` hides its sentences (at a
    random passage); without it, sentences of random words are used.

    Raises ValueError for an unknown task or a budget that is too small for one question.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    rng = random.Random(f"{task}/{seed}")
    makers = {"recall": _recall, "needle": _needle, "copy": _copy, "arithmetic": _arithmetic}
    spans = makers[task](rng, budget, measure, questions, prose)
    return Episode(task, tuple(spans))


def episodes(
    task: str, count: int, budget: int, *, seed: int = 0, measure: Measure = len, prose: str | None = None
) -> Iterator[Episode]:
    """`count` episodes of one task, with seeds `seed`, `seed + 1`, ..."""
    for index in range(count):
        yield generate(task, seed + index, budget, measure=measure, prose=prose)


def _fill(lines: Iterator[str], budget: int, measure: Measure) -> list[str]:
    """As many of `lines` as fit the budget. Raises ValueError if none fits."""
    taken, used = [], 0
    for line in lines:
        used += measure(line)
        if used > budget:
            break
        taken.append(line)
    if not taken:
        raise ValueError(f"budget: expected room for at least one line of the task, got {budget}")
    return taken


def _recall(rng: random.Random, budget: int, measure: Measure, questions: int, _: str | None) -> list[Span]:
    keys = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
    rng.shuffle(keys)
    table = {key: f"{rng.randrange(10000):04d}" for key in keys}
    head, middle = "Table.\n", "Look up.\n"
    line_cost = max(measure(f"{key}={value}\n") for key, value in list(table.items())[:50])
    budget -= measure(head) + measure(middle) + questions * line_cost
    lines = _fill((f"{key}={value}\n" for key, value in table.items()), budget, measure)
    # Lines longer than the reserved size are not asked for.
    short = [key for key, line in zip(keys, lines, strict=False) if measure(line) <= line_cost]
    asked = rng.sample(short, min(questions, len(short)))
    spans: list[Span] = [(head + "".join(lines) + middle, False)]
    for key in asked:
        spans += [(f"{key}=", False), (f"{table[key]}\n", True)]
    return spans


def _needle(rng: random.Random, budget: int, measure: Measure, questions: int, prose: str | None) -> list[Span]:
    names = rng.sample(NAMES, questions)
    numbers = [f"{rng.randrange(100000):05d}" for _ in names]
    needles = [f"The secret number of {a} is {b}.\n" for a, b in zip(names, numbers, strict=True)]
    budget -= 2 * sum(measure(needle) for needle in needles)
    hay = _fill(_sentences(rng, prose), budget, measure)
    for needle in needles:
        hay.insert(rng.randrange(len(hay) + 1), needle)
    spans: list[Span] = [("".join(hay), False)]
    order = list(zip(names, numbers, strict=True))
    rng.shuffle(order)
    for name, number in order:
        spans += [(f"The secret number of {name} is ", False), (f"{number}.\n", True)]
    return spans


def _sentences(rng: random.Random, prose: str | None) -> Iterator[str]:
    """Lines of prose from a random position (wrapping around), or of random words."""
    if prose:
        lines = [line for line in prose[_start(rng, prose) :].split("\n") if line.strip()]
        lines += [line for line in prose.split("\n") if line.strip()]
        for line in lines:
            # Short lines, so that the budget is filled closely and a needle can be anywhere.
            words = line.split(" ")
            for at in range(0, len(words), 24):
                yield " ".join(words[at : at + 24]) + "\n"
    while True:
        yield (
            f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} was near the "
            f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}.\n"
        )


def _start(rng: random.Random, prose: str) -> int:
    at = prose.find("\n", rng.randrange(len(prose)))
    return max(at, 0)


def _copy(rng: random.Random, budget: int, measure: Measure, questions: int, _: str | None) -> list[Span]:
    words = ADJECTIVES + NOUNS

    def lines() -> Iterator[str]:
        seen = set()
        while True:
            line = [rng.choice(words) for _ in range(rng.randint(8, 16))]
            if tuple(line[:2]) not in seen:
                seen.add(tuple(line[:2]))
                yield " ".join(line) + "\n"

    head, middle = "Lines.\n", "Copy.\n"
    budget -= measure(head) + measure(middle) + questions * measure("silent mountain " * 9)
    taken = _fill(lines(), budget, measure)
    spans: list[Span] = [(head + "".join(taken) + middle, False)]
    for line in rng.sample(taken, min(questions, len(taken))):
        first, second, *rest = line.split(" ")
        spans += [(f"{first} {second}", False), (" " + " ".join(rest), True)]
    return spans


def _arithmetic(rng: random.Random, budget: int, measure: Measure, questions: int, _: str | None) -> list[Span]:
    def problem() -> tuple[str, str]:
        digits = rng.randint(2, 4)
        low, high = 10 ** (digits - 1), 10**digits
        return addition(rng.randrange(low, high), rng.randrange(low, high))

    head = "Sums.\n"
    longest = "".join(addition(9999, 9999))
    budget -= measure(head) + questions * measure(longest)
    if budget < 0:
        raise ValueError(f"budget: expected room for {questions} questions, {-budget} more than it is")
    problems = ("".join(problem()) for _count in itertools.count())
    shown = _fill(problems, budget, measure) if budget > measure(longest) else []
    spans: list[Span] = [(head + "".join(shown), False)]
    for question, answer in (problem() for _count in range(questions)):
        spans += [(question, False), (answer, True)]
    return spans


def addition(a: int, b: int) -> tuple[str, str]:
    """The question and the written-out answer of `a + b`.

    >>> addition(58, 67)
    ('58+67:', ' 8+7+0=15 5+6+1=12 so 125\\n')
    """
    x, y, carry, steps = str(a), str(b), 0, []
    width = max(len(x), len(y))
    for p, q in zip(reversed(x.zfill(width)), reversed(y.zfill(width)), strict=True):
        total = int(p) + int(q) + carry
        steps.append(f"{p}+{q}+{carry}={total:02d}")
        carry = total // 10
    return f"{a}+{b}:", f" {' '.join(steps)} so {a + b}\n"
