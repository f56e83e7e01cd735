"""Drafts combined with all scheduler features: answers equal those of a batch of one without drafts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from .answers import MOVED_BY_SHAPE, Answer, answer, assert_same, greedy, prompts
from .watching import FOLDER, NAME, seen, watch

LENGTHS = (57, 62, 63, 64, 126, 190, 121)
"""Drafts of the first steps reach over the end of a block."""


def twice(token_ids: list[int], lengths: tuple[int, ...]) -> list[dict[str, list[int]]]:
    """Prompts of these lengths, of a piece that begins again, so that there is something to draft."""
    pieces = prompts(token_ids, [max(1, length * 3 // 5) for length in lengths])
    return [
        {"prompt_token_ids": (piece["prompt_token_ids"] * 2)[:length]}
        for piece, length in zip(pieces, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def idle(start) -> Any:
    return start(enable_prefix_caching=False)


@pytest.fixture(scope="module")
def asked(token_ids) -> list[dict[str, list[int]]]:
    return twice(token_ids, LENGTHS)


@pytest.fixture(scope="module")
def solo(idle, asked) -> list[Answer]:
    return [answer(idle, [prompt], max_tokens=70)[0] for prompt in asked]


@pytest.fixture(scope="module")
def busy(start, idle) -> Any:
    """As many drafts as there can be: a step of them is a block. Few blocks, and prompts in pieces that end inside
    them. In a process of its own: where vLLM has drafted once, it can start no other engine."""
    ngram = {"method": "ngram", "num_speculative_tokens": 63, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        llm = start(
            processes=True,
            speculative_config=ngram,
            worker_extension_cls=NAME,
            block_size=64,
            num_gpu_blocks_override=9,
            max_num_batched_tokens=64,
            max_num_seqs=5,
            max_model_len=384,
        )
    watch(llm)
    return llm


def assert_happened(counted: Counter[str], *names: str) -> None:
    missing = [name for name in names if not counted[name]]
    assert not missing, f"none of {missing} in {counted}"


def test_preempted_and_resumed_and_rejected_across_blocks(busy, asked, solo) -> None:
    seen(busy)
    assert_same(answer(busy, asked, max_tokens=70), solo, MOVED_BY_SHAPE)
    counted = seen(busy)
    assert_happened(counted, "preempted", "accepted", "rejected", "reopened", "beside pieces")
    assert counted["drafts"] == 63


def test_prefix_cache_hits(busy, idle, token_ids) -> None:
    piece = list(token_ids[500:564])
    asked = [{"prompt_token_ids": piece * 2 + piece[:length]} for length in (1, 30, 63, 64)]
    solo = [answer(idle, [prompt])[0] for prompt in asked]
    answer(busy, asked[:1], max_tokens=1)
    seen(busy)
    # If all tokens but the last are cached, vLLM starts the request with empty drafts.
    assert_same(answer(busy, asked[:1]), solo[:1], MOVED_BY_SHAPE)
    assert_happened(seen(busy), "padded", "accepted", "rejected")
    assert_same(answer(busy, asked), solo, MOVED_BY_SHAPE)
    counted = seen(busy)
    assert counted["shared"] >= 128 * len(asked)
    assert_happened(counted, "accepted", "rejected")


def test_aborts(busy, asked, solo) -> None:
    engine, left = busy.llm_engine, (0, 2)
    names = {f"abort-{index}": index for index in range(len(asked))}
    for name, index in names.items():
        engine.add_request(name, asked[index], greedy(70))
    seen(busy)
    done: dict[int, Answer] = {}
    aborted: Counter[str] | None = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            index = names[output.request_id]
            if output.finished:
                done[index] = Answer.of(output)
            elif aborted is None and index == left[0] and len(output.outputs[0].token_ids) > 10:
                aborted = seen(busy)
                engine.abort_request([f"abort-{index}" for index in left])
    assert aborted is not None
    assert not {*left} & {*done}
    assert_happened(aborted, "accepted", "rejected")
    kept = [index for index in range(len(asked)) if index not in left]
    assert_same([done[index] for index in kept], [solo[index] for index in kept], MOVED_BY_SHAPE)
    # Their remains do not affect other requests.
    assert_same(answer(busy, asked[:2], max_tokens=70), solo[:2], MOVED_BY_SHAPE)


def test_several_answers_to_one_prompt(busy, idle, asked) -> None:
    from vllm import SamplingParams

    # What vLLM draws on CPUs from drafts is not what it draws without them, whatever computes attention. So each
    # answer is read again, as a prompt.
    drawn = SamplingParams(n=3, max_tokens=40, ignore_eos=True, logprobs=2)
    seen(busy)
    outputs = busy.generate(asked[3:5], drawn, use_tqdm=False)
    assert_happened(seen(busy), "preempted", "rejected", "reopened")
    got = [Answer.of(output, index) for output in outputs for index in range(3)]
    assert len({a.tokens for a in got}) == 6
    again = [
        [*output.prompt_token_ids, *got[3 * at + index].tokens]
        for at, output in enumerate(outputs)
        for index in range(3)
    ]
    assert_same(got, [Answer.read(idle, ids, len(ids) - 40) for ids in again], MOVED_BY_SHAPE)
