"""Answers do not depend on scheduling: each is compared with the same prompt in a batch of one."""

from __future__ import annotations

from typing import Any

import pytest

from .answers import MOVED_BY_SHAPE, Answer, answer, assert_same, greedy, metric, prompts
from .models import save_gemma, save_hybrid, save_window

LENGTHS = (3, 64, 65, 130, 200, 1, 127, 300, 256)


@pytest.fixture(scope="module")
def idle(start) -> Any:
    """Whole prompts, no sharing, vLLM's own block size."""
    return start(enable_prefix_caching=False)


@pytest.fixture(scope="module")
def busy(start, idle) -> Any:
    """Prompts in pieces that end inside blocks, few blocks, shared prefixes."""
    return start(
        max_num_batched_tokens=56, block_size=64, num_gpu_blocks_override=11, max_num_seqs=6, max_model_len=512
    )


@pytest.fixture(scope="module")
def asked(token_ids) -> list[dict[str, list[int]]]:
    return prompts(token_ids, LENGTHS)


@pytest.fixture(scope="module")
def solo(idle, asked) -> list[Answer]:
    return [answer(idle, [prompt])[0] for prompt in asked]


def test_batched(idle, asked, solo) -> None:
    assert_same(answer(idle, asked), solo)


def test_chunked_prefill_mixed_with_decoding_and_preempted(busy, asked, solo) -> None:
    before = metric(busy, "num_preemptions")
    assert_same(answer(busy, asked), solo, MOVED_BY_SHAPE)
    assert metric(busy, "num_preemptions") > before


def test_prefix_cache_hits(busy, idle, token_ids) -> None:
    shared = list(token_ids[500:692])
    asked = [{"prompt_token_ids": shared + list(token_ids[700 : 700 + n])} for n in (1, 30, 64, 100)]
    solo = [answer(idle, [prompt])[0] for prompt in asked]
    assert_same(answer(busy, asked[:1]), solo[:1])
    before = metric(busy, "prefix_cache_hits")
    assert_same(answer(busy, asked), solo)
    assert metric(busy, "prefix_cache_hits") - before >= 3 * 192


def test_hit_of_a_block_that_the_same_step_fills(start, idle, token_ids) -> None:
    twin = {"prompt_token_ids": list(token_ids[900:1030])}
    solo = answer(idle, [twin])
    fresh = start(block_size=64)
    assert_same(answer(fresh, [twin, twin, twin]), solo * 3)
    assert metric(fresh, "prefix_cache_hits") == 2 * 128


def test_abort(busy, asked, solo) -> None:
    engine = busy.llm_engine
    for index, prompt in enumerate(asked):
        engine.add_request(f"abort-{index}", prompt, greedy(40))
    names = {f"abort-{index}": index for index in range(len(asked))}
    done: dict[int, Answer] = {}
    for step in range(2000):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                done[names[output.request_id]] = Answer.of(output)
        if step == 12:
            engine.abort_request(["abort-0", "abort-4", "abort-8"])
    kept = [index for index in range(len(asked)) if index not in (0, 4, 8)]
    assert_same([done[index] for index in kept], [solo[index] for index in kept], MOVED_BY_SHAPE)


def test_several_answers_to_one_prompt(busy, idle, token_ids) -> None:
    """Drawn answers part ways; each is what the model would give that many chances, read alone as a prompt."""
    from vllm import SamplingParams

    asked = prompts(token_ids, [150, 90])
    drawn = SamplingParams(n=3, temperature=1.0, max_tokens=40, ignore_eos=True, logprobs=0)
    read = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for output in busy.generate(asked * 2, drawn, use_tqdm=False):
        siblings = [list(completion.token_ids) for completion in output.outputs]
        assert len({tuple(tokens) for tokens in siblings}) == 3
        whole = [{"prompt_token_ids": output.prompt_token_ids + tokens} for tokens in siblings]
        for completion, reading in zip(output.outputs, idle.generate(whole, read, use_tqdm=False), strict=True):
            scored = reading.prompt_logprobs[-len(completion.token_ids) :]
            for token, drawn_with, read_with in zip(completion.token_ids, completion.logprobs, scored, strict=True):
                assert abs(drawn_with[token].logprob - read_with[token].logprob) <= MOVED_BY_SHAPE


def test_beam_search(busy, idle, token_ids) -> None:
    from vllm.sampling_params import BeamSearchParams

    asked = prompts(token_ids, [70, 130])
    params = BeamSearchParams(beam_width=3, max_tokens=16, ignore_eos=True)
    got, wanted = ([o.sequences[0].tokens for o in llm.beam_search(asked, params)] for llm in (busy, idle))
    assert got == wanted


def test_slots_are_given_back(busy, asked) -> None:
    from turboattention.integrations.vllm import steps

    runner = busy.llm_engine.model_executor.driver_worker.worker.model_runner
    answer(busy, asked[:1], max_tokens=2)
    assert len(steps._slots[runner]) == 1  # the one that just ended: vLLM says so with the next step


def test_recurrent_layers_preempted(start, token_ids, tmp_path) -> None:
    """Their states are in blocks of vLLM, too. At 8 bits, since random weights magnify what rounding moves."""
    served: dict[str, Any] = dict(
        model=str(save_hybrid(tmp_path / "m", "falcon_h1")),
        enable_prefix_caching=False,
        block_size=128,
        additional_config={"turboattention": {"bits": 8}},
    )
    asked = prompts(token_ids, LENGTHS)
    alone = start(**served)
    solo = [answer(alone, [prompt], max_tokens=80)[0] for prompt in asked]
    few = start(max_num_batched_tokens=56, num_gpu_blocks_override=11, max_num_seqs=6, max_model_len=512, **served)
    before = metric(few, "num_preemptions")
    assert_same(answer(few, asked, max_tokens=80), solo, MOVED_BY_SHAPE)
    assert metric(few, "num_preemptions") > before


@pytest.mark.parametrize("save, blocks", [(save_window, 11), (save_gemma, 14)], ids=["window", "windows and none"])
def test_windows_preempted_and_behind_shared_prefixes(start, token_ids, tmp_path, save, blocks: int) -> None:
    model = str(save(tmp_path / "m"))
    shared = list(token_ids[500:628])
    asked = prompts(token_ids, LENGTHS) + [{"prompt_token_ids": shared + list(token_ids[n : 2 * n])} for n in (20, 90)]
    alone = start(model=model, enable_prefix_caching=False)
    solo = [answer(alone, [prompt])[0] for prompt in asked]
    few = start(
        model=model,
        max_num_batched_tokens=56,
        block_size=64,
        num_gpu_blocks_override=blocks,
        max_num_seqs=6,
        max_model_len=512,
    )
    before = metric(few, "num_preemptions"), metric(few, "prefix_cache_hits")
    for order in (1, -1):
        assert_same(answer(few, asked[::order]), solo[::order], MOVED_BY_SHAPE)
    assert metric(few, "num_preemptions") > before[0]
    assert metric(few, "prefix_cache_hits") > before[1]
