"""Each of the soak's requests in a batch of one, without drafts and without a prefix cache."""

from __future__ import annotations

import time
from typing import Any

import engine
from soak_requests import Request, requests_of
from soak_run import text_ids

_TOLD = 100


def run(spec: dict[str, Any]) -> dict[str, Any]:
    alone = {"max_num_seqs": 1, "enable_prefix_caching": False, "speculative_config": None}
    llm = engine.start(spec["options"] | alone)
    requests = requests_of(spec["requests"], text_ids(llm), spec["seed"])
    answers: dict[str, list[int]] = {}
    gaps: dict[str, list[float]] = {}
    begin = time.perf_counter()
    for number, request in enumerate(requests, 1):
        answers[request.name], gaps[request.name] = _alone(llm, request)
        if number % _TOLD == 0 or number == len(requests):
            print(f"  {number:,} of {len(requests):,} alone, {time.perf_counter() - begin:.0f} s", flush=True)
    prompts = {request.name: request.prompt for request in requests}
    return {"answers": answers, "gaps": gaps, "prompts": prompts, "seconds": time.perf_counter() - begin}


def _alone(llm: Any, request: Request) -> tuple[list[int], list[float]]:
    """Its tokens, and for each the difference between the two largest logits."""
    sampling = engine.greedy(request.output, logprobs=2)
    completion = llm.generate({"prompt_token_ids": list(request.prompt)}, sampling, use_tqdm=False)[0].outputs[0]
    gaps = []
    for candidates in completion.logprobs:
        best, second = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)[:2]
        gaps.append(best - second)
    return list(completion.token_ids), gaps
