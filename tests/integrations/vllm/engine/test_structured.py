"""Structured output: what a grammar allows is decided after attention. Answers fit it, are each prompt's alone, and at
8 bits those of vLLM's own attention."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from .answers import metric, prompts

LENGTHS = (20, 64, 130, 190, 300, 250)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 24},
        "kind": {"enum": ["castle", "forest", "river"]},
        "rooms": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "kind", "rooms"],
    "additionalProperties": False,
}
DATE = r"(18|19)[0-9]{2}-[01][0-9]-[0-3][0-9]"
GRAMMAR = 'root ::= "the " ("king" | "queen") " saw " ("a river" | "the forest" | "nothing") "."'
DENSE = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
"""Small models are fond of line breaks."""
FEW = dict(
    DENSE, max_num_batched_tokens=90, block_size=64, num_gpu_blocks_override=12, max_num_seqs=5, max_model_len=512
)


def is_object(text: str) -> bool:
    found = json.loads(text)
    named = 1 <= len(found["name"]) <= 24 and found["kind"] in SCHEMA["properties"]["kind"]["enum"]
    rooms = 2 <= len(found["rooms"]) <= 4 and all(isinstance(room, bool) for room in found["rooms"])
    return set(found) == set(SCHEMA["required"]) and named and rooms


KINDS: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "json": ({"json": SCHEMA}, is_object),
    "regex": ({"regex": DATE}, lambda text: re.fullmatch(DATE, text)),
    "choice": ({"choice": ["a castle", "a cottage", "nothing at all"]}, lambda text: text.startswith(("a c", "not"))),
    "grammar": ({"grammar": GRAMMAR}, lambda text: re.fullmatch(r"the (king|queen) saw [a-z ]+\.", text)),
    "free": ({}, len),
}


@pytest.fixture(scope="module")
def asked(token_ids) -> list[dict[str, list[int]]]:
    return prompts(token_ids, LENGTHS) * len(KINDS)


def told(llm: Any, asked: list[dict[str, list[int]]]) -> list[str]:
    """The text after each prompt, the kinds in turn, all at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = []
    for index in range(len(asked)):
        wanted, _ = list(KINDS.values())[index // len(LENGTHS)]
        structured = StructuredOutputsParams(**wanted) if wanted else None
        params.append(SamplingParams(temperature=0, max_tokens=70, structured_outputs=structured))
    return [output.outputs[0].text for output in llm.generate(asked, params, use_tqdm=False)]


def assert_fit(texts: list[str]) -> None:
    for index, text in enumerate(texts):
        kind = list(KINDS)[index // len(LENGTHS)]
        assert KINDS[kind][1](text), f"{kind}: {text!r}"


@pytest.fixture(scope="module")
def solo(start, asked) -> list[str]:
    """Each alone: an engine of one sequence."""
    return told(start(enable_prefix_caching=False, max_num_seqs=1, **DENSE), asked)


def test_beside_free_answers_and_preempted(start, asked, solo) -> None:
    assert_fit(solo)
    llm = start(**FEW)
    before = metric(llm, "num_preemptions")
    assert told(llm, asked) == solo
    assert metric(llm, "num_preemptions") > before


def test_with_drafts(start, asked, solo) -> None:
    """Drafts that the grammar forbids are rejected. In a process of its own: where vLLM has drafted once, it can start
    no other engine."""
    ngram = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    assert told(start(processes=True, speculative_config=ngram, **FEW), asked) == solo


def test_beside_the_stock_backend(start, asked, monkeypatch) -> None:
    """Both in processes of their own, in one of which the plugin is off."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    texts, tokens = [], []
    for bits in ("8", ""):
        monkeypatch.setenv("TURBOATTENTION_VLLM", bits)
        llm = start(processes=True, **DENSE)
        tokens.append(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
        texts.append(told(llm, asked))
        llm.llm_engine.engine_core.shutdown()
    assert tokens[0] > 3 * tokens[1]  # float32 pages, for the stock backend
    for kind in texts:
        assert_fit(kind)
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 0.9 * len(asked), f"{same} of {len(asked)} answers are equal"
