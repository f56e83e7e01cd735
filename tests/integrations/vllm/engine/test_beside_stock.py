"""Beside vLLM's own attention, on the same weights and over the same prefixes: at 8 bits hardly anything differs. What
vLLM itself computes wrongly is wrong in both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .answers import greedy, prompts
from .models import HYBRIDS, IN_BFLOAT16, save_gpt_oss, save_hybrid

LENGTHS = (5, 64, 130, 200, 300)
PIECES = {"block_size": 64, "max_num_batched_tokens": 90, "max_num_seqs": 4}
"""Prompts are read in pieces, which end inside blocks."""

Places = list[tuple[int, float]]
"""At each place of a text the likeliest token, and the log-probability, in nats, of the one that is there."""


@dataclass(frozen=True)
class Difference:
    """agreement: the share of places with the same likeliest token. moved: how far the log-probability of the one that
    is there moved, on average, in nats."""

    agreement: float
    moved: float

    @classmethod
    def of(cls, a: Iterable[Places], b: Iterable[Places]) -> Difference:
        pairs = [pair for texts in zip(a, b, strict=True) for pair in zip(*texts, strict=True)]
        return cls(
            sum(x == y for (x, _), (y, _) in pairs) / len(pairs),
            sum(abs(x - y) for (_, x), (_, y) in pairs) / len(pairs),
        )


@dataclass(frozen=True)
class Beside:
    """The plugin beside vLLM's own attention. read: over prompts. written: over answers, which the plugin computes
    token by token, and vLLM's own attention reads. stock: what that gave for the prompts."""

    read: Difference
    written: Difference
    stock: list[Places]


def read(llm: Any, texts: Sequence[list[int]]) -> list[Places]:
    """From the second token of each text on."""
    asked = [{"prompt_token_ids": text} for text in texts]
    outputs = llm.generate(asked, greedy(1, prompt_logprobs=1), use_tqdm=False)
    return [
        [
            (next(best for best, of in place.items() if of.rank == 1), place[token].logprob)
            for token, place in zip(text[1:], output.prompt_logprobs[1:], strict=True)
        ]
        for text, output in zip(texts, outputs, strict=True)
    ]


def write(llm: Any, texts: Sequence[list[int]], max_tokens: int = 80) -> list[Places]:
    """Answers, all at once."""
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], greedy(max_tokens), use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [
        [(token, place[token].logprob) for token, place in zip(answer.token_ids, answer.logprobs, strict=True)]
        for answer in answers
    ]


@pytest.fixture
def beside(start, monkeypatch, token_ids) -> Callable[..., Beside]:
    """Serve a model at 8 bits, then with the plugin off, each time in processes of their own."""
    texts = [prompt["prompt_token_ids"] for prompt in prompts(token_ids, LENGTHS)]

    def serve(bits: str, model: Path, **options: Any) -> Any:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        monkeypatch.setenv("TURBOATTENTION_VLLM", bits)
        return start(processes=True, model=str(model), **(PIECES | options))

    def beside(model: Path, **options: Any) -> Beside:
        ours = serve("8", model, **options)
        prompted, answers = read(ours, texts), write(ours, texts)
        ours.llm_engine.engine_core.shutdown()
        own = serve("", model, **options)
        whole = read(own, [text + [token for token, _ in answer] for text, answer in zip(texts, answers, strict=True)])
        own.llm_engine.engine_core.shutdown()
        stock = [places[: len(text) - 1] for text, places in zip(texts, whole, strict=True)]
        after = [places[len(text) - 1 :] for text, places in zip(texts, whole, strict=True)]
        return Beside(Difference.of(prompted, stock), Difference.of(answers, after), stock)

    return beside


def test_sinks(beside, tmp_path) -> None:
    """As close as the same model without sinks, although sinks change most results."""
    found = beside(save_gpt_oss(tmp_path / "with"))
    without = beside(save_gpt_oss(tmp_path / "without", sinks=[-100.0] * 4))
    for ours, bound in ((found.read, without.read), (found.written, without.written)):
        assert ours.agreement > 0.95, ours
        assert ours.moved < 1.5 * bound.moved, (ours, bound)
    assert Difference.of(found.stock, without.stock).moved > 20 * found.read.moved


@pytest.mark.parametrize("kind", HYBRIDS)
def test_recurrent_layers(beside, tmp_path, kind: str) -> None:
    """Blocks of vLLM are two pages, or their states; what it does with numbers of blocks has to leave both alone."""
    dtype, moved = ("bfloat16", 0.12) if kind in IN_BFLOAT16 else ("float32", 0.06)
    found = beside(save_hybrid(tmp_path / "m", kind), enable_prefix_caching=False, block_size=128, dtype=dtype)
    for ours in (found.read, found.written):
        assert ours.agreement > (0.95 if dtype == "float32" else 0.93), ours
        assert ours.moved < moved, ours
