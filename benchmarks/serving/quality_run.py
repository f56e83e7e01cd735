"""Log-probabilities of the next token over passages of a text, as an engine computes them from its cache."""

from __future__ import annotations

from typing import Any

import engine
import numpy as np
import torch
from vllm.v1.sample.sampler import Sampler

from turboattention import bundled
from turboattention.evaluation.text_metrics import cut


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes float32 [passage, token, vocabulary] to spec["file"]; the ids of the passages are the result."""
    llm = engine.start(spec["options"])
    passages = cut(llm.get_tokenizer()(bundled.document()).input_ids, spec["context"], spec["passages"])
    np.save(spec["file"], np.stack([_read(llm, ids) for ids in passages]))
    return {"passages": passages, "facts": engine.facts()}


def _read(llm: Any, ids: list[int]) -> np.ndarray:
    """float32 [len(ids) - 1, vocabulary].

    vLLM returns only the largest few. They are computed from all, which are intercepted here.
    """
    pieces: list[np.ndarray] = []
    compute = Sampler.compute_logprobs

    def taking(logits: torch.Tensor) -> torch.Tensor:
        found = compute(logits)
        pieces.append(found.float().cpu().numpy())
        return found

    Sampler.compute_logprobs = staticmethod(taking)
    try:
        llm.generate({"prompt_token_ids": ids}, engine.greedy(1, prompt_logprobs=1), use_tqdm=False)
    finally:
        Sampler.compute_logprobs = staticmethod(compute)
    found = np.concatenate(pieces)
    assert len(found) == len(ids) - 1, f"expected {len(ids) - 1} rows, got {len(found)}"
    return found
