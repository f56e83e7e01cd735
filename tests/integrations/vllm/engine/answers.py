"""Greedy answers, and when two of them may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TIE = 0.02
"""Largest distance, in nats, of the two best tokens where two runs may take different ones. The model around the
attention adds up in another order when batches differ, in the last bits of float32; a code of the cache that lies
between two values then falls to the other side."""


@dataclass(frozen=True)
class Answer:
    """tokens, and for each one the distance of the two best, in nats."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]

    @classmethod
    def of(cls, output: Any, index: int = 0) -> Answer:
        """From a RequestOutput's completion, with logprobs=2."""
        completion = output.outputs[index]
        gaps = []
        for token_logprobs in completion.logprobs:
            best = sorted((entry.logprob for entry in token_logprobs.values()), reverse=True)
            gaps.append(best[0] - best[1])
        return cls(tuple(completion.token_ids), tuple(gaps))


def prompts(token_ids: Sequence[int], lengths: Sequence[int], stride: int = 97) -> list[dict[str, list[int]]]:
    """Prompts of these lengths, from different places of the text."""
    return [{"prompt_token_ids": list(token_ids[stride * i :][:length])} for i, length in enumerate(lengths)]


def greedy(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, **options)


def answer(llm: Any, asked: Sequence[dict[str, list[int]]], max_tokens: int = 40, **options: Any) -> list[Answer]:
    """All at once."""
    outputs = llm.generate(list(asked), greedy(max_tokens, **options), use_tqdm=False)
    return [Answer.of(output) for output in outputs]


def assert_same(got: Sequence[Answer], wanted: Sequence[Answer], tie: float = TIE) -> None:
    """Token by token, up to a difference at a tie."""
    assert len(got) == len(wanted)
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert len(a.tokens) == len(b.tokens)
        for at, pair in enumerate(zip(a.tokens, b.tokens, strict=True)):
            if pair[0] != pair[1]:
                assert min(a.gaps[at], b.gaps[at]) <= tie, f"answer {index} differs at token {at}: {a} {b}"
                break


def metric(llm: Any, name: str) -> float:
    """The sum of a counter of vLLM's; only the engine that started last in a process counts."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")
