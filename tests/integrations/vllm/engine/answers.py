"""Greedy answers, and when two of them may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOVED = 0.001
"""Largest change, in nats, of the distance between the two best tokens, from one run of vLLM to another. Seen: 1e-6."""

MOVED_BY_SHAPE = 0.1
"""The same where answers were computed several tokens at a time: verified drafts, or resumed after a preemption. Matrix
products of another shape add up in another order, in the last bits of float32, and a code of the cache that lies
between two values falls to the other side. Seen: 0.03."""

MOVED_BY_LIBRARY = {8: 0.15, 4: 0.15, 3: 0.25, 2: 0.45}
"""The same between vLLM and transformers, whose norms and activations round differently, by bits: with fewer of them
codes lie further apart. Seen: 0.1, 0.16 at 3 bits (AVX2), and 0.17 (AMX) to 0.34 (AVX2) at 2 bits."""


@dataclass(frozen=True)
class Answer:
    """tokens, and for each one the distance of the two best, in nats."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]

    @classmethod
    def of(cls, output: Any, index: int = 0) -> Answer:
        """From a RequestOutput's completion, with logprobs=2."""
        completion = output.outputs[index]
        return cls(tuple(completion.token_ids), _gaps(completion.logprobs))

    @classmethod
    def read(cls, llm: Any, ids: Sequence[int], begin: int) -> Answer:
        """`ids` from `begin` on, as if they were an answer to those before: read as a prompt, in one step."""
        asked = greedy(1, prompt_logprobs=2)
        (output,) = llm.generate([{"prompt_token_ids": list(ids)}], asked, use_tqdm=False)
        return cls(tuple(ids[begin:]), _gaps(output.prompt_logprobs[begin:]))


def _gaps(logprobs: Sequence[Mapping[int, Any]]) -> tuple[float, ...]:
    """Between the two best, at each place."""
    best = (sorted((entry.logprob for entry in found.values()), reverse=True) for found in logprobs)
    return tuple(first - second for first, second, *_ in best)


def prompts(token_ids: Sequence[int], lengths: Sequence[int], stride: int = 97) -> list[dict[str, list[int]]]:
    """Prompts of these lengths, from different places of the text."""
    return [{"prompt_token_ids": list(token_ids[stride * i :][:length])} for i, length in enumerate(lengths)]


def greedy(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, **options)


def answer(
    llm: Any, asked: Sequence[dict[str, list[int]]], max_tokens: int = 40, adapters: Any = None, **options: Any
) -> list[Answer]:
    """All at once. adapters: a LoRARequest or None for each."""
    outputs = llm.generate(list(asked), greedy(max_tokens, **options), use_tqdm=False, lora_request=adapters)
    return [Answer.of(output) for output in outputs]


def assert_same(got: Sequence[Answer], wanted: Sequence[Answer], moved: float = MOVED) -> None:
    """Token by token, and in the distance of the two best; up to a difference where that distance is no larger."""
    assert len(got) == len(wanted)
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert len(a.tokens) == len(b.tokens)
        for at in range(len(a.tokens)):
            same = a.tokens[at] == b.tokens[at]
            change = abs(a.gaps[at] - b.gaps[at]) if same else a.gaps[at] + b.gaps[at]
            assert change <= moved, f"answer {index}, token {at}: the two best moved by {change} ({a}, {b})"
            if not same:
                break


def metric(llm: Any, name: str) -> float:
    """The sum of a counter of vLLM's; only the engine that started last in a process counts."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")
